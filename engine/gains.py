"""The gains of a run's batches, which programs know by marks: what is off, what is one, and what is equal.

What the other marks stand for is held here, in numbers and tensors that programs read. These change what they hold and
not where they lie, once per batch and only where a gain has changed: a strength that rises or falls from step to step
needs no program of its own, and what has recorded one goes on being right.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from itertools import count
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.branch import Branch
from ..kernels.lowrank import UNIT, Number
from .transfer import on_device

OFF, ONE = 0, 1
Marks = tuple[tuple[int, ...], ...]
"""Per entry of a layer, the mark of the gain of each adapter of a bank, or of each slot of a stack."""


class Marked(NamedTuple):
    """The branches of a batch, and their marks.

    branches  one per row
    of        gains of all adapters, as a layer has them -> their marks
    numbers   what marks stand for: (mark, gain)
    kind      the same for batches of other numbers, where what is off, one, and equal is the same. Branches that differ
              from layer to layer are a kind of their own: who chooses for each layer seldom chooses twice alike
    """

    branches: tuple[Branch, ...]
    of: Mapping[tuple[float, ...], tuple[int, ...]]
    numbers: tuple[tuple[int, float], ...]
    kind: Hashable


class Gains:
    """Marks, and what they stand for in the batch that is evaluated now (`held`)."""

    def __init__(self) -> None:
        self.held: Marked | None = None
        self._numbers = [Number(0.0), UNIT]  # by mark
        self._marks: dict[tuple[int, Hashable], int] = {}
        self._marked: dict[Hashable, Marked] = {}
        self._tensors: dict[Hashable, Tensor] = {}
        self._after: list[tuple[frozenset[int], Callable[[], object]]] = []

    def forget(self) -> None:
        """Let go of all tensors."""
        self._tensors.clear()
        self._after.clear()

    def marked(self, branches: Sequence[Branch]) -> Marked:
        """The branches of a batch by marks.

        While gradients are recorded, which may be asked for when the next batch is evaluated, each number has a mark of
        its own.
        """
        key = branches, lone = tuple(branches), torch.is_grad_enabled()
        if key not in self._marked:
            self._marked[key] = self._mark(branches, lone)
        return self._marked[key]

    def _mark(self, branches: tuple[Branch, ...], lone: bool) -> Marked:
        distinct, rows = dict.fromkeys(branches), {}
        for branch in distinct:
            rows |= dict.fromkeys((branch.gains, *map(itemgetter(1), branch.per_module)))
        marks: dict[float, int] = {0.0: OFF, 1.0: ONE}
        # By adapters, so that what one has is called alike whichever of the others act.
        for adapter, column in enumerate(zip(*rows, strict=True)):
            place = count()
            for gain in dict.fromkeys(column):
                if gain not in marks:
                    name = adapter, (gain,) if lone else next(place)
                    marks[gain] = self._marks.setdefault(name, len(self._marks) + ONE + 1)
        self._numbers += [Number() for _ in range(len(self._marks) + ONE + 1 - len(self._numbers))]
        of = {gains: tuple(map(marks.__getitem__, gains)) for gains in rows}
        alike = not any(branch.per_module for branch in distinct)
        return Marked(branches, of, tuple((mark, gain) for gain, mark in marks.items() if mark > ONE),
                      tuple(of[branch.gains] for branch in branches) if alike else (branches, lone))

    def hold(self, marked: Marked) -> None:
        """From now on marks stand for the gains of this batch."""
        if marked is self.held:
            return
        changed = [mark for mark, gain in marked.numbers if self._numbers[mark].value != gain]
        for mark, gain in marked.numbers:
            self._numbers[mark].value = gain
        self.held = marked
        with torch.inference_mode():  # what was made in it may be changed nowhere else
            for marks, fill in self._after if changed else ():
                if not marks.isdisjoint(changed):
                    fill()

    def number(self, mark: int) -> Number:
        """What a mark stands for, as a number that follows it."""
        return self._numbers[mark]

    def values(self, marks: Iterable[int]) -> tuple[float, ...]:
        """What marks stand for now."""
        return tuple(self._numbers[mark].value for mark in marks)

    def after(self, marks: Collection[int], fill: Callable[[], object]) -> None:
        """`fill` is called whenever one of the marks stands for something new, after those that were named before it.
        """
        self._after.append((frozenset(marks), fill))

    def tensor(self, widths: Sequence[int], marks: Marks, spatial: int, dimensions: int, like: Tensor,
               size: tuple[int, ...] = ()) -> Tensor:
        """Gains [rows of marks, slots], each for so many ranks, as gains that broadcast over hidden values:
        [rows, R, 1, ..] for convolutions, [rows, 1, .., R] for layers with so many token dimensions; with `size`, in
        that size. Layers share them: each is a copy to the device."""
        widths, device, dtype = tuple(widths), like.device, like.dtype
        key = widths, marks, spatial, dimensions, dtype, device, size
        if key not in self._tensors:
            ranks = [mark for row in marks for mark, width in zip(row, widths, strict=True) for _ in range(width)]
            ones = [1] * (spatial or dimensions)
            shape = (len(marks), -1, *ones) if spatial else (len(marks), *ones, -1)

            def now() -> Tensor:
                return on_device(self.values(ranks), device, dtype).reshape(shape)

            gain = now().expand(size).contiguous() if size else now()
            self.after(set(ranks), lambda: gain.copy_(now()))
            self._tensors[key] = gain
        return self._tensors[key]
