"""Which products add a stack's low-rank deltas to the entries of a layer.

There are three ways to serve several branches, and `stack_products` takes the one of least expected time:

    groups    a product for the entries of each branch, with the ranks of that branch alone
    batched   one for all of them, where each has one adapter of equal rank, in the order of the stack
    masked    one over all entries and ranks that matter, with zeros in the gains

Of a layer that is several in one weight (q, k and v) each slice has these three ways for itself. Or all slices share
what they need of the input, one product, and each, or a row of slices of equal size, has one more for its outputs.
Where an adapter's ranks of one slice do not lie beside those of the next, since other adapters' lie between, they are
the matrices of one batched product.

Adapters that act alike in all entries, as a LoRA for few steps does beneath every branch, are in these products where
that takes the least time, and have one of their own before them where it does not: two operations more at the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter

from ..kernels.lowrank import Columns, grouped
from .gains import OFF, ONE, Marks
from .products import Built, LayerCall, Way, apart, in_words, product, sized
from .stack import Slot, Stack, together

_seconds = attrgetter("seconds")


def stack_products(call: LayerCall, stack: Stack, marks: Marks) -> list[Built]:
    """The products that add a stack's deltas in the least time; none where nothing acts. `marks` has one gain per entry
    and slot, in the order of the slots. Layers of one shape share the way, since to choose one takes longer than to
    build it."""
    if not any(map(any, marks)):
        return []
    y, x, geometry = call.y, call.x, call.geometry
    shapes = y.shape, x.shape, geometry.spatial, geometry.channel, x.device, stack.down.shape
    key = "way", shapes, stack.slices, call.where is None, call.beneath, marks
    return call.once(key, lambda: _chosen(call, stack, marks)).build(call, stack)


def _chosen(call: LayerCall, stack: Stack, marks: Marks) -> Way:
    alike = [len(set(column)) == 1 and call.everywhere(slot.adapter)
             for slot, column in zip(stack.slots, zip(*marks, strict=True), strict=True)]
    common, rest = (tuple(tuple(mark if same is one else OFF for mark, same in zip(row, alike, strict=True))
                          for row in marks) for one in (True, False))
    whole = _least(call, stack, marks)
    if not (any(common[0]) and any(map(any, rest))):
        return whole
    below, above = _least(replace(call, where=None), stack, common), _least(call, stack, rest)
    two = Way(lambda call, stack: below.build(replace(call, where=None), stack) + above.build(call, stack),
              below.seconds + above.seconds)
    return min(whole, two, key=_seconds)


def _least(call: LayerCall, stack: Stack, marks: Marks) -> Way:
    """The way that takes the least time; something has to act."""
    if len(stack.slices) == 1:
        return min(_ways(call, stack, stack.slots, marks), key=_seconds)
    by_slice, at = [], 0
    for each in stack.slices:
        own = tuple(row[at:at + len(each.slots)] for row in marks)
        at += len(each.slots)
        if any(map(any, own)):
            by_slice.append(min(_ways(call, stack, each.slots, own), key=_seconds))
    return min(_ways(call, stack, stack.slots, marks) + [_all_of(by_slice)], key=_seconds)


def _all_of(ways: Sequence[Way]) -> Way:
    return Way(lambda *layer: [built for way in ways for built in way.build(*layer)], sum(map(_seconds, ways)))


def _ways(call: LayerCall, stack: Stack, slots: Sequence[Slot], marks: Marks) -> list[Way]:
    """The ways to do what neighbouring slots of a stack have to do."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for entry, row in enumerate(marks):
        if any(row):
            groups.setdefault(row, []).append(entry)
    by_group = _groups(call, stack, slots, groups)
    ways: list[Way | None] = [_all_of(by_group)]
    within = [entry for entry, row in enumerate(marks) if any(row)]
    if len(by_group) > 1 or within[-1] - within[0] + 1 != len(within):
        ways += [_masked(call, stack, slots, marks, stretch)
                 for stretch in ((within[0], within[-1] + 1), (0, len(marks)))]
    if len(groups) > 1:
        ways.append(_batched(call, stack, slots, groups))
    if len(by_group) > len(groups):
        ways.append(_strided(call, stack, slots, groups))
    return [way for way in ways if way is not None]


