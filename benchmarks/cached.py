"""What the branch cache costs in quality: `python3 benchmarks/cached.py [--sets K] [--interval I] [--methods ...]`.

Draws the testbed's sets with every branch whole at every step, and with a cache, and counts what the judge finds (see
quality.py). The testbed's U-Net is cut as ComfyUI's are (host/families/split_points.py): its outer level runs in every
step, the inner one with all attention only when the schedule says so. One JSON line per row, then the table and the
difference of `shown` in points with its 95 % interval over the sets.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.cached", *sys.argv[1:]]))

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..kernels.branch import Branch, Step
from ..methods.schedule import NonUniform, Schedule, Uniform
from ..testbed.base import Base
from ..testbed.evaluate import METHODS, RECIPES, interval, scores
from ..testbed.protocol import some_sets
from ..testbed.sampler import STEPS, Sampler
from ..testbed.weights import load_base, load_judge, load_loras
from ..testbed.worlds import REGIMES

INNER = ("downsample", "down_res2", "down_attn", "mid_res", "mid_attn", "up_res2", "up_attn")


class CachedSampler(Sampler):
    """A sampler whose rows reuse deep features. A step whose rows are not those of the last whole step runs whole."""

    def __init__(self, base: Base, loras: Sequence[Mapping[str, Tensor]], schedule: Schedule):
        super().__init__(base, loras)
        self.schedule = schedule
        self._rows: tuple | None = None
        self._kept: list[Tensor] = []

    def _predict(self, x: Tensor, sigma: float, contexts: Tensor, pictures: Tensor, branches: list[Branch],
                 *rest: object) -> Tensor:
        rows = (tuple(pictures.tolist()), tuple(branches))
        whole = rows != self._rows or self.schedule.refreshes(Step(round((1 - sigma) * STEPS), STEPS, sigma))
        self._rows = rows
        if whole:
            self._kept = []
        with self._caught() if whole else self._recalled():
            return super()._predict(x, sigma, contexts, pictures, branches, *rest)

    @contextmanager
    def _caught(self) -> Iterator[None]:
        """Keep what leaves the inner level, call by call."""
        handle = self.base.unet.upsample.register_forward_hook(lambda _, __, out: self._kept.append(out))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _recalled(self) -> Iterator[None]:
        """The inner level costs nothing, and what leaves it is what was kept."""
        kept = iter(self._kept)
        layers = [getattr(self.base.unet, name) for name in (*INNER, "upsample")]
        before = [layer.__dict__.get("forward") for layer in layers]
        for layer in layers[1:-1]:
            layer.forward = lambda x, *_: x[:, :0]
        layers[0].forward = lambda x: x[:, :1, ::2, ::2]  # what is added to it needs the right places
        layers[-1].forward = lambda x: next(kept)
        try:
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, help="a fixed random sample of this many sets, in equal parts per N")
    parser.add_argument("--regime", choices=REGIMES, default=REGIMES[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["Merge", "Composite"])
    parser.add_argument("--interval", type=int, default=3, help="0: CMLoRA's schedule")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    schedule = Uniform(options.interval) if options.interval else NonUniform()
    base, judge, sets = load_base(options.device), load_judge(options.device), some_sets(options.sets)
    loras = load_loras(options.regime)
    for name in options.methods:
        shown = {}
        for kind, sampler in (("whole", Sampler(base, loras)), ("cached", CachedSampler(base, loras, schedule))):
            with sampler:
                found = [one for size in sorted({len(s.concepts) for s in sets})
                         for one in scores(sampler, judge, [s for s in sets if len(s.concepts) == size], RECIPES[name],
                                           1.0)]
            shown[kind] = np.array([one.shown for one in found])
            sys.stdout.write(json.dumps({
                "benchmark": "cached", "regime": options.regime, "method": name, "kind": kind, "sets": len(found),
                "interval": options.interval, "shown": round(float(shown[kind].mean()), 4),
                "shown_95": interval(shown[kind]), "all": round(float(np.mean([one.all for one in found])), 4),
                "leaked": round(float(np.mean([one.leaked for one in found])), 4)}) + "\n")
            sys.stdout.flush()
        apart = shown["cached"] - shown["whole"]
        low, high = interval(apart)
        sys.stdout.write(f"{name}: concepts shown {100 * apart.mean():+.1f} points with the cache "
                         f"[{100 * low:+.1f}, {100 * high:+.1f}]\n")
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
