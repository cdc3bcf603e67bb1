"""docs/families.md: what its table says of each family is what the pack does with a small model of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from lora_ensemble.host.families.row_order import row_order
from lora_ensemble.host.families.split_points import split_point_of
from lora_ensemble.host.families.token_order import token_order

from .blocks import TRANSFORMERS
from .disturbed import newest
from .small import like
from .small_video import SMALL, built, forgotten, nothing_left  # noqa: F401
from .test_attention import UNREAD
from .test_split_points import NEWER

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
ROWS = {
    "SD 1.5": "SD15", "SDXL": "SDXL", "Stable Cascade": "Stable Cascade C", "SD 3, 3.5": "SD 3.5",
    "Flux, Kontext": "Flux Kontext", "Flux.2": "Flux 2 edit", "Chroma": "Chroma", "Chroma Radiance": "Chroma Radiance",
    "Qwen-Image, Edit": "Qwen-Edit", "Lumina 2, NewBie": "NewBie", "Z-Image": "Z-Image", "Krea 2": "Krea 2",
    "MageFlow": "MageFlow", "JoyImage": "JoyImage edit", "Anima": "Anima", "HiDream": "HiDream", "AuraFlow": "AuraFlow",
    "HunyuanDiT": "HunyuanDiT", "HunyuanImage 2.1": "HunyuanImage 2.1", "Kandinsky 5 Image": "Kandinsky 5 Image",
    "PixArt": "PixArt Alpha", "PixelDiT": "PixelDiT", "OmniGen 2": "OmniGen 2 edit", "Boogu": "Boogu edit",
    "Lens": "Lens", "Ernie-Image": "Ernie-Image", "Ideogram 4": "Ideogram 4", "Wan 2.1, 2.2": "Wan 2.2",
    "Wan VACE": "Wan VACE", "Wan Camera": "Wan Camera", "Wan HuMo": "Wan HuMo", "Wan S2V": "Wan S2V",
    "Wan-Animate": "Wan Animate", "Wan-Animate2": "Wan Animate 2", "SCAIL, SCAIL-2": "Wan SCAIL 2",
    "WanDancer": "Wan Dancer", "HunyuanVideo": "HunyuanVideo", "HunyuanVideo 1.5": "HunyuanVideo 1.5",
    "LTX-Video": "LTX-Video", "LTX-2": "LTX-2", "LTX 2.5": "LTX 2.5", "MiniMax H3": "MiniMax H3 references",
    "Mochi": "Mochi", "Cosmos": "Cosmos", "Cosmos Predict 2": "Cosmos Predict 2", "Kandinsky 5": "Kandinsky 5",
    "CogVideoX": "CogVideoX 1.5", "SVD": "SVD", "SeedVR2": "SeedVR2", "Stable Audio": "Stable Audio 3",
    "ACE-Step": "ACE-Step", "ACE-Step 1.5": "ACE-Step 1.5", "Hunyuan3D 2": "Hunyuan3D",
    "Hunyuan3D 2.1": "Hunyuan3D 2.1", "TripoSplat": "TripoSplat", "Trellis 2": "Trellis 2 shape",
}
"""As the page calls it -> the small model."""

DEEPER = {"Krea 2": dict(layers=4), "PixArt Alpha": dict(depth=4),
          "Chroma Radiance": dict(depth=3, depth_single_blocks=3),
          **dict.fromkeys(("Anima", "Cosmos Predict 2", "TripoSplat"), dict(num_blocks=4)),
          **dict.fromkeys(("Wan Camera", "Wan HuMo", "Wan S2V", "Wan SCAIL 2", "Wan Dancer", "CogVideoX 1.5", "SeedVR2",
                           "ACE-Step"), dict(num_layers=4))}

pytestmark = [pytest.mark.usefixtures("forgotten"),
              pytest.mark.skipif(not newest(), reason="the page is about a newer ComfyUI")]


def cut(name: str) -> bool:
    """Whether the Branch Cache finds a place: in the classes that test_split_points cuts, and where a call of a deeper
    model leaves the features that it goes on from."""
    kind, caught = SMALL[name], {}
    if kind.where in {each.where for each in (*TRANSFORMERS.values(), *NEWER.values())} or "UNetModel" in kind.where:
        return True
    kind = like(kind, name, **DEEPER.get(name, {}))
    model = kind.build()
    split = split_point_of(model, 1)
    if isinstance(split, str):
        assert "no place" in split, f"{name}: {split}"
        return False
    kind.call(model, split.capture({}, caught))
    return split.complete(caught)


def row(title: str) -> str:
    name = ROWS[title]
    places = token_order(built(name)) is not None
    found = (row_order(built(name)) is not None, places, places and name not in UNREAD, cut(name))
    return f"| {title} | " + " | ".join("yes" if each else "no" for each in found) + " |"


@pytest.mark.parametrize("title", ROWS)
def test_a_row_of_the_table(title):
    assert row(title) in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_table_has_no_other_rows():
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(ROWS)
