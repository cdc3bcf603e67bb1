"""Runs of the real pack and the real samplers on models whose tensors have a shape and nothing else, to count what is
computed: no weights, no device, and nothing that depends on a machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..host.compose.attention import OVERRIDE
from ..host.compose.composition import KEY, Composition
from ..host.families.split_points import split_point_of
from ..host.families.work import META, Operations

ENDLESS = 2.0**60
"""Bytes of memory that there seem to be: how a batch is split does not depend on the machine."""


class Weightless(Operations):
    """While open, what is computed with a tensor on `meta` is there as well, wherever the others are, and counted. What
    is written from there into an ordinary tensor leaves it as it was, and a number that is read is 1."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = {tensor.is_meta for tensor in _tensors((*args, *kwargs.values()))}
        if True not in there:
            return super().__torch_dispatch__(op, types, args, kwargs)
        if op is torch.ops.aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        found, named = args, kwargs
        if False in there or any(isinstance(value, torch.device) for value in (*args, *kwargs.values())):
            found, named = tree_map(_bare, (args, kwargs))
        out = super().__torch_dispatch__(op, types, found, named)
        return args[0] if op._schema.is_mutable and isinstance(args[0], Tensor) and not args[0].is_meta else out


def _tensors(values: Iterable) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _bare(value):
    if isinstance(value, Tensor) and not value.is_meta:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META)
    return META if isinstance(value, torch.device) else value


class Remembered:
    """The blocks of a MODEL's diffusion model, each computed once for all calls that are alike: blocks of the same
    parameters, inputs of the same shapes, a batch of the same branches. What it counted is added, and what it gave is
    given again, for a run of 20 steps makes the same call of 60 equal blocks twenty times."""

    def __init__(self, model, counter: Operations):
        self._counter, self._root = counter, model.model.diffusion_model
        self._known: dict[Hashable, tuple[int, object, list]] = {}
        self._composition: Composition | None = None
        for block in split_point_of(self._root, 1).deep:
            kind = tuple((name, each.shape) for name, each in block.named_parameters())
            block.forward = self._remembered(block, block.forward, kind)

    @contextmanager
    def of(self, model) -> Iterator[Callable[[], int]]:
        """A run of this MODEL, one of the same diffusion model: what counts its operations."""
        self._composition, before = model.get_attachment(KEY), self._counter.total
        yield lambda: self._counter.total - before
        self._composition = None

    def _remembered(self, block: nn.Module, forward: Callable, kind: Hashable) -> Callable:
        def remembered(*args, **kwargs):
            values = [*args, *kwargs.values()]
            options = next((value for value in values if isinstance(value, dict) and OVERRIDE in value), {})
            shapes = tuple(value.shape if isinstance(value, Tensor) else type(value) for value in values)
            key = kind, tuple(kwargs), shapes, self._batch(), OVERRIDE in options
            if key not in self._known:
                with self._watched(options) as attended:
                    before = self._counter.total
                    out = forward(*args, **kwargs)
                    own = self._counter.total - before - sum(operations for operations, _ in attended)
                self._known[key] = own, tree_map(_bare_copy, out), [call for _, call in attended]
                return out
            operations, out, calls = self._known[key]
            self._counter.total += operations
            for inputs, named in calls:
                options[OVERRIDE](lambda q, k, v, *args, **kwargs: v, *inputs, **named)
            return tree_map(_bare_copy, out)

        return remembered

    @contextmanager
    def _watched(self, options: dict) -> Iterator[list[tuple[int, tuple[tuple, dict]]]]:
        """While open, the calls of attention that are read (host/compose/attention.py): what reading each computed, and
        its inputs. Which are read goes by how many came before, so that this is not remembered."""
        attended, seen, counter = [], options.get(OVERRIDE), self._counter

        def watched(func: Callable, *inputs, **named) -> Tensor:
            inside = 0

            def counted(*args, **kwargs) -> Tensor:
                nonlocal inside
                before = counter.total
                out = func(*args, **kwargs)
                inside = counter.total - before
                return out

            before = counter.total
            out = seen(counted, *inputs, **named)
            plain = {name: value for name, value in named.items() if not isinstance(value, dict)}
            attended.append((counter.total - before - inside, (inputs, plain)))
            return out

        if seen is None:
            yield attended
            return
        options[OVERRIDE] = watched
        try:
            yield attended
        finally:
            options[OVERRIDE] = seen

    def _batch(self) -> Hashable:
        """What the LoRAs do in the batch that is evaluated."""
        if self._composition is None:
            return None
        layouts = [routed.current for routed in self._composition.run.routed(self._root, list, None, bool, dict)]
        return tuple(each and (each.rows, each.places is not None, each.reach is not None) for each in layouts)


def _bare_copy(value):
    return torch.empty_like(value, device=META) if isinstance(value, Tensor) else value


@contextmanager
def weightless(model) -> Iterator[Remembered]:
    """While open, LoRA files are read without their numbers, memory has no end, and operations are counted; the blocks
    of a MODEL without memory, which count them."""
    import comfy.model_management
    import comfy.utils

    load = comfy.utils.load_torch_file

    def bare(*args, **kwargs) -> dict[str, Tensor]:
        return {key: tensor.to(META) if tensor.ndim else tensor for key, tensor in load(*args, **kwargs).items()}

    def free(device=None, torch_free_too: bool = False):
        return (ENDLESS, ENDLESS) if torch_free_too else ENDLESS

    def numbers(tensor: Tensor, known=Tensor.tolist):
        return known(torch.ones(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor)

    def told(line: logging.LogRecord) -> bool:  # a layer that is remembered is not called
        return "never called" not in line.getMessage()

    log = logging.getLogger("lora_ensemble")
    log.addFilter(told)
    try:
        with mock.patch.object(comfy.utils, "load_torch_file", bare), mock.patch.object(Tensor, "tolist", numbers), \
                mock.patch.object(comfy.model_management, "get_free_memory", free), Weightless() as counter:
            yield Remembered(model, counter)
    finally:
        log.removeFilter(told)