# --- the three ways ---


def _groups(call: LayerCall, stack: Stack, slots: Sequence[Slot], groups: dict[tuple[int, ...], list[int]]
            ) -> list[Way]:
    products = []
    for row, entries in groups.items():
        at = 0
        while at < len(slots):
            stop = at
            while stop < len(slots) and row[stop]:
                stop += 1
            if stop > at:
                products.append(product(call, stack, slots[at:stop], tuple(entries),
                                        tuple(row[at:stop] for _ in entries)))
            at = stop + 1
    return products


def _masked(call: LayerCall, stack: Stack, slots: Sequence[Slot], marks: Marks, stretch: tuple[int, int]) -> Way:
    columns = [column for column in range(len(slots)) if any(row[column] for row in marks)]
    first, last = columns[0], columns[-1] + 1
    within = tuple(range(*stretch))
    return product(call, stack, slots[first:last], within, tuple(marks[entry][first:last] for entry in within))


def _batched(call: LayerCall, stack: Stack, slots: Sequence[Slot], groups: dict[tuple[int, ...], list[int]]
             ) -> Way | None:
    """Needs groups of equal length one after the other, each with one adapter of the same rank, in the order of the
    stack, the last of which may be followed by zeros: what Composite's batch looks like."""
    if call.geometry.spatial or call.where is not None:
        return None
    columns, own, entries = [], [], []
    for row, members in groups.items():
        active = [column for column, mark in enumerate(row) if mark]
        if len(active) != 1:
            return None
        columns.append(active[0])
        own.append(row[active[0]])
        entries += members
    count, width, first = len(groups), slots[columns[0]].width, columns[0]
    if entries != list(range(entries[0], entries[0] + len(entries))) or len({len(m) for m in groups.values()}) > 1:
        return None
    if columns != list(range(first, first + count)) or any(slots[column].width != width for column in columns[:-1]):
        return None
    last, k = slots[columns[-1]], stack.slice_of(slots[first])
    each = stack.slices[k]
    if last.stop > each.ranks.stop or not last.width - last.empty <= width <= last.width:
        return None
    n, rates, same = len(entries), call.rates, len(set(own)) == 1
    rows = n // count * call.places
    size = sized(call, (count, rows, width))

    def build(call: LayerCall, stack: Stack) -> list[Built]:
        down, up = call.factors(stack)
        ranks = slice(slots[first].start, last.start + width)
        down, up = down[ranks].unflatten(0, (count, width)).mT, stack.up_of(k, up, ranks).unflatten(0, (count, width))
        alpha = call.gains.number(own[0] if same else ONE)
        gain = None if same else call.gains.tensor([1], tuple((mark,) for mark in own), 0, 1, call.x, size)
        columns = [Columns(each.span[1], whole.shape[-1]) if each.span is not None and each.span[0] == dim else None
                   for dim, whole in enumerate((call.y, call.x))]
        update = grouped(down, up, rows, gain, alpha, entries[0] * call.places, *columns)
        return [(update, f"{count} groups of {n // count} entries, rank {width} each" + in_words(each.span))]

    seconds = (2 if same else 3) * rates.launch + 2 * rates.view + call.work(stack, n, [(width, each.out)])
    return Way(build, seconds)


def _strided(call: LayerCall, stack: Stack, slots: Sequence[Slot], groups: dict[tuple[int, ...], list[int]]
             ) -> Way | None:
    """A product for each branch, for all slices of a stack, which have to be neighbours of equal size with the same
    adapters: its ranks of a slice and those of the next are matrices that lie apart."""
    (one, *_), count = stack.slices, len(stack.slices)
    if call.where is not None or count == 1 or len(slots) != len(stack.slots) or stack.alike(0) != count:
        return None
    products = []
    for row, entries in groups.items():
        own = row[:len(one.slots)]  # as of the other slices: gains are those of adapters
        active = [column for column, mark in enumerate(own) if mark]
        first, last = active[0], active[-1]
        if active != list(range(first, last + 1)) or len({own[column] for column in active}) > 1:
            return None
        ranks = slice(one.slots[first].start, together(one.slots[first:last + 1])[-1].stop)
        products.append(apart(call, stack, ranks, tuple(entries), own[first]))
    return _all_of(products)
