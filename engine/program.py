"""What a routed layer does for one batch layout: a list of tensor operations, chosen once and then only run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..kernels.lowrank import Update
from .adapters import Bias, Decomposed, Op, Reader
from .bank import Bank, Site
from .chain import Link, additions, chain
from .gains import OFF, ONE, Gains, Marks
from .geometry import Geometry, plain
from .layout import Layout, NotRows
from .positions import Places, of_text
from .products import Entries, LayerCall, Where, in_turn, on_entries
from .stack import Slot, Stack
from .tell import Report
from .ways import stack_products

Value = TypeVar("Value", bound=Hashable)


@dataclass(frozen=True)
class Program:
    """A layer's operations for inputs of one shape and dtype.

    text   what it does, a line per product
    """

    shape: torch.Size
    dtype: torch.dtype
    run: Update
    text: tuple[str, ...] = ()


class Layer(NamedTuple):
    """A layer that a bank acts on; `base` is its forward as it was."""

    site: Site
    geometry: Geometry
    base: Callable
    module: nn.Module


class Programs:
    """Makes the programs of one bank's layers, and keeps them and what they are made of, for one run.

    gains    what the marks of layouts stand for
    tell     told what cannot be expressed
    lasting  a context for tensors that are kept beyond the layer that runs
    flat     layers have no dimension for entries: the model takes one row, and its tokens are their first dimension
    """

    def __init__(self, bank: Bank, gains: Gains, reader: Reader, tell: Report,
                 lasting: Callable[[], AbstractContextManager] = nullcontext, flat: bool = False):
        self.bank, self._tokens_first = bank, flat
        self.seen: dict[str, set[int]] = {}  # layer -> the adapters that acted in a batch which came to it
        self._gains, self._reader, self._tell, self._lasting = gains, reader, tell, lasting
        self._programs: dict[Hashable, Program] = {}
        self._latest: dict[tuple[str, tuple[int, ...]], Program] = {}  # (layer, gains of all rows)
        self._made: dict[Hashable, object] = {}

    def forget(self) -> None:
        """Let go of everything: the host has moved the bank's factors, or the run is over."""
        self._programs.clear()
        self._latest.clear()
        self._made.clear()
        self._gains.forget()

    def latest(self, names: Sequence[str], layout: Layout) -> list[Program]:
        """Per layer what it did when it last had these gains, which is what it does for an input of that program's
        shape and dtype; `UNMET` where that is not known, or depends on more than one branch, or on the layer's weight.

        A method that chooses anew at each step for each layer meets few programs, but in layouts that are all new.
        """
        if not layout.uniform or layout.places is not None or layout.reach is not None:
            return [UNMET] * len(names)
        row, of, found, seen, acting = layout.rows[0], layout.marked.of, self._latest, self.seen, layout.acting
        marks, others, nobody = of[row.gains], {name: of[gains] for name, gains in row.per_module}, frozenset()
        return [found.get((name, others.get(name, marks)), UNMET) if acting <= seen.get(name, nobody) else UNMET
                for name in names]

    def program(self, layer: Layer, layout: Layout, y: Tensor, x: Tensor) -> Program:
        """The program of a layer for calls like this one, y its own output at x.

        Raises NotRows where rows of several branches cannot be told apart in the layer.
        """
        name, shape = layer.site.name, x.shape
        flat = y.ndim < 2 + layer.geometry.spatial or (self._tokens_first and y.ndim == 2)
        self.seen.setdefault(name, set()).update(layout.acting)
        if flat:
            y, x = y.unsqueeze(0), plain(x).unsqueeze(0)
        owners = self._owners(layout, name, y, x)
        places = None if owners is None else layout.places
        marks = layout.marks(name, (0,) if owners is None else owners)
        weighed = self._weighed(layer.site, marks)
        key = name, marks, weighed, shape, x.dtype, y.dtype, x.device, places, owners if places is not None else None
        if key not in self._programs:
            with self._lasting():
                program = self._program(layer, marks, y, x, places, owners)
                self._programs[key] = Program(shape, x.dtype, _of_one(program.run), program.text) if flat else program
        if owners is None and places is None and not weighed:
            self._latest[name, marks[0]] = self._programs[key]
        if layout.reach is None:
            return self._programs[key]
        tell = self._telling(layer, layout, y, x)
        return replace(self._programs[key], run=in_turn([self._programs[key].run, _of_one(tell) if flat else tell]))

    def _telling(self, layer: Layer, layout: Layout, y: Tensor, x: Tensor) -> Update:
        """An update that adds nothing, and tells the layout's `reach` what the adapters would add; not where it is
        unknown whose the entries are."""
        owners = layout.owners(layer.site.name, y.shape[0]) if x.shape[0] == y.shape[0] else None
        if owners is None:
            return nothing
        like = plain(x).new_empty(0)  # what is kept must not hold an activation
        return layout.reach.listen(layer.site, layer.geometry, owners, y, lambda stack: self._factors(stack, like)) \
            or nothing

    def _owners(self, layout: Layout, name: str, y: Tensor, x: Tensor) -> Entries | None:
        """The row of each entry of a layer; None where all are alike, or where it is not known and need not be.

        Raises NotRows where it must be known.
        """
        if not y.shape[0]:
            return ()
        if layout.uniform and layout.places is None:
            return None
        owners = layout.owners(name, y.shape[0]) if x.shape[0] == y.shape[0] else None
        if owners is None and not layout.uniform:
            raise NotRows(name, x.shape[0], len(layout.rows))
        if owners is None and layout.places is not None:
            self._tell("all", name, "its rows cannot be told apart, so LoRAs act there everywhere")
        return owners

    def _weighed(self, site: Site, marks: Marks) -> tuple[float, ...]:
        """The gains that are part of a program: where a DoRA goes by the weight with what is beneath it."""
        return self._gains.values(mark for row in dict.fromkeys(marks) for mark in row) if site.weighed else ()

    def _program(self, layer: Layer, marks: Marks, y: Tensor, x: Tensor, places: Places | None,
                 owners: Entries | None) -> Program:
        site, shape, dtype = layer.site, x.shape, x.dtype
        plainly = _plainly if plain(x) is not x else None
        x = plain(x)
        if x.dtype is not y.dtype:  # under autocast, and in layers that convert what they give
            plainly, x = partial(_plainly, dtype=y.dtype), x.to(y.dtype)
        if owners is None:
            marks *= y.shape[0]
        call = LayerCall(y, x, layer.geometry, lambda stack: self._factors(stack, x), self._gains,
                         self._where(layer, y, places, owners) if places is not None else None,
                         places.beneath if places is not None else 0, self._once)
        in_any_order = not len(site.others) or all(_additive(site, row) for row in set(marks))
        updates, text = self._added(call, site, marks) if in_any_order else self._chained(call, layer, marks)
        update = in_turn(updates) if updates else nothing
        return Program(shape, dtype, update if plainly is None else plainly(update), text)

    def _added(self, call: LayerCall, site: Site, marks: Marks) -> tuple[list[Update], tuple[str, ...]]:
        """The products of a layer on which nothing depends on the order."""
        updates: list[Update] = []
        text: tuple[str, ...] = ()
        others: dict[Entries, list[tuple[int, int, Op]]] = {}
        for stack in site.stacks:
            for update, line in stack_products(call, stack, stack.of_slots(marks)):
                updates.append(update)
                text += (line,)
        for a in map(int, site.others):
            for mark, entries in _alike(tuple(row[a] for row in marks)).items():
                if mark:
                    others.setdefault(entries, []).extend((a, mark, op) for op in site.ops(a))
        for entries, ops in others.items():
            update = additions([self._link(call, entries, *each) for each in ops], call.geometry)
            updates.append(on_entries(update, entries, call.y))
            text += tuple(f"{len(entries)} of {len(marks)} entries, {type(op).__name__}" for *_, op in ops)
        return updates, text

    def _chained(self, call: LayerCall, layer: Layer, marks: Marks) -> tuple[list[Update], tuple[str, ...]]:
        """Groups of entries one by one: some have ops whose order matters. What all have alike beneath these comes
        first, for all of them together."""
        site, count = layer.site, _beneath(layer.site, marks)
        below = tuple(row[:count] + (OFF,) * (len(row) - count) for row in marks)
        updates, text = self._added(call, site, below)
        for row, entries in _alike(marks).items():
            inner = call.narrowed(entries)
            if _additive(site, row):
                added, lines = self._added(inner, site, ((OFF,) * count + row[count:],) * len(entries))
                if added:
                    updates.append(on_entries(in_turn(added), entries, call.y))
                    text += lines
                continue
            ops, biases = self._in_order(call, site, row)
            ops = [each for each in ops if each[0] >= count]
            links = [self._link(call, entries, *each) for each in ops]
            base = _with(layer.base, self._added(inner, site, below[:len(entries)])[0])
            update = chain(links, [self._link(call, entries, *each) for each in biases], base,
                           self._bias(layer, call.x), call.geometry)
            updates.append(on_entries(update, entries, call.y))
            text += (f"{len(entries)} of {len(marks)} entries, in order: "
                     + ", ".join(type(op).__name__ for _, _, op, *_ in ops),)
        return updates, text

    def _link(self, call: LayerCall, entries: Entries, adapter: int, mark: int, op: Op, scales=None) -> Link:
        gain = call.gains.number(mark)
        if call.everywhere(adapter):
            return Link(gain, op, scales)
        return Link(gain, op, scales, call.where(entries, (Slot(adapter, 0, 1),), ((ONE,),)))

    def _where(self, layer: Layer, y: Tensor, places: Places, owners: Entries) -> Where | None:
        """On the layer's own grid for convolutions, by the tokens of others; None where neither is known."""
        name, spatial = layer.site.name, layer.geometry.spatial
        if spatial not in (0, 2, 3) or (not spatial and y.ndim < 3):
            return None
        segments = None if spatial else places.locate(name, y[0].numel() // y.shape[-1])
        if not segments and not spatial:
            if segments is None:
                self._tell("all", name, "where its tokens lie in the picture is not known, so LoRAs act there "
                                        "everywhere")
            return None

        grid = tuple(y.shape[2:]) if spatial else tuple(y.shape[1:-1])
        like = y.new_empty(0)  # what is kept must not hold an activation

        def where(entries: Entries, slots: Sequence[Slot], marks: Marks) -> Tensor:
            rows = tuple(owners[entry] for entry in entries)
            widths = tuple(slot.width for slot in slots)
            columns = tuple(slot.adapter for slot in slots for _ in range(slot.width))
            # Made once: what is made anew when places change comes from the device alone.
            gain, index = self._gains.tensor(widths, marks, spatial, len(grid), like), places.index(columns)

            def make(out: Tensor | None) -> Tensor:
                if spatial:
                    found = places.on_grid(grid, rows).index_select(1, index)
                else:
                    found = places.on_tokens(segments, rows).index_select(-1, index).unflatten(1, grid)
                # The product goes into the layer's dtype by itself.
                return torch.mul(found, gain, out=gain.new_empty(found.shape) if out is None else out)

            key = segments, grid, rows, columns, marks, like.dtype
            found = places.keep(key, make, not spatial and of_text(segments))
            self._once((places, key), lambda: self._gains.after({mark for row in marks for mark in row},
                                                                lambda: make(found)))
            return found

        return where

    # --- what programs are made of: once per run ---

    def _factors(self, stack: Stack, like: Tensor) -> tuple[Tensor, Tensor]:
        """The stack's factors as the layer needs them: themselves, or one converted copy per run."""
        if stack.down.dtype == like.dtype and stack.down.device == like.device:
            return stack.down, stack.up
        return self._once(("factors", id(stack), like.dtype, like.device),
                          lambda: (stack.down.to(like), stack.up.to(like)))

    def _in_order(self, call: LayerCall, site: Site, marks: tuple[int, ...]) -> tuple[list, list]:
        """The active ops of a site in the order of the adapters, (adapter, gain, op, magnitude factors of a DoRA), and
        apart from them the biases, (adapter, gain, op). The weight is read here and nowhere else: one for all places.
        """
        active = [(a, op) for a, mark in enumerate(marks) if mark for op in site.all_ops(a)]
        weight = None
        if any(isinstance(op, Decomposed) for _, op in active):
            weight = self._reader(f"{site.name}.weight")
            weight = None if weight is None else weight.to(call.x.device)
        ops, biases = [], []
        for a, op in active:
            scales = None
            if isinstance(op, Bias):
                biases.append((a, marks[a], op))
                continue
            if isinstance(op, Decomposed):
                if weight is None:
                    self._tell(self.bank.names[a], site.name, "DoRA needs the base weight, which is unreadable; left "
                                                              "out")
                    continue
                if any(below != a and not call.everywhere(below) for below, *_ in ops):
                    self._tell(self.bank.names[a], site.name, "a DoRA goes by the weight with the LoRAs before it; of "
                               "those that act at some places alone, as if they did everywhere")
                scales = op.scales(weight)
            ops.append((a, marks[a], op, scales))
            weight = None if weight is None else op.on_weight(weight, call.gains.number(marks[a]).value)
        return ops, biases

    def _bias(self, layer: Layer, like: Tensor) -> Tensor | None:
        """The layer's own bias."""
        def read() -> Tensor | None:
            value = self._reader(f"{layer.site.name}.bias")
            if value is None and getattr(layer.module, "bias", None) is not None:
                self._tell("all", layer.site.name, "the layer's bias is unreadable and was treated as part of its "
                                                   "weight")
            return None if value is None else value.to(like.device, like.dtype)

        return self._once(("bias", layer.site.name, like.dtype, like.device), read)

    def _once(self, key: Hashable, make: Callable[[], object]):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _alike(values: Sequence[Value]) -> dict[Value, Entries]:
    """Value -> the entries that have it, in order."""
    found: dict[Value, list[int]] = {}
    for entry, value in enumerate(values):
        found.setdefault(value, []).append(entry)
    return {value: tuple(entries) for value, entries in found.items()}


def _additive(site: Site, marks: Sequence[int]) -> bool:
    """Whether the order of all that acts on a site at these gains does not matter."""
    return all(op.additive for a in map(int, site.others) if marks[a] for op in site.ops(a))


def _beneath(site: Site, marks: Marks) -> int:
    """How many adapters, the first of the bank, have one gain in all entries and additive changes of the weight alone.
    """
    def fits(a: int, column: Sequence[int]) -> bool:
        return len(set(column)) == 1 and all(
            op.additive and not isinstance(op, Bias) for op in site.ops(a) if column[0])

    return sum(1 for _ in takewhile(lambda each: fits(*each), enumerate(zip(*marks, strict=True))))


def _with(base: Callable, updates: Sequence[Update]) -> Callable:
    """A layer with what is beneath an op on its inputs."""
    return (lambda x: in_turn(updates)(base(x), x)) if updates else base


def nothing(y: Tensor, x: Tensor) -> Tensor:
    """The update of a layer on which no adapter acts."""
    return y


UNMET = Program(torch.Size((-1,)), torch.bool, nothing)
"""The program of a layer that no batch of a layout has come to yet."""


def _of_one(update: Update) -> Update:
    """For a layer without a dimension for entries: its tensors are one entry."""
    return lambda y, x: update(y.unsqueeze(0), plain(x).unsqueeze(0)).squeeze(0)


def _plainly(update: Update, dtype: torch.dtype | None = None) -> Update:
    """For inputs that the host has quantized on the way into the layer, or of another dtype than outputs."""
    return lambda y, x: update(y, plain(x).to(dtype or x.dtype))
