"""The low-rank factors of a layer's adapters, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.lowrank import Share
from .adapters import LowRank, Op, Span, frozen
from .gains import Marks
from .geometry import Geometry

EVEN = 8
"""More ranks than these are filled up with zeros to a multiple of them. Odd numbers, which files that were resized by
their singular values have, are slow: on a CPU 2 x 256 x 1280 took 1.28 ms at rank 15 and 0.66 ms at rank 16, and tensor
cores read what lies at multiples of 16 bytes."""


@dataclass(frozen=True)
class Slot:
    """Where one adapter's ranks lie in a stack, the alpha/rank that was folded into them, the rank that it was trained
    with, and how many of its ranks, the last, are zeros."""

    adapter: int
    start: int
    stop: int
    scale: float = 1.0
    rank: int = 0
    empty: int = 0

    @property
    def width(self) -> int:
        return self.stop - self.start

    @property
    def filled(self) -> slice:
        """Its ranks without the zeros."""
        return slice(self.start, self.stop - self.empty)


@dataclass(frozen=True)
class Slice:
    """A slice of a layer's weight: which, how many outputs it has, and its adapters, side by side in the stack."""

    span: Span
    out: int
    slots: tuple[Slot, ...]

    @property
    def ranks(self) -> slice:
        return slice(self.slots[0].start, self.slots[-1].stop)

    @property
    def width(self) -> int:
        return self.slots[-1].stop - self.slots[0].start

    @property
    def widths(self) -> list[tuple[int, int]]:
        """(adapter, its ranks), in order."""
        return [(slot.adapter, slot.width) for slot in self.slots]


def together(slots: Sequence[Slot]) -> Sequence[Slot]:
    """Neighbouring slots for a product of their ranks: one alone without the zeros that what lies beside it needs."""
    if len(slots) > 1:
        return slots
    own, = slots
    rank = own.width - own.empty
    empty = _even(rank) - rank
    return [replace(own, stop=own.start + rank + empty, empty=empty)]


