"""Low-rank branches: y += alpha * up^T (gain * (down x)), in place, without ever forming the product of the factors.

R is the rank of one adapter, or of several laid side by side. `gain` multiplies the hidden values, one number for each
row, place and rank, and broadcasts: [R] for adapters of unequal strength, [n, 1, R] for rows of different branches,
[n, T, R] for adapters that act in some places only; None for all ones. `alpha` is a number that all ranks share, and
that may be another one at each call.
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

Update = Callable[[Tensor, Tensor], Tensor]
"""(y, x) -> y with what is added to it, in place where that can be: y a layer's output, x its input."""


class Number:
    """A number that products read whenever they run."""

    __slots__ = ("value",)

    def __init__(self, value: float = 0.0):
        self.value = value


UNIT = Number(1.0)
"""The number of what is added as it is; it stays what it is."""


def rows(down: Tensor, up: Tensor, gain: Tensor | None = None, alpha: Number = UNIT) -> Update:
    """For vectors. Shape: y [n, out], x [n, in], down [R, in], up [R, out], gain like [n, R].

    y may be a column slice of a wider tensor.
    """
    mm, down = torch.mm, down.T

    def update(y: Tensor, x: Tensor) -> Tensor:
        hidden = mm(x, down)
        return y.addmm_(hidden if gain is None else hidden.mul_(gain), up, alpha=alpha.value)

    return update


def tokens(down: Tensor, up: Tensor, gain: Tensor | None = None, alpha: Number = UNIT) -> Update:
    """For tokens. Shape: y [n, T, out], x [n, T, in], down [R, in], up [n, R, out], gain like [n, T, R].

    `up` is one matrix expanded over the rows, a view: so neither y nor the hidden values need a view of their own.
    """
    multiply, down = _into_ranks(down, up.shape[0])
    if gain is None and alpha is UNIT:
        return lambda y, x: y.baddbmm_(multiply(x, down), up)
    if gain is None:
        return lambda y, x: y.baddbmm_(multiply(x, down), up, alpha=alpha.value)
    if alpha is UNIT:
        return lambda y, x: y.baddbmm_(multiply(x, down).mul_(gain), up)
    return lambda y, x: y.baddbmm_(multiply(x, down).mul_(gain), up, alpha=alpha.value)


def _into_ranks(down: Tensor, entries: int | None) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """(f, down or a view of it) with f(x, that) = x down^T, for so many entries of tokens; None: for vectors.

    `bmm` with one matrix for all entries takes a third less of the host's time than a linear layer, and no more of a
    GPU's in half precision. In fp32 an H200 took 24.5 us for 2 x 1024 x 1280 at rank 16 where the linear layer took
    13.6.
    """
    if entries is None:
        return torch.mm, down.T
    if down.is_cuda and down.dtype == torch.float32:
        return F.linear, down
    return torch.bmm, down.T.expand(entries, -1, -1)


class Columns(NamedTuple):
    """Neighbouring columns of a matrix: the first of them, and the width of the whole matrix."""

    start: int
    width: int


class Share(NamedTuple):
    """What some outputs take of the hidden values: those of slices of equal size, side by side from `start` on, with as
    many ranks each, side by side from `rank` on.

    up   [slices, ranks of a slice, outputs of a slice]
    """

    start: int
    rank: int
    up: Tensor

    @property
    def outputs(self) -> tuple[int, int]:
        """(first, how many)"""
        return self.start, self.up.shape[0] * self.up.shape[2]

    @property
    def ranks(self) -> tuple[int, int]:
        """(first, how many)"""
        return self.rank, self.up.shape[0] * self.up.shape[1]


def shares(down: Tensor, parts: Sequence[Share], entries: int | None, outputs: int, gain: Tensor | None = None,
           alpha: Number = UNIT) -> Update:
    """For a layer that is several in one weight (q, k and v): one product for what all of them need of the input, and
    one for each of `parts`.

    entries, outputs   what y and x have; None: vectors, of which there may be any number
    Shape: y [n, out] or [n, T, out], x likewise [.., in], down [R, in], gain like [.., R].
    """
    ranks = down.shape[0]
    multiply, down = _into_ranks(down, entries)
    outs, ins = _pieces([part.outputs for part in parts], outputs), _pieces([part.ranks for part in parts], ranks)
    factors = [part.up if len(part.up) > 1 else part.up[0] for part in parts]
    (count, rank, width), up = parts[0].up.shape, parts[0].up

    def into_columns(y: Tensor, x: Tensor) -> Tensor:
        hidden = multiply(x, down) if gain is None else multiply(x, down).mul_(gain)
        if not y.is_contiguous():
            return _add_apart_(y, hidden, parts, alpha.value)
        for into, of, up in zip(outs(y.view(-1, outputs)), ins(hidden.view(-1, ranks)), factors, strict=True):
            if up.ndim == 2:
                into.addmm_(of, up, alpha=alpha.value)
            else:
                count, rank, width = up.shape
                _slices(into, count, width).baddbmm_(_slices(of, count, rank), up, alpha=alpha.value)
        return y

    def into_all(y: Tensor, x: Tensor) -> Tensor:
        hidden = multiply(x, down) if gain is None else multiply(x, down).mul_(gain)
        if not y.is_contiguous():
            return _add_apart_(y, hidden, parts, alpha.value)
        _slices(y, count, width).baddbmm_(_slices(hidden, count, rank), up, alpha=alpha.value)
        return y

    return into_all if len(parts) == 1 and count > 1 and count * width == outputs else into_columns


