"""Adaptive Guidance and LinearAG (Castillo et al. 2023, arXiv 2312.12487, AAAI 2025): when the negative is evaluated.

Guidance sees predictions that a composition method has already mixed, so both work with every method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..kernels.branch import Step

Space = Literal["noise", "x0"]
SPACES: tuple[Space, ...] = ("noise", "x0")


@dataclass(frozen=True)
class AdaptiveGuidance:
    """e = e_cfg while gamma_t < threshold; from the first step where it is reached on, e = e_c.

    threshold    gamma-bar; above 1 it is never reached
    space        where gamma_t is the cosine: "noise" (the paper; velocity for flow models) or "x0" (denoised
                 predictions, as asagi4's node has it). Thresholds of one space mean nothing in the other.
    per_sample   every picture of a batch decides for itself; otherwise all stop when the last one has reached it
    min_steps    steps that are guided whatever gamma is
    ramp_steps   steps over which guidance fades once the threshold is reached; 0: at once, as in the paper. The
                 negative is evaluated until it has faded.
    """

    threshold: float = 0.991
    space: Space = "noise"
    per_sample: bool = True
    min_steps: int = 0
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ValueError(f"Adaptive Guidance: space is '{self.space}'. Choose one of: {', '.join(SPACES)}.")
        if self.min_steps < 0 or self.ramp_steps < 0:
            raise ValueError("Adaptive Guidance: min_steps and ramp_steps must not be negative.")


@dataclass(frozen=True)
class LinearAG:
    """The paper's policy: in the first half, true CFG and CFG with a predicted negative take turns; in the second half
    the conditional prediction alone. 20 steps cost 25 evaluations.

    coefficients   one row per model call: what each feature so far weighs in that call's negative. Column 2i is the
                   conditional prediction of call i, 2i + 1 its negative one, the last column the intercept.
    steps          the step that each call belongs to; samplers may call the model several times in one
    """

    coefficients: tuple[tuple[float, ...], ...]
    steps: tuple[int, ...]

    def kind(self, step: Step) -> Literal["guided", "predicted", "conditional"]:
        """What a step does with its negative."""
        return self.kind_at(step.index, step.total)

    @staticmethod
    def kind_at(index: int, total: int) -> Literal["guided", "predicted", "conditional"]:
        """The same, for a step by number."""
        if 2 * index >= total:
            return "conditional"
        return "predicted" if index % 2 else "guided"
