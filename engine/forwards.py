"""Routed forwards: layers of a live model that add to each row the deltas of that row's branch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.branch import Branch
from ..kernels.lowrank import add_linear_, add_linear_batched_, add_pointwise_
from .adapters import Bias, Decomposed, Op, part
from .bank import Bank, Site, Slot, Stack, gain_vector
from .geometry import Geometry, geometry_of, no_bias, plain
from .opaque import connect, disconnect, handle_of, route_
from .rows import Rows
from .transfer import on_device

Reader = Callable[[str], "Tensor | None"]
"""(parameter name) -> the base model's tensor in fp32, or None where it cannot be read."""


class _Installed(NamedTuple):
    module: nn.Module
    before: Callable | None
    forward: Callable
    handle: int
    route: Callable


class _Batch(NamedTuple):
    """The rows [at, at + rows) of a batch, in groups of equal length, each with one adapter of a layer: its factors
    down [groups, r, in] and up [groups, out, r], and the gain of all or one for each [groups, 1, 1]."""

    at: int
    rows: int
    down: Tensor
    up: Tensor
    gain: float | Tensor


class RoutedForwards:
    """Installs a bank on the layers of one model and takes it off again.

    Installing replaces `forward` on the instances found now (never a class, never a weight). Outside `rows(...)` a
    routed layer is exactly the layer it was. Installing twice or removing twice is harmless; a layer that somebody
    else has wrapped meanwhile keeps that wrapping, and ours inside it turns into a plain call.

    report     called as report(adapter name, layer, reason) for what cannot be expressed; once per case
    position   tells banks on the same model apart, outermost last
    """

    def __init__(self, root: nn.Module, bank: Bank, reader: Reader | None = None,
                 report: Callable[[str, str, str], None] | None = None, position: int = 0):
        self.root, self.bank, self.position = root, bank, position
        self.current: Rows | None = None
        self.seen: set[str] = set()
        self._reader = reader or (lambda name: _read(root, name))
        self._report = report or (lambda adapter, layer, reason: None)
        self._reported: set[tuple[str, str]] = set()
        self._installed: list[_Installed] = []
        self._generation = 0
        self._layouts: dict[tuple[Branch, ...], Rows] = {}
        self._cache: dict[tuple, object] = {}

    def install(self) -> None:
        if self._installed:
            return
        for name, site in self.bank.sites.items():
            module = _find(self.root, name)
            geometry = None if module is None else geometry_of(module)
            if geometry is None:
                self._tell("all", name, "the model has no such layer that can be routed; left out")
                continue
            before = module.__dict__.get("forward")
            installed = self._routed(site, module, geometry)
            self._installed.append(_Installed(module, before, *installed))
            module.forward = installed[0]

    def remove(self) -> None:
        self.current = None
        self._generation += 1
        for module, before, forward, handle, route in self._installed:
            disconnect(handle, route)
            if module.__dict__.get("forward") is not forward:
                continue
            if before is None:
                del module.forward
            else:
                module.forward = before
        self._installed.clear()
        self._cache.clear()
        self._layouts.clear()

    @contextmanager
    def rows(self, branches: Sequence[Branch]) -> Iterator[None]:
        """While open, row r of the model's batch belongs to branches[r]; rows may come in any order."""
        key = tuple(branches)
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = Rows(key)
        before, self.current = self.current, layout if layout.groups else None
        try:
            yield
        finally:
            self.current = before

    def _routed(self, site: Site, module: nn.Module, geometry: Geometry) -> tuple[Callable, int, Callable]:
        """The layer's new forward, its handle, and what the handle does."""
        base, handle, generation = module.forward, handle_of(module, self.position), self._generation

        def add(y: Tensor, x: Tensor) -> Tensor:
            # A forward that a foreign wrapper holds on to must stay plain when this is installed again above it.
            if self.current is None or self._generation != generation:
                return y
            self.seen.add(site.name)
            return self._add(site, geometry, base, self.current, y, plain(x))

        def route(y: Tensor, x: Tensor) -> None:
            out = add(y, x)
            if out is not y:
                y.copy_(out)

        def forward(x: Tensor, *args, **kwargs) -> Tensor:
            y = base(x, *args, **kwargs)
            if torch.compiler.is_compiling():
                route_(y, x, handle)
                return y
            return add(y, x)

        connect(handle, route)
        return forward, handle, route

    def _add(self, site: Site, geometry: Geometry, base: Callable, rows: Rows, y: Tensor, x: Tensor) -> Tensor:
        if not rows.uniform and (rows.fold(y.shape[0]) is None or x.shape[0] != y.shape[0]):
            self._tell("all", site.name, f"a batch of {x.shape[0]} does not divide into {rows.count} rows; left out")
            return y
        if not geometry.spatial and not y.is_contiguous():
            y = y.contiguous()
        if self._add_batched(site, geometry, rows, y, x):
            return y
        for branch, y_part, x_part, group in rows.parts(y, x):
            gains = branch.at(site.name)
            ops = self._others(site, gains)
            if all(op.additive for _, _, op in ops):
                for stack in site.stacks:
                    self._add_stack(stack, geometry, y_part, x_part, gains)
                for _, gain, op in ops:
                    op.apply_(y_part, x_part, None, gain, geometry)
            else:
                self._chain(site, geometry, base, gains, y_part, x_part)
            if group is not None:
                rows.write_back(y, group, y_part)
        return y

    def _add_stack(self, stack: Stack, geometry: Geometry, y: Tensor, x: Tensor, gains: Sequence[float]) -> None:
        for down, up, gain in self._runs(stack, gains, x):
            x_part = part(x, stack.span, geometry.x_channel, 1)
            if geometry.spatial:
                add_pointwise_(part(y, stack.span, geometry.channel, 0), geometry.apply(x_part, down), up, gain)
            else:
                flat = part(y.view(-1, y.shape[-1]), stack.span, -1, 0)
                add_linear_(flat, x_part.reshape(-1, x_part.shape[-1]), down, up, gain)

    def _add_batched(self, site: Site, geometry: Geometry, rows: Rows, y: Tensor, x: Tensor) -> bool:
        """All groups in two products, where `_batch` finds that possible. False: it is not, and nothing was done."""
        if len(rows.groups) < 2 or geometry.spatial or geometry.is_norm or len(site.stacks) != 1:
            return False
        batch = self._kept(("batch", site.name, rows, x.dtype, x.device), site.stacks[0],
                           lambda: self._batch(site, rows, x))
        if batch is None:
            return False
        if batch.rows != rows.count:
            fold = rows.fold(y.shape[0])
            y, x = (t.narrow(0, batch.at * fold, batch.rows * fold) for t in (y, x))
        count = batch.down.shape[0]
        add_linear_batched_(y.view(count, -1, y.shape[-1]), x.reshape(count, -1, x.shape[-1]),
                            batch.down, batch.up, batch.gain)
        return True

    def _batch(self, site: Site, rows: Rows, like: Tensor) -> _Batch | None:
        """One product for all groups needs each to be a run of equal length right after the last, with one adapter
        each, in the order of the stack, and equal ranks: what Composite's batch looks like."""
        stack, groups = site.stacks[0], rows.groups
        at, length, slots = groups[0].rows[0], len(groups[0].rows), list(stack.slots)
        positions, gains = [], []
        for k, group in enumerate(groups):
            active = [(adapter, gain) for adapter, gain in enumerate(group.branch.at(site.name)) if gain]
            if len(active) != 1 or active[0][0] not in stack.slots or not group.is_run:
                return None
            if len(group.rows) != length or group.rows[0] != at + k * length:
                return None
            positions.append(slots.index(active[0][0]))
            gains.append(float(active[0][1]))
        first, last = positions[0], positions[-1] + 1
        if len(site.others) or stack.span is not None or stack.width is None or positions != list(range(first, last)):
            return None
        down, up = self._factors(stack, like)
        gain = gains[0]
        if len(set(gains)) > 1:
            gain = on_device(gains, like.device, like.dtype).reshape(-1, 1, 1)
        return _Batch(at, length * len(groups), down.unflatten(0, (-1, stack.width))[first:last],
                      up.unflatten(1, (-1, stack.width)).movedim(1, 0)[first:last], gain)

    def _runs(self, stack: Stack, gains: Sequence[float], like: Tensor) -> list[tuple[Tensor, Tensor, float | Tensor]]:
        """The active adapters of a stack as runs of neighbouring ranks: (down, up, gain)."""

        def make() -> list[tuple[Tensor, Tensor, float | Tensor]]:
            runs: list[list[Slot]] = []
            for slot in stack.slots.values():
                if not gains[slot.adapter]:
                    continue
                if runs and runs[-1][-1].stop == slot.start:
                    runs[-1].append(slot)
                else:
                    runs.append([slot])
            out = []
            for run in runs:
                (down, up), ranks = self._factors(stack, like), slice(run[0].start, run[-1].stop)
                values = [float(gains[slot.adapter]) for slot in run]
                gain = values[0] if len(set(values)) == 1 else gain_vector(run, values, like)
                out.append((down[ranks], up[:, ranks], gain))
            return out

        return self._kept(("runs", id(stack), tuple(gains), like.dtype, like.device), stack, make)

    def _kept(self, key: tuple, stack: Stack, make: Callable[[], object]):
        """What was made of a stack's factors, kept for the run; made again where the host has moved the factors."""
        address = stack.down.data_ptr()
        kept = self._cache.get(key)
        if kept is None or kept[0] != address:
            kept = self._cache[key] = (address, make())
        return kept[1]

    def _chain(self, site: Site, geometry: Geometry, base: Callable, gains: Sequence[float], y: Tensor,
               x: Tensor) -> None:
        """Ops whose order matters, one after the other as the host's loader would change the weight."""
        ops, biases = self._in_order(site, tuple(gains), x.device)
        bias = self._bias(site, x)

        def run(k: int, x: Tensor, y: Tensor | None = None) -> Tensor:
            if k == 0:
                return no_bias(base(x) if y is None else y, bias, geometry)
            out = run(k - 1, x, y)
            gain, op, scales = ops[k - 1]
            op.apply_(out, x, lambda z: run(k - 1, z), gain, geometry, scales)
            return out

        out = run(len(ops), x, y)
        y.copy_(out if bias is None else out + geometry.per_channel(bias, out))
        for gain, op in biases:
            op.apply_(y, x, None, gain, geometry)

    def _in_order(self, site: Site, gains: tuple[float, ...], device: torch.device) -> tuple[list, list]:
        """The active ops of a site in the order of the adapters, (gain, op, magnitude factors of a DoRA), and apart
        from them the biases, (gain, op). Worked out once per run: the weight is read here and nowhere else."""
        key = ("chain", site.name, gains, device)
        if key not in self._cache:
            active = [(a, op) for a, gain in enumerate(gains) if gain for op in site.all_ops(a)]
            weight = None
            if any(isinstance(op, Decomposed) for _, op in active):
                weight = self._reader(f"{site.name}.weight")
                weight = None if weight is None else weight.to(device)
            ops, biases = [], []
            for a, op in active:
                scales = None
                if isinstance(op, Bias):
                    biases.append((gains[a], op))
                    continue
                if isinstance(op, Decomposed):
                    if weight is None:
                        self._tell(self.bank.names[a], site.name, "DoRA needs the base weight, which is unreadable; "
                                                                  "left out")
                        continue
                    scales = op.scales(weight)
                ops.append((gains[a], op, scales))
                weight = None if weight is None else op.on_weight(weight, gains[a])
            self._cache[key] = ops, biases
        return self._cache[key]

    def _others(self, site: Site, gains: Sequence[float]) -> list[tuple[int, float, Op]]:
        return [(a, gains[a], op) for a in map(int, site.others) if gains[a] for op in site.ops(a)]

    def _bias(self, site: Site, like: Tensor) -> Tensor | None:
        """The layer's own bias, read once per run."""
        key = ("bias", site.name, like.dtype, like.device)
        if key not in self._cache:
            value = self._reader(f"{site.name}.bias")
            if value is None and getattr(_find(self.root, site.name), "bias", None) is not None:
                self._tell("all", site.name, "the layer's bias is unreadable and was treated as part of its weight")
            self._cache[key] = None if value is None else value.to(like.device, like.dtype)
        return self._cache[key]

    def _factors(self, stack: Stack, like: Tensor) -> tuple[Tensor, Tensor]:
        """The stack's factors as the layer needs them: themselves, or one converted copy per run."""
        if stack.down.dtype == like.dtype and stack.down.device == like.device:
            return stack.down, stack.up
        key = ("factors", id(stack), like.dtype, like.device)
        if key not in self._cache:
            self._cache[key] = (stack.down.to(like), stack.up.to(like))
        return self._cache[key]

    def _tell(self, adapter: str, layer: str, reason: str) -> None:
        if (adapter, layer) not in self._reported:
            self._reported.add((adapter, layer))
            self._report(adapter, layer, reason)


def _find(root: nn.Module, name: str) -> nn.Module | None:
    try:
        return root.get_submodule(name) if name else None
    except AttributeError:
        return None


def _read(root: nn.Module, name: str) -> Tensor | None:
    """Default reader: the parameter itself in fp32; None where there is none or it is not an ordinary tensor."""
    owner, _, leaf = name.rpartition(".")
    value = getattr(_find(root, owner), leaf, None)
    return value.detach().float() if isinstance(value, Tensor) and value.is_floating_point() else None
