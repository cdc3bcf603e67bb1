"""A small plot of a calibration, drawn with what ComfyUI already has."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...kernels.guidance import threshold_for
from ..guidance.coeffs import GuidanceCoeffs

SIZE, MARGIN = (720, 420), (70, 30, 20, 50)  # left, top, right, bottom
INK, GRID, CURVES = (40, 40, 40), (225, 225, 225), {"noise": (200, 70, 50), "x0": (50, 110, 190)}


def plot(coeffs: GuidanceCoeffs) -> Tensor:
    """IMAGE [1, height, width, 3]: per step 1 - similarity on a logarithmic scale, mean as a line, the range over the
    paths as a band; noise red, x0 blue; the share of guidance that LinearAG foretells as grey bars."""
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image, "RGBA")
    left, top, right, bottom = MARGIN
    width, height = SIZE[0] - left - right, SIZE[1] - top - bottom
    curves = {space: (1 - coeffs.found.by_step(space).double()).clamp_min(1e-7).log10() for space in CURVES}
    low = min(float(curve.min()) for curve in curves.values())
    high = max(float(curve.max()) for curve in curves.values())
    low, high = int(np.floor(low)), max(int(np.ceil(high)), int(np.floor(low)) + 1)
    steps = next(iter(curves.values())).shape[1]

    def x(step: float) -> float:
        return left + width * (step + 0.5) / steps

    def y(level: float) -> float:
        return top + height * (high - level) / (high - low)

    r2 = [float(coeffs.found.r2[coeffs.found.steps.index(step)]) for step in sorted(set(coeffs.found.steps))]
    for step, share in enumerate(r2):
        draw.rectangle((x(step - 0.35), top + height * (1 - min(max(share, 0), 1)), x(step + 0.35), top + height),
                       fill=(235, 235, 235))
    for level in range(low, high + 1):
        draw.line((left, y(level), left + width, y(level)), fill=GRID)
        draw.text((8, y(level) - 6), f"{1 - 10.0**level:.{max(-level, 0)}f}", fill=INK)
    for space, curve in curves.items():
        band = [(x(s), y(v)) for s, v in enumerate(curve.amax(0).tolist())]
        band += [(x(s), y(v)) for s, v in reversed(list(enumerate(curve.amin(0).tolist())))]
        if len(band) > 3:
            draw.polygon(band, fill=(*CURVES[space], 50))
        line = [(x(s), y(v)) for s, v in enumerate(curve.mean(0).tolist())]
        draw.line(line if len(line) > 1 else line * 2, fill=CURVES[space], width=2)
    for step in range(0, steps, max(1, steps // 10)):
        draw.text((x(step) - 4, top + height + 6), str(step + 1), fill=INK)
    draw.rectangle((left, top, left + width, top + height), outline=INK)
    draw.text((left, 8), "similarity per step: noise red, x0 blue; grey bars: share of guidance foretold", fill=INK)
    draw.text((left + width // 2 - 12, SIZE[1] - 22), "step", fill=INK)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)[None]


def summary(coeffs: GuidanceCoeffs) -> str:
    """What a calibration found, as text."""
    found = coeffs.found
    paths, steps = found.by_step("noise").shape
    lines = [f"{paths} paths of {steps} steps, {coeffs.sampler}, cfg {coeffs.cfg:g}, {coeffs.model}",
             "saving   threshold on noise   threshold on x0"]
    for saving in (0.1, 0.2, 0.25, 0.3, 0.4):
        thresholds = [threshold_for(found.by_step(space), saving) for space in CURVES]
        lines.append(f"{100 * saving:4.0f} %   {thresholds[0]:18.6f}   {thresholds[1]:15.6f}")
    lines.append("step   similarity of noise   of x0   share of guidance foretold")
    for step in range(steps):
        call = found.steps.index(step)
        noise, x0 = (float(found.by_step(space)[:, step].mean()) for space in CURVES)
        lines.append(f"{step + 1:4d}   {noise:19.6f}   {x0:.6f}   {float(found.r2[call]):.4f}")
    return "\n".join(lines)
