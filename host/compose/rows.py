"""Rows of a batch: the caller's conds for some of them."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.utils
from torch import Tensor

from ...engine.transfer import on_device
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
    for applied, session in zip(composition.applied if sessions else (), sessions, strict=True):
        if session.whole_batch:
            return f"{applied.title} mixes by what it finds in the whole batch"
        if applied.routed is not None:
            return "LoRAs act where their words are, in each picture elsewhere"
        if any(mask is not None and mask.ndim > 2 and mask.shape[0] > 1 for mask in applied.masks):
            return "a LoRA has a mask for each picture"
    inner = options.get("transformer_options", {})
    if (reason := sides_together(options)) is not None:
        return reason
    if any(name.startswith("attn") and found for name, found in inner.get("patches_replace", {}).items()):
        return "a patch in the place of attention (IP-Adapter, Self-Attention Guidance) may know the rows of its batch"
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


def sides_together(options: dict) -> str | None:
    """Why both sides must be evaluated in the same steps: without the negative beside it the conditional one would be
    another, or the two would be of unequal age. None where there is no reason."""
    inner = options.get("transformer_options", {})
    if any(name.endswith("output_patch") for name in inner.get("patches", {})):
        return "a patch of attention outputs (NAG) looks at both sides of a batch"
    if getattr(inner.get("easycache"), "name", None) == "EasyCache":  # LazyCache keeps whole steps, which is no matter
        return "EasyCache keeps outputs of whole batches"
    return None
