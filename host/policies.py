"""From what a user chose on a node to the guidance of a MODEL."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..engine.guidance import AdaptiveState, LinearState
from ..kernels.guidance import threshold_for
from ..methods.guidance import AdaptiveGuidance
from .coeffs import CoeffsError, GuidanceCoeffs
from .guidance import Guidance, State
from .run_info import RunInfo

MODES = ("threshold", "saving", "LinearAG")


@dataclass(frozen=True)
class Choice:
    """The options of a guidance node.

    mode      "threshold": as `policy` says; "saving": its threshold is the one that saves `saving` on the calibrated
              paths; "LinearAG": as calibrated
    saving    share of all evaluations, at most 0.5
    exact     the host waits for each step's similarity, on accelerators
    nearest   coefficients that were calibrated for something else are used all the same
    """

    mode: str
    policy: AdaptiveGuidance
    saving: float = 0.25
    exact: bool = False
    coeffs: GuidanceCoeffs | None = None
    nearest: bool = False


def guidance_of(choice: Choice) -> Guidance:
    """The attachment for a choice. Raises CoeffsError where it needs coefficients and has none."""
    if choice.mode == "threshold":
        return Guidance(_words(choice.policy), lambda info: (AdaptiveState(choice.policy, choice.exact), None))
    if choice.coeffs is None:
        raise CoeffsError(f"Adaptive Guidance: mode '{choice.mode}' needs guidance coefficients. Connect Load Guidance "
                          "Coefficients or Calibrate Guidance to 'coeffs', or choose mode 'threshold'.")
    if choice.mode == "saving":
        policy = replace(choice.policy, threshold=saving_threshold(choice))
        return Guidance(f"{_words(policy)}, which saves {100 * choice.saving:g} % on the calibrated paths",
                        lambda info: (AdaptiveState(policy, choice.exact), choice.coeffs.check(info, choice.nearest)))
    return Guidance("LinearAG", lambda info: _linear(choice, info))


def saving_threshold(choice: Choice) -> float:
    """The threshold whose mean saving on the calibrated paths is nearest to the one wanted."""
    found, policy = choice.coeffs.found, choice.policy
    return threshold_for(found.by_step(policy.space), choice.saving, policy.min_steps, policy.ramp_steps)


def _linear(choice: Choice, info: RunInfo) -> tuple[State, str | None]:
    if info.negatives != 1:
        raise CoeffsError(f"LinearAG predicts one negative, and this guider has {info.negatives}. Use CFGGuider or "
                          "KSampler, or another mode of Adaptive Guidance.")
    different = choice.coeffs.check(info, choice.nearest)
    return LinearState(choice.coeffs.linear(info.sigmas)), different


def _words(policy: AdaptiveGuidance) -> str:
    who = "each picture for itself" if policy.per_sample else "the whole batch together"
    return f"Adaptive Guidance, threshold {policy.threshold:.6g} on {policy.space}, {who}"