def _pieces(cuts: Sequence[tuple[int, int]], width: int) -> Callable[[Tensor], Sequence[Tensor]]:
    """A function: matrix of `width` columns -> its columns (first, how many) of each of the cuts, views. All of them by
    one operation, where they do not overlap but for those that are the whole."""
    whole = (0, width)
    edges = sorted({0, width, *(edge for start, count in cuts for edge in (start, start + count))})
    found = {(start, stop - start): k for k, (start, stop) in enumerate(zip(edges, edges[1:], strict=False))}
    if all(cut == whole for cut in cuts):
        return lambda matrix: [matrix] * len(cuts)
    if len(cuts) == 1 or any(cut != whole and cut not in found for cut in cuts):
        return lambda matrix: [matrix.narrow(1, *cut) for cut in cuts]
    sizes, order = [count for _, count in found], [len(found) if cut == whole else found[cut] for cut in cuts]
    split = torch.split_with_sizes
    if order == list(range(len(found))):
        return lambda matrix: split(matrix, sizes, 1)

    def pieces(matrix: Tensor) -> Sequence[Tensor]:
        parts = (*split(matrix, sizes, 1), matrix)
        return [parts[k] for k in order]

    return pieces


def _slices(rows: Tensor, count: int, width: int) -> Tensor:
    """[count, rows, width] of so many slices side by side, a view."""
    return rows.view(-1, count, width).transpose(0, 1)


def _add_apart_(y: Tensor, hidden: Tensor, parts: Sequence[Share], alpha: float) -> Tensor:
    """For outputs that lie anyhow in memory."""
    for start, rank, up in parts:
        for k, factor in enumerate(up):
            ranks, out = factor.shape
            y.narrow(-1, start + k * out, out).add_(hidden.narrow(-1, rank + k * ranks, ranks) @ factor, alpha=alpha)
    return y


def shares_apart(down: Tensor, part: Share, outputs: int, alpha: Number = UNIT) -> Update:
    """The same for one part, where what a slice needs of the input does not lie beside what the next one needs.

    Shape: down [slices, in, ranks of a slice].
    """
    (count, _, out), up, cut = part.up.shape, part.up, None if part.outputs == (0, outputs) else part.outputs

    def update(y: Tensor, x: Tensor) -> Tensor:
        hidden = torch.bmm(x.reshape(1, -1, x.shape[-1]).expand(count, -1, -1), down)
        if not y.is_contiguous():
            hidden = hidden.transpose(0, 1).reshape(*y.shape[:-1], -1)
            return _add_apart_(y, hidden, [part._replace(rank=0)], alpha.value)
        _slices(y if cut is None else y.narrow(-1, *cut), count, out).baddbmm_(hidden, up, alpha=alpha.value)
        return y

    return update


def grouped(down: Tensor, up: Tensor, rows: int, gain: Tensor | None = None, alpha: Number = UNIT, first: int = 0,
            into: Columns | None = None, of: Columns | None = None) -> Update:
    """One adapter per group of rows, groups of equal length one after the other: two products however many groups.

    rows       of a group; tokens are rows of their own
    first      the row of y and x at which the first group starts
    into, of   columns of y and of x that take part; None: all
    Shape: y [.., out], x [.., in], down [g, in, r], up [g, r, out], gain like [g, rows, r].

    Each of the two is a single view, by sizes and strides: which rows, in which groups, and which columns.
    """
    multiply, (count, inputs, _), outputs = torch.bmm, down.shape, up.shape[2]
    (x_start, x_width), (y_start, y_width) = of or Columns(0, inputs), into or Columns(0, outputs)
    x_size, x_strides, x_start = (count, rows, inputs), (rows * x_width, x_width, 1), first * x_width + x_start
    y_size, y_strides, y_start = (count, rows, outputs), (rows * y_width, y_width, 1), first * y_width + y_start

    def update(y: Tensor, x: Tensor) -> Tensor:
        if not y.is_contiguous():
            return y.copy_(update(y.contiguous(), x))
        if not x.is_contiguous():
            x = x.contiguous()
        hidden = multiply(x.as_strided(x_size, x_strides, x.storage_offset() + x_start), down)
        if gain is not None:
            hidden.mul_(gain)
        y.as_strided(y_size, y_strides, y.storage_offset() + y_start).baddbmm_(hidden, up, alpha=alpha.value)
        return y

    return update


def add_pointwise_(y: Tensor, hidden: Tensor, up: Tensor, gain: Tensor | None = None, alpha: Number = UNIT) -> Tensor:
    """Second half of a convolution's branch: y[b, :, p] += alpha * up^T (gain * hidden[b, :, p]) at each position p.

    Shape: y [b, out, *size], hidden [b, R, *size] (overwritten), up [R, out], gain like hidden; any number of size
    dimensions and any memory format.
    """
    if gain is not None:
        hidden = hidden.mul_(gain)
    if y.is_contiguous() and hidden.is_contiguous():
        flat = y.view(y.shape[0], y.shape[1], -1)
        flat.baddbmm_(up.mT.expand(y.shape[0], -1, -1), hidden.view(hidden.shape[0], hidden.shape[1], -1),
                      alpha=alpha.value)
        return y
    last = y.movedim(1, -1)
    if last.is_contiguous():  # channels last
        last.view(-1, y.shape[1]).addmm_(hidden.movedim(1, -1).reshape(-1, hidden.shape[1]), up, alpha=alpha.value)
        return y
    return y.add_(torch.einsum("ro,br...->bo...", up, hidden), alpha=alpha.value)
