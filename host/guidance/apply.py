"""What a MODEL carries once guidance was applied to it, and how a run of it begins and ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from weakref import ref

from comfy.controlnet import ControlBase
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ...engine.tell import into
from ...methods.guidance.record import GuidanceRecord
from ...methods.guidance.session import GuidanceSession, Tell
from ...methods.session import RunContext
from ..compose.composition import KEY as OURS
from ..compose.composition import TOLD
from ..compose.context import guidance_context, run_context
from ..compose.earlier import Left, bare, mark_of, marks
from ..compose.steps import tracked
from ..compose.variants import own_conds
from ..compose.watch import watching
from .identity import describe_model
from .left import Guided, GuidedRuns
from .run import GuidedRun

KEY = "lora_ensemble_guidance"
PROMPT_MARKS = 64
"""Values by which a prompt is recognised."""
CONTROL = ("control_model", "t2i_model", "control_weights", "cond_hint_original", "strength", "timestep_percent_range",
           "extra_args", "extra_concat_orig", "previous_controlnet")
"""What tells the host's ControlNets from each other, and what is set on them."""

GUIDED = GuidedRuns()


@dataclass
class Guidance:
    """The attachment of a MODEL with guidance on it. A later node replaces an earlier one's.

    policy   the decision in words, for the record
    instead  that of an earlier node, whose place it takes; "": there is none
    begin    the rule's session for a run of a MODEL, and what tells problems; raises ValueError where the run is not
             what coefficients were calibrated on
    record   what guidance did in the last run
    told     the same of those before, by the latents that they left
    """

    policy: str
    begin: Callable[[ModelPatcher, RunContext, Tell], GuidanceSession]
    instead: str = ""
    record: GuidanceRecord | None = None
    told: Left[GuidanceRecord] = field(default_factory=lambda: Left(TOLD))

    def on_model_patcher_clone(self) -> Guidance:
        """Called by the host: clones share the attachment, so that the record can be read from any of them."""
        return self


def apply_guidance(model: ModelPatcher, guidance: Guidance) -> ModelPatcher:
    """A MODEL that samples with this guidance, under any sampler and guider.

    The wrappers that do it are put in place when a run begins, around or inside those of all other nodes, whatever the
    order of the nodes: see run.py.
    """
    new_model, before = model.clone(), model.get_attachment(KEY)
    new_model.set_attachments(KEY, replace(guidance, instead=before.policy) if before is not None else guidance)
    if not new_model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
        new_model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, sample_guided)
    return new_model


def replaced(earlier: str) -> str:
    """What is said, on the node and in the record, where a node takes the place of one before it; `earlier`: the rule
    of that one in words."""
    return (f"Adaptive Guidance is on this MODEL twice, and the last node alone decides: nothing that is set on the "
            f"earlier one is used ({earlier})")


def guidance_record_of(model: ModelPatcher, latent: Tensor | None = None) -> GuidanceRecord | None:
    """What guidance did in the run of a MODEL that left a latent, in the last one where none is given or known to have
    left it; None before the first run and for other models."""
    guidance: Guidance | None = model.get_attachment(KEY)
    if guidance is None:
        return None
    return (None if latent is None else guidance.told.before(latent)) or guidance.record


def sample_guided(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *args, **kwargs):
    """One run, wrapped: its state begins here and ends here, however it ends."""
    guider = executor.class_obj
    guidance: Guidance | None = guider.model_patcher.get_attachment(KEY)
    if guidance is None:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, *args, **kwargs)
    record = GuidanceRecord(guidance.policy)
    tell = into(record.problems)
    if guidance.instead:
        tell(replaced(guidance.instead))
    noisy, model, prompts = bare(noise), guider.model_patcher, _prompts(guider.conds)
    earlier = GUIDED.before(latent_image) if noisy else None
    context = guidance_context(run_context(sigmas, noise, kwargs.get("latent_shapes")), guider, sampler,
                               earlier.steps if earlier is not None else None if noisy else 0)
    session = guidance.begin(model, context, tell)
    if earlier is not None:
        nothing = earlier.left is None and not earlier.given_up
        why = "" if nothing else earlier.unlike(guidance.policy, model, prompts, context.sigmas[0])
        carried = session.go_on(earlier.steps, None if why else earlier.left, why, model.load_device)
        record.carried += [carried] if carried else []
    tracker, callback = tracked(context.sigmas, callback)
    run = GuidedRun(guider, session, tracker, record, tell)
    guidance.record = record
    options, left = guider.model_options, None
    watchers = watching(model, None, tracker.total) if model.get_attachment(OURS) is None else []
    guider.model_options = run.installed(create_model_options_clone(options), KEY)
    try:
        out = executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, *args, **kwargs)
        left, record.finished = mark_of(out), True
        guidance.told.keep(left, record)
        if record.full and record.full == sum(step.rows for step in record.steps):
            at = "" if context.cfg is None else f" at cfg {context.cfg:g}"
            tell(f"Adaptive Guidance: no negative is evaluated{at}, so there is nothing to save")
        return out
    finally:
        guider.model_options = options
        session.summary(record)
        for told in watchers:
            told(True)
        if record.finished and context.handed_on:
            steps = context.steps + (earlier.steps if earlier is not None else 0)
            GUIDED.keep(left, Guided(guidance.policy, ref(model.model, GUIDED.model_gone), describe_model(model),
                                    prompts, context.sigmas[-1], steps, session.left()))


def _prompts(conds: Mapping[str, Sequence[Mapping]]) -> tuple:
    """What a guider's conds ask for: equal for equal prompts, whichever node made them."""
    return tuple((name, *map(_prompt, entries or ())) for name, entries in own_conds(conds).items())


def _prompt(entry: Mapping) -> tuple:
    """All that nodes have put on a prompt: a ControlNet, a start picture or a reference say as much as the text."""
    return tuple((key, _told(entry[key])) for key in sorted(entry)
                 if key not in ("uuid", "model_conds") and not key.startswith(OURS))


def _told(value: object) -> object:
    """Equal for equal values, and for one and the same model. Of objects of other kinds the tensors count."""
    if isinstance(value, Tensor):
        return marks(value, PROMPT_MARKS)
    if isinstance(value, Mapping):
        return tuple((key, _told(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_told, value))
    if isinstance(value, nn.Module):
        return ref(value)
    if isinstance(value, ControlBase):
        return (type(value).__name__, *(_told(getattr(value, name, None)) for name in CONTROL))
    if value is None or isinstance(value, str | int | float):
        return value
    return type(value).__name__, *(_told(each) for each in getattr(value, "__dict__", {}).values()
                                   if isinstance(each, Tensor))
