"""Products that add low-rank deltas of a stack to entries of a layer, and the time that each is expected to take."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor

from ..kernels.lowrank import Number, Share, Update, add_pointwise_, rows, shares, shares_apart, tokens
from .adapters import Span, part
from .gains import OFF, ONE, Gains, Marks
from .geometry import Geometry
from .stack import SlicePart, Slot, Stack, together
from .transfer import on_device

Entries = tuple[int, ...]
Where = Callable[[Entries, Sequence[Slot], Marks], Tensor]
"""(entries, slots, marks) -> gains of hidden values [entries, .., ranks of the slots]: an entry's gain for the slot
(one row of marks serves all entries) times how much of the adapter acts at each place. It is always the same tensor: an
update of the places, or of what marks stand for, changes what it holds."""
MakeOnce = Callable[[Hashable, Callable[[], Any]], Any]


@dataclass(frozen=True)
class Rates:
    """What a device does in a second, roughly; only ratios matter.

    launch   seconds until the host has started an operation
    view     seconds to make a view of a tensor
    madds    multiply-adds of thin products
    values   values read or written
    """

    launch: float
    view: float
    madds: float
    values: float


# Measured on one core of a server's CPU at fp32; a GPU's are those of a host that starts an operation in 5 us and of a
# card of 2023 in half precision.
RATES = {"cpu": Rates(2e-6, 1e-6, 4.2e10, 2e9)}
ACCELERATOR = Rates(5e-6, 1e-6, 1e14, 1e12)


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer, as far as a program depends on it.

    y, x       output and input, of which only shapes, strides, dtypes and devices count
    geometry   the layer's
    factors    stack -> its down and up, in the dtype and on the device of x
    gains      what marks stand for
    where      where adapters act inside the entries; None: everywhere
    beneath    how many adapters, the first of the bank, act everywhere whatever `where` says
    once       (key, make) -> what `make` gave for the key when it was first asked for, in this run
    """

    y: Tensor
    x: Tensor
    geometry: Geometry
    factors: Callable[[Stack], tuple[Tensor, Tensor]]
    gains: Gains
    where: Where | None = None
    beneath: int = 0
    once: MakeOnce = lambda key, make: make()

    def everywhere(self, adapter: int) -> bool:
        return self.where is None or adapter < self.beneath

    def narrowed(self, entries: Entries) -> LayerCall:
        """The call for some of its entries alone."""
        where = self.where
        return replace(self, y=self.y[:len(entries)], x=self.x[:len(entries)], where=None if where is None else
                       lambda some, *more: where(tuple(entries[e] for e in some), *more))

    @property
    def rates(self) -> Rates:
        return RATES.get(self.x.device.type, ACCELERATOR)

    @property
    def places(self) -> int:
        """Of one entry."""
        return self.y[0].numel() // self.y.shape[self.geometry.channel]

    def work(self, stack: Stack, entries: int, widths: Sequence[tuple[int, int]]) -> float:
        """Seconds of arithmetic of one product, given ranks and outputs of each slice."""
        inputs = stack.down[0].numel()
        return entries * self.places * sum(width * (inputs + out) for width, out in widths) / self.rates.madds


Built = tuple[Update, str]
"""A product, and the same in words."""


@dataclass(frozen=True)
class Way:
    """One way to do what a stack has to do, for all layers of one shape.

    build     (call, stack) -> its products, with the tensors that they need
    seconds   expected time
    """

    build: Callable[[LayerCall, Stack], list[Built]]
    seconds: float


def product(call: LayerCall, stack: Stack, slots: Sequence[Slot], entries: Entries, marks: Marks) -> Way:
    """The neighbouring `slots` of a stack on some entries, `marks` with one gain per entry and slot."""
    slots = together(slots)
    ranks, n, rates = slice(slots[0].start, slots[-1].stop), len(entries), call.rates
    common, needed = _common(call, marks)
    parts = stack.parts(ranks)
    (first, own, count), span, outputs = parts[0], stack.slices[parts[0].k].span, call.y.shape[-1]
    lone, width = len(parts) == count == 1, ranks.stop - ranks.start
    size = () if call.geometry.spatial else sized(call, (n, call.places, width) if call.x.ndim > 2 else (n, width))
    # Slices of outputs are columns of one matrix of all rows: a product into one of a batch of matrices is no product
    # for a BLAS.
    columns = not lone or (span is not None and span[0] == 0 and not call.geometry.spatial)

    def build(call: LayerCall, stack: Stack) -> list[Built]:
        down, up = call.factors(stack)
        gain, alpha = None, call.gains.number(common)
        if needed is not None:
            gain = call.where(entries, slots, needed) if call.where is not None else call.gains.tensor(
                [slot.width for slot in slots], needed, call.geometry.spatial, min(call.x.ndim - 2, 1), call.x, size)
            if gain.ndim > 3 and not call.geometry.spatial:  # a view, which is brought up to date with its tensor
                gain = gain.flatten(1, -2)
        if columns:
            add = shares(down[ranks], [stack.share(up, ranks, each) for each in parts],
                         None if call.x.ndim == 2 else n, outputs, gain, alpha)
            add = add if call.x.ndim <= 3 else _flat(add)
        else:
            add = _added(call.geometry, call.x.ndim, n, down[ranks], stack.up_of(first, up, own), gain, alpha, span)
        text = f"{n} of {call.y.shape[0]} entries, rank {width}"
        text += "" if gain is None else f", gains {'x'.join(map(str, gain.shape))}"
        return [(on_entries(add, entries, call.y), text + (in_words(span) if lone else f", {len(parts)} for slices"))]

    seconds = (1 + len(parts) + (needed is not None)) * rates.launch
    seconds += (_views(stack, parts, width, outputs) if columns else 0 if span is None else 1) * rates.view
    seconds += call.work(stack, n, [(own.stop - own.start, stack.slices[k].out) for k, own, count in parts
                                    for _ in range(count)])
    if needed is not None and call.where is not None:  # a gain for every place
        seconds += n * call.places * width / rates.values
    return Way(build, seconds + _reaching(call, entries))


