"""Which tokens of a model move with a place of the picture, a word of the prompt and a reference.

Attention answers with its queries here and what stands for a whole row with constants, so that no token learns of
another: what moves, moves in its own place, through the whole model.
"""

from __future__ import annotations

import sys

import pytest
from lora_ensemble.host.families.token_order import token_order
from torch import Tensor, nn

from .blocks import Transformer, noise
from .disturbed import newest, skipped_where_older, watching
from .small_video import SMALL, built

SEEN = "lora_ensemble_tests_seen"

WITHOUT = {"SVD", "Stable Cascade C", "Wan Animate 2", "Cosmos", "Stable Audio", "ACE-Step", "ACE-Step 1.5",
           "Hunyuan3D", "Hunyuan3D 2.1", "TripoSplat", "Stable Cascade B", "Stable Audio 3", "Trellis 2",
           "Trellis 2 shape", "SeedVR2"}
"""Families without a token order: no picture, places not told from shapes alone, or rows that mix anyway."""

FRAMES = {"CogVideoX 1.5": 2}
"""Families that have several frames in a token."""


def attend_to_nothing(q: Tensor, k: Tensor, v: Tensor, heads: int, *args, skip_reshape: bool = False,
                      skip_output_reshape: bool = False, transformer_options: dict | None = None, **kwargs) -> Tensor:
    """Attention's answer in its shape, made of the queries alone (which may come in a container). Told to whoever looks
    (SEEN in the options): q and k, [rows, heads, tokens, d]."""
    q, k = getattr(q, "tensor", q), getattr(k, "tensor", k)
    if SEEN in (transformer_options or {}):
        transformer_options[SEEN].append(tuple(
            (t if skip_reshape else t.unflatten(-1, (heads, -1)).transpose(1, 2)).clone() for t in (q, k)))
    if skip_reshape:
        return q if skip_output_reshape else q.transpose(1, 2).flatten(2)
    return q.unflatten(2, (heads, -1)).transpose(1, 2) if skip_output_reshape else q


@pytest.fixture
def apart(monkeypatch):
    """No token learns of another by attention."""
    for module in [module for name, module in sys.modules.items() if name.startswith("comfy.ldm.")]:
        for name in vars(module):
            if name in ("optimized_attention", "optimized_attention_masked"):
                monkeypatch.setattr(module, name, attend_to_nothing)


class Seen:
    """One call: what it was given, each layer's segments and output, and q and k of each attention."""

    def __init__(self, kind: Transformer, model: nn.Module, change=lambda x, conds: (x, conds)):
        self.model, self.order, self.layers, self.attention = model, token_order(model), [], []

        def begin(_, args, kwargs):
            x, kwargs = change(args[0], kwargs)
            self.x, self.conds, self.tokens = x, kwargs, self.order.begin(x, kwargs)
            return (x, *args[1:]), kwargs

        with model.register_forward_pre_hook(begin, with_kwargs=True), watching(model, self._see):
            kind.call(model, {SEEN: self.attention}, rows=1)

    def _see(self, layer, geometry, x, out):
        if geometry.is_norm and geometry.channel == 1:  # over groups of channels and all places
            return x
        entries = 1 if self.order.axis == 0 else out.shape[0]
        count = out.numel() // (entries * out.shape[geometry.channel])
        segments = self.tokens.segments(layer, count)
        self.layers.append((layer, geometry, segments, out.clone(), count))
        return noise(*out.shape, seed=2) if segments == () else None


def plain(name: str) -> tuple[Transformer, nn.Module, Seen]:
    kind, model = SMALL[name], built(name)
    if name == "Wan references" and not newest():
        pytest.skip("older releases know no context latents")
    with skipped_where_older(name):
        return kind, model, Seen(kind, model)


def moved(before: Seen, after: Seen):
    """(layer, segments, the tokens that are not what they were) of every layer with known tokens."""
    for (layer, geometry, segments, old, count), (*_, new, _) in zip(before.layers, after.layers, strict=True):
        if segments:
            apart = (old != new).movedim(geometry.channel % old.ndim, -1).any(-1).reshape(-1, count).any(0)
            yield layer, segments, set(apart.nonzero().flatten().tolist())


def places(segments, kind: str, position) -> set[int]:
    """The tokens of a kind that stand for a position in it: `position(segment)` -> index within the segment."""
    starts = [sum(s.count for s in segments[:k]) for k in range(len(segments))]
    return {start + position(s) for start, s in zip(starts, segments, strict=True) if s.kind == kind}


def at_place(size: tuple[int, ...], place: tuple[int, ...], name: str = ""):
    """The token of a place of the latent, counted frame by frame and row by row."""
    size, place = (1, *size)[-3:], (0, *place)[-3:]

    def position(segment) -> int:
        _, h, w = segment.grid
        i, j = (p // -(-n // g) for n, g, p in zip(size[1:], (h, w), place[1:], strict=True))
        return (place[0] // FRAMES.get(name, 1) * h + i) * w + j

    return position


def changed(latent: Tensor, place: tuple[int, ...]) -> Tensor:
    latent = latent.clone()
    latent[(slice(None), slice(None), *place)] += noise(latent.shape[1], seed=9)
    return latent


def move(place: tuple[int, ...], names: tuple[str, ...] = ("vace_context", "control_video", "ref_mask_latents")):
    """A call whose latent is another at a place, and control films with it, which may begin before it."""

    def behind(frames: int) -> tuple[int, ...]:
        return (place[0] + frames, *place[1:])

    def change(x, conds):
        moved = {n: changed(conds[n].flatten(0, -5), behind(conds[n].shape[-3] - size_of(x)[0])).view(conds[n].shape)
                 for n in names if n in conds}
        x = [changed(x[0], place), *x[1:]] if isinstance(x, list) else changed(x, place)
        return x, {**conds, **moved}

    return change


def size_of(x: Tensor | list[Tensor]) -> tuple[int, ...]:
    return tuple((x[0] if isinstance(x, list) else x).shape[2:])
