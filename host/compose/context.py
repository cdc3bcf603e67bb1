"""What the host knows of a run before it starts, in the words of the methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from uuid import UUID
from weakref import WeakKeyDictionary

import comfy.model_sampling
import comfy.utils
import torch
from torch import Tensor

from ...kernels.nested import Parts
from ...methods.session import OTHER, POSITIVE, UNCONDITIONAL, RunContext
from ...methods.windows import gains_of
from ..families.film import ahead_of_film, end_of_film, in_frames
from .applied import Applied
from .earlier import Earlier, names_of
from .prompts import shares_of
from .variants import own_conds

SIDES = {"positive": POSITIVE, "negative": UNCONDITIONAL, "empty_negative_prompt": UNCONDITIONAL}
"""Names that ComfyUI's guiders give their conds; `middle` of DualCFG and unknown ones are OTHER."""

FINEST = 2.0**-30
"""How finely a noise level is placed in a model's time."""
MOST_KNOWN = 64
"""Noise levels that are remembered of a sampling."""
_PERCENTS: WeakKeyDictionary[object, dict[float, float]] = WeakKeyDictionary()


def run_context(sigmas: Tensor, noise: Tensor, shapes: Sequence[Sequence[int]] | None) -> RunContext:
    """What any run tells: its schedule and the shape of its latent. `shapes` are those of the parts that the host has
    packed into one noise."""
    levels = _sampled(sigmas.detach().float().cpu().tolist())
    return RunContext(tuple(levels), shape=tuple((shapes or [noise.shape])[0]))


def _sampled(levels: list[float]) -> list[float]:
    """A schedule without the zeros at its ends by which a sampler (RES4LYF's, which goes on with a picture or back to
    its noise) tells the host to add no noise: before it falls, behind one that rises, and after the 0 that is its end.
    """
    while len(levels) > 2 and levels[-1] == levels[-2] == 0:
        levels = levels[:-1]
    if len(levels) > 3 and levels[0] == 0 and levels[1] > levels[2]:
        levels = levels[1:]
    if len(levels) > 3 and levels[-1] == 0 and all(a < b for a, b in zip(levels[:-2], levels[1:-1], strict=True)):
        levels = levels[:-1]
    return levels


def timed(context: RunContext, model, earlier: Earlier | None = None, noisy: bool = False) -> RunContext:
    """The context with the model's times, and with the place of this run among those of its picture.

    earlier   the run whose picture this one goes on with, where that is known
    noisy     whether the latent comes with its noise: this run goes on with a picture, or begins one with no noise
    """
    sampling = model.get_model_object("model_sampling")
    own = tuple(_times(sampling, context.sigmas))
    before, whole = _of_whole(sampling, context.sigmas, earlier.steps if earlier is not None else None if noisy else 0)
    times = earlier.times if earlier is not None else tuple(
        1 - (1 - own[0]) * k / before for k in range(before))  # in equal parts, since they are not known
    first, last = _span(sampling, context.sigmas)
    if earlier is not None and earlier.sigmas and context.sigmas[-1] == 0:  # the last run knows all steps
        begun = _percent(sampling, earlier.sigmas[0])
        first = begun + (1 - begun) * before / (whole - 1)
    return replace(context, times=times + own, span=(first, last), before=before, whole=whole)


def method_contexts(context: RunContext, model, applied: Sequence[Applied], conds: Mapping[str, Sequence[Mapping]],
                    earlier: Earlier | None = None) -> list[RunContext]:
    """A `timed` context per method applied to a MODEL: with the masks, the windows and the shares in a guider's conds
    of that method's LoRAs, and what was left of the method in the run before."""
    device, film = model.load_device, end_of_film(context.shape, conds)
    ahead = ahead_of_film(model.model.diffusion_model, conds) if len(context.shape) == 5 else 0
    placed = [[on_latent(mask, context.shape, film, ahead) for mask in each.masks] for each in applied]
    windowed = any(each.windows for each in applied)
    known = earlier.sigmas if earlier is not None else ()
    times = _schedule(model.get_model_object("model_sampling"), context.sigmas, context, known) if windowed else ()
    left, names = earlier.left if earlier is not None else {}, names_of([each.method for each in applied])
    context = replace(context, film=film, ahead=ahead)
    return [replace(context, masks=tuple(mask if mask is None else mask.to(device) for mask in masks),
                    gains=gains_of(each.windows, times), shares=shares_of(conds, each.asked), left=left.get(name))
            for masks, each, name in zip(placed, applied, names, strict=True)]


def guidance_context(context: RunContext, guider, sampler, before: int | None = 0) -> RunContext:
    """The context for guidance: with how the guider samples. `before` as `_of_whole` takes it."""
    cfg = getattr(guider, "cfg", None)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    before, whole = _of_whole(sampling, context.sigmas, before)
    return replace(context, sampler=sampler_name(sampler), cfg=None if cfg is None else float(cfg),
                   negatives=len(own_conds(guider.conds)) - 1, before=before, whole=whole)


def is_flow(model) -> bool:
    """Whether a MODEL's noise levels are times of a flow, 0 to 1."""
    return isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)


def sampler_name(sampler) -> str:
    """The sampler's function by name, with its options where it has any."""
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__)
    options = getattr(sampler, "extra_options", None) or {}
    return name + "".join(f" {key}={options[key]}" for key in sorted(options))


