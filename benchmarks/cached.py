"""What the branch cache costs in quality: `python3 benchmarks/cached.py [--body B] [--sets K] [--seed S]`.

Draws the testbed's sets with every branch whole at every step, and with a cache, whose features are held or foretold,
and counts what the judge finds (see quality.py). Both bodies are cut as ComfyUI's models of their kind are (cuts.py).
One JSON line per picture as it is drawn, then a table over all of them. Processes may each take a share of the sets
(`--share 1/4 > a.jsonl`, `--share 2/4 > b.jsonl`, ...); `--join *.jsonl` makes one table of what they wrote, also of
one that was cut off.

    held         every interval-th step whole
    held, 2      the same and the second step, as many whole passes as a forecast has
    forecast     these, and between them the features on the line through the last two, the less far the farther on
    guidance     every step whole, guidance extrapolated, 30 % of the evaluations saved (guidance.py)
    both         forecast and guidance
    paper, held  of CMLoRA, by its own schedule: the leader whole, the others' features as old as all take to lead
    own, held    the same, and no features older than by the number of steps
    own, forecast  the same, moved on along their line
    whole        whole passes, of as many as there are steps
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..engine.cache import FeatureCache
from ..kernels.branch import Branch, Step
from ..methods import Method
from ..methods.guidance.extrapolated import Extrapolation
from ..methods.schedule import NonUniform, Schedule, Uniform
from ..methods.session import RunContext, Session, begin
from ..testbed.beds import BEDS
from ..testbed.body import Body
from ..testbed.evaluate import BATCH, METHODS, RECIPES, interval, score
from ..testbed.judge import Judge
from ..testbed.protocol import SEED, LoraSet, some_of
from ..testbed.sampler import ROWS, STEPS, Guide, Picture, Sampler
from ..testbed.worlds import REGIMES
from .cuts import Caught, cut_of
from .guidance import Ruled, distances, extrapolated

EVERYWHERE = 10**9
"""An age that no feature reaches."""
WHOLE = "every step"
KINDS = ("held", "held, 2", "forecast", "guidance", "both", "paper, held", "own, held", "own, forecast")
USUAL = tuple(kind for kind in KINDS if kind not in ("guidance", "both"))


class CachedSampler(Sampler):
    """A sampler whose rows reuse deep features, each those of its own picture, branch and side.

    schedule   when all rows run whole; None: when their methods ask for it (`Session.refresh`)
    forecast   features move on along the line through the last two (`FeatureCache`)
    """

    def __init__(self, base: Body, loras: Sequence[Mapping[str, Tensor]], schedule: Schedule | None,
                 forecast: bool = False, depth: int = 1):
        super().__init__(base, loras)
        self.schedule, self.cut = schedule, cut_of(base, depth)
        self.rows = self.whole = 0
        self._asked: list[bool] = []
        self._store = FeatureCache(EVERYWHERE if schedule is None else schedule.max_age, forecast)

    def draw(self, pictures: Sequence[Picture], steps: int = STEPS, *more, **options) -> Tensor:
        self._store.clear()
        asking = [replace(p, method=_Asking(p.method, self._asked)) for p in pictures]
        return super().draw(pictures if self.schedule is not None else asking, steps, *more, **options)

    def _predict(self, x: Tensor, step: Step, contexts: Tensor, pictures: Tensor, branches: list[Branch],
                 *more) -> Tensor:
        seen: Counter = Counter()
        keys = []  # picture, branch, and the how-manieth row of both: the side of guidance
        for place in zip(pictures.tolist(), branches, strict=True):
            keys.append((*place, seen[place]))
            seen[place] += 1
        fresh = [self.schedule.refreshes(step)] * len(keys) if self.schedule is not None else \
            self._asked * (len(keys) // len(self._asked))
        self._asked.clear()
        whole = [r for r, key in enumerate(keys) if fresh[r] or self._store.get(key, step.index) is None]
        rest = [r for r in range(len(keys)) if r not in set(whole)]
        self.rows, self.whole = self.rows + len(keys), self.whole + len(whole)
        out = torch.empty(len(keys), *x.shape[1:], device=x.device)
        for part, run in ((whole, self._caught), (rest, self._recalled)):
            if part:
                # In the order of the sampler, which calls the net once for so many rows.
                part = sorted(part, key=lambda r: branches[r].gains)
                with run([[keys[r] for r in part[k:k + ROWS]] for k in range(0, len(part), ROWS)], step):
                    out[part] = super()._predict(x, step, contexts[part], pictures[part], [branches[r] for r in part],
                                                 *(more if len(part) == len(keys) else ()))
        return out

    @contextmanager
    def _caught(self, calls: list[list], step: Step) -> Iterator[None]:
        found: list[Caught] = []
        with self.cut.catch(found):
            yield
        for keys, features in zip(calls, found, strict=True):
            for k, key in enumerate(keys):
                self._store.put(key, step.index, {name: value[k:k + 1] for name, value in features.items()},
                                [(self.device, float("inf"))], step.time(flow=True))

    @contextmanager
    def _recalled(self, calls: list[list], step: Step) -> Iterator[None]:
        def features() -> Iterator[Caught]:
            for keys in calls:
                each = [self._store.at(key, step.index, step.time(flow=True), self.device) for key in keys]
                yield {name: torch.cat([one[name] for one in each]) for name in each[0]}

        with self.cut.recall(features()):
            yield


@dataclass(frozen=True)
class _Asking:
    """A method whose sessions also tell which of their branches have to run whole."""

    method: Method
    asked: list[bool]

    def begin(self, context: RunContext) -> Session:
        return _AskingSession(begin(self.method, context), self.asked)


class _AskingSession(Session):
    def __init__(self, session: Session, asked: list[bool]):
        self.session, self.asked = session, asked

    def observe(self, step: Step, x: Tensor) -> None:
        self.session.observe(step, x)

    def branches(self, step: Step) -> tuple[Branch, ...]:
        self.asked += self.session.refresh(step)
        return self.session.branches(step)

    def mix(self, step: Step, call) -> list[Tensor | None]:
        return self.session.mix(step, call)


@dataclass(frozen=True)
class Drawn:
    """One picture; see the head of this file. `of_set` is its set's number."""

    body: str
    depth: int
    regime: str
    method: str
    kind: str
    interval: int
    seed: int
    of_set: int
    whole: float
    error: float
    shown: float

    @property
    def row(self) -> tuple[str, int, str, str, str, int]:
        """The line of the table that it belongs to."""
        return self.body, self.depth, self.regime, self.method, self.kind, self.interval


