"""Guidance on the testbed, measured: `python3 benchmarks/guidance.py [--sets K] [--seed S] [--regime clean|narrow]
[--rules extrapolated ...]`.

For every composition method and number of steps: full guidance (CFG), extrapolated guidance, full guidance with fewer
steps at as many evaluations, Adaptive Guidance at the threshold that saves a quarter, and LinearAG. Thresholds and
coefficients are calibrated on other seeds of half of the sets. `--between 0 3 7` adds what no rule can know: the terms
of full guidance in as many steps, seen at these steps alone, on straight lines between them. Prints one JSON line per
row, then a table:

    evaluations   per picture, both sides of guidance together, after the branches were mixed
    error         of the picture to the true solution, full guidance in 60 steps: relative L2
    median        of that, over the pictures: single ones whose content changes move the mean
    same steps    the same to full guidance in as many steps
    shown, all    as in quality.py: share of concepts shown, share of pictures that show all of them
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.guidance", *sys.argv[1:]]))

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..kernels.branch import Step
from ..kernels.guidance import threshold_for
from ..methods.guidance.adaptive import SPACES, AdaptiveGuidance, AdaptiveSession
from ..methods.guidance.calibration import Calibration, CalibrationSession, NormalEquations
from ..methods.guidance.extrapolated import ExtrapolatedSession, Extrapolation
from ..methods.guidance.linear import LinearSession
from ..methods.guidance.session import GuidanceSession
from ..methods.schedule import Schedule
from ..testbed.beds import BEDS
from ..testbed.evaluate import BATCH, RECIPES, Recipe, score
from ..testbed.protocol import SEED, LoraSet, some_of
from ..testbed.sampler import Guide, Sampler
from ..testbed.worlds import REGIMES

EXACT, AG_SAVING = 60, 0.25
RULES = ("extrapolated", "AG", "LinearAG")
SPACE = "x0"  # along this model's flow the similarity of velocities rises and falls again; that of x0 only rises


@dataclass(frozen=True)
class Row:
    """One line of the table; see the head of this file."""

    method: str
    guidance: str
    steps: int
    evaluations: float
    error: float
    median: float
    same_steps: float
    shown: float
    all: float


class Full:
    """Every negative is evaluated. `terms`: e(c) - e(u) at each step."""

    def __init__(self):
        self.evaluations, self.terms = 0, []

    def __call__(self, step: Step, x: Tensor, c: Tensor, u: Tensor) -> Tensor:
        self.evaluations += 2
        self.terms.append((u - c) / step.sigma)
        return u


class Between(Full):
    """The terms of a run with full guidance, seen at some steps: those at others on the line through the two nearest
    ones. The sampler's steps are of one length."""

    def __init__(self, of: Full, seen: Sequence[int]):
        super().__init__()
        self.of, self.seen = of, sorted(seen)

    def __call__(self, step: Step, x: Tensor, c: Tensor, u: Tensor) -> Tensor:
        self.evaluations += 2 if step.index in self.seen else 1
        a, b = next((pair for pair in pairwise(self.seen) if step.index <= pair[1]), self.seen[-2:])
        return c + step.sigma * torch.lerp(self.of.terms[a], self.of.terms[b], (step.index - a) / (b - a))


class Ruled(Full):
    """A rule of guidance, by its session."""

    def __init__(self, session: GuidanceSession):
        super().__init__()
        self.session = session

    def __call__(self, step: Step, x: Tensor, c: Tensor, u: Tensor) -> Tensor:
        need, sigma = self.session.begin(step), torch.full((1,), step.sigma, device=x.device)
        self.evaluations += 1 if need.rows == () else 2
        if not need.guided:
            return c
        if need.rows is None or need.watch:
            self.session.keep(x, c, {"negative": u}, sigma)
            u = self.session.settle("negative", x, c, u, sigma)
        if need.rows == ():
            u = self.session.replace("negative", x, c, sigma)
        self.session.end()
        return torch.lerp(c, u, self.session.weigh(c)) if self.session.fades else u


def drawn(sampler: Sampler, recipe: Recipe, sets: Sequence[LoraSet], guides: Sequence[Guide], steps: int) -> Tensor:
    """The pictures of the sets, with a guide each."""
    pictures = [recipe.picture(task, sampler.bank) for task in sets]
    return torch.cat([sampler.draw(pictures[i:i + BATCH], steps, guides=guides[i:i + BATCH])
                      for i in range(0, len(sets), BATCH)])


def calibrated(sampler: Sampler, recipe: Recipe, sets: Sequence[LoraSet], steps: int) -> Calibration:
    """Curves and coefficients from other seeds of the given sets."""
    sessions = [CalibrationSession() for _ in sets]
    drawn(sampler, recipe, [replace(task, seed=task.seed + 10**6) for task in sets],
          [Ruled(session) for session in sessions], steps)
    equations = NormalEquations()
    for session in sessions:
        equations.add(session.features, session.targets)
    coefficients, r2 = equations.solve()
    gamma = {space: torch.stack([torch.cat(session.gamma[space]) for session in sessions]) for space in SPACES}
    return Calibration(coefficients, tuple(range(steps)), r2, gamma)


def distances(images: Tensor, others: Tensor) -> Tensor:
    """Relative L2 distance of each picture from its other."""
    return (images - others).flatten(1).norm(dim=1) / others.flatten(1).norm(dim=1)