def sides_of(conds: Mapping[str, list]) -> dict[UUID, str]:
    """The side of every cond of a guider, by the identity that the host gave it."""
    return {entry["uuid"]: SIDES.get(name, OTHER) for name, entries in conds.items() for entry in entries or ()
            if "uuid" in entry}


def parts_of(conds: Sequence[list[dict] | None]) -> Parts:
    """The parts of a latent that the host has packed, as the conds of a call tell its model (in a context window they
    are smaller than the run's)."""
    for entry in (entry for cond in conds for entry in cond or ()):
        shapes = entry.get("model_conds", {}).get("latent_shapes")
        if shapes is not None and len(shapes.cond) > 1:
            return tuple(tuple(shape[1:]) for shape in shapes.cond)
    return ()


def on_latent(mask: Tensor | None, shape: Sequence[int], film: int | None = None, ahead: int = 0) -> Tensor | None:
    """A MASK [B, H, W] or [H, W] in pixels -> [pictures or 1, 1, h, w] in fp32 on the latent's grid; None for latents
    without height and width. Of films, more masks than there are films are those of the frames of each
    (`RunContext.film`), behind those that stand ahead of it: [1, 1, frames, h, w], with ones for the frames that guide
    it or stand ahead."""
    if mask is None or len(shape) < 4:
        return None
    mask = mask.detach().float().reshape(-1, 1, *mask.shape[-2:])
    mask = torch.nn.functional.interpolate(mask, size=tuple(shape[-2:]), mode="area").clamp(0, 1)
    if len(shape) == 5 and len(mask) > shape[0]:
        end = shape[2] if film is None else film
        mask = in_frames(mask, end - ahead)
        return torch.nn.functional.pad(mask, (0, 0, 0, 0, ahead, shape[2] - end), value=1.0)
    return mask if len(mask) == 1 else comfy.utils.repeat_to_batch_size(mask, shape[0])


def _times(sampling, sigmas: Sequence[float]) -> list[float]:
    """The model's time of every step, 1 at its highest noise level and 0 at its lowest."""
    levels = torch.stack([torch.as_tensor(float(level)) for level in (sampling.sigma_max, sampling.sigma_min)])
    levels = torch.cat([levels, torch.tensor(sigmas[:-1], dtype=torch.float32)])
    device = getattr(sampling, "sigmas", levels).device
    top, bottom, *steps = sampling.timestep(levels.to(device)).float().tolist()
    return [(t - bottom) / (top - bottom) for t in steps]


def _span(sampling, sigmas: Sequence[float]) -> tuple[float, float]:
    """`RunContext.span` by the scale on which users give start and end of a ControlNet. A run that ends without noise
    is at its end with its last step, one that is handed on with noise left goes on after it."""
    last = 1.0 if sigmas[-1] == 0 or len(sigmas) < 3 else _percent(sampling, sigmas[-2])
    return _percent(sampling, sigmas[0]), last


def _of_whole(sampling, sigmas: Sequence[float], before: int | None) -> tuple[int, int]:
    """(steps before a run, steps of all runs of the picture, 0 where it is the only one). What is not known goes by the
    noise levels at both ends, as if all steps were equal parts of the model's time.

    before   None where it is not known
    """
    steps = max(len(sigmas) - 1, 1)
    first, last = _percent(sampling, sigmas[0]), 1.0 if sigmas[-1] == 0 else _percent(sampling, sigmas[-1])
    each = (last - first) / steps
    if each <= 0:  # from a picture to its noise
        return before or 0, before + steps if before else 0
    before = round(first / each) if before is None else before
    after = round((1 - last) / each)
    return before, before + steps + after if before or after else 0


def _schedule(sampling, sigmas: Sequence[float], context: RunContext, earlier: Sequence[float]) -> list[float]:
    """When each step of all runs of the picture is, on the scale of `_percent`. Of runs that are not known, in equal
    parts."""
    own = [_percent(sampling, sigma) for sigma in sigmas[:-1]]
    end = 1.0 if sigmas[-1] == 0 else _percent(sampling, sigmas[-1])
    after = context.total - context.before - context.steps
    known = [_percent(sampling, sigma) for sigma in earlier] or [own[0] * k / context.before
                                                                 for k in range(context.before)]
    return [*known, *own, *(end + (1 - end) * k / after for k in range(after))]


def _percent(sampling, sigma: float) -> float:
    """The inverse of the host's `percent_to_sigma`, which every kind of model has and which only falls.

    Each look at it is a dozen operations, and on a GPU some waits. So what was found is remembered with the sampling,
    and holds as long as it still is the first number of its grid at which noise is as low."""
    def passed(share: float) -> bool:
        return float(sampling.percent_to_sigma(share)) <= sigma

    known = _PERCENTS.setdefault(sampling, {})
    last = known.get(sigma)
    if last is not None and passed(last) and (last <= FINEST or not passed(last - FINEST)):
        return last
    low, high = 0.0, 1.0
    while high - low > FINEST:
        middle = (low + high) / 2
        low, high = (low, middle) if passed(middle) else (middle, high)
    if len(known) >= MOST_KNOWN:
        known.clear()
    known[sigma] = high
    return high
