"""The products that add a stack's low-rank deltas to the entries of a layer, and which of them to take.

Each product adds the low-rank deltas of some ranks of a stack to some entries of the
layer, with a gain for each. There are three ways to serve several branches, and `cheapest` takes the one of least
expected time:

    groups    a product for the entries of each branch, with the ranks of that branch alone
    batched   one for all of them, where each has one adapter of equal rank, in the order of the stack
    masked    one over all entries and ranks that matter, with zeros in the gains
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..kernels.lowrank import Run, add_batched_, add_pointwise_, rows, tokens
from .adapters import part
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
    """

    y: Tensor
    x: Tensor
    geometry: Geometry
    factors: Callable[[Stack], tuple[Tensor, Tensor]]
    where: Where | None = None

    def narrowed(self, entries: Entries) -> Call:
        """The call for some of its entries alone."""
        where = self.where
        return replace(self, y=self.y[:len(entries)], x=self.x[:len(entries)], where=None if where is None else
                       lambda some, *more: where(tuple(entries[e] for e in some), *more))

    @property
    def rates(self) -> Rates:
        return RATES.get(self.x.device.type, ACCELERATOR)

    def work(self, stack: Stack, entries: int, width: int) -> float:
        """Seconds of arithmetic of one product."""
        places = self.y[0].numel() // self.y.shape[self.geometry.channel]
        return entries * places * width * (stack.down[0].numel() + stack.up.shape[0]) / self.rates.madds


@dataclass(frozen=True)
class Choice:
    """One way to do what a stack has to do.

    runs     its products
    text     the same in words
    seconds  expected time
    """

    runs: tuple[Run, ...]
    text: tuple[str, ...]
    seconds: float


def stack_choice(call: Call, stack: Stack, numbers: Numbers) -> Choice | None:
    """The cheapest way to add a stack's deltas, `numbers` with one gain per entry and slot, in the order of the slots;
    None where nothing acts."""
    groups: dict[tuple[float, ...], list[int]] = {}
    for entry, row in enumerate(numbers):
        if any(row):
            groups.setdefault(row, []).append(entry)
    if not groups:
        return None
    slots = list(stack.slots.values())
    choices = [_groups(call, stack, slots, groups)]
    if len(groups) > 1 or len(choices[0].runs) > 1:
        within = [entry for entry, row in enumerate(numbers) if any(row)]
        choices += [_masked(call, stack, slots, numbers, stretch)
                    for stretch in {(within[0], within[-1] + 1), (0, len(numbers))}]
    if len(groups) > 1:
        choices.append(_batched(call, stack, slots, groups))
    return min((choice for choice in choices if choice is not None), key=lambda choice: choice.seconds)


# --- the three ways ---


def _groups(call: Call, stack: Stack, slots: Sequence[Slot], groups: dict[tuple[float, ...], list[int]]) -> Choice:
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
    return _together(products)


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
    down, up = call.factors(stack)
    ranks = slice(slots[first].start, slots[columns[-1]].stop)
    down, up = down[ranks].unflatten(0, (count, width)).mT, up[:, ranks].T.unflatten(0, (count, width))
    alpha, gain = (gains[0], None) if len(set(gains)) == 1 else (
        1.0, on_device(gains, call.x.device, call.x.dtype).reshape(-1, 1, 1))
    at, n = entries[0], len(entries)
    whole = n == call.y.shape[0]

    inputs, outputs = (count, -1, call.x.shape[-1]), (count, -1, call.y.shape[-1])

    def run(y: Tensor, x: Tensor) -> Tensor:
        if not y.is_contiguous():
            y = y.contiguous()
        y_part = y
        if not whole:
            y_part, x = y.narrow(0, at, n), x.narrow(0, at, n)
        add_batched_(y_part.view(outputs), x.reshape(inputs), down, up, gain, alpha)
        return y

    rates = call.rates
    seconds = (2 + (gain is not None)) * rates.launch + (2 if whole else 4) * rates.view + call.work(stack, n, width)
    return Choice((run,), (f"{count} groups of {n // count} entries, rank {width} each",), seconds)


# --- one product ---


