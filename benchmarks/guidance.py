"""Guidance on the testbed, measured: `python3 benchmarks/guidance.py [--sets K] [--regime clean|narrow]`.

For every composition method: full guidance (CFG), Adaptive Guidance at the threshold that saves a quarter, LinearAG,
and fewer steps at as many evaluations. Thresholds and coefficients are calibrated on other seeds of half of the sets.
Prints one JSON line per row, then a table:

    evaluations   per picture, both sides of guidance together, after the branches were mixed
    ssim, error   of the picture against full guidance with all steps: structural similarity, relative L2 error
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..kernels.branch import Step
from ..kernels.guidance import threshold_for
from ..methods.guidance.adaptive import SPACES, AdaptiveGuidance, AdaptiveSession
from ..methods.guidance.calibration import Calibration, CalibrationSession, NormalEquations
from ..methods.guidance.linear import LinearSession
from ..methods.guidance.session import GuidanceSession
from ..testbed.evaluate import METHODS, Factory, lineup, score
from ..testbed.protocol import LoraSet, some_sets
from ..testbed.sampler import STEPS, Guide, Picture, Sampler
from ..testbed.weights import load_base, load_judge, load_loras
from ..testbed.worlds import REGIMES

SAVING, BATCH = 0.25, 24
SPACE = "x0"  # along this model's flow the similarity of velocities rises and falls again; that of x0 only rises


@dataclass(frozen=True)
class Row:
    """One line of the table; see the head of this file."""

    method: str
    guidance: str
    steps: int
    evaluations: float
    ssim: float
    error: float
    shown: float
    all: float


class Full:
    """Every negative is evaluated."""

    def __init__(self):
        self.evaluations = 0

    def __call__(self, step: Step, x: Tensor, c: Tensor, u: Tensor) -> Tensor:
        self.evaluations += 2
        return u


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
        if need.rows == ():
            u = self.session.replace("negative", x, c, sigma)
        return torch.lerp(c, u, self.session.weigh(c)) if self.session.fades else u


def ssim(a: Tensor, b: Tensor, size: int = 7) -> Tensor:
    """Structural similarity of pictures [n, 3, h, w] in [0, 1], uniform windows (Wang et al. 2004), per picture."""
    def mean(t: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(t, size, stride=1)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).flatten(1).mean(1)


def drawn(sampler: Sampler, factory: Factory, sets: Sequence[LoraSet], guides: Sequence[Guide], steps: int) -> Tensor:
    """The pictures of the sets, with a guide each."""
    pictures = [Picture(task.prompt(), task.seed, task.loras, factory(lineup(task, 1.0, sampler.bank)))
                for task in sets]
    return torch.cat([sampler.draw(pictures[i:i + BATCH], steps, guides=guides[i:i + BATCH])
                      for i in range(0, len(sets), BATCH)])


def calibrated(sampler: Sampler, factory: Factory, sets: Sequence[LoraSet]) -> Calibration:
    """Curves and coefficients from other seeds of the given sets."""
    sessions = [CalibrationSession() for _ in sets]
    drawn(sampler, factory, [replace(task, seed=task.seed + 10**6) for task in sets],
          [Ruled(session) for session in sessions], STEPS)
    equations = NormalEquations()
    for session in sessions:
        equations.add(session.features, session.targets)
    coefficients, r2 = equations.solve()
    gamma = {space: torch.stack([torch.cat(session.gamma[space]) for session in sessions]) for space in SPACES}
    return Calibration(coefficients, tuple(range(STEPS)), r2, gamma)


def rows_of(name: str, sampler: Sampler, judge, sets: Sequence[LoraSet], calibration: Sequence[LoraSet],
            tell: Callable[[Row], None]) -> list[Row]:
    """All rows of one composition method."""
    found = calibrated(sampler, METHODS[name], calibration)
    threshold = threshold_for(found.gamma[SPACE], SAVING)
    arms: list[tuple[str, Callable[[], Full], int]] = [
        ("CFG", Full, STEPS), ("AG", lambda: Ruled(AdaptiveSession(AdaptiveGuidance(threshold, SPACE))), STEPS),
        ("LinearAG", lambda: Ruled(LinearSession(found.policy())), STEPS),
        ("CFG, fewer steps, as AG", Full, round(STEPS * (1 - SAVING))),
        ("CFG, fewer steps, as LinearAG", Full, -(-STEPS * 25 // 40)),
    ]  # fmt: skip
    rows, whole = [], None
    for guidance, make, steps in arms:
        guides = [make() for _ in sets]
        images = drawn(sampler, METHODS[name], sets, guides, steps)
        whole = images if whole is None else whole
        read = judge.read(images)
        shown = [score(task, {h: int(v[i]) for h, v in read.items()})[0] for i, task in enumerate(sets)]
        row = Row(name, guidance, steps, round(sum(guide.evaluations for guide in guides) / len(sets), 2),
                  round(float(ssim(images, whole).mean()), 4),
                  round(float(((images - whole).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)).mean()), 4),
                  round(sum(sum(each) / len(each) for each in shown) / len(sets), 4),
                  round(sum(map(all, shown)) / len(sets), 4))
        rows.append(row)
        tell(row)
    return rows


def summary(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| method | guidance | steps | evaluations | SSIM to CFG | relative error | shown % | all % |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    lines += [f"| {r.method} | {r.guidance} | {r.steps} | {r.evaluations:.1f} | {r.ssim:.3f} | {r.error:.3f} | "
              f"{100 * r.shown:.1f} | {100 * r.all:.1f} |" for r in rows]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=96, help="sets that are drawn; half as many calibrate")
    parser.add_argument("--regime", choices=REGIMES, default="narrow")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    base, judge = load_base(options.device), load_judge(options.device)
    sets = some_sets(options.sets)

    def tell(row: Row) -> None:
        sys.stdout.write(json.dumps({"benchmark": "guidance", "regime": options.regime} | asdict(row)) + "\n")
        sys.stdout.flush()

    rows = []
    for name in options.methods:
        with Sampler(base, load_loras(options.regime)) as sampler:
            rows += rows_of(name, sampler, judge, sets, sets[::2], tell)
    sys.stdout.write("\n" + summary(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