def apart(images: Tensor, others: Tensor) -> float:
    """The mean of these."""
    return float(distances(images, others).mean())


def extrapolated(policy: Extrapolation, steps: int, cache: Schedule | None = None) -> ExtrapolatedSession:
    """Extrapolated guidance in a run of the testbed's sampler, beside a branch cache of this schedule or none."""
    session = ExtrapolatedSession(policy, True, torch.linspace(1, 0, steps + 1).tolist())
    session.whole = cache
    return session


def arms(rules: Sequence[str], calibrate: Callable[[], Calibration], steps: int, policy: Extrapolation,
         between: Sequence[int]) -> Iterator[tuple[str, Callable[[Full | None], Full], int]]:
    """Name, guide and number of steps of every row. A guide is made from that of the same picture in the first row."""
    yield "CFG", lambda _: Full(), steps
    if between:
        yield f"true terms between {', '.join(map(str, between))}", lambda full: Between(full, between), steps
    if "extrapolated" in rules:
        yield "extrapolated", lambda _: Ruled(extrapolated(policy, steps)), steps
        yield "CFG, fewer steps, as extrapolated", lambda _: Full(), -(-(steps + len(policy.steps(steps))) // 2)
    if not {"AG", "LinearAG"} & set(rules):
        return
    found = calibrate()
    threshold = threshold_for(found.gamma[SPACE], AG_SAVING)
    if "AG" in rules:
        yield "AG", lambda _: Ruled(AdaptiveSession(AdaptiveGuidance(threshold, SPACE))), steps
    if "LinearAG" in rules:
        yield "LinearAG", lambda _: Ruled(LinearSession(found.policy())), steps


def rows_of(name: str, sampler: Sampler, judge, sets: Sequence[LoraSet], all_steps: Sequence[int],
            policy: Extrapolation, tell: Callable[[Row], None], rules: Sequence[str] = RULES,
            between: Sequence[int] = ()) -> list[Row]:
    """All rows of one composition method."""
    recipe, rows = RECIPES[name], []
    exact = drawn(sampler, recipe, sets, [Full() for _ in sets], EXACT)
    for steps in all_steps:
        whole, full = None, [None] * len(sets)

        def calibrate(steps: int = steps) -> Calibration:
            return calibrated(sampler, recipe, sets[::2], steps)

        for guidance, make, count in arms(rules, calibrate, steps, policy, between):
            guides = [make(each) for each in full]
            images = drawn(sampler, recipe, sets, guides, count)
            whole, full = (images, guides) if whole is None else (whole, full)
            read = judge.read(images)
            shown = [score(task, {h: int(v[i]) for h, v in read.items()})[0] for i, task in enumerate(sets)]
            row = Row(name, guidance, count, round(sum(guide.evaluations for guide in guides) / len(sets), 2),
                      round(apart(images, exact), 5), round(float(distances(images, exact).median()), 5),
                      round(apart(images, whole), 5),
                      round(sum(sum(each) / len(each) for each in shown) / len(sets), 4),
                      round(sum(map(all, shown)) / len(sets), 4))
            rows.append(row)
            tell(row)
    return rows


def summary(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| method | guidance | steps | evaluations | error to 60 steps | median | to as many steps | shown % "
             "| all % |",
             "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    lines += [f"| {r.method} | {r.guidance} | {r.steps} | {r.evaluations:.1f} | {r.error:.4f} | {r.median:.4f} | "
              f"{r.same_steps:.4f} | {100 * r.shown:.1f} | {100 * r.all:.1f} |" for r in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--body", choices=BEDS, default="unet", help="the testbed's model and world")
    parser.add_argument("--sets", type=int, default=96, help="sets that are drawn; half as many calibrate")
    parser.add_argument("--seed", type=int, default=SEED, help="of the surroundings and the noise")
    parser.add_argument("--regime", choices=REGIMES, default="narrow")
    parser.add_argument("--methods", nargs="+", choices=tuple(RECIPES), default=["Merge", "Composite", "Routed"],
                        metavar="METHOD", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--steps", nargs="+", type=int, default=[8, 20, 40])
    parser.add_argument("--saving", type=float, default=0.3, help="share that extrapolated guidance is to save")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES, help="beside full guidance")
    parser.add_argument("--between", nargs="+", type=int, default=[], metavar="STEP", help="at least two")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    if len(options.between) == 1 or max(options.between, default=0) >= min(options.steps):
        parser.error("--between takes at least two steps, of those that every run has")
    torch.manual_seed(0)
    bed, policy = BEDS[options.body], Extrapolation(options.saving)
    base, judge = bed.load_base(options.device), bed.load_judge(options.device)
    sets = some_of(bed.all_sets(seed=options.seed), options.sets)

    def tell(row: Row) -> None:
        sys.stdout.write(json.dumps({"benchmark": "guidance", "regime": options.regime} | asdict(row)) + "\n")
        sys.stdout.flush()

    rows = []
    for name in options.methods:
        with Sampler(base, bed.load_loras(options.regime)) as sampler:
            rows += rows_of(name, sampler, judge, sets, options.steps, policy, tell, options.rules,
                            options.between)
    sys.stdout.write("\n" + summary(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
