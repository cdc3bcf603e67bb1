"""Maps as heat: a ramp of colours that colour-blind eyes can read, laid over a picture."""

from __future__ import annotations

import numpy as np
from PIL import Image

RAMP = ((68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142), (31, 158, 137), (53, 183, 121),
        (109, 205, 89), (180, 222, 44), (253, 231, 37))
"""From 0 to 1 at equal distances, as in viridis: ever brighter, so that it is one in grey as well."""
COVER = 0.65
"""How much of a picture the colours cover."""
GREY = 128


def coloured(values: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1] of any shape -> RGB in 0..255 in fp32; what is outside goes by the nearer end."""
    places = np.clip(values, 0, 1) * (len(RAMP) - 1)
    return np.stack([np.interp(places, range(len(RAMP)), channel) for channel in zip(*RAMP, strict=True)],
                    axis=-1).astype(np.float32)


def overlay(values: np.ndarray, size: tuple[int, int], picture: np.ndarray | None = None) -> Image.Image:
    """A map [height, width] at a size (width, height) in colours over a picture [height, width, 3] in [0, 1], which
    loses its own colours: the map's are not to be taken for them. Over grey without one."""
    heat = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    under = np.full((size[1], size[0]), GREY, dtype=np.float32)
    if picture is not None:
        pixels = (np.nan_to_num(picture[..., :3]).clip(0, 1) * 255).astype(np.uint8)
        small = Image.fromarray(pixels).convert("L").resize(size, Image.Resampling.BILINEAR)
        under = np.asarray(small, dtype=np.float32)
    mixed = (1 - COVER) * under[..., None] + COVER * coloured(heat)
    return Image.fromarray(mixed.round().astype(np.uint8))
