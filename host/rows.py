"""Rows of a batch: the caller's conds for some of them, and models that need theirs in an order of their own."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.utils
import torch
from torch import Tensor

from ..engine.transfer import on_device
from .composition import Composition


def narrowed(cond: list[dict], rows: Sequence[int], batch: int) -> list[dict]:
    """A processed cond list for the given rows of a batch. What has one entry for all rows stays as it is."""
    return [_entry(entry, rows, batch) for entry in cond]


def _entry(entry: dict, rows: Sequence[int], batch: int) -> dict:
    entry = {**entry, "model_conds": {name: _cond(value, rows, batch) for name, value in entry["model_conds"].items()}}
    if isinstance(entry.get("mask"), Tensor):
        entry["mask"] = _tensor(entry["mask"], rows, batch)
    return entry


def _cond(value, rows: Sequence[int], batch: int):
    inner = getattr(value, "cond", None)
    if isinstance(inner, Tensor):
        return value._copy_with(_tensor(inner, rows, batch))
    if isinstance(inner, list) and all(isinstance(each, Tensor) for each in inner):
        return value._copy_with([_tensor(each, rows, batch) for each in inner])
    return value


def _tensor(tensor: Tensor, rows: Sequence[int], batch: int) -> Tensor:
    if tensor.ndim == 0 or tensor.shape[0] <= 1:
        return tensor
    # As the host would repeat or cut it for the whole batch.
    whole = comfy.utils.repeat_to_batch_size(tensor, batch)
    return whole.index_select(0, on_device(rows, tensor.device))


def in_range(entry: dict, sigma: float) -> bool:
    """Whether a processed cond acts at a noise level: the host leaves it out before its start and after its end."""
    return entry.get("timestep_end", sigma) <= sigma <= entry.get("timestep_start", sigma)


def whole_only(conds: list, options: dict, composition: Composition | None) -> str | None:
    """Why a batch cannot be evaluated in part, or None. A composition must be in its run."""
    sessions = composition.run.sessions if composition is not None else ()
    for layer, session in zip(composition.layers if sessions else (), sessions, strict=True):
        if session.whole_batch:
            return f"{type(layer.method).__name__} mixes by what it finds in the whole batch"
        if any(mask is not None and mask.ndim > 2 and mask.shape[0] > 1 for mask in layer.masks):
            return "a LoRA has a mask for each picture"
    inner = options.get("transformer_options", {})
    if any(name.endswith("output_patch") for name in inner.get("patches", {})):
        return "a patch of attention outputs (NAG) looks at both sides of a batch"
    if any(name.startswith("attn") and found for name, found in inner.get("patches_replace", {}).items()):
        return "a patch in the place of attention (IP-Adapter, Self-Attention Guidance) may know the rows of its batch"
    if getattr(inner.get("easycache"), "name", None) == "EasyCache":  # LazyCache keeps whole steps, which is no matter
        return "EasyCache keeps outputs of whole batches"
    if options.get("context_handler") is not None:
        return "context windows cut the batch themselves"
    for entry in (entry for cond in conds if cond for entry in cond):
        control = entry.get("control")
        while control is not None:
            hint = getattr(control, "cond_hint_original", None)
            if not isinstance(hint, Tensor) or hint.shape[0] > 1:
                return "a ControlNet has a hint for each picture"
            control = getattr(control, "previous_controlnet", None)
    return None


HALVES = {"HunYuanDiTPlain", "NaDiT"}
"""Classes of diffusion models (Hunyuan3D 2.1, SeedVR2) that take a batch for two halves, one per prompt, and swap them
inside: rows come out as they went in, but between lie in places of their own."""


def branches_apart(diffusion_model: torch.nn.Module) -> bool:
    """Whether every branch needs a batch of its own, in which all rows have the same LoRAs."""
    return type(diffusion_model).__name__ in HALVES
