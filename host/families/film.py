"""Which frames of a latent are its film's own, and which frames of the film each of them holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import takewhile

import comfy.latent_formats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .row_order import family_entry

Conds = Mapping[str, Sequence[Mapping]]
"""A guider's conds by name, with what nodes have put on their prompts."""

REFERENCES = {"wan.model_animate.AnimateWanModel": 1, "wan.model_animate2.WanAnimate2Model": 1}
"""Frames of a reference before the film, which these models themselves count off."""
TOGETHER = 4, 6, 8
"""How many frames of a film are one of its latent's, in the host's families; the first one is one alone."""


def ahead_of_film(diffusion_model: nn.Module, conds: Conds) -> int:
    """How many frames of a latent stand before its film: references, which are trimmed off when it is sampled."""
    known = family_entry(getattr(diffusion_model, "_orig_mod", diffusion_model), REFERENCES)
    frames = [entry["vace_frames"][0] for entries in conds.values() for entry in entries or ()
              if entry.get("vace_frames")]
    return known or max(map(_references, frames), default=0)


def end_of_film(shape: Sequence[int], conds: Conds) -> int | None:
    """Behind how many frames of a latent its film ends, by those that LTX-Video's conds name as guides; None: with the
    latent."""
    guides = [entry["keyframe_idxs"].shape[2] for entries in conds.values() for entry in entries or ()
              if entry.get("keyframe_idxs") is not None] if len(shape) == 5 else []
    return shape[2] - max(guides) // math.prod(shape[3:]) if guides else None


def in_frames(masks: Tensor, frames: int) -> Tensor:
    """Masks [N, 1, h, w] of a film as those of its latent's frames, [1, 1, frames, h, w]: one for each frame of the
    film where there are as many as the latent stands for, else in equal parts of its length."""
    together = (len(masks) - 1) / max(frames - 1, 1)
    if together in TOGETHER:  # the first one counts as many times as all others of its latent's do together
        masks = torch.cat([masks[:1].expand(int(together) - 1, -1, -1, -1), masks])
    return F.interpolate(masks.transpose(0, 1)[None], (frames, *masks.shape[2:]), mode="area")


def _references(control: Tensor) -> int:
    """How many frames of a control film [films, 2 x 16, frames, h, w] of VACE, from the first on, are references. The
    half that is to be drawn anew has nothing there, exactly, as no picture that was encoded has."""
    anew = control[:1, 16:]
    nothing = comfy.latent_formats.Wan21().process_out(torch.zeros_like(anew))
    empty = (anew == nothing).transpose(1, 2).flatten(2).all(-1)[0].tolist()
    return len(list(takewhile(bool, empty)))
