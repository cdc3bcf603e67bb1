"""Where the tokens of every layer lie: what the table says, against which tokens move with a place of the picture, a
word of the prompt and a reference."""

from __future__ import annotations

import re
from math import prod

import pytest
import torch
from lora_ensemble.engine.positions import Segment
from lora_ensemble.host.families.row_order import FAMILIES as ROWS
from lora_ensemble.host.families.token_order import FAMILIES, token_order
from torch import Tensor

from .moved import WITHOUT, Seen, apart, at_place, move, moved, places, plain, size_of  # noqa: F401
from .small_video import SMALL, built, forgotten, nothing_left  # noqa: F401

pytestmark = pytest.mark.usefixtures("forgotten")

OPEN = {
    "Chroma Radiance": r"nerf_.*",
    "Krea 2.*": r"txtfusion\.(layerwise_blocks|projector).*",
    "Z-Image pixels": r"dec_net\..*",
    "HunyuanDiT": r"mlp_t5\..*",
    "HiDream": r".*\.experts\..*",
    "PixArt.*": r".*\.kv_linear",
    "PixelDiT|PiD": r"(pixel_blocks\.\d+\.(adaLN|compress|expand|mlp)|final_layer|lq_proj\.(latent|output)).*",
    "Wan Camera": r"control_adapter\..*",
    "Wan HuMo": r"audio_proj\..*|.*\.audio_cross_attn\.[kv]",
    "Wan S2V": r"casual_audio_encoder\..*|audio_injector\..*",
    "Wan Animate": r"pose_patch_embedding",
    "Wan Dancer": r"music_.*",
    "Wan SCAIL.*": r"patch_embedding_pose",
    "Mochi": r"x_embedder\.proj|t5_y_embedder\.to_kv",
    "Anima": r"llm_adapter\..*|.*\.cross_attn\.[kv]_proj",
    "CogVideoX.*": r"patch_embed\.proj",
}
"""Layers that the table leaves open, by name of the call: tokens folded into rows, sound, poses."""

UNETS = ["SD15", "SDXL", "x4 upscaler"]
known = pytest.mark.parametrize("name", [name for name in SMALL if name not in WITHOUT])


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("name", [name for name in SMALL if name not in {*WITHOUT, *UNETS}])
def test_places_of_the_picture(name):
    """The host fills a latent up to whole patches with its first rows and columns, which are therefore left alone, and
    the third frame of one film is a guide."""
    kind, model, before = plain(name)
    *frames, height, width = size = size_of(before.x)
    for place in ((2, 2), (height // 2, width // 2), (height - 1, width - 1)):
        place = (*[min(1, n - 1) for n in frames], *place)
        for layer, segments, found in moved(before, Seen(kind, model, move(place))):
            expected = places(segments, "picture", at_place(size, place, name))
            assert found == expected, f"{layer} at {place}: {sorted(found)} instead of {sorted(expected)}"


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("name", UNETS)
def test_places_of_the_picture_in_unets(name):
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


@pytest.mark.usefixtures("apart")
@known
def test_words_of_the_prompt(name):
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


@pytest.mark.usefixtures("apart")
@known
def test_references_and_sound(name):
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


@pytest.mark.parametrize(("tokens", "grid"), [
    (96 * 64, (96, 64)), (48 * 32, (48, 32)), (24 * 16, (24, 16)), (12 * 8, (12, 8)), (6 * 4, (6, 4)),
    (64 * 43, (64, 43)), (32 * 22, (32, 22)), (96 * 64 * 2 // 3, None), (79, None), (2 * 96 * 64, None)])
def test_pictures_that_another_node_has_shrunk(tokens, grid):
    """A U-Net whose activations are made smaller by any factor: what has the latent's proportions is the picture."""
    unet = token_order(SMALL["SD15"].build())
    found = unet.begin(torch.zeros(1, 4, 96, 64), {"context": torch.zeros(1, 5, 32)}).segments(
        "middle_block.1.proj_in", tokens)
    assert found == (None if grid is None else (Segment("picture", tokens, (1, *grid)),))


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_families_without_an_order(name):
    assert token_order(built(name)) is None


def test_no_family_mixes_rows():
    """MiniMax H3 has one row."""
    assert set(FAMILIES) - {"minimax.model.MiniMaxH3Model"} <= set(ROWS)
