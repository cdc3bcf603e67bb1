"""What guidance did in a run: what was evaluated, and how alike the two sides were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite

from ..counted import counted


def known(values: Sequence[float | None]) -> list[float | None]:
    """What was measured, None for what is no number (NaN or infinite)."""
    return [value if value is not None and isfinite(value) else None for value in values]


@dataclass
class GuidanceStep:
    """One sampling step as guidance sees it, after branches were mixed.

    calls        model calls of the sampler
    rows         pictures x calls: what the conditional side costs
    negative     pictures x calls (x negatives) whose negative was evaluated
    predicted    pictures x calls whose negative was predicted instead (LinearAG, extrapolated guidance)
    gamma        similarity per picture; None where it was not measured, or is no number
    missed       extrapolated guidance: by how much the line through the last two terms missed this step's, relatively,
                 per picture; None as there
    """

    index: int
    sigma: float
    calls: int = 0
    rows: int = 0
    negative: int = 0
    predicted: int = 0
    gamma: list[float | None] = field(default_factory=list)
    missed: list[float | None] = field(default_factory=list)


@dataclass
class GuidanceRecord:
    """What guidance did in one run. Plain numbers and strings only.

    policy      the decision in words
    full        evaluations that full guidance would have cost
    problems    what could not be done as asked, and what was done instead
    carried     what goes on from the earlier run of a picture that is sampled in several
    """

    policy: str
    steps: list[GuidanceStep] = field(default_factory=list)
    full: int = 0
    problems: list[str] = field(default_factory=list)
    finished: bool = False
    carried: list[str] = field(default_factory=list)

    @property
    def evaluations(self) -> int:
        """Pictures x sides of guidance that were evaluated."""
        return sum(step.rows + step.negative for step in self.steps)

    def as_dict(self) -> dict:
        """The record as JSON-serialisable data."""
        return asdict(self)

    def text(self) -> str:
        """The record as a few lines to read."""
        calls = sum(step.calls for step in self.steps)
        saved = 100 * (1 - self.evaluations / self.full) if self.full else 0.0
        lines = [f"{self.policy}: {self.evaluations} of {counted(self.full, 'evaluation')} ({saved:.1f} % saved), "
                 f"{counted(len(self.steps), 'step')}, {counted(calls, 'model call')}"
                 + ("" if self.finished else ", not finished")]
        for step in self.steps:
            side = "predicted" if step.predicted else "full" if step.negative else "none"
            if step.negative and step.negative < step.rows:
                side = f"{step.negative} of {step.rows}"
            known = ", ".join("-" if g is None else f"{g:.6f}" for g in step.gamma)
            missed = ", ".join("-" if m is None else f"{100 * m:.1f} %" for m in step.missed)
            lines.append(f"step {step.index + 1}, sigma {step.sigma:.4g}: negative {side}"
                         + (f", similarity {known}" if known else "")
                         + (f", its term missed by {missed}" if missed else ""))
        return "\n".join(lines + self.carried + self.problems)
