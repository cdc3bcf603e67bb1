"""What a run did: the numbers behind the report, the live view and the tests."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass
class StepRecord:
    """One sampling step.

    branches     gains of each branch that was evaluated, in order (per method, outermost first)
    calls        forwards of the diffusion model
    rows         samples in them: branches x conds x pictures
    seconds      host time until the next step began
    """

    index: int
    sigma: float
    branches: list[list[list[float]]] = field(default_factory=list)
    calls: int = 0
    rows: int = 0
    seconds: float = 0.0


@dataclass
class RunRecord:
    """One sampling run. Plain numbers and strings only, so that it can be saved and shown as it is.

    methods     name of each method, outermost first
    adapters    names of the LoRAs of each method, in the order of the gains
    problems    what could not be expressed, and what was done instead
    finished    False for a run that was interrupted or failed
    """

    methods: list[str]
    adapters: list[list[str]]
    steps: list[StepRecord] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    finished: bool = False

    def as_dict(self) -> dict:
        """The record as JSON-serialisable data."""
        return asdict(self)
