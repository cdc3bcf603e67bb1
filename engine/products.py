"""The products that add a stack's low-rank deltas to the entries of a layer, and which of them to take.

Each product adds the low-rank deltas of some ranks of a stack to some entries of the layer, with a gain for each. There
are three ways to serve several branches, and `stack_products` takes the one of least expected time:

    groups    a product for the entries of each branch, with the ranks of that branch alone
    batched   one for all of them, where each has one adapter of equal rank, in the order of the stack
    masked    one over all entries and ranks that matter, with zeros in the gains

Adapters that act alike in all entries, as a LoRA for few steps does beneath every branch, are in these products where
that takes the least time, and have one of their own before them where it does not: two operations more at the most.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..kernels.lowrank import Run, add_batched_, add_pointwise_, rows, tokens
from .adapters import Span, part
from .bank import Slot, Stack
from .geometry import Geometry
from .transfer import on_device

Numbers = tuple[tuple[float, ...], ...]
"""Per entry of a layer, one number per adapter of a stack."""
Entries = tuple[int, ...]
Where = Callable[[Entries, Sequence[Slot], Numbers], Tensor]
"""(entries, slots, numbers) -> gains of hidden values [entries, .., ranks of the slots]: the number of an entry's slot
(one row of numbers: of all entries) times how much of the adapter acts at each place. The same tensor for as long as
places are only updated."""


Once = Callable[[Hashable, Callable[[], object]], object]


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
RATES = {"cpu": Rates(2e-6, 1e-6, 3.5e10, 2e9)}
ACCELERATOR = Rates(5e-6, 1e-6, 1e14, 1e12)


@dataclass(frozen=True)
class Call:
    """A call of a layer as far as a program depends on it.

    y, x       output and input, of which only shapes, strides, dtypes and devices count
    geometry   the layer's
    factors    stack -> (down [R, in, *k], up [out, R]) in the dtype and on the device of x
    where      where adapters act inside the entries; None: everywhere
    beneath    how many adapters of the bank, its first ones, act everywhere in any case
    once       (key, make) -> what `make` gave for the key when it was first asked for, in this run
    """

    y: Tensor
    x: Tensor
    geometry: Geometry
    factors: Callable[[Stack], tuple[Tensor, Tensor]]
    where: Where | None = None
    beneath: int = 0
    once: Once = lambda key, make: make()

    def everywhere(self, adapter: int) -> bool:
        return self.where is None or adapter < self.beneath

    def narrowed(self, entries: Entries) -> Call:
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

    def work(self, stack: Stack, entries: int, width: int) -> float:
        """Seconds of arithmetic of one product."""
        return entries * self.places * width * (stack.down[0].numel() + stack.up.shape[0]) / self.rates.madds


Built = tuple[Run, str]
"""A product, and the same in words."""


@dataclass(frozen=True)
class Choice:
    """One way to do what a stack has to do, for all layers of one shape.

    build     (call, stack) -> its products, with the tensors that they need
    seconds   expected time
    """

    build: Callable[[Call, Stack], list[Built]]
    seconds: float


def stack_products(call: Call, stack: Stack, numbers: Numbers) -> list[Built]:
    """The products that add a stack's deltas in the least time; none where nothing acts. `numbers` has one gain per
    entry and slot, in the order of the slots. Layers of one shape share the choice, which takes longer than to build
    what was chosen."""
    if not any(map(any, numbers)):
        return []
    y, x, geometry = call.y, call.x, call.geometry
    shapes = y.shape, x.shape, geometry.spatial, geometry.channel, x.device, stack.down.shape, stack.up.shape
    key = "choice", shapes, stack.span, tuple(stack.slots.items()), call.where is None, call.beneath, numbers
    return call.once(key, lambda: _chosen(call, stack, numbers)).build(call, stack)


def _chosen(call: Call, stack: Stack, numbers: Numbers) -> Choice:
    alike = [len(set(column)) == 1 and call.everywhere(adapter)
             for adapter, column in zip(stack.slots, zip(*numbers, strict=True), strict=True)]
    common, rest = (tuple(tuple(number if same is one else 0.0 for number, same in zip(row, alike, strict=True))
                          for row in numbers) for one in (True, False))
    whole = _least(call, stack, numbers)
    if not (any(common[0]) and any(map(any, rest))):
        return whole
    below, above = _least(replace(call, where=None), stack, common), _least(call, stack, rest)
    apart = Choice(lambda call, stack: below.build(replace(call, where=None), stack) + above.build(call, stack),
                   below.seconds + above.seconds)
    return min(whole, apart, key=lambda choice: choice.seconds)


def _least(call: Call, stack: Stack, numbers: Numbers) -> Choice:
    """The way that takes the least time; something has to act."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for entry, row in enumerate(numbers):
        if any(row):
            groups.setdefault(row, []).append(entry)
    slots = list(stack.slots.values())
    by_group = _groups(call, stack, slots, groups)
    choices = [Choice(lambda *layer: [built for choice in by_group for built in choice.build(*layer)],
                      sum(choice.seconds for choice in by_group))]
    if len(by_group) > 1:
        within = [entry for entry, row in enumerate(numbers) if any(row)]
        choices += [_masked(call, stack, slots, numbers, stretch)
                    for stretch in ((within[0], within[-1] + 1), (0, len(numbers)))]
    if len(groups) > 1:
        choices.append(_batched(call, stack, slots, groups))
    return min((choice for choice in choices if choice is not None), key=lambda choice: choice.seconds)


