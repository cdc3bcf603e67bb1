"""Where the tokens of every layer lie: what the table says, against which tokens move with a place of the picture, a
word of the prompt and a reference.

Attention answers with its queries here and what stands for a whole row with constants, so that no token learns of
another: what moves, moves in its own place, through the whole model.
"""

from __future__ import annotations

import re
import sys
from math import prod

import pytest
import torch
from lora_ensemble.host.families.row_order import FAMILIES as ROWS
from lora_ensemble.host.families.token_order import FAMILIES, token_order
from torch import Tensor, nn

from .blocks import Transformer, noise
from .disturbed import newest, skipped_where_older, watching
from .small_video import SMALL, built, forgotten, nothing_left  # noqa: F401

pytestmark = pytest.mark.usefixtures("forgotten")

WITHOUT = {"SVD", "Stable Cascade C", "Wan Animate 2", "Cosmos", "Stable Audio", "ACE-Step", "ACE-Step 1.5",
           "Hunyuan3D", "Hunyuan3D 2.1", "TripoSplat"}
"""Families without a token order: no picture, places not told from shapes alone, or rows that mix anyway."""

OPEN = {
    "Chroma Radiance": r"nerf_.*",
    "Krea 2.*": r"txtfusion\.(layerwise_blocks|projector).*",
    "Z-Image pixels": r"dec_net\..*",
    "HunyuanDiT": r"mlp_t5\..*",
    "HiDream": r".*\.experts\..*",
    "PixArt": r".*\.kv_linear",
    "PixelDiT|PiD": r"(pixel_blocks\.\d+\.(adaLN|compress|expand|mlp)|final_layer|lq_proj\.(latent|output)).*",
    "Wan Camera": r"control_adapter\..*",
    "Wan HuMo": r"audio_proj\..*|.*\.audio_cross_attn\.[kv]",
    "Wan S2V": r"casual_audio_encoder\..*|audio_injector\..*",
    "Wan Animate": r"pose_patch_embedding",
    "Wan Dancer": r"music_.*",
    "Wan SCAIL": r"patch_embedding_pose",
    "Mochi": r"x_embedder\.proj|t5_y_embedder\.to_kv",
    "Anima": r"llm_adapter\..*|.*\.cross_attn\.[kv]_proj",
    "CogVideoX": r"patch_embed\.proj",
}
"""Layers that the table leaves open, by name of the call: tokens folded into rows, sound, poses."""

UNETS = ["SD15", "SDXL"]
known = pytest.mark.parametrize("name", [name for name in SMALL if name not in WITHOUT])


def attend_to_nothing(q: Tensor, k: Tensor, v: Tensor, heads: int, *args, skip_reshape: bool = False,
                      skip_output_reshape: bool = False, **kwargs) -> Tensor:
    """Attention's answer in its shape, made of the queries alone (which may come in a container)."""
    q = getattr(q, "tensor", q)
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
    """One call: what it was given, and each layer's segments and output."""

    def __init__(self, kind: Transformer, model: nn.Module, change=lambda x, conds: (x, conds)):
        self.order, self.layers = token_order(model), []

        def begin(_, args, kwargs):
            x, kwargs = change(args[0], kwargs)
            self.x, self.conds, self.tokens = x, kwargs, self.order.begin(x, kwargs)
            return (x, *args[1:]), kwargs

        with model.register_forward_pre_hook(begin, with_kwargs=True), watching(model, self._see):
            kind.call(model, {}, rows=1)

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


