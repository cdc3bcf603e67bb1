"""What a MODEL carries once guidance was applied to it, and how a run of it begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP

from ..engine.guidance import AdaptiveState, LinearState
from ..engine.guidance_record import GuidanceRecord
from .guided_run import GuidedRun
from .run_info import RunInfo, run_info

KEY = "lora_ensemble_guidance"

State = AdaptiveState | LinearState


@dataclass
class Guidance:
    """The attachment of a MODEL with guidance on it. A later node replaces an earlier one's.

    policy   the decision in words, for the record
    make     state of a new run, and what to say about it in the record; raises ValueError where the run is not what
             coefficients were calibrated on
    """

    policy: str
    make: Callable[[RunInfo], tuple[State, str | None]]
    record: GuidanceRecord | None = None
    runs: list[GuidedRun] = field(default_factory=list)

    def on_model_patcher_clone(self) -> Guidance:
        """Called by the host: clones share the attachment, so that the record can be read from any of them."""
        return self


def apply_guidance(model, guidance: Guidance):
    """A MODEL that samples with this guidance, under any sampler and guider.

    The wrappers that do it are put in place when a run begins, around or inside those of all other nodes, whatever the
    order of the nodes: see `guided_run`.
    """
    new_model = model.clone()
    new_model.set_attachments(KEY, guidance)
    if not new_model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        new_model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, outer_sample)
    return new_model


def guidance_record_of(model) -> GuidanceRecord | None:
    """What guidance did in the last run of a MODEL; None before the first run and for other models."""
    guidance = model.get_attachment(KEY)
    return guidance.record if guidance is not None else None


def outer_sample(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *args, **kwargs):
    """One run: state begins here and ends here, however it ends."""
    guider = executor.class_obj
    guidance: Guidance | None = guider.model_patcher.get_attachment(KEY)
    if guidance is None:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, *args, **kwargs)
    info = run_info(guider, sampler, sigmas)
    state, remark = guidance.make(info)
    run = GuidedRun(guider, state, info.sigmas, guidance.policy)
    if remark is not None:
        run.problem(remark)
    guidance.runs.append(run)
    guidance.record = run.record
    options = guider.model_options
    guider.model_options = run.installed(comfy.model_patcher.create_model_options_clone(options), KEY)

    told, finished = run.clock.listening(callback), False
    try:
        out = executor(noise, latent_image, sampler, sigmas, denoise_mask, told, *args, **kwargs)
        finished = True
        return out
    finally:
        guider.model_options = options
        guidance.runs.remove(run)
        run.close(finished)