# --- the three ways ---


def _groups(call: Call, stack: Stack, slots: Sequence[Slot], groups: dict[tuple[float, ...], list[int]]
            ) -> list[Choice]:
    products = []
    for row, entries in groups.items():
        at = 0
        while at < len(slots):
            stop = at
            while stop < len(slots) and row[stop]:
                stop += 1
            if stop > at:
                products.append(_product(call, stack, slots[at:stop], tuple(entries),
                                         tuple(row[at:stop] for _ in entries)))
            at = stop + 1
    return products


def _masked(call: Call, stack: Stack, slots: Sequence[Slot], numbers: Numbers, stretch: tuple[int, int]) -> Choice:
    columns = [column for column in range(len(slots)) if any(row[column] for row in numbers)]
    first, last = columns[0], columns[-1] + 1
    within = tuple(range(*stretch))
    return _product(call, stack, slots[first:last], within, tuple(numbers[entry][first:last] for entry in within))


def _batched(call: Call, stack: Stack, slots: Sequence[Slot], groups: dict[tuple[float, ...], list[int]]
             ) -> Choice | None:
    """Needs groups of equal length one after the other, each with one adapter of the same rank, in the order of the
    stack: what Composite's batch looks like."""
    if call.geometry.spatial or call.where is not None or stack.span is not None:
        return None
    columns, gains, entries = [], [], []
    for row, members in groups.items():
        active = [column for column, gain in enumerate(row) if gain]
        if len(active) != 1:
            return None
        columns.append(active[0])
        gains.append(row[active[0]])
        entries += members
    count, width, first = len(groups), slots[columns[0]].width, columns[0]
    if entries != list(range(entries[0], entries[0] + len(entries))) or len({len(m) for m in groups.values()}) > 1:
        return None
    if columns != list(range(first, first + count)) or any(slots[column].width != width for column in columns):
        return None
    at, n, rates, same = entries[0], len(entries), call.rates, len(set(gains)) == 1
    whole = n == call.y.shape[0]

    def build(call: Call, stack: Stack) -> list[Built]:
        down, up = call.factors(stack)
        ranks = slice(slots[first].start, slots[columns[-1]].stop)
        down, up = down[ranks].unflatten(0, (count, width)).mT, up[:, ranks].T.unflatten(0, (count, width))
        alpha = gains[0] if same else 1.0
        gain = None if same else call.once(
            ("gains", tuple(gains), call.x.dtype, call.x.device),
            lambda: on_device(gains, call.x.device, call.x.dtype).reshape(-1, 1, 1))
        run = _batched_run(down, up, gain, alpha, None if whole else (at, n))
        return [(run, f"{count} groups of {n // count} entries, rank {width} each")]

    seconds = (2 if same else 3) * rates.launch + (2 if whole else 4) * rates.view + call.work(stack, n, width)
    return Choice(build, seconds)


def _batched_run(down: Tensor, up: Tensor, gain: Tensor | None, alpha: float, stretch: tuple[int, int] | None) -> Run:
    count = down.shape[0]
    inputs, outputs = (count, -1, down.shape[1]), (count, -1, up.shape[2])

    def run(y: Tensor, x: Tensor) -> Tensor:
        if not y.is_contiguous():
            y = y.contiguous()
        y_part = y
        if stretch is not None:
            y_part, x = y.narrow(0, *stretch), x.narrow(0, *stretch)
        add_batched_(y_part.view(outputs), x.reshape(inputs), down, up, gain, alpha)
        return y

    return run


# --- one product ---


