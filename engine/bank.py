"""The bank: what every adapter does to every layer of a model, held once and shared by all branches."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapters import Kron, LowRank, Op, Span, frozen
from .geometry import Geometry


@dataclass(frozen=True)
class Slot:
    """Where one adapter's ranks lie in a stack, the alpha/rank that was folded into them, and the rank that it was
    trained with."""

    adapter: int
    start: int
    stop: int
    scale: float = 1.0
    rank: int = 0

    @property
    def width(self) -> int:
        return self.stop - self.start


class Stack(nn.Module):
    """Low-rank factors of all adapters for one slice of one layer, side by side along the rank.

    down [R, in, *k], up [out, R] with R the sum of the ranks; alpha/rank is folded into up, in fp32 and rounded once,
    to `dtype`. One adapter is a view, and all of them together are one product.
    """

    def __init__(self, entries: Mapping[int, LowRank], span: Span, dtype: torch.dtype | None = None):
        super().__init__()
        self.span = span
        self.down = frozen(torch.cat([op.down.to(dtype or op.down.dtype) for op in entries.values()]).contiguous())
        ups = [(op.up.float() * op.scale).to(dtype or op.up.dtype) for op in entries.values()]
        self.up = frozen(torch.cat(ups, dim=1).contiguous())
        self.slots: dict[int, Slot] = {}
        start = 0
        for adapter, op in entries.items():
            self.slots[adapter] = Slot(adapter, start, start + op.down.shape[0], op.scale, op.rank)
            start += op.down.shape[0]


class StackOp(Op):
    """One adapter's part of a stack, as an op like others."""

    def __init__(self, stack: Stack, slot: Slot):
        super().__init__()
        # In a list, so that the stack is not registered once more as a module of this op.
        self._stack, self.slot, self.span, self.scale, self.rank = [stack], slot, stack.span, slot.scale, slot.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """(down [r, in, *k], up [out, r]), alpha/rank folded into up: views of the stack."""
        stack, ranks = self._stack[0], slice(self.slot.start, self.slot.stop)
        return stack.down[ranks], stack.up[:, ranks]

    def delta(self, like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        down, up = (factor.to(like.device, dtype) for factor in self.factors())
        return (up @ down.flatten(1)).unflatten(1, down.shape[1:])

    def product(self, x: Tensor, geometry: Geometry) -> Tensor:
        down, up = self.factors()
        hidden = geometry.apply(x, down.to(x)).movedim(geometry.channel, -1)
        return (hidden @ up.to(x).T).movedim(-1, geometry.channel)


class Site(nn.Module):
    """Everything the bank holds for one layer: its stacks, and the ops that are not low-rank, by adapter."""

    def __init__(self, name: str, ops: Mapping[int, Sequence[Op]], dtype: torch.dtype | None = None):
        super().__init__()
        self.name = name
        by_span: dict[Span, dict[int, LowRank]] = {}
        others: dict[int, list[Op]] = {}
        for adapter, adapter_ops in ops.items():
            for op in adapter_ops:
                entries = by_span.setdefault(op.span, {}) if type(op) is LowRank else None
                if entries is not None and adapter not in entries:
                    entries[adapter] = op
                else:
                    # Small factors that every call multiplies by: converted here, once.
                    others.setdefault(adapter, []).append(op.to(dtype) if type(op) is Kron and dtype else op)
        self.stacks = nn.ModuleList([Stack(entries, span, dtype) for span, entries in by_span.items() if entries])
        self.others = nn.ModuleDict({str(adapter): nn.ModuleList(kept) for adapter, kept in others.items()})

    @property
    def adapters(self) -> set[int]:
        """Those that act here."""
        return {*map(int, self.others), *(adapter for stack in self.stacks for adapter in stack.slots)}

    def ops(self, adapter: int) -> list[Op]:
        """The ops of one adapter that are not in a stack."""
        return list(self.others[str(adapter)]) if str(adapter) in self.others else []

    def all_ops(self, adapter: int) -> list[Op]:
        """All ops of one adapter, in the order they act; none where it leaves the layer alone."""
        stacked = [StackOp(stack, stack.slots[adapter]) for stack in self.stacks if adapter in stack.slots]
        return stacked + self.ops(adapter)


class Bank(nn.Module):
    """N adapters over the layers of one model.

    adapters   per adapter: layer name -> its ops there, in the order they act
    names      what to call each adapter in messages
    dtype      low-rank factors and those of LoKr are held in this dtype, the model's compute dtype, so that a forward
               converts nothing; all others stay as they are. None keeps the files' dtypes.
    """

    def __init__(self, adapters: Sequence[Mapping[str, Sequence[Op]]], names: Sequence[str] | None = None,
                 dtype: torch.dtype | None = None):
        super().__init__()
        self.count = len(adapters)
        self.names = tuple(names) if names is not None else tuple(str(i) for i in range(self.count))
        by_layer: dict[str, dict[int, Sequence[Op]]] = {}
        for i, adapter in enumerate(adapters):
            for name, ops in adapter.items():
                by_layer.setdefault(name, {})[i] = ops
        # Layer names hold dots, which module names must not: sites are kept by position.
        self.site_list = nn.ModuleList([Site(name, ops, dtype) for name, ops in by_layer.items()])
        self.sites: dict[str, Site] = {site.name: site for site in self.site_list}
        self.dtype = dtype
        self._first = self._first_tensors()

    def __deepcopy__(self, memo: dict) -> Bank:
        """A bank with tensors of its own. What a host hangs on a model to manage its memory belongs to the original
        alone: handles of buffers among it, which would be freed twice."""
        other = Bank.__new__(Bank)
        nn.Module.__init__(other)
        other.count, other.names, other.dtype = self.count, self.names, self.dtype
        other.site_list = copy.deepcopy(self.site_list, memo)
        other.sites = {site.name: site for site in other.site_list}
        other._first = other._first_tensors()
        return other

    def in_dtype(self, dtype: torch.dtype, device: torch.device) -> Bank:
        """A bank on a device that holds in another dtype what this one holds in its own."""
        held = {id(factor) for part in self.modules() if type(part) in (Stack, Kron) for factor in part.parameters()}
        other = copy.deepcopy(self, {id(each): frozen(each.to(device, dtype if id(each) in held else each.dtype))
                                     for each in self.parameters()})
        other.dtype = dtype
        return other

    def _first_tensors(self) -> list[tuple[dict, str]]:
        """Per layer, where its first tensor is held. Not the tensor: hosts put others in its place."""
        return [next((module._parameters, leaf) for module in site.modules() for leaf in module._parameters)
                for site in self.site_list]

    def addresses(self) -> list[int]:
        """Where the layers' first tensors lie in memory: elsewhere once the host has moved the bank."""
        return [held[leaf].data_ptr() for held, leaf in self._first]

    def sites_of(self, first: int) -> list[Site]:
        """The layers on which an adapter from the first-th on acts."""
        return [site for site in self.site_list if max(site.adapters, default=-1) >= first]

    def additive(self, first: int = 0) -> bool:
        """Whether no change of a layer by the adapters from the first-th on depends on the layer's weight."""
        return all(op.additive for site in self.site_list for a in range(first, self.count) for op in site.ops(a))

    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(p.numel() * p.element_size() for p in self.parameters())