@dataclass(frozen=True)
class Arm:
    """A row of the table to be: how it samples, with full guidance or not, and what becomes of the method."""

    kind: str
    interval: int
    schedule: Schedule | None
    forecast: bool = False
    saves: bool = False
    changed: Callable[[Method], Method] = lambda method: method

    def guides(self, count: int) -> list[Guide] | None:
        """One per picture, as a run beside this cache has it."""
        if not self.saves:
            return None
        return [Ruled(extrapolated(Extrapolation(), STEPS, self.schedule)) for _ in range(count)]


def arms(name: str, intervals: Sequence[int]) -> Iterator[Arm]:
    """The rows of a method; interval 0 is CMLoRA's schedule, for all branches of any method."""
    yield Arm(WHOLE, 1, Uniform(1))
    yield Arm("guidance", 1, Uniform(1), saves=True)
    for k in intervals:
        yield Arm("held", k, Uniform(k) if k else NonUniform())
        if k:
            yield Arm("held, 2", k, Uniform(k, first=2))
            yield Arm("forecast", k, Uniform(k, first=2), True)
            yield Arm("both", k, Uniform(k, first=2), True, True)
    if name == "CMLoRA":
        yield Arm("paper, held", 0, None)
        for kind in ("held", "forecast"):
            yield Arm(f"own, {kind}", 0, None, kind == "forecast", changed=lambda method: replace(method, cache_age=0))


def draw(name: str, options: argparse.Namespace, sets: Sequence[LoraSet], base: Body, judge: Judge,
         loras: Sequence[Mapping[str, Tensor]]) -> Iterator[Drawn]:
    """All pictures of one method, those of all arms for some sets before those of others."""
    chosen = [arm for arm in arms(name, options.intervals) if arm.kind in (WHOLE, *options.kinds)]
    samplers = [CachedSampler(base, loras, arm.schedule, arm.forecast, options.depth) for arm in chosen]
    for start in range(0, len(sets), BATCH):
        batch, exact = sets[start:start + BATCH], None
        for arm, sampler in zip(chosen, samplers, strict=True):
            sampler.rows = sampler.whole = 0
            pictures = [RECIPES[name].picture(task, sampler.bank) for task in batch]
            with sampler:
                images = sampler.draw([replace(one, method=arm.changed(one.method)) for one in pictures], STEPS,
                                      guides=arm.guides(len(batch)))
            exact, read = images if exact is None else exact, judge.read(images)
            for i, (task, error) in enumerate(zip(batch, distances(images, exact).tolist(), strict=True)):
                shown = np.mean(score(task, {h: int(v[i]) for h, v in read.items()})[0])
                yield Drawn(options.body, options.depth, options.regime, name, arm.kind, arm.interval, options.seed,
                            task.index, round(STEPS * sampler.whole / sampler.rows, 2), round(error, 5),
                            round(float(shown), 4))


