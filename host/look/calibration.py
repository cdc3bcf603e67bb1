"""What a calibration of guidance found, as a picture and as text."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ...kernels.guidance import threshold_for
from ...methods.counted import counted
from ..guidance.coeffs import GuidanceCoeffs
from .chart import Lines, Series
from .sheet import as_image, sheet
from .theme import BLUE, LIGHT, ORANGE, Theme

SPACES = {"noise": ORANGE, "x0": BLUE}


def plot(coeffs: GuidanceCoeffs, theme: Theme = LIGHT) -> Tensor:
    """IMAGE [1, height, width, 3]: the similarity per step, on a logarithmic scale of its distance from 1; the mean as
    a line, the range over the paths as a band; the share of guidance that LinearAG foretells as grey columns."""
    found = coeffs.found
    curves = {space: (1 - found.by_step(space).double()).clamp_min(1e-7).log10() for space in SPACES}
    low = int(np.floor(min(float(curve.min()) for curve in curves.values())))
    high = max(int(np.ceil(max(float(curve.max()) for curve in curves.values()))), low + 1)
    foretold = [float(found.r2[found.steps.index(step)]) for step in sorted(set(found.steps))]
    chart = Lines("Similarity of the two sides of guidance",
                  [Series(f"of {space}", curve.mean(0).tolist(), SPACES[space]) for space, curve in curves.items()],
                  tall=380, lowest=low, highest=high,
                  marks=[(level, f"{1 - 10.0**level:.{max(-level, 0)}f}") for level in range(low, high + 1)],
                  bands=[list(zip(curve.amin(0).tolist(), curve.amax(0).tolist(), strict=True))
                         for curve in curves.values()],
                  behind=Series("share of guidance that LinearAG foretells", foretold))
    return as_image(sheet([chart], "Calibrate Guidance", _about(coeffs), theme))


def summary(coeffs: GuidanceCoeffs) -> str:
    """What a calibration found, as text."""
    found = coeffs.found
    lines = [_about(coeffs), "saving   threshold on noise   threshold on x0"]
    for saving in (0.1, 0.2, 0.25, 0.3, 0.4):
        thresholds = [threshold_for(found.by_step(space), saving) for space in SPACES]
        lines.append(f"{100 * saving:4.0f} %   {thresholds[0]:18.6f}   {thresholds[1]:15.6f}")
    lines.append("step   similarity of noise   of x0   share of guidance foretold")
    for step in range(found.by_step("noise").shape[1]):
        call = found.steps.index(step)
        noise, x0 = (float(found.by_step(space)[:, step].mean()) for space in SPACES)
        lines.append(f"{step + 1:4d}   {noise:19.6f}   {x0:.6f}   {float(found.r2[call]):.4f}")
    return "\n".join(lines)


def _about(coeffs: GuidanceCoeffs) -> str:
    paths, steps = coeffs.found.by_step("noise").shape
    return f"{counted(paths, 'path')} of {counted(steps, 'step')}, {coeffs.sampler}, cfg {coeffs.cfg:g}, {coeffs.model}"
