"""Routed layers under torch.compile.

What low-rank adapters add to a layer is part of the graph, as products of tensors that are given to it from outside:
factors, and gains for every row of the batch and every rank. Gains change what they hold and not where they lie, so one
graph serves all branches, strengths and steps, all blocks of a model whose adapters have the same ranks, and may be
recorded as a CUDA graph.

Other adapters, and places that adapters are confined to, are one opaque operator behind the layer, which looks up what
to do when the graph runs. It neither breaks graphs nor makes new ones, but a CUDA graph, which repeats the kernels of
one call, must not hold it: inductor leaves it out by its tag (torch 2.9); what records it all the same is stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..kernels.branch import Branch
from ..kernels.lowrank import add_pointwise_, rows, shares, tokens
from .adapters import part
from .bank import Site
from .geometry import Geometry
from .transfer import on_device

_numbers = count()
_handles: WeakKeyDictionary[nn.Module, dict[int, Tensor]] = WeakKeyDictionary()
_routes: dict[int, Callable[[Tensor, Tensor], None]] = {}


class Traced:
    """What a compiled layer is given from outside; plain attributes, so that graphs of equal layers are one.

    handle    the number of the layer for the opaque operator; a tensor, since a number would be part of the graph
    stacks    (down [R, in, *k], up [R, out], span) of each of its stacks, or, where one has several slices of the
              weight, (down, the shares of its outputs, None); None where the opaque operator is needed
    gains     per stack [rows, 1, R], for convolutions [rows, R, 1, ..]; empty where the opaque operator has to see to
              it; None where no adapter acts on the batch
    order     how the layer has several entries per row (layout.py)
    uniform   whether all rows are of one branch, so that a layer may have any number of entries
    """

    def __init__(self, site: Site, geometry: Geometry, handle: Tensor, order: str | None):
        self.handle, self.geometry, self.order, self.uniform = handle, geometry, order, False
        self.stacks: list | None = None
        self.gains: Sequence[Tensor] | None = ()
        self._site = site

    def refresh(self) -> None:
        """Find the factors, which the host may have moved."""
        if len(self._site.others) or self.geometry.is_norm:
            return
        self.stacks = []
        for stack in self._site.stacks:
            if len(stack.slices) > 1:
                ranks = slice(0, stack.down.shape[0])
                parts = [stack.share(stack.up, ranks, each) for each in stack.parts(ranks)]
                self.stacks.append((stack.down, parts, None))
                keep_address(stack.down, *(each.up for each in parts))
            else:
                self.stacks.append((stack.down, stack.ups()[0].mT, stack.slices[0].span))
                keep_address(*self.stacks[-1][:2])

    def add_(self, y: Tensor, x: Tensor) -> Tensor:
        """y with what the adapters add, as the compiler sees it."""
        if self.gains is None:
            return y
        gains = self._of_entries(y, x)
        if gains is None:
            route_(y, x, self.handle)
            return y
        geometry, x = self.geometry, x.to(y.dtype)
        for (down, up, span), gain in zip(self.stacks, gains, strict=True):
            down, gain = down.to(x), gain.to(x)
            if isinstance(up, list):
                into, of = (t if t.ndim <= 3 else t.flatten(1, -2) for t in (y, x))
                shares(down, [each._replace(up=each.up.to(x)) for each in up], None if x.ndim == 2 else x.shape[0],
                       y.shape[-1], gain[:, 0] if x.ndim == 2 else gain)(into, of)
                continue
            up = up.to(x)
            into, of = part(y, span, geometry.channel, 0), part(x, span, geometry.channel, 1)
            if geometry.spatial:
                add_pointwise_(into, geometry.apply(of, down), up, gain)
            elif x.ndim == 2:
                rows(down, up, gain[:, 0])(into, of)
            else:
                into, of = (t if t.ndim == 3 else t.flatten(1, -2) for t in (into, of))
                tokens(down, up.expand(into.shape[0], -1, -1), gain)(into, of)
        return y

    def _of_entries(self, y: Tensor, x: Tensor) -> Sequence[Tensor] | None:
        """The gains of a layer's entries, from those of the rows; None where the opaque operator has to see to it."""
        gains = self.gains
        if not gains or self.stacks is None or y.ndim < 2 + self.geometry.spatial:
            return None
        entries, rows = x.shape[0], gains[0].shape[0]
        if entries == rows:
            return gains
        fold = entries // rows
        if fold * rows == entries and self.order == "repeat":
            return [gain.unsqueeze(1).expand(-1, fold, *gain.shape[1:]).flatten(0, 1) for gain in gains]
        if fold * rows == entries and self.order == "tile":
            return [gain.unsqueeze(0).expand(fold, *gain.shape).flatten(0, 1) for gain in gains]
        return [gain[:1] for gain in gains] if self.uniform else None


