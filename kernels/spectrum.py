"""The radial spectrum of a latent, and its high-frequency share (CMLoRA, Zou et al. 2025, arXiv 2502.04923).

    A(r)  = mean of |FFT2(X)| over the frequencies of radius r, X the channel mean
    A^(r) = A(r) / max_r A(r)
    H_h   = mean of A^(r) over r >= h R_max

The radius is relative to each axis, sqrt((kx / W)^2 + (ky / H)^2), in units of 1 / min(H, W): on square latents that is
the paper's int(sqrt(kx^2 + ky^2)), and on others a bin still holds equal physical frequencies. No bin is ever empty.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HIGH = 0.2
"""h: from this share of the largest radius on frequencies are high."""


def radial_bins(h: int, w: int, device: torch.device | None = None) -> Tensor:
    """The averages over rings as one matrix: |rfft2(X)| [..., h (w // 2 + 1)] @ it -> A [..., bins], fp32.

    Every half-spectrum frequency counts as often as it occurs in the whole spectrum. Build it once per size.
    """
    ky = torch.fft.fftfreq(h, 1 / h, dtype=torch.float64)[:, None]
    kx = torch.arange(w // 2 + 1, dtype=torch.float64)[None]
    unit = min(side for side in (h, w) if side > 1 or h == w == 1)
    ring = ((kx * (unit / w)).square() + (ky * (unit / h)).square()).sqrt().long()
    twice = (kx > 0) & ((kx < w / 2) | (w % 2 == 1))
    counts = torch.where(twice, 2.0, 1.0).double().expand(h, -1).flatten()
    corner = math.sqrt((w // 2 * (unit / w)) ** 2 + (h // 2 * (unit / h)) ** 2)
    matrix = torch.zeros(h * (w // 2 + 1), int(corner) + 1, dtype=torch.float64)
    matrix[torch.arange(len(matrix)), ring.flatten()] = counts
    return (matrix / matrix.sum(dim=0)).float().to(device)


def radial_amplitude(x: Tensor, bins: Tensor) -> Tensor:
    """A^ of every picture: x [B, C, *size] -> [B, bins] in fp32, in [0, 1] with a largest entry of 1 (all 0 for a
    latent that is 0). Frames of a video are averaged; a sequence [B, C, length] is a picture with one row."""
    plane = x.float().mean(dim=1)
    plane = plane[:, None] if plane.ndim == 2 else plane
    plane = plane[:, None] if plane.ndim == 3 else plane
    amplitude = _transformed(plane).flatten(-2) @ bins
    amplitude = amplitude.mean(dim=1)
    return amplitude / amplitude.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _transformed(plane: Tensor) -> Tensor:
    """|rfft2| of the last two dimensions; through the CPU where the device has no Fourier transform (DirectML), but not
    where it has one that fails."""
    try:
        return torch.fft.rfft2(plane, norm="ortho").abs()
    except NotImplementedError:
        return torch.fft.rfft2(plane.cpu(), norm="ortho").abs().to(plane.device)


def high_share(amplitude: Tensor) -> Tensor:
    """H_h: the mean of A^ [..., bins] over the radii from h R_max on, h = HIGH -> [...]."""
    last = amplitude.shape[-1] - 1
    return amplitude[..., min(math.ceil(HIGH * last), last):].mean(dim=-1)


def late_change(own: Tensor, ground: Tensor) -> tuple[float, float]:
    """How far shares lie from those of the same pictures without a change, both [steps, pictures]: of the means over
    the second half of the run, where the latent is more picture than noise, (own / ground - 1, its standard error over
    the pictures; 0 for one picture). Reads the result, so it belongs at the end of a run."""
    own, ground = (shares[len(shares) // 2:].double().mean(dim=0) for shares in (own, ground))
    level = ground.mean().clamp_min(1e-12)
    ratio = own.mean() / level
    # The usual error of a ratio of means: pictures with little detail of their own do not count for more.
    error = ((own - ratio * ground).std() / level).item() / len(own) ** 0.5 if len(own) > 1 else 0.0
    return ratio.item() - 1, error
