"""What the host knows of a run before it starts, in the words of the methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from uuid import UUID

import comfy.utils
import torch
from torch import Tensor

from ..kernels.packed import Parts
from ..methods.session import OTHER, POSITIVE, UNCONDITIONAL, RunFacts
from .composition import Layer

SIDES = {"positive": POSITIVE, "negative": UNCONDITIONAL, "empty_negative_prompt": UNCONDITIONAL}
"""Names that ComfyUI's guiders give their conds; `middle` of DualCFG and unknown ones are OTHER."""


def run_facts(model, layers: Sequence[Layer], sigmas: Tensor, shape: Sequence[int]) -> list[RunFacts]:
    """The facts of one run, per layer: they differ in the masks. `shape` is the latent's, or its first part's."""
    schedule, sampling = tuple(sigmas.detach().float().cpu().tolist()), model.get_model_object("model_sampling")
    times, span = tuple(_times(sampling, sigmas)), _span(sampling, schedule)
    return [RunFacts(schedule, times, tuple(shape), tuple(on_latent(mask, shape) for mask in layer.masks), span)
            for layer in layers]


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


def on_latent(mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """A MASK [B, H, W] or [H, W] in pixels -> [pictures or 1, 1, h, w] in fp32 on the latent's grid; None for latents
    without height and width."""
    if mask is None or len(shape) < 4:
        return None
    mask = mask.detach().float().reshape(-1, 1, *mask.shape[-2:])
    mask = torch.nn.functional.interpolate(mask, size=tuple(shape[-2:]), mode="area").clamp(0, 1)
    return mask if len(mask) == 1 else comfy.utils.repeat_to_batch_size(mask, shape[0])


def _times(sampling, sigmas: Tensor) -> list[float]:
    """The model's time of every step, 1 at its highest noise level and 0 at its lowest."""
    levels = torch.stack([torch.as_tensor(float(level)) for level in (sampling.sigma_max, sampling.sigma_min)])
    levels = torch.cat([levels, sigmas[:-1].detach().float().cpu()])
    device = getattr(sampling, "sigmas", levels).device
    top, bottom, *steps = sampling.timestep(levels.to(device)).float().tolist()
    return [(t - bottom) / (top - bottom) for t in steps]


def _span(sampling, sigmas: Sequence[float]) -> tuple[float, float]:
    """`RunFacts.span` by the scale on which users give start and end of a ControlNet. A run that ends without noise is
    at its end with its last step, one that is handed on with noise left goes on after it."""
    last = 1.0 if sigmas[-1] == 0 or len(sigmas) < 3 else _percent(sampling, sigmas[-2])
    return _percent(sampling, sigmas[0]), last


def _percent(sampling, sigma: float) -> float:
    """The inverse of the host's `percent_to_sigma`, which every kind of model has and which only falls."""
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if float(sampling.percent_to_sigma(middle)) <= sigma else (middle, high)
    return high