class TracedGains:
    """The gains of all layers of a bank for batches of so many rows: tensors that stay where they are."""

    def __init__(self, layers: Sequence[tuple[Site, Geometry]], rows: int, device: torch.device, dtype: torch.dtype):
        self.layers, self.rows, self.device, self.dtype = layers, rows, device, dtype
        self._slots = [(site.name, slot) for site, _ in layers for stack in site.stacks
                       for slot in stack.slots]
        self._adapters = torch.tensor([slot.adapter for _, slot in self._slots for _ in range(slot.width)])
        self._sent: dict[tuple[Branch, ...], list[Tensor]] = {}
        self._holding: tuple[Branch, ...] | None = None
        widths = iter(self._split(torch.zeros(rows, len(self._adapters), device=device, dtype=dtype)))
        self.tensors = [[next(widths).clone() for _ in site.stacks] for site, _ in layers]
        self._flat = [tensor for each in self.tensors for tensor in each]
        keep_address(*self._flat)

    def hold(self, branches: tuple[Branch, ...]) -> None:
        """Fill the gains for a batch of these branches; each batch layout is sent to the device once."""
        if branches == self._holding or not self._flat:
            return
        if branches not in self._sent:
            self._sent[branches] = self._split(self._numbers(branches))
        torch._foreach_copy_(self._flat, self._sent[branches])
        self._holding = branches

    def _numbers(self, branches: tuple[Branch, ...]) -> Tensor:
        rows = []
        for branch in branches:
            row = torch.tensor(branch.gains, dtype=torch.float32)[self._adapters]
            at = 0
            for name, slot in self._slots if branch.per_module else ():
                row[at:at + slot.width] = branch.at(name)[slot.adapter]
                at += slot.width
            rows.append(row)
        return on_device(torch.stack(rows), self.device, self.dtype)

    def _split(self, numbers: Tensor) -> list[Tensor]:
        """[rows, ranks of all stacks] -> per stack, as `Traced.gains` has them."""
        out, at = [], 0
        for site, geometry in self.layers:
            for stack in site.stacks:
                ranks = numbers[:, at:at + stack.down.shape[0]]
                ones = [1] * (geometry.spatial or 1)
                out.append(ranks.unflatten(1, (-1, *ones)) if geometry.spatial else ranks.unsqueeze(1))
                at += stack.down.shape[0]
        return out


def handle_of(module: nn.Module, position: int) -> Tensor:
    """The number of a layer for its position-th bank; a layer keeps it for as long as it lives."""
    own = _handles.setdefault(module, {})
    if position not in own:
        number = next(_numbers)
        own[position] = torch.tensor(number)
        own[position].number = number  # beside the tensor, since reading one takes longer
    return own[position]


def connect(handle: Tensor, route: Callable[[Tensor, Tensor], None]) -> None:
    """From now on the handle does route(y, x), which changes y in place."""
    _routes[_number(handle)] = route


def disconnect(handle: Tensor, route: Callable[[Tensor, Tensor], None]) -> None:
    """The handle does nothing again; a route that somebody else has connected since stays."""
    if _routes.get(_number(handle)) is route:
        del _routes[_number(handle)]


def _number(handle: Tensor) -> int:
    number = getattr(handle, "number", None)
    return int(handle) if number is None else number


def run(y: Tensor, x: Tensor, handle: Tensor) -> None:
    """Semantics: y += the deltas of each row's branch at the layer of this handle.

    Raises RuntimeError while a CUDA graph is recorded.
    """
    if y.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("LoRA Ensemble: a CUDA graph would repeat what adapters other than plain LoRAs, or confined "
                           "to places, do at one step for ever. In the node that compiles the model choose backend "
                           "'inductor' instead of 'cudagraphs', and a mode without CUDA graphs ('default').")
    route = _routes.get(int(handle))
    if route is not None:
        route(y, x)


_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
route_ = torch.library.custom_op("lora_ensemble::route_", run, mutates_args=("y",),
                                 schema="(Tensor(a!) y, Tensor x, Tensor handle) -> ()",
                                 **({"tags": _TAGS} if _TAGS else {}))


@route_.register_fake
def _(y: Tensor, x: Tensor, handle: Tensor) -> None:
    return None


def keep_address(*tensors: Tensor) -> None:
    """Tell the compiler that these lie where they are for good: CUDA graphs read them there and copy nothing."""
    mark = getattr(torch._dynamo, "mark_static_address", None)
    for tensor in tensors if mark is not None else ():
        mark(tensor, guard=False)