def table(drawn: Sequence[Drawn]) -> str:
    """Markdown; a picture that was drawn twice counts once."""
    rows: dict[tuple, dict[tuple[int, int], Drawn]] = {}
    for each in drawn:
        rows.setdefault(each.row, {})[each.seed, each.of_set] = each
    head = ("body", "LoRAs", "method", "features", "interval", "sets", "whole steps", "error", "shown %",
            "difference, points")
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---'] * len(head))} |"]
    for (body, depth, regime, method, kind, every), own in rows.items():
        exact = rows.get((body, depth, regime, method, WHOLE, 1), {})
        pairs = [(own[key], exact[key]) for key in own if key in exact]
        if not pairs:
            raise ValueError(f"{body}, {method}, {kind}: no picture was also drawn with every step whole")
        points = np.array([100 * (mine.shown - whole.shown) for mine, whole in pairs])
        mean = {key: float(np.mean([getattr(mine, key) for mine, _ in pairs])) for key in ("whole", "error", "shown")}
        low, high = interval(points)
        cells = (body if depth == 1 else f"{body}, depth {depth}", regime, method, kind, every or "-", len(pairs),
                 f"{mean['whole']:.3g}", f"{mean['error']:.4f}", f"{100 * mean['shown']:.1f}",
                 f"{points.mean():+.1f} [{low:+.1f}, {high:+.1f}]")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def joined(paths: Sequence[Path]) -> list[Drawn]:
    """The pictures in what several runs wrote; a last line that was cut off counts for nothing."""
    fields, found = Drawn.__dataclass_fields__, []
    for path in paths:
        for line in path.read_text().splitlines():
            if line.startswith("{") and line.endswith("}"):
                found.append(Drawn(**{key: value for key, value in json.loads(line).items() if key in fields}))
    return found


def share_of(text: str) -> tuple[int, int]:
    """"2/4" -> (1, 4): every fourth set from the second on."""
    part, parts = map(int, text.split("/"))
    if not 1 <= part <= parts:
        raise ValueError(text)
    return part - 1, parts


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--body", choices=BEDS, default="unet", help="the testbed's model and world")
    parser.add_argument("--sets", type=int, help="a fixed random sample of this many sets, in equal parts per N")
    parser.add_argument("--share", type=share_of, default=(0, 1), metavar="K/N", help="the K-th of N parts of them")
    parser.add_argument("--join", nargs="+", type=Path, metavar="FILE", help="draw nothing: the table of these")
    parser.add_argument("--seed", type=int, default=SEED, help="of the surroundings and the noise")
    parser.add_argument("--regime", choices=REGIMES, default=REGIMES[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["Merge", "Composite"])
    parser.add_argument("--intervals", nargs="*", type=int, default=[2, 3, 4], help="0: CMLoRA's schedule")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=USUAL, metavar="KIND",
                        help=f"beside every step: of {', '.join(map(repr, KINDS))}")
    parser.add_argument("--depth", type=int, default=1, help="blocks at either end of the transformer in every step")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if options.join:
        sys.stdout.write(table(joined(options.join)) + "\n")
        return 0
    bed, drawn = BEDS[options.body], []
    base, judge, loras = bed.load_base(options.device), bed.load_judge(options.device), bed.load_loras(options.regime)
    part, parts = options.share
    sets = some_of(bed.all_sets(seed=options.seed), options.sets)[part::parts]
    for name in options.methods:
        for each in draw(name, options, sets, base, judge, loras):
            drawn.append(each)
            sys.stdout.write(json.dumps({"benchmark": "cached"} | asdict(each)) + "\n")
            sys.stdout.flush()
    sys.stdout.write("\n" + table(drawn) + "\n")
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
