"""What the branch cache costs in quality: `python3 benchmarks/cached.py [--sets K] [--seed S] [--methods ...]`.

Draws the testbed's sets with every branch whole at every step, and with a cache, whose features are held or foretold,
and counts what the judge finds (see quality.py). The testbed's U-Net is cut as ComfyUI's are
(host/families/split_points.py): its outer level runs in every step, the inner one with all attention only when the
schedule says so. One JSON line per row, then a table:

    held         every interval-th step whole
    held, 2      the same and the second step, as many whole passes as a forecast has
    forecast     these, and between them the features on the straight line through the last two
    whole        whole passes of a picture's steps
    error        of the pictures to those with every step whole: relative L2
    shown        share of the concepts shown, and its difference in points with its 95 % interval over the sets
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.branch import Branch, Step
from ..methods.schedule import NonUniform, Schedule, Uniform
from ..testbed.base import Base
from ..testbed.evaluate import BATCH, METHODS, RECIPES, interval, score
from ..testbed.protocol import SEED, LoraSet, some_sets
from ..testbed.sampler import STEPS, Sampler
from ..testbed.weights import load_base, load_judge, load_loras
from ..testbed.worlds import REGIMES
from .guidance import apart

INNER = ("downsample", "down_res2", "down_attn", "mid_res", "mid_attn", "up_res2", "up_attn")


class CachedSampler(Sampler):
    """A sampler whose rows reuse deep features. A step whose rows are not those of the last whole step runs whole."""

    def __init__(self, base: Base, loras: Sequence[Mapping[str, Tensor]], schedule: Schedule, forecast: bool = False):
        super().__init__(base, loras)
        self.schedule, self.forecast = schedule, forecast
        self.steps = self.whole = 0
        self._rows: tuple | None = None
        self._kept: list[tuple[float, list[Tensor]]] = []  # of the last two whole steps: noise level, call by call

    def _predict(self, x: Tensor, sigma: float, contexts: Tensor, pictures: Tensor, branches: list[Branch],
                 *more) -> Tensor:
        rows, index = (tuple(pictures.tolist()), tuple(branches)), round((1 - sigma) * STEPS)
        if rows != self._rows or index == 0:
            self._rows, self._kept = rows, []
        whole = not self._kept or self.schedule.refreshes(Step(index, STEPS, sigma))
        self.steps, self.whole = self.steps + 1, self.whole + whole
        if whole:
            self._kept = [*self._kept[-1:], (sigma, [])]
        with self._caught() if whole else self._recalled(sigma):
            return super()._predict(x, sigma, contexts, pictures, branches, *more)

    @contextmanager
    def _caught(self) -> Iterator[None]:
        """Keep what leaves the inner level, call by call."""
        handle = self.base.unet.upsample.register_forward_hook(lambda _, __, out: self._kept[-1][1].append(out))
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _recalled(self, sigma: float) -> Iterator[None]:
        """The inner level costs nothing, and what leaves it is what was kept, or foretold from it."""
        kept = iter(self._foretold(sigma) if self.forecast and len(self._kept) > 1 else self._kept[-1][1])
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

    def _foretold(self, sigma: float) -> list[Tensor]:
        (t0, first), (t1, second) = self._kept
        return [y1 + (y1 - y0) * ((sigma - t1) / (t1 - t0)) for y0, y1 in zip(first, second, strict=True)]


@dataclass(frozen=True)
class Row:
    """One line of the table; see the head of this file."""

    method: str
    kind: str
    interval: int
    whole: float
    error: float
    shown: float
    points: float
    points_95: tuple[float, float]


def arms(base: Base, loras: Sequence[Mapping[str, Tensor]], intervals: Sequence[int]) -> Iterator[tuple]:
    """(kind, interval, sampler) of every row; interval 0 is CMLoRA's schedule."""
    yield "every step", 1, CachedSampler(base, loras, Uniform(1))
    for k in intervals:
        yield "held", k, CachedSampler(base, loras, Uniform(k) if k else NonUniform())
        if k:
            yield "held, 2", k, CachedSampler(base, loras, Uniform(k, first=2))
            yield "forecast", k, CachedSampler(base, loras, Uniform(k, first=2), forecast=True)


def rows_of(name: str, base: Base, judge, loras: Sequence[Mapping[str, Tensor]], sets: Sequence[LoraSet],
            intervals: Sequence[int], tell: Callable[[Row], None]) -> None:
    """All rows of one method."""
    exact, before = None, None
    for kind, k, sampler in arms(base, loras, intervals):
        with sampler:
            pictures = [RECIPES[name].picture(task, sampler.bank) for task in sets]
            images = torch.cat([sampler.draw(pictures[i:i + BATCH]) for i in range(0, len(sets), BATCH)])
        read = judge.read(images)
        shown = np.array([np.mean(score(task, {h: int(v[i]) for h, v in read.items()})[0])
                          for i, task in enumerate(sets)])
        exact, before = (images, shown) if exact is None else (exact, before)
        tell(Row(name, kind, k, round(STEPS * sampler.whole / sampler.steps, 1), round(apart(images, exact), 5),
                 round(float(shown.mean()), 4), round(100 * float((shown - before).mean()), 2),
                 tuple(round(100 * each, 1) for each in interval(shown - before))))


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, help="a fixed random sample of this many sets, in equal parts per N")
    parser.add_argument("--seed", type=int, default=SEED, help="of the surroundings and the noise")
    parser.add_argument("--regime", choices=REGIMES, default=REGIMES[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["Merge", "Composite"])
    parser.add_argument("--intervals", nargs="+", type=int, default=[2, 3, 4], help="0: CMLoRA's schedule")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    base, judge = load_base(options.device), load_judge(options.device)
    sets, rows = some_sets(options.sets, options.seed), []

    def tell(row: Row) -> None:
        rows.append(row)
        sys.stdout.write(json.dumps({"benchmark": "cached", "regime": options.regime} | asdict(row)) + "\n")
        sys.stdout.flush()

    for name in options.methods:
        rows_of(name, base, judge, load_loras(options.regime), sets, options.intervals, tell)
    sys.stdout.write("\n| method | features | interval | whole steps | error | shown % | difference, points |\n"
                     "| --- | --- | --- | --- | --- | --- | --- |\n")
    for r in rows:
        low, high = r.points_95
        sys.stdout.write(f"| {r.method} | {r.kind} | {r.interval} | {r.whole:g} | {r.error:.4f} | "
                         f"{100 * r.shown:.1f} | {r.points:+.1f} [{low:+.1f}, {high:+.1f}] |\n")
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
