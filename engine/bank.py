"""The bank: what every adapter does to every layer of a model, held once and shared by all branches."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .adapters import Decomposed, Kron, LowRank, Op, Span, frozen
from .stack import Stack, StackOp


class Site(nn.Module):
    """Everything the bank holds for one layer: its stacks, and the ops that are not low-rank, by adapter.

    weighed   whether one of these depends on the layer's weight, and on the changes beneath it
    """

    def __init__(self, name: str, ops: Mapping[int, Sequence[Op]], dtype: torch.dtype | None = None):
        super().__init__()
        self.name = name
        stacks: dict[object, dict[Span, dict[int, LowRank]]] = {}
        others: dict[int, list[Op]] = {}
        for adapter, adapter_ops in ops.items():
            for op in adapter_ops:
                # Behind an op that depends on the order, as another one of the same file may be, it stays there.
                low = type(op) is LowRank and all(before.additive for before in others.get(adapter, ()))
                entries = stacks.setdefault(_inputs(op), {}).setdefault(op.span, {}) if low else None
                if entries is not None and adapter not in entries:
                    entries[adapter] = op
                else:
                    # Small factors that every call multiplies by: converted here, once.
                    others.setdefault(adapter, []).append(op.to(dtype) if type(op) is Kron and dtype else op)
        self.stacks = nn.ModuleList([Stack(slices, dtype) for slices in stacks.values()])
        self.others = nn.ModuleDict({str(adapter): nn.ModuleList(kept) for adapter, kept in others.items()})
        self.weighed = any(isinstance(op, Decomposed) for ops in others.values() for op in ops)

    @property
    def adapters(self) -> set[int]:
        """Those that act here."""
        return {*map(int, self.others), *(slot.adapter for stack in self.stacks for slot in stack.slots)}

    def ops(self, adapter: int) -> list[Op]:
        """The ops of one adapter that are not in a stack."""
        return list(self.others[str(adapter)]) if str(adapter) in self.others else []

    def all_ops(self, adapter: int) -> list[Op]:
        """All ops of one adapter, in the order they act; none where it leaves the layer alone."""
        stacked = [StackOp(stack, k, slot) for stack in self.stacks for k, each in enumerate(stack.slices)
                   for slot in each.slots if slot.adapter == adapter]
        return stacked + self.ops(adapter)


def _inputs(op: LowRank) -> Span:
    """The slice of a layer's inputs that an op takes; of convolutions, which no model fuses, any slice is apart."""
    return op.span if op.span is not None and (op.span[0] == 1 or op.down.ndim > 2) else None


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
        return [site for site in self.site_list if max(site.adapters) >= first]

    def additive(self, first: int = 0) -> bool:
        """Whether no change of a layer by the adapters from the first-th on depends on the layer's weight."""
        return all(op.additive for site in self.site_list for a in range(first, self.count) for op in site.ops(a))

    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(p.numel() * p.element_size() for p in self.parameters())