def _views(stack: Stack, parts: Sequence[SlicePart], ranks: int, outputs: int) -> int:
    """How many views a product into columns takes: of outputs and hidden values as rows of one matrix, and of those the
    columns of each part, as matrices where it is several slices."""
    views = 2
    for k, own, count in parts:
        views += (count * (own.stop - own.start) != ranks) + (count * stack.slices[k].out != outputs)
        views += 4 if count > 1 else 0
    return views


def apart(call: LayerCall, stack: Stack, ranks: slice, entries: Entries, mark: int) -> Way:
    """Some ranks of the first slice and the same of those that follow it, on some entries, at one gain."""
    (one, *_), count, n, rates = stack.slices, len(stack.slices), len(entries), call.rates
    width = ranks.stop - ranks.start

    def build(call: LayerCall, stack: Stack) -> list[Built]:
        down, up = call.factors(stack)
        down = down.unflatten(0, (count, one.width))[:, ranks].mT
        update = shares_apart(down, Share(one.span[1], 0, up.view(count, one.out, one.width)[..., ranks].mT),
                              call.y.shape[-1], call.gains.number(mark))
        text = f"{n} of {call.y.shape[0]} entries, {count} slices, rank {width} each"
        return [(on_entries(update, entries, call.y), text)]

    seconds = 2 * rates.launch + 4 * rates.view + call.work(stack, n, [(width, one.out)] * count)
    seconds += (count - 1) * n / call.y.shape[0] * call.x.numel() / rates.values
    return Way(build, seconds + _reaching(call, entries))


def _reaching(call: LayerCall, entries: Entries) -> float:
    """Seconds until a product has its entries, where they are not all."""
    n, rates = len(entries), call.rates
    if entries[-1] - entries[0] + 1 != n:  # scattered
        values = n / call.y.shape[0] * (call.x.numel() + 2 * call.y.numel())
        return 3 * rates.launch + 2 * values / rates.values
    return 2 * rates.view if n != call.y.shape[0] else 0.0


def in_words(span: Span) -> str:
    return f", slice {span}" if span else ""


def _added(geometry: Geometry, ndim: int, n: int, down: Tensor, up: Tensor, gain: Tensor | None, alpha: Number,
           span: Span) -> Update:
    """The product for inputs of `ndim` dimensions and n entries."""
    if geometry.spatial:
        def update(y: Tensor, x: Tensor) -> Tensor:
            hidden = geometry.apply(part(x, span, 1, 1), down)
            add_pointwise_(part(y, span, 1, 0), hidden, up, gain, alpha)
            return y

        return update
    if ndim == 2:
        return _on_inputs(rows(down, up, gain, alpha), span)
    add = _on_inputs(tokens(down, up.expand(n, -1, -1), gain, alpha), span)
    return add if ndim == 3 else _flat(add)


def _flat(add: Update) -> Update:
    """For layers with several token dimensions."""
    def update(y: Tensor, x: Tensor) -> Tensor:
        flat = add(y.flatten(1, -2), x.flatten(1, -2))
        return y if flat.data_ptr() == y.data_ptr() else y.copy_(flat.view(y.shape))

    return update


def _on_inputs(add: Update, span: Span) -> Update:
    if span is None:
        return add

    def update(y: Tensor, x: Tensor) -> Tensor:
        return add(y, part(x, span, -1, 1))

    return update


def on_entries(add: Update, entries: Entries, like: Tensor) -> Update:
    """An update in place, for some entries alone of outputs such as `like`: all, a stretch of them, or copies of
    scattered ones that are written back."""
    first, n = entries[0], len(entries)
    if n == like.shape[0]:
        return add
    if entries[-1] - first + 1 == n:
        stretch = slice(first, first + n)  # two thirds of the time that `narrow` takes

        def update(y: Tensor, x: Tensor) -> Tensor:
            add(y[stretch], x[stretch])
            return y
    else:
        index = on_device(entries, like.device)

        def update(y: Tensor, x: Tensor) -> Tensor:
            picked = y.index_select(0, index)
            add(picked, x.index_select(0, index))
            y[index] = picked
            return y
    return update


def _common(call: LayerCall, marks: Marks) -> tuple[int, Marks | None]:
    """(mark of alpha, what a gain tensor has to hold, None: no tensor is needed). Where all entries have the same
    gains, and all but zeros are equal, they are alpha, exactly, and the tensor holds ones, zeros and places: a map of
    ones changes no bit."""
    if len(set(marks)) > 1:
        return ONE, marks
    acting = set(marks[0]) - {OFF}
    if len(acting) > 1:
        return ONE, marks[:1]
    alpha, row = acting.pop(), tuple(ONE if mark else OFF for mark in marks[0])
    return alpha, None if call.where is None and all(row) else (row,)


def sized(call: LayerCall, size: tuple[int, ...]) -> tuple[int, ...]:
    """The size of all hidden values, where gains are to be held in it; (): they broadcast. An operation that broadcasts
    takes the host about a view longer, one that does not reads more: the larger the size, the longer."""
    return () if prod(size) > call.rates.view * call.rates.values else size


def in_turn(updates: Sequence[Update]) -> Update:
    """The updates one after the other."""
    if len(updates) == 1:
        return updates[0]

    def update(y: Tensor, x: Tensor) -> Tensor:
        for each in updates:
            y = each(y, x)
        return y

    return update

