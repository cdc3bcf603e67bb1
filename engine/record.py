"""What a run did: the numbers behind the report, the live view and the tests."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import isfinite
from threading import Lock

from torch import Tensor


@dataclass
class StepRecord:
    """One sampling step.

    branches     gains of each branch that was evaluated, in order (per method, outermost first)
    calls        forwards of the diffusion model
    rows         samples in them: branches x conds x pictures
    seconds      host time until the next step began
    notes        what methods, caches and guidance say of the step, each under its own name
    """

    index: int
    sigma: float
    branches: list[list[list[float]]] = field(default_factory=list)
    calls: int = 0
    rows: int = 0
    seconds: float = 0.0
    notes: dict[str, object] = field(default_factory=dict)


@dataclass
class RunRecord:
    """One sampling run. Plain numbers and strings only once it has settled, so that it can be saved and shown as it is.
    The devices of one run report from threads of their own: what they report goes through the methods.

    methods     name of each method, outermost first
    adapters    names of the LoRAs of each method, in the order of the gains
    problems    what could not be expressed, and what was done instead
    reasons     why a method was taken, where the user left that to the node
    finished    False for a run that was interrupted or failed
    chosen      what users left to the number of steps, and what came of it
    before      steps that earlier runs took of the picture, where it is sampled in several
    whole       steps of all these runs together; 0: those of this one
    carried     what goes on from the earlier run of the picture, and what begins anew
    devices     samples that were evaluated on each device, where several were at hand; else nothing
    """

    methods: list[str]
    adapters: list[list[str]]
    steps: list[StepRecord] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    finished: bool = False
    chosen: list[str] = field(default_factory=list)
    before: int = 0
    whole: int = 0
    devices: dict[str, int] = field(default_factory=dict)
    carried: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = Lock()  # no field: a record is copied and saved as plain data

    @property
    def done(self) -> int:
        """Steps of the picture so far, those of earlier runs too."""
        return self.before + len(self.steps)

    def count(self, rows: int, device: str = "") -> None:
        """One more forward of the diffusion model in the current step, the samples in it and where it was; nothing
        before the first step."""
        with self._lock:
            if self.steps:
                self.steps[-1].calls += 1
                self.steps[-1].rows += rows
                if device in self.devices:
                    self.devices[device] += rows

    def note_key(self, k: int) -> str:
        """Under which the notes of a step have those of the k-th method: its name; the second of a kind has its place
        as well."""
        kind = self.methods[k]
        return f"{kind} {k + 1}" if kind in self.methods[:k] else kind

    def note(self, key: str, value: object) -> None:
        """Record something about the current step: a JSON value, or a tensor, which is read when the run is over."""
        with self._lock:
            if self.steps:
                self.steps[-1].notes[key] = value

    def settle(self) -> StepRecord | None:
        """Read every tensor that was noted; before, none made the host wait for the device. What is no number (NaN or
        infinite) becomes None, for charts, pages and files know none; returns the first step with such, if there is
        one."""
        first: StepRecord | None = None
        for step in self.steps:
            step.notes, whole = _plain(step.notes)
            first = step if first is None and not whole else first
        return first

    def as_dict(self) -> dict:
        """The record as JSON-serialisable data."""
        return asdict(self)


def _plain(value: object) -> tuple[object, bool]:
    """(the value without tensors, whether all numbers in it are some)"""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, float) and not isfinite(value):
        return None, False
    if isinstance(value, dict | list | tuple):
        found = [_plain(entry) for entry in (value.values() if isinstance(value, dict) else value)]
        entries, whole = [entry for entry, _ in found], all(each for _, each in found)
        return dict(zip(value, entries, strict=True)) if isinstance(value, dict) else entries, whole
    return value, True
