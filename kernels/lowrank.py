"""Low-rank branches: y += gain * B (A x), in place, without ever forming B A.

Shapes use r for the rank (of one adapter or of several laid side by side) and n for rows x tokens. Factors and
activations share one dtype; products accumulate as the backend's matrix multiply does (fp32 for bf16 and fp16).
`gain` is a number, or a tensor of length r that gives each rank its own gain (adapters of unequal strength).
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_linear_(y: Tensor, x: Tensor, down: Tensor, up: Tensor, gain: float | Tensor) -> Tensor:
    """Semantics: y[n] += up @ (gain * (down @ x[n])).

    Shape: y [n, out], x [n, in], down [r, in], up [out, r]. y may be a column slice of a wider tensor.
    """
    hidden = x @ down.T
    if isinstance(gain, Tensor):
        return y.addmm_(hidden * gain, up.T)
    return y.addmm_(hidden, up.T, alpha=gain)


def add_linear_batched_(y: Tensor, x: Tensor, down: Tensor, up: Tensor, gain: float | Tensor) -> Tensor:
    """`add_linear_` for g groups of rows at once, each with its own factors: two launches however many groups.

    Shape: y [g, n, out], x [g, n, in], down [g, r, in], up [g, out, r], gain a number or [g, 1, 1].
    """
    hidden = torch.bmm(x, down.mT)
    if isinstance(gain, Tensor):
        return y.baddbmm_(hidden * gain, up.mT)
    return y.baddbmm_(hidden, up.mT, alpha=gain)


def add_pointwise_(y: Tensor, hidden: Tensor, up: Tensor, gain: float | Tensor) -> Tensor:
    """Second half of a convolution's low-rank branch: y[b, :, p] += up @ (gain * hidden[b, :, p]) at each position p.

    Shape: y [b, out, *size], hidden [b, r, *size], up [out, r]; any number of size dimensions and any memory format.
    """
    if isinstance(gain, Tensor):
        hidden = hidden * gain.reshape(-1, *[1] * (hidden.ndim - 2))
        gain = 1.0
    if y.is_contiguous() and hidden.is_contiguous():
        flat = y.view(y.shape[0], y.shape[1], -1)
        flat.baddbmm_(up.expand(y.shape[0], -1, -1), hidden.view(hidden.shape[0], hidden.shape[1], -1), alpha=gain)
        return y
    last = y.movedim(1, -1)
    if last.is_contiguous():  # channels last
        last.view(-1, y.shape[1]).addmm_(hidden.movedim(1, -1).reshape(-1, hidden.shape[1]), up.T, alpha=gain)
        return y
    delta = torch.einsum("or,br...->bo...", up, hidden)
    return y.add_(delta, alpha=gain)