def _product(call: Call, stack: Stack, slots: Sequence[Slot], entries: Entries, numbers: Numbers) -> Choice:
    """The neighbouring `slots` of a stack on some entries, `numbers` with one gain per entry and slot."""
    ranks, n, rates = slice(slots[0].start, slots[-1].stop), len(entries), call.rates
    alpha, needed = _gains(call, numbers)

    def build(call: Call, stack: Stack) -> list[Built]:
        down, up = call.factors(stack)
        gain = None
        if needed is not None:
            gain = call.where(entries, slots, needed) if call.where is not None else gain_tensor(
                slots, needed, call.geometry.spatial, min(call.x.ndim - 2, 1), call.x, call.once)
        add = _added(call.geometry, call.x.ndim, n, down[ranks], up[:, ranks].T, gain, alpha, stack.span)
        text = f"{n} of {call.y.shape[0]} entries, rank {ranks.stop - ranks.start}"
        text += "" if gain is None else f", gains {'x'.join(map(str, gain.shape))}"
        return [(on_entries(add, entries, call.y), text + (f", slice {stack.span}" if stack.span else ""))]

    width = ranks.stop - ranks.start
    seconds = (2 if needed is None else 3) * rates.launch + call.work(stack, n, width)
    if needed is not None and call.where is not None:  # a gain for every place
        seconds += n * call.places * width / rates.values
    if entries[-1] - entries[0] + 1 != n:  # scattered
        values = n / call.y.shape[0] * (call.x.numel() + 2 * call.y.numel())
        seconds += 3 * rates.launch + 2 * values / rates.values
    elif n != call.y.shape[0]:
        seconds += 2 * rates.view
    return Choice(build, seconds)


def _added(geometry: Geometry, ndim: int, n: int, down: Tensor, up: Tensor, gain: Tensor | None, alpha: float,
           span: Span) -> Run:
    """The product for inputs of `ndim` dimensions and n entries."""
    if geometry.spatial:
        def run(y: Tensor, x: Tensor) -> Tensor:
            hidden = geometry.apply(part(x, span, 1, 1), down)
            add_pointwise_(part(y, span, 1, 0), hidden, up, gain, alpha)
            return y

        return run
    if ndim == 2:
        return _in_span(rows(down, up, gain, alpha), span)
    add = _in_span(tokens(down, up.expand(n, -1, -1), gain, alpha), span)
    return add if ndim == 3 else _flat(add)


def _flat(add: Run) -> Run:
    """For layers with several token dimensions."""
    def run(y: Tensor, x: Tensor) -> Tensor:
        flat = add(y.flatten(1, -2), x.flatten(1, -2))
        return y if flat.data_ptr() == y.data_ptr() else y.copy_(flat.view(y.shape))

    return run


def _in_span(add: Run, span: Span) -> Run:
    if span is None:
        return add

    def run(y: Tensor, x: Tensor) -> Tensor:
        add(part(y, span, -1, 0), part(x, span, -1, 1))
        return y

    return run


def on_entries(add: Run, entries: Entries, like: Tensor) -> Run:
    """What changes y in place, as a run on some entries of outputs such as `like`: all, a stretch of them, or copies of
    scattered ones that are written back."""
    first, n = entries[0], len(entries)
    if n == like.shape[0]:
        return add
    if entries[-1] - first + 1 == n:
        def run(y: Tensor, x: Tensor) -> Tensor:
            add(y.narrow(0, first, n), x.narrow(0, first, n))
            return y
    else:
        index = on_device(entries, like.device)

        def run(y: Tensor, x: Tensor) -> Tensor:
            picked = y.index_select(0, index)
            add(picked, x.index_select(0, index))
            y[index] = picked
            return y
    return run


def _gains(call: Call, numbers: Numbers) -> tuple[float, Numbers | None]:
    """(alpha, what a gain tensor has to hold, None: no tensor is needed). Where all entries have the same numbers, and
    all but zeros are equal, they are alpha, exactly, and the tensor holds ones, zeros and places: a map of ones changes
    no bit."""
    alpha = 1.0
    if len(set(numbers)) == 1:
        distinct = {number for number in numbers[0] if number}
        alpha = distinct.pop() if len(distinct) == 1 else 1.0
        numbers = (tuple(number / alpha for number in numbers[0]),)
        if call.where is None and set(numbers[0]) == {1.0}:
            return alpha, None
    return alpha, numbers


def gain_tensor(slots: Sequence[Slot], numbers: Numbers, spatial: int, dimensions: int, like: Tensor, once: Once
                ) -> Tensor:
    """Numbers [rows of numbers, slots] as gains that broadcast over hidden values: [rows, R, 1, ..] for convolutions,
    [rows, 1, .., R] for layers with so many token dimensions. Layers share them: each is a copy to the device."""
    widths, device, dtype = tuple(slot.width for slot in slots), like.device, like.dtype

    def make() -> Tensor:
        ranks = [number for row in numbers for number, width in zip(row, widths, strict=True) for _ in range(width)]
        ones = [1] * (spatial or dimensions)
        gain = on_device(ranks, device, dtype).view(len(numbers), -1)
        return gain.reshape(len(numbers), -1, *ones) if spatial else gain.reshape(len(numbers), *ones, -1)

    return once(("gain", widths, numbers, spatial, dimensions, dtype, device), make)


def in_turn(runs: Sequence[Run]) -> Run:
    """The runs one after the other."""
    if len(runs) == 1:
        return runs[0]

    def run(y: Tensor, x: Tensor) -> Tensor:
        for each in runs:
            y = each(y, x)
        return y

    return run