def at_place(size: tuple[int, ...], place: tuple[int, ...]):
    """The token of a place of the latent, counted frame by frame and row by row. No family joins frames."""
    size, place = (1, *size)[-3:], (0, *place)[-3:]

    def position(segment) -> int:
        _, h, w = segment.grid
        i, j = (p // -(-n // g) for n, g, p in zip(size[1:], (h, w), place[1:], strict=True))
        return (place[0] * h + i) * w + j

    return position


def changed(latent: Tensor, place: tuple[int, ...]) -> Tensor:
    latent = latent.clone()
    latent[(slice(None), slice(None), *place)] += noise(latent.shape[1], seed=9)
    return latent


def move(place: tuple[int, ...], names: tuple[str, ...] = ("vace_context", "control_video")):
    """A call whose latent is another at a place, and control films with it."""

    def change(x, conds):
        moved = {n: changed(conds[n].flatten(0, -5), place).view(conds[n].shape) for n in names if n in conds}
        x = [changed(x[0], place), *x[1:]] if isinstance(x, list) else changed(x, place)
        return x, {**conds, **moved}

    return change


def size_of(x: Tensor | list[Tensor]) -> tuple[int, ...]:
    return tuple((x[0] if isinstance(x, list) else x).shape[2:])


@pytest.mark.parametrize("name", [name for name in SMALL if name not in {*WITHOUT, *UNETS}])
def test_places_of_the_picture(name, apart):
    """The host fills a latent up to whole patches with its first rows and columns, which are therefore left alone, and
    the third frame of one film is a guide."""
    kind, model, before = plain(name)
    *frames, height, width = size = size_of(before.x)
    for place in ((2, 2), (height // 2, width // 2), (height - 1, width - 1)):
        place = (*[min(1, n - 1) for n in frames], *place)
        for layer, segments, found in moved(before, Seen(kind, model, move(place))):
            expected = places(segments, "picture", at_place(size, place))
            assert found == expected, f"{layer} at {place}: {sorted(found)} instead of {sorted(expected)}"


@pytest.mark.parametrize("name", UNETS)
def test_places_of_the_picture_in_unets(name, apart):
    """With convolutions that see their own place alone. What comes up from half the size covers two places by two."""
    kind = SMALL[name]
    model = kind.build()
    for module in model.modules():
        if getattr(module, "kernel_size", None) == (3, 3):
            module.weight *= torch.nn.functional.pad(torch.ones(1, 1), (1, 1, 1, 1))
    before, place = Seen(kind, model), (2, 4)
    size = size_of(before.x)
    for layer, segments, found in moved(before, Seen(kind, model, move(place))):
        around = {(2, 4), (2, 5), (3, 4), (3, 5)} if layer.startswith("out") else {place}
        expected = [places(segments, "picture", at_place(size, p)) for p in ((2, 4), *around)]
        assert expected[0] <= found <= set().union(*expected), layer


@known
def test_words_of_the_prompt(name, apart):
    """Several texts are one text for several encoders: HiDream's Llama, HunyuanDiT's T5."""
    (kind, model, before), word, reached = plain(name), 3, set()

    def change(x, conds):
        context = conds["context"].clone()
        context[:, word] += 1
        return x, {**conds, "context": context}

    for layer, segments, found in moved(before, Seen(kind, model, change)):
        expected = places(segments, "text", lambda segment: word)
        assert found <= expected, f"{layer}: {sorted(found)} instead of {sorted(expected)}"
        texts = sum(s.kind == "text" for s in segments)
        assert found == expected or texts > 1 or name in ("HiDream", "Anima"), f"{layer} does not move with the text"
        reached |= found
    assert reached or name == "Anima"


@known
def test_references_and_sound(name, apart):
    """Nothing that is not the picture or the prompt lies where one of them does."""
    kind, model, before = plain(name)
    other = {"ref_latents", "reference_latent", "context_latents", "time_dim_concat", "clip_fea", "txt_byt5",
             "ref_contexts", "siglip_feats"}

    def change(x, conds):
        x = [x[0], *(part + 1 for part in x[1:])] if isinstance(x, list) else x
        return x, {key: (value + 1 if isinstance(value, Tensor) else [part + 1 for part in value]) if key in other
                   else value for key, value in conds.items()}

    reached = set()
    for layer, segments, found in moved(before, Seen(kind, model, change)):
        starts = [sum(s.count for s in segments[:k]) for k in range(len(segments))]
        allowed = {start + t for start, s in zip(starts, segments, strict=True) if s.kind == "other"
                   for t in range(s.count)}
        assert found <= allowed, f"{layer}: {sorted(found - allowed)}"
        reached |= found
    assert reached or not (isinstance(before.x, list) or other & set(before.conds))


@known
def test_tokens_add_up(name):
    """Of every layer with tokens but those that are left open."""
    pattern = "|".join(layers for names, layers in OPEN.items() if re.fullmatch(names, name))
    _, _, seen = plain(name)
    for layer, geometry, segments, _, count in seen.layers:
        if re.fullmatch(pattern, layer) or geometry.is_norm and segments is None:
            continue
        assert segments is not None, f"{layer} sees {count} tokens of unknown order"
        assert segments == () or sum(s.count for s in segments) == count
        assert all(s.count == prod(s.grid) for s in segments if s.kind == "picture")


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_families_without_an_order(name):
    assert token_order(built(name)) is None


def test_no_family_mixes_rows():
    """MiniMax H3 has one row."""
    assert set(FAMILIES) - {"minimax.model.MiniMaxH3Model"} <= set(ROWS)
