"""From what a user chose on a node to the guidance of a MODEL."""

from __future__ import annotations

from dataclasses import dataclass, replace

from comfy.model_patcher import ModelPatcher

from ...kernels.guidance import threshold_for
from ...methods.guidance.adaptive import AdaptiveGuidance, AdaptiveSession
from ...methods.guidance.extrapolated import ExtrapolatedSession, Extrapolation
from ...methods.guidance.linear import LinearSession
from ...methods.guidance.session import Tell
from ...methods.session import RunContext
from ..compose.context import is_flow
from .apply import Guidance
from .coeffs import GuidanceCoeffs

CALIBRATED = ("saving", "LinearAG")
MODES = ("extrapolate", "threshold", *CALIBRATED)
ADAPTIVE = "dpm_adaptive"
NEVER = 1.1
"""A threshold that no cosine reaches."""


@dataclass(frozen=True)
class GuidanceOptions:
    """The options of a guidance node.

    mode       "extrapolate": the negative's term is extrapolated, of `policy` its min_steps and per_sample are used;
               "threshold": as `policy` says; "saving": its threshold is the one that saves `saving` on the calibrated
               paths; "LinearAG": as calibrated
    saving     share of all evaluations, at most 0.5
    exact      the host waits for each step's similarity, on accelerators
    nearest    coefficients that were calibrated for something else are used all the same
    tolerance  above 0, in mode "extrapolate": the relative error of the term to go by, instead of `saving`
    """

    mode: str
    policy: AdaptiveGuidance
    saving: float = 0.25
    exact: bool = False
    coeffs: GuidanceCoeffs | None = None
    nearest: bool = False
    tolerance: float = 0.0


def guidance_of(options: GuidanceOptions) -> Guidance:
    """The attachment for a node's options. Raises ValueError where they need coefficients and have none."""
    if options.mode == "extrapolate":
        return _extrapolated(options)
    if options.mode == "threshold":
        return Guidance(_words(options.policy), lambda model, context, tell: AdaptiveSession(
            options.policy, options.exact, tell, context.whole))
    if options.coeffs is None:
        raise ValueError(f"Adaptive Guidance: mode '{options.mode}' needs guidance coefficients. Connect Load "
                          "Guidance Coefficients or Calibrate Guidance to 'coeffs', or choose mode 'extrapolate', "
                          "which needs none.")
    return _saving(options) if options.mode == "saving" else _linear(options)


def saving_threshold(options: GuidanceOptions) -> float:
    """The threshold whose mean saving on the calibrated paths is nearest to the one wanted. Nothing is to be saved: one
    that is never reached, since one that is in the last step saves as little and changes the picture."""
    found, policy = options.coeffs.found, options.policy
    if not options.saving:
        return NEVER
    return threshold_for(found.by_step(policy.space), options.saving, policy.min_steps, policy.ramp_steps)


def _saving(options: GuidanceOptions) -> Guidance:
    policy = replace(options.policy, threshold=saving_threshold(options))

    def begin(model: ModelPatcher, context: RunContext, tell: Tell) -> AdaptiveSession:
        options.coeffs.check(model, context, options.nearest, tell)
        return AdaptiveSession(policy, options.exact, tell, context.whole)

    return Guidance(f"{_words(policy)}, which saves {100 * options.saving:g} % on the calibrated paths", begin)


def _linear(options: GuidanceOptions) -> Guidance:
    def begin(model: ModelPatcher, context: RunContext, tell: Tell) -> LinearSession:
        if context.negatives != 1:
            raise ValueError(f"LinearAG predicts one negative, and this guider has {context.negatives}. Use CFGGuider "
                              "or KSampler, or another mode of Adaptive Guidance.")
        options.coeffs.check(model, context, options.nearest, tell)
        at = options.coeffs.begins(context)
        if at is None:
            return LinearSession(options.coeffs.linear(context.sigmas), tell)
        return LinearSession(options.coeffs.found.policy(), tell, at, len(options.coeffs.sigmas) - 1)

    return Guidance("LinearAG", begin)


def _extrapolated(options: GuidanceOptions) -> Guidance:
    policy = Extrapolation(options.saving, options.tolerance or None, max(options.policy.min_steps, 2),
                           options.policy.per_sample)

    def begin(model: ModelPatcher, context: RunContext, tell: Tell) -> ExtrapolatedSession:
        flow = is_flow(model)
        if ADAPTIVE in context.sampler:
            tell(f"Extrapolated guidance: {ADAPTIVE} chooses its steps by the error that it sees, of which an "
                 "extrapolation would be a part; the negative was evaluated in every step")
            return ExtrapolatedSession(Extrapolation(0.0), flow, context.sigmas, tell)
        return ExtrapolatedSession(policy, flow, context.sigmas, tell, context.before, context.whole)

    goal = f"a tolerance of {policy.tolerance:g}" if policy.tolerance else f"to save {100 * policy.saving:g} %"
    return Guidance(f"Extrapolated guidance, {goal}", begin)


def _words(policy: AdaptiveGuidance) -> str:
    who = "each picture for itself" if policy.per_sample else "the whole batch together"
    return f"Adaptive Guidance, threshold {policy.threshold:.6g} on {policy.space}, {who}"
