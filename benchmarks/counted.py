#!/usr/bin/env python3
"""What runs with the branch cache take, counted: `python3 benchmarks/counted.py --comfyui PATH [--steps N]`.

Start it with the interpreter that ComfyUI runs in. Counts the operations of SD1.5 (512 x 512), SDXL and Flux (1024 x
1024) at full size, with --models also of Qwen-Image (1024 x 1024) and Wan (480 x 480, two latent frames), whole and
cut, on tensors without memory: no weights, no device, nothing timed. Two tables: what a
run takes with an interval and a depth, as a share of the operations of a run without a cache, held, forecast (which has
the second step whole as well) and, where the model has a negative, forecast with extrapolated guidance; and what the
node's budgets choose.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.counted", *sys.argv[1:]]))

from collections.abc import Mapping, Sequence

import torch

from ..kernels.branch import Step
from ..methods.guidance.extrapolated import Extrapolation, widest
from ..methods.guidance.turns import steps_among
from ..methods.schedule import LONGEST, BySteps, Schedule, Uniform, schedules, within
from . import models
from .measure import parser_of

SIZES = {"SD1.5": (64, 77), "SDXL": (128, 77), "Flux": (128, 512), "Qwen-Image": (128, 77), "Wan": (60, 77)}
"""Name -> (side of the latent, tokens of the text)."""
FRAMES = {"Qwen-Image": 1, "Wan": 2}
USUAL = ("SD1.5", "SDXL", "Flux")
DEPTHS = (1, 2, 3)


def shares(name: str, scale: float = 1.0) -> tuple[int, Mapping[int, float]]:
    """(operations of a whole call, per depth the share of one that is cut there), of one row."""
    from ..host.families.work import work_of

    size, tokens = SIZES[name]
    architecture = models.ARCHITECTURES[name]
    model = models.build(name, scale, torch.float32, torch.device("meta")).model
    config = model.model_config.unet_config
    pooled = config.get("vec_in_dim") if name == "Flux" else config.get("adm_in_channels")
    conds = {"y": torch.zeros(1, pooled)} if pooled else {}
    conds |= {"guidance": torch.full((1,), 3.5)} if config.get("guidance_embed") else {}
    x = torch.zeros(1, model.latent_format.latent_channels, *[FRAMES[name]] if name in FRAMES else [], size, size)
    context = torch.zeros(1, tokens, config[architecture.context])
    work = work_of(model, model.diffusion_model, x, torch.full((1,), 0.6), None, context, {}, conds)
    if isinstance(work, str):
        raise RuntimeError(work)
    return work.whole, work.shares


def with_guidance(steps: int, schedule: Schedule, rest: float) -> float:
    """The share of a run whose guidance is extrapolated, too: both sides at its turns, one at other steps."""
    whole = [step for step in range(steps) if schedule.refreshes(Step(step, steps, 0.0))]
    turns = steps_among(Extrapolation().steps(steps), whole, schedule.max_age, widest(steps))
    return sum((1 + (step in turns)) * (1 if step in whole else rest) for step in range(steps)) / (2 * steps)


def intervals_table(found: Mapping[str, Mapping[int, float]], steps: int) -> str:
    """Rows: interval and depth; per model the share of a run, held / forecast / forecast and guidance."""
    def cell(name: str, rest: float, interval: int) -> str:
        plain = [within(1.0, steps, {1: rest}, [Uniform(interval, first)]).share for first in (1, 2)]
        guided = models.ARCHITECTURES[name].cfg != 1
        return " / ".join(f"{each:.0%}" for each in
                          plain + [with_guidance(steps, Uniform(interval, 2), rest)] * guided)

    lines = [f"| interval | depth | {' | '.join(found)} |", f"| --- | --- | {' | '.join('---' for _ in found)} |"]
    for interval in range(2, LONGEST + 1):
        for depth in DEPTHS:
            cells = [cell(name, rests[depth], interval) for name, rests in found.items()]
            lines.append(f"| {interval} | {depth} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("%", " %")


def budgets_table(found: Mapping[str, Mapping[int, float]], steps: int, budgets: Sequence[float]) -> str:
    """Rows: budgets; per model what a forecast chooses."""
    lines = [f"| budget | {' | '.join(found)} |", f"| --- | {' | '.join('---' for _ in found)} |"]
    for budget in budgets:
        chosen = [within(budget, steps, rests, schedules(BySteps(True, 2))) for rests in found.values()]
        lines.append(f"| {budget:g} | " + " | ".join(f"{each.schedule.words.replace(' is', '')}, depth {each.depth}: "
                                                     f"{each.share:.0%}" for each in chosen) + " |")
    return "\n".join(lines).replace("%", " %")


def main(arguments: list[str]) -> None:
    parser = parser_of("counted", __doc__)
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(USUAL))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.7, 0.6, 0.5, 0.4, 0.3])
    options = parser.parse_args(arguments)
    models.start_comfyui(options.comfyui, "cpu")
    found = {name: shares(name)[1] for name in options.models}
    sys.stdout.write(f"\n{intervals_table(found, options.steps)}\n\n"
                     f"{budgets_table(found, options.steps, options.budgets)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
