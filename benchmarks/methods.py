#!/usr/bin/env python3
"""What every method costs on a model: time, evaluations and memory, with each way of saving, beside ComfyUI's own ways.

    python3 benchmarks/methods.py --comfyui PATH [--device cuda --model SDXL --size 1024 --n 2 5 10] >> results.jsonl
    python3 benchmarks/table.py results.jsonl --write                                             into RESULTS.md

Start it with the interpreter that ComfyUI runs in. The model has a true architecture and random weights (models.py).
Runs of all ways take turns; before each goes a run of one step (see README.md). Prints one JSON object per result:

    way          the plain model; ComfyUI's loaders, LoRAs in the weights; its hooks, one LoRA per evaluation; a method
    saving       none; guidance: extrapolated, 30 % of the evaluations saved; cache: forecast, every third step whole;
                 both; always on: one LoRA more, of role `always`
    seconds      of all steps of a run but the first; `first_seconds`: of that one
    host         processor time of the sampling thread in those steps; on a CPU it holds torch's work of that thread
    rows         samples that the model evaluated in the run, whole or (cache) in part
    bytes        peak of a run above the level before it
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.methods", *sys.argv[1:]]))

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..methods.cmlora import AgeBySteps, CMLoRA
from ..methods.composite import Composite
from ..methods.guidance.adaptive import AdaptiveGuidance
from ..methods.loratorio import LoRAtorio
from ..methods.merge import Merge
from ..methods.routed import Routing
from ..methods.schedule import Uniform
from . import models
from .measure import Peak, Results, Seconds, median, parser_of, total
from .models import STRENGTH
from .routing import clauses

METHODS = {"Merge": Merge, "Routed": Merge, "Composite": Composite, "LoRAtorio": LoRAtorio,
           "CMLoRA": partial(CMLoRA, cache_age=0)}
SAVINGS = ("none", "guidance", "cache", "both", "always on")
PLAIN, LOADERS, HOOKS = "plain model", "ComfyUI's loaders", "ComfyUI's hooks"
INTERVAL, DEPTH, SAVED = 3, 2, 0.3


@dataclass
class Way:
    """One way to draw a picture with some LoRAs, and what its runs have taken."""

    model: object
    conds: Sequence[list]
    rows: int = 0
    bytes: int = 0
    first: list[Seconds] = field(default_factory=list)
    later: list[Seconds] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Count what the model evaluates."""
        from comfy.patcher_extension import WrappersMP

        def counted(executor, x: Tensor, *args, **kwargs) -> Tensor:
            self.rows += x.shape[0]
            return executor(x, *args, **kwargs)

        self.model = self.model.clone()
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "benchmark", counted)

    def run(self, noise: Tensor, steps: int, cfg: float) -> None:
        models.sampled(self.model, *self.conds, noise, 1, cfg)
        self.rows = 0
        with Peak(self.model.load_device) as peak:
            first, *later = models.sampled(self.model, *self.conds, noise, steps, cfg)[1]
        self.first.append(first)
        self.later.append(total(later))
        self.bytes = max(self.bytes, peak.bytes)


def composed(model, files: Sequence[Path], name: str, always: Path | None = None):
    """The MODEL that a method's node gives, its caching as the node has it."""
    from ..host.compose.apply import apply_method, with_cache
    from ..host.compose.cache import CacheSpec
    from ..host.compose.routes import Placing
    from ..host.files.ensemble import ALWAYS, LoRASpec

    ensemble = tuple(LoRASpec(file.name, STRENGTH, 0.0, words=f"word{k}x0") for k, file in enumerate(files))
    if always is not None:
        ensemble += (LoRASpec(always.name, STRENGTH, 0.0, role=ALWAYS),)
    placing = Placing("words", Routing("every step")) if name == "Routed" else None
    ours, _ = apply_method(model, None, ensemble, lambda active: METHODS[name](active.strengths), name, placing=placing)
    return with_cache(ours, CacheSpec(max_age=AgeBySteps(len(files)), depth=3)) if name == "CMLoRA" else ours


