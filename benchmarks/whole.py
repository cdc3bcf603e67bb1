"""Whole runs: all that this pack can do at once against the stock hook composite, and how near a step comes to the time
that its products alone would take."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import torch
from torch import Tensor

from .measure import Seconds, difference, median, synchronize, total
from .methods import saving
from .models import sampled

Cut = tuple[int, int]
"""Interval and depth of a branch cache."""


def bench_stack(model, hooks: list, composed, conds: list, noise: Tensor, steps: int, rounds: int, cfg: float,
                cuts: Sequence[Cut]) -> dict[Cut, dict[str, float]]:
    """Seconds of whole runs, the first step included, of the stock hook composite and of Composite with the forecast
    cache, cut in each of these ways, and, where the model has a negative, extrapolated guidance (methods.py); how far
    the last pictures are apart, as a share of the hooks' norm: cache and guidance are approximations."""
    how = "both" if cfg != 1 else "cache"
    arms = {None: (model, *hooks), **{cut: (saving(composed, how, *cut), *conds) for cut in cuts}}
    runs: dict[Cut | None, list[Seconds]] = {name: [] for name in arms}
    latents: dict[Cut | None, Tensor] = {}
    for _ in range(rounds):
        for name, arm in arms.items():
            sampled(*arm, noise, 1, cfg)  # hooks make the host load its model anew for every other MODEL
            latents[name], times = sampled(*arm, noise, steps, cfg)
            runs[name].append(total(times))
    theirs = median(runs[None])

    def found(cut: Cut) -> dict[str, float]:
        mine = median(runs[cut])
        return {"ratio": theirs.wall / mine.wall, "cpu_ratio": theirs.cpu / mine.cpu, "hooks_seconds": theirs.wall,
                "stack_seconds": mine.wall, "steps": steps, "interval": cut[0], "depth": cut[1],
                "difference": difference(latents[cut], latents[None])}

    return {cut: found(cut) for cut in cuts}


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations per second of a large product on this device, two for each multiply-add."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    best, until = float("inf"), perf_counter() + seconds
    while perf_counter() < until:
        synchronize(device)
        start = perf_counter()
        a @ b
        synchronize(device)
        best = min(best, perf_counter() - start)
    return 2 * size**3 / best


def bench_floor(composed, conds: list, noise: Tensor, steps: int, cfg: float, dtype: torch.dtype,
                compiled: bool) -> dict[str, float]:
    """What the products of a step (of layers, convolutions, attention and LoRAs) would take at the matrix rate of the
    device, as a share of a step; compiled: also of a step of the model under torch.compile."""
    def step(model) -> float:
        return median(sampled(model, *conds, noise, steps, cfg)[1][1:]).wall

    from ..host.families.work import Operations

    with Operations() as counter:  # looks at every operation: slow
        sampled(composed, *conds, noise, 1, cfg)
    operations = counter.total
    step(composed)
    rate = matrix_rate(composed.load_device, dtype)
    found = {"operations": float(operations), "rate": rate, "seconds": step(composed)}
    found["share"] = operations / rate / found["seconds"]
    if compiled:
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        faster = composed.clone()
        set_torch_compile_wrapper(faster, backend="inductor")
        start = perf_counter()
        step(faster)
        found["compile_seconds"] = perf_counter() - start
        found["compiled_seconds"] = step(faster)
        found["compiled_share"] = operations / rate / found["compiled_seconds"]
    return found
