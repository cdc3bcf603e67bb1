"""How large every adapter's delta of every layer is: what K-LoRA and EST-LoRA choose by."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import isfinite
from typing import TypeVar

import torch
from torch import Tensor

from ..kernels.energy import energy
from ..kernels.size import Size
from ..kernels.topk import LARGEST_TILE, MatrixPart, sums_on_device, top_and_total
from .adapters import Bias, Decomposed, GLoRA, Op, Reader, Span
from .bank import Bank, Site
from .stack import StackOp
from .tell import Report
from .transfer import on_device

Made = TypeVar("Made")

AT_ONCE = 2**27  # entries of dense deltas, half a gigabyte, that wait or are measured at a time
ROOM = 40  # bytes on a GPU for each entry that is measured at a time: float64, float32, and the search among them


def measure(bank: Bank, subjects: Sequence[bool], k: int = 0, raw: bool = False, top: bool = True,
            reader: Reader | None = None, visit: Callable[[int, int], None] | None = None,
            report: Report | None = None, strengths: Sequence[float] | None = None, alone: bool = False,
            device: torch.device | None = None, most: int = 2**24, first: int = 0) -> dict[str, dict[int, Size]]:
    """Layer -> adapter -> the size of its delta there at strength 1, for layers on which several adapters act; a layer
    of one adapter has a size of NaN, as there is nothing to compare, unless `alone` asks for it.

    subjects   per adapter that is compared, whether it is on the subject side; K is the product of the largest rank of
               either side (with one side only, of that one), for two adapters the product of their ranks
    k          a fixed K instead; 0: that product
    raw        leave alpha/rank out where it is a factor of the delta, which the released code of K-LoRA does
    top        False: neither the largest entries nor the sums, only energies, which cost next to nothing
    reader     (parameter name) -> base weight in fp32, for adapters whose change depends on the weight (DoRA, OFT,
               BOFT, GLoRA, replaced weights): the size is that of W' - W. Where there is none, only the part that
               does not depend on the weight counts
    visit      called as visit(layers done, layers) after each layer; may raise to stop
    report     told where a size is not the whole truth
    strengths  per adapter, the strength at which W' - W is taken, to be divided by it: not all such changes are
               proportional to it. None: 1
    device     a GPU to compute on, wherever the bank is: one that has float64. None: the processor, in threads. Both
               agree to 1e-6, so that a choice by these sizes can differ where two are that near to being equal; of
               equal deltas they are equal on either
    most       entries of a delta that the device holds at a time, each in at most ROOM bytes
    first      the adapters before this one are not compared: those that are, are counted from here

    A layer is a module of the model: where a model fuses several projections, they are one. Biases do not count.
    Raises ValueError for a delta that holds values which are not finite.
    """
    jobs = _jobs(bank, subjects, k, raw, reader, report, strengths, alone, first)
    if device is not None:
        return _on_device(bank, jobs, top, visit, device, most, first)
    sizes: dict[str, dict[int, Size]] = {}
    count = len(bank.sites_of(first))
    with _pool() as pool:
        begun = (((name, {adapter: job and pool.submit(_size, *job, top) for adapter, job in here.items()}),
                  _dense_entries(here)) for name, here in jobs)
        for done, (name, here) in enumerate(_ahead(begun, torch.get_num_threads()), start=1):
            sizes[name] = {adapter: size.result() if size else Size() for adapter, size in here.items()}
            _check(bank, name, sizes[name], here, first)
            if visit is not None:
                visit(done, count)
    return sizes


@torch.inference_mode()
def _on_device(bank: Bank, jobs: Iterable[tuple[str, dict[int, Job | None]]], top: bool,
               visit: Callable[[int, int], None] | None, device: torch.device, most: int,
               first: int) -> dict[str, dict[int, Size]]:
    """`measure` on a GPU. Numbers come to the host together, when all have been asked for."""
    found: dict[str, dict[int, Tensor | None]] = {}
    count = len(bank.sites_of(first))
    for done, (name, here) in enumerate(jobs, start=1):
        found[name] = {adapter: _sums(*job, top, device, most) if job else None for adapter, job in here.items()}
        if visit is not None:
            visit(done, count)
    asked = [each for here in found.values() for each in here.values() if each is not None]
    numbers = iter(torch.stack(asked).tolist() if asked else ())
    sizes = {name: {adapter: Size() if each is None else Size(*next(numbers)) if top else Size(energy=next(numbers)[0])
                    for adapter, each in here.items()} for name, here in found.items()}
    for name, here in sizes.items():
        _check(bank, name, here, {adapter: each is not None for adapter, each in found[name].items()}, first)
    return sizes


def _sums(parts: Sequence[MatrixPart], k: int, top: bool, device: torch.device, most: int) -> Tensor:
    """Of one delta [top, total, energy], or [energy], in float64 on the device."""
    parts = [on_device(part, device) if isinstance(part, Tensor) else tuple(on_device(each, device) for each in part)
             for part in parts]
    if top:
        return sums_on_device(parts, k, device, most)
    squares = [tile.double().square().sum() for part in parts if isinstance(part, Tensor)
               for tile in part.flatten().split(most)]
    squares += [energy(part[0].flatten(1), part[1]) for part in parts if not isinstance(part, Tensor)]
    return torch.stack([torch.zeros((), dtype=torch.float64, device=device), *squares]).sum(dim=0, keepdim=True)


Job = tuple[list[MatrixPart], int]
"""The parts of a delta, and K."""


def _jobs(bank: Bank, subjects: Sequence[bool], k: int, raw: bool, reader: Reader | None, report: Report | None,
          strengths: Sequence[float] | None, alone: bool, first: int) -> Iterator[tuple[str, dict[int, Job | None]]]:
    """Per layer, for each adapter that acts there: the parts of its delta and K, or None where it acts alone and that
    is not asked for."""
    for site in bank.sites_of(first):
        here = {adapter: site.all_ops(first + adapter) for adapter in range(len(subjects))}
        here = {adapter: ops for adapter, ops in here.items() if ops}
        if len(here) == 1 and not alone:
            yield site.name, dict.fromkeys(here)
            continue
        count = k or _k({adapter: _rank(ops) for adapter, ops in here.items()}, subjects)
        yield site.name, {adapter: (_parts(bank.names[first + adapter], site, ops, raw, reader, report,
                                           1.0 if strengths is None else strengths[adapter]), count)
                          for adapter, ops in here.items()}


def _dense_entries(jobs: dict[int, Job | None]) -> int:
    return sum(part.numel() for job in jobs.values() if job for part in job[0] if isinstance(part, Tensor))


def _check(bank: Bank, layer: str, sizes: dict[int, Size], measured: Mapping[int, object], first: int) -> None:
    for adapter, size in sizes.items():
        if measured[adapter] and not isfinite(size.energy):
            raise ValueError(f"LoRA '{bank.names[first + adapter]}': its change of the layer '{layer}' holds "
                             f"values that are not finite in {bank.dtype or 'the dtype of its file'}. Use the model in "
                             "a wider dtype (bf16, fp32), or take the LoRA out of the ensemble.")


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch computes with, each computing alone: the tensors of one layer are too small to be
    shared (two threads on each took as long as one, for SDXL). Not at once with other work of torch's."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _ahead(items: Iterable[tuple[Made, int]], count: int) -> Iterator[Made]:
    """The items, each given with the dense entries that it holds, made up to `count` ahead of the one that is asked
    for; fewer where these are more than AT_ONCE, as dense deltas of a large model are."""
    made: deque[tuple[Made, int]] = deque()
    held = 0
    for item, entries in items:
        made.append((item, entries))
        held += entries
        while len(made) > count or held > AT_ONCE:
            first, entries = made.popleft()
            held -= entries
            yield first
    yield from (item for item, _ in made)


@torch.inference_mode()
def _size(parts: Sequence[MatrixPart], k: int, top: bool) -> Size:
    square = 0.0
    for part in parts:
        if isinstance(part, Tensor):
            square += sum(tile.double().square().sum().item() for tile in part.flatten().split(LARGEST_TILE))
        else:
            square += energy(part[0].flatten(1), part[1]).item()
    return Size(*top_and_total(parts, k), square) if top else Size(energy=square)


def _k(ranks: dict[int, int], subjects: Sequence[bool]) -> int:
    most = [max((rank for adapter, rank in ranks.items() if subjects[adapter] == side), default=0)
            for side in (True, False)]
    return (most[0] or most[1]) * (most[1] or most[0])


def _rank(ops: Sequence[Op]) -> int:
    """The rank that an adapter was trained with, at least 1: of each op the smallest dimension of its factors, summed
    over the slices of a fused layer."""
    return max(sum(_rank_of(op) for op in ops), 1)


def _rank_of(op: Op) -> int:
    if op.rank:
        return op.rank
    if isinstance(op, Decomposed):
        return _rank_of(op.direction)  # its magnitude has a dimension of 1, which is no rank
    return min((min(p.shape[:2]) for p in op.parameters() if p.ndim > 1), default=0)


def _parts(adapter: str, site: Site, ops: Sequence[Op], raw: bool, reader: Reader | None,
           report: Report | None, strength: float) -> list[MatrixPart]:
    """The delta of one adapter at one layer, in disjoint parts: one per slice of the weight."""
    ops = [op for op in ops if not isinstance(op, Bias)]
    if not all(op.additive for op in ops):
        weight = reader(f"{site.name}.weight") if reader is not None else None
        if weight is not None:
            changed = weight = weight.cpu()  # where the factors are; some accelerators have no float64
            for op in ops:
                changed = op.on_weight(changed, strength)
            return [(changed - weight).div_(strength)]
        if report is not None:
            report(adapter, site.name, "the base weight is unreadable, so only the part of its change that "
                                                   "does not depend on the weight is compared")
    slices: dict[Span, list[Op]] = {}
    for op in ops:
        plain = op.direction if isinstance(op, Decomposed) else op.plus if isinstance(op, GLoRA) else op
        if plain.additive:
            slices.setdefault(op.span, []).append(plain)
    if None in slices and len(slices) > 1:
        whole = _dense(slices.pop(None), raw)
        for span, each in slices.items():
            whole.narrow(*span).add_(_dense(each, raw))
        return [whole]
    return [_part(each, raw) for each in slices.values()]


def _part(ops: Sequence[Op], raw: bool) -> MatrixPart:
    """The delta of the ops of one slice: factors as they are, everything else added up."""
    if len(ops) == 1 and isinstance(ops[0], StackOp):
        down, up = ops[0].factors()
        return down, up.float() / _scale(ops[0], raw)
    return _dense(ops, raw)


def _dense(ops: Sequence[Op], raw: bool) -> Tensor:
    like = torch.empty(0)
    return sum(op.delta(like) / _scale(op, raw) for op in ops)


def _scale(op: Op, raw: bool) -> float:
    return (op.scale or 1.0) if raw else 1.0
