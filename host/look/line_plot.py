"""A plain line plot as a ComfyUI IMAGE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 600, 70, 30, 50, 60
COLOURS = ("#000000", "#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")


def line_plot(lines: Sequence[tuple[str, Sequence[float]]], title: str, across: str) -> Tensor:
    """Lines over [0, 1], each with its label -> [1, height, width, 3] in [0, 1]. The vertical axis starts at 0."""
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    top = max((value for _, values in lines for value in values), default=1.0) * 1.05 or 1.0

    def place(i: int, count: int, value: float) -> tuple[float, float]:
        return (LEFT + (WIDTH - LEFT - RIGHT) * i / max(count - 1, 1),
                HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top)

    for mark in range(6):
        (x, floor), (left, y) = place(mark, 6, 0), place(0, 6, top * mark / 5)
        pen.line([(left, y), (WIDTH - RIGHT, y)], "#dddddd")
        pen.text((left - 45, y - 6), f"{top * mark / 5:.3f}", "black", font)
        pen.text((x - 8, floor + 8), f"{mark / 5:.1f}", "black", font)
    pen.text((LEFT, 15), title, "black", font)
    pen.text((WIDTH // 2, HEIGHT - 25), across, "black", font)
    for k, (label, values) in enumerate(lines):
        colour, points = COLOURS[k % len(COLOURS)], [place(i, len(values), v) for i, v in enumerate(values)]
        pen.line(points, colour, 2) if len(points) > 1 else pen.point(points, colour)
        row = TOP + 10 + 16 * k
        pen.line([(WIDTH - 330, row + 6), (WIDTH - 300, row + 6)], colour, 3)
        pen.text((WIDTH - 290, row), label[:44], "black", font)
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]
