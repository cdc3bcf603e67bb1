"""Routed forwards: layers of a live model that add to each row the deltas of that row's branch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.branch import Branch
from .adapters import Reader
from .bank import Bank
from .compiled import Traced, TracedGains, connect, disconnect, handle_of
from .gains import Gains, Marked
from .geometry import ForwardOf, geometry_of, layer_of, own_forward
from .layout import Layout, Order, folded
from .positions import Places
from .program import UNMET, Layer, Programs
from .reach import Reach
from .tell import Once, Report


class _State:
    """What the forwards of one installation look at: gone with it, so that one that a foreign wrapper holds on to is
    the plain layer when others are installed above it."""

    __slots__ = ("bare", "current", "open")

    def __init__(self) -> None:
        self.current: Layout | None = None
        self.open = 0
        self.bare = False


class _Installed(NamedTuple):
    module: nn.Module
    before: Callable | None
    forward: Callable
    traced: Traced
    route: Callable


class RoutedForwards:
    """Installs a bank on the layers of one model and takes it off again.

    Installing replaces `forward` on the instances found now (never a class, never a weight). Outside `rows(...)` a
    routed layer is exactly the layer it was. Installing twice or removing twice is harmless; a layer that somebody
    else has wrapped meanwhile keeps that wrapping, and ours inside it turns into a plain call.

    report     told what cannot be expressed, once per case
    position   tells banks on the same model apart, outermost last
    order      how the rows of a batch lie in the entries of a layer (layout.py)
    compiled   whether torch.compile sees the model: gains are then tensors that stay where they are (compiled.py).
               Where it does although this is False, all that adapters add is an opaque operator
    lasting    a context for tensors that are kept beyond the layer that runs, as a host may ask for
    layers     all layers by the names that the bank knows, asked where the model has none of such a name: others may
               have put modules of their own between its layers, which gives those behind them other names
    flat       see `Programs`
    forward_of which forward of a layer is called, and how another takes its place

    `acted` are the adapters that acted in any batch.
    """

    def __init__(self, root: nn.Module, bank: Bank, reader: Reader | None = None,
                 report: Report | None = None, position: int = 0, order: Order = folded,
                 compiled: bool = False, lasting: Callable[[], AbstractContextManager] = nullcontext,
                 layers: Callable[[], Mapping[str, nn.Module]] | None = None, flat: bool = False,
                 forward_of: ForwardOf = own_forward):
        self.root, self.bank, self.position, self.order, self.compiled = root, bank, position, order, compiled
        self._named, self._forward_of = layers, forward_of
        say = Once(report or (lambda adapter, layer, reason: None))
        # Not a method: programs hold it, and a circle would keep the model of a run that is over.
        self._tell = lambda adapter, layer, reason: say(adapter, layer, reason, about=(adapter, layer))
        self._state = _State()
        self.acted: set[int] = set()
        self._installed: list[_Installed] = []
        self._layers: list[Layer] = []
        self._names: list[str] = []  # theirs, which a choice for each layer goes through at every step
        self._weighed: list[int] = []  # layers whose programs are for some gains alone
        self._layouts: dict[Hashable, Layout] = {}
        self._gains = Gains()
        self._programs = Programs(bank, self._gains, reader or (lambda name: _read(root, name)), self._tell, lasting,
                                  flat)
        self._addresses: list[int] = []
        self._traced: dict[int, TracedGains] = {}

    @property
    def seen(self) -> set[str]:
        """Names of the layers that were met by a batch on which an adapter acts. All where the model is compiled: a
        graph does not say which it calls."""
        return set(self.bank.sites) if self.compiled else set(self._programs.seen)

    def unseen(self, groups: Sequence[Collection[int]]) -> list[str]:
        """Layers that have adapters of a group that acted, in no batch which came to them."""
        if self.compiled:
            return []
        acted, met = [group for group in groups if not self.acted.isdisjoint(group)], self._programs.seen
        return [name for name, site in self.bank.sites.items() if any(
            met.get(name, set()).isdisjoint(group) for group in acted if not site.adapters.isdisjoint(group))]

    @property
    def current(self) -> Layout | None:
        """The layout of the batch that is evaluated now, None where no adapter acts."""
        return self._state.current

    @property
    def bare(self) -> bool:
        """Whether a layer was called outside `rows(...)`: by somebody who evaluates the model in a way of his own. Of a
        compiled model it is not known."""
        return self._state.bare

    def install(self) -> None:
        if self._installed:
            return
        found = {name: layer_of(self.root, name) for name in self.bank.sites}
        if self._named is not None and None in found.values():
            named = self._named()
            found = {name: named.get(name) for name in found}
        for name, site in self.bank.sites.items():
            module = found[name]
            geometry = None if module is None else geometry_of(module)
            base, fitted = (None, None) if geometry is None else self._forward_of(module)
            if base is None:
                self._tell("all", name, "the model has no such layer that can be routed; left out")
                continue
            before = module.__dict__.get("forward")
            self._layers.append(Layer(site, geometry, base, module))
            self._names.append(name)
            if site.weighed:
                self._weighed.append(len(self._layers) - 1)
            forward, traced, route = self._routed(len(self._layers) - 1)
            module.forward = fitted(forward)
            self._installed.append(_Installed(module, before, module.forward, traced, route))

    def remove(self) -> None:
        self._state.current, self._state = None, _State()
        for module, before, forward, traced, route in self._installed:
            disconnect(traced.handle, route)
            traced.gains = None
            if module.__dict__.get("forward") is not forward:
                continue
            if before is None:
                del module.forward
            else:
                module.forward = before
        self._installed.clear()
        self._layers.clear()
        self._names.clear()
        self._weighed.clear()
        self._forget()

    @contextmanager
    def rows(self, branches: Sequence[Branch], places: Places | None = None,
             reach: Reach | None = None) -> Iterator[None]:
        """While open, row r of the model's batch belongs to branches[r]; rows may come in any order.

        reach   told what adapters would add, whether they act or not. Of a compiled model it learns nothing
        """
        if self._addresses != (addresses := self.bank.addresses()):
            self._forget()  # the host has moved factors since
            self._addresses = addresses
        state, marked = self._state, self._gains.marked(branches)
        before, held = state.current, self._gains.held
        if reach is not None and not self.compiled:
            layout = Layout(marked, places, self.order, reach)  # of this batch alone
        elif (layout := self._layouts.get((marked.kind, places))) is None:
            layout = self._layouts[marked.kind, places] = Layout(marked, places, self.order)
        state.open += 1
        self.acted |= layout.acting
        try:
            self._turn_to(layout if layout.acting or layout.reach is not None else None, marked)
            yield
        finally:
            state.open -= 1
            self._turn_to(before, held)

    def _turn_to(self, layout: Layout | None, marked: Marked | None) -> None:
        """From now on layers do what a layout says, for a batch of these branches; None: nothing."""
        self._state.current = layout
        if layout is not None:
            self._gains.hold(marked)
            if not layout.programs:  # no layer has met it: those that are known of other layouts
                layout.programs = self._programs.latest(self._names, layout)
            elif layout.marked is not marked:
                for k in self._weighed:
                    layout.programs[k] = UNMET
            layout.marked = marked
        self._trace(layout)

    def explain(self) -> list[str]:
        """What each layer does for each layout that was met: a line per product."""
        return [f"{len(layout.rows)} rows: {layer.site.name}: {line}" for layout in self._layouts.values()
                for layer, program in zip(self._layers, layout.programs, strict=True) for line in program.text]

    def _trace(self, layout: Layout | None) -> None:
        """Hand the compiled layers what they need for a layout."""
        if not self.compiled:
            return
        gains = None
        if layout is not None and layout.places is not None:
            gains = [()] * len(self._layers)
        elif layout is not None:
            rows = len(layout.rows)
            if rows not in self._traced:
                like = next(self.bank.parameters())
                self._traced[rows] = TracedGains([layer[:2] for layer in self._layers], rows, like.device,
                                                 self.bank.dtype or like.dtype)
            self._traced[rows].hold(layout.rows)
            gains = [tensors if layout.uniform or self.order(layer.site.name, rows, rows) == "rows" else ()
                     for layer, tensors in zip(self._layers, self._traced[rows].tensors, strict=True)]
        for k, installed in enumerate(self._installed):
            installed.traced.gains = None if gains is None else gains[k]
            installed.traced.uniform = layout is not None and layout.uniform

    def _forget(self) -> None:
        self._layouts.clear()
        self._traced.clear()
        self._programs.forget()
        for installed in self._installed if self.compiled else ():
            installed.traced.refresh()

    def _routed(self, k: int) -> tuple[Callable, Traced, Callable]:
        """The new forward of the k-th layer, what the compiler sees of it, and what its handle does."""
        layer, state, programs = self._layers[k], self._state, self._programs
        base, compiling = layer.base, torch.compiler.is_dynamo_compiling
        traced = Traced(layer.site, layer.geometry, handle_of(layer.module, self.position),
                        self.order(layer.site.name, 4, 2))

        def add(y: Tensor, x: Tensor) -> Tensor:
            layout = state.current
            if layout is None:
                return y
            program = layout.programs[k]
            if program.shape != x.shape or program.dtype is not x.dtype:
                program = layout.programs[k] = programs.program(layer, layout, y, x)
            return program.run(y, x)

        def route(y: Tensor, x: Tensor) -> None:
            out = add(y, x)
            if out is not y:
                y.copy_(out)

        def forward(x: Tensor | None = None, *args, **kwargs) -> Tensor:
            # This runs at every layer of every step: no more than is needed, and no call of `add`.
            if args or kwargs:
                y = base(**kwargs) if x is None else base(x, *args, **kwargs)
                x = next(iter(kwargs.values())) if x is None else x  # by its name, which is not the same in all layers
            else:
                y = base(x)
            if compiling():
                return traced.add_(y, x)
            layout = state.current
            if layout is None:
                state.bare = state.bare or not state.open
                return y
            program = layout.programs[k]
            return program.run(y, x) if program.shape == x.shape and program.dtype is x.dtype else add(y, x)

        connect(traced.handle, route)
        return forward, traced, route


def _read(root: nn.Module, name: str) -> Tensor | None:
    """Default reader: the parameter itself in fp32; None where there is none or it is not an ordinary tensor."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(layer_of(root, owner), leaf, None)
    return value.detach().float() if isinstance(value, Tensor) and value.is_floating_point() else None