def saving(model, how: str):
    """The same behind the nodes that save."""
    from ..host.compose.apply import with_cache
    from ..host.compose.cache import CacheSpec
    from ..host.guidance.apply import apply_guidance
    from ..host.guidance.options import GuidanceOptions, guidance_of

    if how in ("cache", "both"):
        model = with_cache(model, CacheSpec(Uniform(INTERVAL), depth=DEPTH, forecast=True))
    if how in ("guidance", "both"):
        model = apply_guidance(model, guidance_of(GuidanceOptions("extrapolate", AdaptiveGuidance(), SAVED)))
    return model


def ways(model, files: Sequence[Path], always: Path, conds: list, options: argparse.Namespace
         ) -> Iterator[tuple[str, str, Callable[[], Way]]]:
    """(way, saving, how it is made) of everything that is asked for."""
    marked = [[tensor, {**extra, "lora_ensemble_prompt": clauses(len(files), tensor.shape[1])}]
              for tensor, extra in conds[0]]
    guided = models.ARCHITECTURES[options.model].cfg != 1
    yield PLAIN, "none", lambda: Way(model, conds)
    yield LOADERS, "none", lambda: Way(models.stock(model, files), conds)
    yield HOOKS, "none", lambda: Way(model, models.hooked(conds, files))
    for name in options.methods:
        prompts = (marked, conds[1]) if name == "Routed" else conds
        for how in options.savings:
            if (how in ("guidance", "both") and not guided) or (name == "CMLoRA" and how in ("cache", "both")):
                continue  # nothing to save at cfg 1; CMLoRA has a cache of its own
            yield name, how, lambda name=name, how=how, prompts=prompts: Way(saving(composed(
                model, files, name, always if how == "always on" else None), how), prompts)


def bench(model, files: Sequence[Path], always: Path, options: argparse.Namespace, tell: Results) -> None:
    """All ways with one number of LoRAs."""
    noise, conds = models.inputs(options.model, model, options.size)
    cfg, count = models.ARCHITECTURES[options.model].cfg, len(files)
    found = {(way, how): make() for way, how, make in ways(model, files, always, conds, options)}
    for _ in range(options.rounds):
        for way in found.values():
            way.run(noise, options.steps, cfg)
    plain = median(found[PLAIN, "none"].later).wall
    for (way, how), each in found.items():
        later = median(each.later)
        tell("method", way=way, saving=how, n=count, steps=options.steps, seconds=later.wall, ratio=later.wall / plain,
             host=later.thread, cpu_seconds=later.cpu, first_seconds=median(each.first).wall, rows=each.rows,
             bytes=each.bytes, rank=options.rank)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of("methods", __doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=list(models.ARCHITECTURES), default="SD1.5")
    parser.add_argument("--size", type=int, default=256, help="picture size in pixels")
    parser.add_argument("--scale", type=float, default=1.0, help="width of the model as a share of the true one")
    parser.add_argument("--n", type=int, nargs="+", default=[2, 5], help="numbers of LoRAs")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scope", choices=["attention", "linear", "conv"], default="linear", help="as in speed.py")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--savings", nargs="+", choices=SAVINGS, default=list(SAVINGS))
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step is the start of the run")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    version = models.start_comfyui(options.comfyui, options.device)
    device = torch.device(options.device)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16 if options.model in ("Flux", "Wan") \
        else torch.float16
    model = models.build(options.model, options.scale, dtype, device)
    tell = Results(device, comfyui=version, model=options.model, dtype=str(dtype).removeprefix("torch."),
                   size=options.size, scale=options.scale, scope=options.scope, quick=options.scale != 1)
    with tempfile.TemporaryDirectory() as folder:
        *files, always = models.write_loras(Path(folder), options.model, model, [options.rank] * (max(options.n) + 1),
                                            options.scope)
        for count in options.n:
            bench(model, files[:count], always, options, tell)


if __name__ == "__main__":
    main(sys.argv[1:])
