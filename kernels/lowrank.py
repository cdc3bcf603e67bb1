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

from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class Share(NamedTuple):
    """What some outputs take of the hidden values: those of slices of equal size, side by side from `start` on, with as
    many ranks each, side by side from `rank` on.

    up   [slices, ranks of a slice, outputs of a slice]
    """

    start: int
    rank: int
    up: Tensor


def shares(down: Tensor, parts: Sequence[Share], gain: Tensor | None = None, alpha: float = 1.0) -> Run:
    """For a layer that is several in one weight (q, k and v): one product for what all of them need of the input, and
    one for each of `parts`.

    Shape: y [n, out] or [n, T, out], x likewise [.., in], down [R, in], gain like [.., R].
    """
    linear, ranks, adds = F.linear, down.shape[0], [_share(part, alpha) for part in parts]

    def run(y: Tensor, x: Tensor) -> Tensor:
        hidden = linear(x, down) if gain is None else linear(x, down).mul_(gain)
        if not y.is_contiguous():
            return _add_apart_(y, hidden, parts, alpha)
        outputs, hidden = y.view(-1, y.shape[-1]), hidden.view(-1, ranks)
        for add in adds:
            add(outputs, hidden)
        return y

    return run


def _share(part: Share, alpha: float) -> Callable[[Tensor, Tensor], None]:
    """For rows of outputs and of hidden values, both in one piece of memory."""
    start, rank, up = part
    count, ranks, out = up.shape

    if count == 1:
        def add(y: Tensor, hidden: Tensor) -> None:
            y.narrow(1, start, out).addmm_(hidden.narrow(1, rank, ranks), up[0], alpha=alpha)
    else:
        def add(y: Tensor, hidden: Tensor) -> None:
            _slices(y, start, count, out).baddbmm_(_slices(hidden, rank, count, ranks), up, alpha=alpha)
    return add


def _slices(rows: Tensor, start: int, count: int, width: int) -> Tensor:
    """[count, rows, width] of rows in one piece of memory, a view."""
    if rows.shape[-1] != count * width:
        rows = rows.narrow(-1, start, count * width)
    return rows.view(-1, count, width).transpose(0, 1)


def _add_apart_(y: Tensor, hidden: Tensor, parts: Sequence[Share], alpha: float) -> Tensor:
    """For outputs that lie anyhow in memory."""
    for start, rank, up in parts:
        for k, factor in enumerate(up):
            ranks, out = factor.shape
            y.narrow(-1, start + k * out, out).add_(hidden.narrow(-1, rank + k * ranks, ranks) @ factor, alpha=alpha)
    return y


def shares_apart(down: Tensor, part: Share, alpha: float = 1.0) -> Run:
    """The same for one part, where what a slice needs of the input does not lie beside what the next one needs.

    Shape: down [slices, in, ranks of a slice].
    """
    start, _, up = part
    count, _, out = up.shape

    def run(y: Tensor, x: Tensor) -> Tensor:
        hidden = torch.bmm(x.reshape(1, -1, x.shape[-1]).expand(count, -1, -1), down)
        if not y.is_contiguous():
            return _add_apart_(y, hidden.transpose(0, 1).reshape(*y.shape[:-1], -1), [part._replace(rank=0)], alpha)
        _slices(y, start, count, out).baddbmm_(hidden, up, alpha=alpha)
        return y

    return run


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
