"""A name for what a MODEL predicts with: its architecture, its weights, and the LoRAs on it."""

from __future__ import annotations

import hashlib
from dataclasses import MISSING, fields
from math import isfinite

import torch
from torch import Tensor

from ...methods.selection import Contest
from ..compose.applied import Applied
from ..compose.composition import KEY
from ..compose.earlier import marks

SAMPLED = 16  # tensors whose values are looked at
MASKED = 4096  # values by which a mask is recognised


def describe_model(model) -> str:
    """Equal for equal predictions, short enough to show. Another checkpoint, dtype, LoRA or strength changes it, and so
    do windows in time, masks, how places are found by words, and what else is set on a method or a Branch Cache.

    Only small unquantized tensors are read, as they are without patches; nothing is moved or loaded.
    """
    return _described(model, whole=True)


def describe_kind(model) -> str:
    """As `describe_model`, but equal for the same LoRAs at any strengths and with any settings of their method."""
    return _described(model, whole=False)


def _described(model, whole: bool) -> str:
    parts = [f"{type(model.model).__name__} {_digest(_weights(model))}"]
    if model.patches:
        parts.append(f"patches {_digest(_patches(model, whole))}")
    composition = model.get_attachment(KEY)
    for applied in composition.applied if composition is not None else ():
        known = getattr(applied.method, "strengths", ())
        loras = [f"{name} {s:g}" if whole else name for name, s in zip(applied.names, known, strict=False)]
        where = "".join(f" {name} {_digest(found)}" for name, found in _confined(applied) if found)
        said = "".join(f", {line}" for line in _settings(applied.method)) if whole else ""
        parts.append(f"{type(applied.method).__name__} ({', '.join(loras) or 'no LoRA'}{said}){where}")
    if whole and composition is not None and composition.cache is not None:
        parts.append(f"Branch Cache ({', '.join(_settings(composition.cache))})")
    return " + ".join(parts)


def _settings(of: object) -> list[str]:
    """What is set on a method or a cache besides the strengths of its LoRAs, as far as it is not how it comes."""
    out = []
    for field in fields(of):
        value = getattr(of, field.name)
        if isinstance(value, Contest):
            finite = [ratio for ratio in value.ratios if isfinite(ratio)]
            out += [f"subjects {[i + 1 for i, one in enumerate(value.sides) if one]}", f"ties {value.subject_ties}",
                    f"mean ratio {sum(finite) / max(len(finite), 1):.3g}"]
        elif field.name != "strengths" and (field.default is MISSING or value != field.default):
            out.append(f"{field.name} {value}")
    return out


def _confined(applied: Applied) -> list[tuple[str, list[bytes]]]:
    """What says when and where a method's LoRAs act; nothing of those that always act everywhere."""
    masks = [(k, mask) for k, mask in enumerate(applied.masks) if mask is not None]
    routed = applied.routed
    return [("windows", [repr(window).encode() for window in applied.windows]),
            ("masks", [repr((k, *marks(mask, MASKED))).encode() for k, mask in masks]),
            ("words", [] if routed is None else [repr((routed.routing, routed.words, routed.active, routed.everywhere,
                                                       routed.blocks)).encode()])]


def _digest(parts: list[bytes]) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:8]


def _weights(model) -> list[bytes]:
    state = {key: value for key, value in model.model.state_dict().items() if key.startswith("diffusion_model.")}
    out = [f"{key}{tuple(value.shape)}".encode() for key, value in sorted(state.items())]
    small = [key for key, value in sorted(state.items()) if value.ndim == 1 and value.is_floating_point()]
    for key in small[::max(1, len(small) // SAMPLED)]:
        backup = model.backup.get(key)
        out += _values(state[key] if backup is None else backup.weight)
    return out


def _patches(model, strengths: bool) -> list[bytes]:
    out = []
    for n, (key, patches) in enumerate(sorted(model.patches.items(), key=lambda item: str(item[0]))):
        out.append(f"{key} {[float(patch[0]) if strengths else '' for patch in patches]}".encode())
        if n < SAMPLED:
            out += [value for patch in patches for value in _values(getattr(patch[1], "weights", patch[1]))]
    return out


def _values(value) -> list[bytes]:
    """The first numbers of a tensor, or of the first tensor in a nest of tuples."""
    if isinstance(value, (tuple, list)):
        return next((found for each in value if (found := _values(each))), [])
    if not isinstance(value, Tensor) or value.is_meta or type(value) not in (Tensor, torch.nn.Parameter):
        return []
    return [value.detach().flatten()[:64].float().cpu().numpy().tobytes()]