class Slices(tuple):
    """The slices of a stack. Which products serve them is looked up by them for each layer of each layout, and all
    that they hold is hashed once."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()


class SlicePart(NamedTuple):
    """Some ranks of a stack's `k`-th slice; or, with a count above 1, all ranks of so many equal slices from the k-th
    on, which are one product."""

    k: int
    ranks: slice
    count: int


class Stack(nn.Module):
    """Low-rank factors of all adapters for the slices of one layer that have the same inputs, side by side along the
    rank, slice by slice.

    down [R, in, *k], R the sum of the ranks, of an adapter and of a slice in even numbers (`EVEN`); up [sum of out *
    ranks], the slices' [out, ranks] one after the other. alpha/rank is folded into up, in fp32 and rounded once, to
    `dtype`. What all slices need of an input is one product; neighbours of equal size are one array of matrices.
    """

    def __init__(self, slices: Mapping[Span, Mapping[int, LowRank]], dtype: torch.dtype | None = None):
        super().__init__()
        downs, ups, found, start = [], [], [], 0
        # Neighbours of equal size side by side, whatever larger slice a file has that holds them.
        for span in sorted(slices, key=lambda span: () if span is None else (span[2], span[1])):
            ops, slots, columns = slices[span], [], []
            for (adapter, op), empty in zip(ops.items(), _empty([op.down.shape[0] for op in ops.values()]),
                                            strict=True):
                width = op.down.shape[0] + empty
                slots.append(Slot(adapter, start, start + width, op.scale, op.rank, empty))
                start += width
                downs.append(_filled(op.down.to(dtype or op.down.dtype), 0, empty))
                columns.append(_filled((op.up.float() * op.scale).to(dtype or op.up.dtype), 1, empty))
            up = torch.cat(columns, dim=1)
            ups.append(up.flatten())
            found.append(Slice(span, up.shape[0], tuple(slots)))
        self.down, self.up = frozen(torch.cat(downs).contiguous()), frozen(torch.cat(ups))
        self.slices = Slices(found)
        self.slots = tuple(slot for each in found for slot in each.slots)
        self.adapters = tuple(slot.adapter for slot in self.slots)

    def of_slots(self, marks: Marks) -> Marks:
        """Per entry the gains of its adapters -> those of the slots."""
        if not marks or self.adapters == tuple(range(len(marks[0]))):
            return marks
        return tuple(tuple(row[adapter] for adapter in self.adapters) for row in marks)

    def ups(self, up: Tensor | None = None) -> list[Tensor]:
        """Per slice its factor [out, ranks], a view; `up`: of a copy of the stack's."""
        up = self.up if up is None else up
        parts = up.split([each.out * each.width for each in self.slices])
        return [flat.view(each.out, each.width) for flat, each in zip(parts, self.slices, strict=True)]

    def up_of(self, k: int, up: Tensor, ranks: slice) -> Tensor:
        """[ranks, out] of the k-th slice, a view; `ranks` as the stack counts them."""
        if len(self.slices) == 1:  # what programs of most layers are made of
            return up.view(self.slices[0].out, -1)[:, ranks].T
        first = self.slices[k].ranks.start
        return self.ups(up)[k][:, ranks.start - first:ranks.stop - first].T

    def slice_of(self, slot: Slot) -> int:
        """The number of the slice that a slot is in."""
        return next(k for k, each in enumerate(self.slices) if slot in each.slots)

    def alike(self, first: int) -> int:
        """How many slices from the first-th on are side by side, of equal size, with the same adapters of the same
        ranks."""
        one, count = self.slices[first], 1
        for each in self.slices[first + 1:] if one.span is not None else ():
            if each.span != (0, one.span[1] + count * one.out, one.out) or each.widths != one.widths:
                break
            count += 1
        return count

    def parts(self, ranks: slice) -> list[SlicePart]:
        """Neighbouring ranks, as few parts of slices as can be."""
        found, k = [], 0
        while k < len(self.slices):
            own = self.slices[k].ranks
            count = max(1, sum(1 for each in self.slices[k:k + self.alike(k)]
                               if ranks.start <= own.start and each.ranks.stop <= ranks.stop))
            own = slice(max(own.start, ranks.start), min(own.stop, ranks.stop))
            if own.start < own.stop:
                found.append(SlicePart(k, own, count))
            k += count
        return found

    def share(self, up: Tensor, ranks: slice, part: SlicePart) -> Share:
        """A part of what neighbouring ranks give to outputs."""
        k, own, count = part
        each = self.slices[k]
        start, rank = (0 if each.span is None else each.span[1]), own.start - ranks.start
        if count == 1:
            return Share(start, rank, self.up_of(k, up, own).unsqueeze(0))
        first = sum(before.out * before.width for before in self.slices[:k])
        return Share(start, rank, up[first:first + count * each.out * each.width].view(count, each.out, each.width).mT)


def _empty(ranks: Sequence[int]) -> list[int]:
    """How many zeros each adapter of a slice gets; the last one those of the slice too."""
    widths = [_even(rank) for rank in ranks]
    widths[-1] += _even(sum(widths)) - sum(widths)
    return [width - rank for width, rank in zip(widths, ranks, strict=True)]


def _even(ranks: int) -> int:
    return ranks + (-ranks % EVEN if ranks > EVEN else 0)


def _filled(factor: Tensor, dim: int, empty: int) -> Tensor:
    """With so many zeros behind it."""
    return F.pad(factor, (0, 0) * (factor.ndim - 1 - dim) + (0, empty)) if empty else factor


class StackOp(Op):
    """One adapter's part of a slice of a stack, as an op like others."""

    def __init__(self, stack: Stack, of: int, slot: Slot):
        super().__init__()
        # In a list, so that the stack is not registered once more as a module of this op.
        self._stack, self._of, self.slot = [stack], of, slot
        self.span, self.scale, self.rank = stack.slices[of].span, slot.scale, slot.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """(down [r, in, *k], up [out, r]), alpha/rank folded into up: views of the stack."""
        stack, slot = self._stack[0], self.slot
        own, first = slot.filled, stack.slices[self._of].ranks.start
        return stack.down[own], stack.ups()[self._of][:, own.start - first:own.stop - first]

    def delta(self, like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        down, up = (factor.to(like.device, dtype) for factor in self.factors())
        return (up @ down.flatten(1)).unflatten(1, down.shape[1:])

    def product(self, x: Tensor, geometry: Geometry) -> Tensor:
        down, up = self.factors()
        hidden = geometry.apply(x, down.to(x)).movedim(geometry.channel, -1)
        return (hidden @ up.to(x).T).movedim(-1, geometry.channel)
