"""Draws the second body's scenes with the first body's shapes, on a stage one and a half times as wide.

Backgrounds and styles are drawn coarser. The model sees the picture in patches of four pixels, and its rotary places
turn by at most one radian from a patch to the next: stripes of two patches are out of its reach.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import render as first
from .scene import SIDES, Scenes, as_first, stands

HEIGHT, WIDTH = 32, 48
HEAD_X = {"left": 11.0, "right": 36.0}
OBJECT = (23.5, 24.0)
COARSE = 1.6


def render(scenes: Scenes, chunk: int = 256) -> Tensor:
    """float32 [n, 3, 32, 48] in [0, 1]."""
    if len(scenes) > chunk:
        return torch.cat([render(scenes.take(slice(i, i + chunk))) for i in range(0, len(scenes), chunk)])
    values = {a: torch.as_tensor(v) for a, v in scenes.values.items()}
    j = torch.as_tensor(scenes.jitter, dtype=torch.float32)
    x, y = first.pixels(HEIGHT, WIDTH)
    v = as_first(values, "left")
    image = first.background(v, j[:, 0:7], (x - (WIDTH - 1) / 2) / COARSE, (y - (HEIGHT - 1) / 2) / COARSE)
    for k, side in enumerate(SIDES):
        own, at = as_first(values, side), j[:, 42 + 2 * k:44 + 2 * k, None, None]
        left, top = x - HEAD_X[side] - 0.9 * at[:, 0], y - 12.0 - 0.7 * at[:, 1]
        figure = first.character(image, own, j[:, 16 + 8 * k:20 + 8 * k], left, top)
        figure = first.clothing(figure, own, j[:, 20 + 8 * k:24 + 8 * k], left, top - 11.5)
        image = torch.where(torch.as_tensor(stands(scenes.values, side))[:, None, None, None], figure, image)
    at = j[:, 46:48, None, None]
    image = first.thing(image, v, j[:, 7:11], x - OBJECT[0] - 0.7 * at[:, 0], y - OBJECT[1] - 0.8 * at[:, 1])
    return first.style(image, v, j[:, 11:16], x / COARSE, y / COARSE).clamp(0, 1)
