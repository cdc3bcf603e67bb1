"""Low-rank branches: y += alpha * up^T (gain * (down x)), in place, without ever forming the product of the factors.

R is the rank of one adapter, or of several laid side by side. `gain` multiplies the hidden values, one number for each
row, place and rank, and broadcasts: [R] for adapters of unequal strength, [n, 1, R] for rows of different branches,
[n, T, R] for adapters that act in some places only; None for all ones. `alpha` is a number that all ranks share.
Factors and activations have one dtype; products accumulate as the backend's matrix multiply does (fp32 for bf16 and
fp16).

A branch is called at every layer of a model, where the host's time counts: `rows` and `tokens` return functions
(y, x) -> y that look at nothing but the two tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[Tensor, Tensor], Tensor]


def rows(down: Tensor, up: Tensor, gain: Tensor | None = None, alpha: float = 1.0) -> Run:
    """For vectors. Shape: y [n, out], x [n, in], down [R, in], up [R, out], gain like [n, R].

    y may be a column slice of a wider tensor.
    """
    def run(y: Tensor, x: Tensor) -> Tensor:
        hidden = F.linear(x, down)
        return y.addmm_(hidden if gain is None else hidden.mul_(gain), up, alpha=alpha)

    return run


def tokens(down: Tensor, up: Tensor, gain: Tensor | None = None, alpha: float = 1.0) -> Run:
    """For tokens. Shape: y [n, T, out], x [n, T, in], down [R, in], up [n, R, out], gain like [n, T, R].

    `up` is one matrix expanded over the rows, a view: so neither y nor the hidden values need a view of their own.
    """
    linear = F.linear
    if gain is None and alpha == 1:
        return lambda y, x: y.baddbmm_(linear(x, down), up)
    if gain is None:
        return lambda y, x: y.baddbmm_(linear(x, down), up, alpha=alpha)
    if alpha == 1:
        return lambda y, x: y.baddbmm_(linear(x, down).mul_(gain), up)
    return lambda y, x: y.baddbmm_(linear(x, down).mul_(gain), up, alpha=alpha)


def add_batched_(y: Tensor, x: Tensor, down: Tensor, up: Tensor, gain: Tensor | None = None,
                 alpha: float = 1.0) -> Tensor:
    """One adapter per group of rows: two launches however many groups.

    Shape: y [g, n, out], x [g, n, in], down [g, in, r], up [g, r, out], gain like [g, n, r].
    """
    hidden = torch.bmm(x, down)
    return y.baddbmm_(hidden if gain is None else hidden.mul_(gain), up, alpha=alpha)


def add_pointwise_(y: Tensor, hidden: Tensor, up: Tensor, gain: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """Second half of a convolution's branch: y[b, :, p] += alpha * up^T (gain * hidden[b, :, p]) at each position p.

    Shape: y [b, out, *size], hidden [b, R, *size] (overwritten), up [R, out], gain like hidden; any number of size
    dimensions and any memory format.
    """
    if gain is not None:
        hidden = hidden.mul_(gain)
    if y.is_contiguous() and hidden.is_contiguous():
        flat = y.view(y.shape[0], y.shape[1], -1)
        flat.baddbmm_(up.mT.expand(y.shape[0], -1, -1), hidden.view(hidden.shape[0], hidden.shape[1], -1), alpha=alpha)
        return y
    last = y.movedim(1, -1)
    if last.is_contiguous():  # channels last
        last.view(-1, y.shape[1]).addmm_(hidden.movedim(1, -1).reshape(-1, hidden.shape[1]), up, alpha=alpha)
        return y
    return y.add_(torch.einsum("ro,br...->bo...", up, hidden), alpha=alpha)