def _product(call: Call, stack: Stack, slots: Sequence[Slot], entries: Entries, numbers: Numbers) -> Choice:
    """The neighbouring `slots` of a stack on some entries, `numbers` with one gain per entry and slot."""
    geometry, ranks = call.geometry, slice(slots[0].start, slots[-1].stop)
    down, up = (factor[ranks] if k == 0 else factor[:, ranks].T for k, factor in enumerate(call.factors(stack)))
    alpha, gain = _gain(call, slots, entries, numbers)
    span, n = stack.span, len(entries)
    if geometry.spatial:
        def add(y: Tensor, x: Tensor) -> Tensor:
            hidden = geometry.apply(part(x, span, 1, 1), down)
            add_pointwise_(part(y, span, 1, 0), hidden, up, gain, alpha)
            return y
    elif call.x.ndim == 2:
        add = _in_span(rows(down, up, gain, alpha), span)
    else:
        add = _in_span(tokens(down, up.expand(n, -1, -1), gain, alpha), span)
        add = add if call.x.ndim == 3 else _flat(add)
    whole, scattered = n == call.y.shape[0], entries[-1] - entries[0] + 1 != n
    rates, width = call.rates, ranks.stop - ranks.start
    seconds = (2 + (gain is not None)) * rates.launch + call.work(stack, n, width)
    if scattered:
        values = n / call.y.shape[0] * (call.x.numel() + 2 * call.y.numel())
        seconds += 3 * rates.launch + 2 * values / rates.values
    elif not whole:
        seconds += 2 * rates.view
    text = f"{n} of {call.y.shape[0]} entries, rank {width}{'' if gain is None else ', gains ' + _shape(gain)}"
    return Choice((on_entries(add, entries, call),), (text + (f", slice {span}" if span else ""),), seconds)


def _flat(add: Run) -> Run:
    """For layers with several token dimensions."""
    def run(y: Tensor, x: Tensor) -> Tensor:
        flat = add(y.flatten(1, -2), x.flatten(1, -2))
        return y if flat.data_ptr() == y.data_ptr() else y.copy_(flat.view(y.shape))

    return run


def _in_span(add: Run, span) -> Run:
    if span is None:
        return add

    def run(y: Tensor, x: Tensor) -> Tensor:
        add(part(y, span, -1, 0), part(x, span, -1, 1))
        return y

    return run


def on_entries(add: Run, entries: Entries, call: Call) -> Run:
    """What changes y in place, as a run on some entries: all, a stretch of them, or copies of scattered ones that are
    written back."""
    first, n = entries[0], len(entries)
    if n == call.y.shape[0]:
        return add
    if entries[-1] - first + 1 == n:
        def run(y: Tensor, x: Tensor) -> Tensor:
            add(y.narrow(0, first, n), x.narrow(0, first, n))
            return y
    else:
        index = on_device(entries, call.y.device)

        def run(y: Tensor, x: Tensor) -> Tensor:
            picked = y.index_select(0, index)
            add(picked, x.index_select(0, index))
            y[index] = picked
            return y
    return run


def _gain(call: Call, slots: Sequence[Slot], entries: Entries, numbers: Numbers) -> tuple[float, Tensor | None]:
    """(alpha, gain) of a product. Where all entries have the same numbers, and all but zeros are equal, they are alpha,
    exactly, and the tensor holds ones, zeros and places: a map of ones changes no bit."""
    alpha = 1.0
    if len(set(numbers)) == 1:
        distinct = {number for number in numbers[0] if number}
        alpha = distinct.pop() if len(distinct) == 1 else 1.0
        numbers = (tuple(number / alpha for number in numbers[0]),)
        if call.where is None and set(numbers[0]) == {1.0}:
            return alpha, None
    if call.where is not None:
        return alpha, call.where(entries, slots, numbers)
    return alpha, gain_tensor(slots, numbers, call.geometry.spatial, min(call.x.ndim - 2, 1), call.x)


def gain_tensor(slots: Sequence[Slot], numbers: Numbers, spatial: int, dimensions: int, like: Tensor) -> Tensor:
    """Numbers [rows of numbers, slots] as gains that broadcast over hidden values: [rows, R, 1, ..] for convolutions,
    [rows, 1, .., R] for layers with so many token dimensions."""
    ranks = [number for row in numbers for number, slot in zip(row, slots, strict=True) for _ in range(slot.width)]
    ones = [1] * (spatial or dimensions)
    gain = on_device(ranks, like.device, like.dtype).view(len(numbers), -1)
    return gain.reshape(len(numbers), -1, *ones) if spatial else gain.reshape(len(numbers), *ones, -1)


def _together(choices: Sequence[Choice]) -> Choice:
    return Choice(tuple(run for choice in choices for run in choice.runs),
                  tuple(line for choice in choices for line in choice.text),
                  sum(choice.seconds for choice in choices))


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def in_turn(runs: Sequence[Run]) -> Run:
    """The runs one after the other."""
    if len(runs) == 1:
        return runs[0]

    def run(y: Tensor, x: Tensor) -> Tensor:
        for each in runs:
            y = each(y, x)
        return y

    return run

