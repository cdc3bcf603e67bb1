#!/usr/bin/env python3
"""What every method costs on a model: time, evaluations and memory, with each way of saving, beside ComfyUI's own ways.

    python3 benchmarks/methods.py --comfyui PATH [--device cuda --model SDXL --size 1024 --n 5 2 10] >> results.jsonl
    python3 benchmarks/methods.py --comfyui PATH --device meta --model SDXL --size 1024 --n 2 5 10 >> results.jsonl
    python3 benchmarks/table.py results.jsonl --write                                             into RESULTS.md

Start it with the interpreter that ComfyUI runs in. The model has a true architecture and random weights (models.py).
Before each run goes one of one step (see README.md). The first of --n, --rank, --size and --steps is what the others
vary, one at a time: what is measured there are --sweep-methods. The most telling comes first, and after --seconds
nothing is begun any more. Prints one JSON object per result, as soon as it is there:

    way          the plain model; ComfyUI's loaders, LoRAs in the weights; its hooks, one LoRA per evaluation; a method
    saving       none; guidance: extrapolated, 30 % of the evaluations saved; cache: forecast, the second and every
                 third step whole; both; always on: one LoRA more, of role `always`
    seconds      of all steps of a run but the first; `first_seconds`: of that one; `cpu_`: processor time of all
                 threads, which other programs on a CPU hardly change
    host         processor time of the sampling thread in those steps until all was queued for the device; on a CPU it
                 holds torch's work of that thread
    rows         samples that the model evaluated in the run, whole or (cache) in part
    bytes        peak of a run above the level before it, at which the LoRAs are there already: `bank_bytes`
    sweep        what is varied, "" in the table of methods

On the device `meta` there are no weights and nothing is timed: the products of a whole run are counted (weightless.py),
two operations for each multiply-add of layers, convolutions, attention and LoRAs, and do not depend on the machine.
ComfyUI's own ways are not among them: its loaders take what the plain model takes, its hooks that for every LoRA.

    operations   of a whole run, its first step and Routed's look for words with it
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.methods", *sys.argv[1:]]))

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from time import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..methods.cmlora import CMLoRA
from ..methods.composite import Composite
from ..methods.guidance.adaptive import AdaptiveGuidance
from ..methods.loratorio import LoRAtorio
from ..methods.merge import Merge
from ..methods.routed import Routing
from ..methods.schedule import AgeBySteps, Uniform
from . import models
from .measure import Peak, Results, Seconds, median, parser_of, total
from .models import STRENGTH
from .routing import with_clauses

if TYPE_CHECKING:
    from .weightless import Remembered

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
    bank: int = 0
    blocks: Remembered | None = None
    operations: int = 0
    rows: int = 0
    bytes: int = 0
    evaluated: list[int] = field(default_factory=list)
    first: list[Seconds] = field(default_factory=list)
    later: list[Seconds] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Count what the model evaluates. The model must not hold this object: in a circle of references it would stay
        until Python collects them, and ComfyUI empties the GPU's memory pool before every run while it does."""
        from comfy.patcher_extension import WrappersMP

        found = self.evaluated

        def counted(executor, x: Tensor, *args, **kwargs) -> Tensor:
            found.append(x.shape[0])
            return executor(x, *args, **kwargs)

        self.model = self.model.clone()
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "benchmark", counted)

    def run(self, noise: Tensor, steps: int, cfg: float) -> None:
        if self.blocks is not None:
            with self.blocks.of(self.model) as counted:
                models.sampled(self.model, *self.conds, noise, steps, cfg)
            self.operations, self.rows = counted(), sum(self.evaluated)
            return
        models.sampled(self.model, *self.conds, noise, 1, cfg)
        self.evaluated.clear()
        with collected(), Peak(self.model.load_device) as peak:
            first, *later = models.sampled(self.model, *self.conds, noise, steps, cfg)[1]
        self.rows = sum(self.evaluated)
        self.first.append(first)
        self.later.append(total(later))
        self.bytes = max(self.bytes, peak.bytes)


@contextmanager
def collected() -> Iterator[None]:
    """Python collects circles of references before, not within: which way it falls on is chance, and among the objects
    of large models it takes as long as many steps."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def composed(model, files: Sequence[Path], name: str, always: Path | None = None):
    """The MODEL that a method's node gives, its caching as the node has it."""
    from ..host.compose.apply import apply_method, with_cache
    from ..host.compose.cache import CacheSpec
    from ..host.compose.placing import Placing
    from ..host.files.ensemble import ALWAYS, LoRASpec

    ensemble = tuple(LoRASpec(file.name, STRENGTH, 0.0, words=f"word{k}x0") for k, file in enumerate(files))
    if always is not None:
        ensemble += (LoRASpec(always.name, STRENGTH, 0.0, role=ALWAYS),)
    placing = Placing("words", Routing("every step", trust=True)) if name == "Routed" else None
    ours, _ = apply_method(model, None, ensemble, lambda active: METHODS[name](active.strengths), name, placing=placing)
    return with_cache(ours, CacheSpec(max_age=AgeBySteps(len(files)), depth=3)) if name == "CMLoRA" else ours


def saving(model, how: str, interval: int = INTERVAL, depth: int = DEPTH):
    """The same behind the nodes that save; the interval and the depth are the cache's."""
    from ..host.compose.apply import with_cache
    from ..host.compose.cache import CacheSpec
    from ..host.guidance.apply import apply_guidance
    from ..host.guidance.options import GuidanceOptions, guidance_of

    if how in ("cache", "both"):
        model = with_cache(model, CacheSpec(Uniform(interval, first=2), depth=depth, forecast=True))
    if how in ("guidance", "both"):
        model = apply_guidance(model, guidance_of(GuidanceOptions("extrapolate", AdaptiveGuidance(), SAVED)))
    return model


@dataclass(frozen=True)
class Case:
    """What ways are compared at. `sweep`: which of it is varied, if any."""

    n: int
    rank: int
    size: int
    steps: int
    sweep: str = ""


Cells = Sequence[tuple[str, str]]
"""(way, saving) each."""


def savings_of(way: str, asked: Sequence[str], guided: bool) -> list[str]:
    """What can be saved: at cfg 1 nothing of guidance; CMLoRA has a cache of its own."""
    return [how for how in asked if (guided or how not in ("guidance", "both"))
            and not (way == "CMLoRA" and how in ("cache", "both"))]


def plan(options: argparse.Namespace) -> list[tuple[Case, Cells]]:
    """What is measured together, the most telling first: with the first number of LoRAs what methods cost, ComfyUI's
    own ways, what saves; then other numbers, what varies, and what saves there. A case begins with the plain model."""
    guided = models.ARCHITECTURES[options.model].cfg != 1
    cases = [Case(n, options.rank[0], options.size[0], options.steps[0]) for n in options.n]

    def saved(case: Case) -> tuple[Case, Cells]:
        return case, [(name, how) for name in options.saved_methods if case.n in options.saved_n
                      for how in savings_of(name, options.savings, guided) if how != "none"]

    whole = [(case, [(PLAIN, "none"), *((name, "none") for name in options.methods)]) for case in cases]
    found = [whole[0], *((replace(cases[0], n=n), [(way, "none")])
                         for way, numbers in ((LOADERS, options.loaders), (HOOKS, options.hooks)) for n in numbers)]
    found += [saved(cases[0]), *whole[1:]]
    for sweep, values in (("n", options.sweep_n), ("rank", options.rank[1:]), ("size", options.size[1:]),
                          ("steps", options.steps[1:])):
        asked = [how for how in SAVINGS if sweep == "steps" and how != "always on"] or ["none"]
        found += [(replace(cases[0], **{sweep: value}, sweep=sweep),
                   [(name, how) for name in options.sweep_methods for how in savings_of(name, asked, guided)])
                  for value in values]
    found += [saved(case) for case in cases[1:]]
    seen: set[Case] = set()
    for i, (case, cells) in enumerate(found):
        if case in seen:
            found[i] = case, [cell for cell in cells if cell != (PLAIN, "none")]
        elif cells and (PLAIN, "none") not in cells:
            found[i] = case, [(PLAIN, "none"), *cells]
        seen.update([case] if cells else [])
    return [(case, cells) for case, cells in found if cells]


class Bench:
    """A model with what its cases need: files, prompts, how long the plain model takes."""

    def __init__(self, model, folder: Path, options: argparse.Namespace, tell: Results,
                 blocks: Remembered | None = None):
        self.model, self.folder, self.options, self.tell, self.blocks = model, folder, options, tell, blocks
        self.architecture = models.ARCHITECTURES[options.model]
        self.plain: dict[Case, dict[str, float]] = {}

    @cached_property
    def most(self) -> int:
        return max([*self.options.n, *self.options.sweep_n, *self.options.loaders, *self.options.hooks]) + 1

    def files(self, case: Case) -> tuple[list[Path], Path]:
        """(LoRAs, the one that is always on), written when they are first asked for."""
        count = self.most if case.rank == self.options.rank[0] else case.n + 1
        folder = self.folder / str(case.rank)
        if not folder.exists():
            folder.mkdir()
            written = 1 if self.blocks else count  # without their numbers all are alike
            first, *_ = models.write_loras(folder, self.options.model, self.model, [case.rank] * written,
                                           self.options.scope, "cuda" if self.options.device == "cuda" else "cpu")
            for file in self._names(case, count)[written:]:
                file.hardlink_to(first)
        files = self._names(case, count)
        return files[:case.n], files[-1]

    def _names(self, case: Case, count: int) -> list[Path]:
        folder = self.folder / str(case.rank)
        return [folder / f"{self.options.model}-{i}-rank{case.rank}.safetensors" for i in range(count)]

    def way(self, case: Case, name: str, how: str, conds: Sequence[list]) -> Way:
        files, always = self.files(case)
        if name == PLAIN:
            return Way(self.model, conds)
        if name == LOADERS:
            return Way(models.stock(self.model, files), conds)
        if name == HOOKS:
            return Way(self.model, models.hooked(conds, files))
        if name == "Routed":
            conds = (with_clauses(conds[0], len(files)), conds[1])
        made = composed(self.model, files, name, always if how == "always on" else None)
        return Way(saving(made, how), conds, bank=bank_bytes(made))

    def measure(self, case: Case, cells: Cells, late: Callable[[], bool]) -> list[str]:
        """Measure some ways, in turns. In words what was left out, as it is late or does not work here."""
        noise, conds = models.inputs(self.options.model, self.model, case.size, frames=self.options.frames)
        ways: dict[tuple[str, str], Way] = {}
        left: list[str] = []
        for round_ in range(self.options.rounds):
            for cell in cells if round_ == 0 else list(ways):
                if round_ == 0 and late():
                    left.append(f"{case} {cell}: late")
                    continue
                try:
                    if round_ == 0:
                        ways[cell] = self.way(case, *cell, conds)
                        ways[cell].blocks = self.blocks
                    ways[cell].run(noise, case.steps, self.architecture.cfg)
                except RuntimeError as e:  # as a lack of memory is
                    left.append(f"{case} {cell}: {e}")
                    ways.pop(cell, None)
                else:
                    if round_ == self.options.rounds - 1:
                        self.report(case, *cell, ways.pop(cell))
        return left

    def report(self, case: Case, name: str, how: str, way: Way) -> None:
        later, found = None if self.blocks else median(way.later), {"way": name, "saving": how, **asdict(case)}
        costs = {"": float(way.operations)} if later is None else {"": later.wall, "cpu_": later.cpu}
        if name == PLAIN:
            self.plain[case] = costs
        if case in self.plain:
            found |= {f"{kind}ratio": cost / self.plain[case][kind] for kind, cost in costs.items()}
        if later is None:
            self.tell("operations", **found, operations=costs[""], rows=way.rows)
            return
        first = median(way.first)
        self.tell("method", **found, seconds=later.wall, host=later.thread, cpu_seconds=later.cpu,
                  first_seconds=first.wall, cpu_first_seconds=first.cpu, rows=way.rows, bytes=way.bytes,
                  bank_bytes=way.bank)


def bank_bytes(composed) -> int:
    """Of the LoRAs of a composed MODEL, on the device while it runs."""
    return sum(bank.model.nbytes() for bank in models.banks_of(composed))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of("methods", __doc__)
    parser.add_argument("--device", choices=["cpu", "cuda", "meta"], default="cpu",
                        help="meta: count operations, time nothing")
    parser.add_argument("--model", choices=list(models.ARCHITECTURES), default="SD1.5")
    parser.add_argument("--size", type=int, nargs="+", default=[256], help="picture size in pixels; more: varied")
    parser.add_argument("--frames", type=int, default=1, help="latent frames, where the model has some")
    parser.add_argument("--scale", type=float, default=1.0, help="width of the model as a share of the true one")
    parser.add_argument("--n", type=int, nargs="+", default=[2, 5], help="numbers of LoRAs")
    parser.add_argument("--sweep-n", type=int, nargs="*", default=[], help="more of them, for --sweep-methods")
    parser.add_argument("--rank", type=int, nargs="+", default=[16], help="of the LoRAs; more: varied")
    parser.add_argument("--scope", choices=["attention", "linear", "conv"], default="linear", help="as in speed.py")
    parser.add_argument("--steps", type=int, nargs="+", default=[20], help="of a run; more: varied, with what saves")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--savings", nargs="+", choices=SAVINGS, default=list(SAVINGS))
    parser.add_argument("--saved-n", type=int, nargs="*", help="numbers of LoRAs for --savings; default: --n")
    parser.add_argument("--saved-methods", nargs="*", choices=METHODS, help="for --savings; default: --methods")
    parser.add_argument("--loaders", type=int, nargs="*", help="numbers of LoRAs for ComfyUI's loaders; default: --n")
    parser.add_argument("--hooks", type=int, nargs="*", help="numbers of LoRAs for ComfyUI's hooks; default: --n")
    parser.add_argument("--sweep-methods", nargs="+", choices=METHODS, default=["Merge", "Composite"])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after that, counted from the start of "
                        "the process, nothing more is begun")
    options = parser.parse_args(arguments)
    if min(options.steps) < 2:
        parser.error("--steps must be at least 2: the first step is the start of the run")
    for name, usual in (("loaders", "n"), ("hooks", "n"), ("saved_n", "n"), ("saved_methods", "methods")):
        if getattr(options, name) is None:
            setattr(options, name, getattr(options, usual))
    if options.device == "meta":
        options.loaders, options.hooks = [], []
    return options


def main(arguments: list[str]) -> None:
    import psutil  # one of ComfyUI's

    options, begun = parse(arguments), psutil.Process().create_time()
    version = models.start_comfyui(options.comfyui, options.device)
    device = torch.device(options.device)
    dtype = models.ARCHITECTURES[options.model].dtype if device.type == "cuda" else torch.float32
    model = models.build(options.model, options.scale, dtype, device)
    models.settle(model)
    tell = Results(model.load_device, comfyui=version, model=options.model, dtype=str(dtype).removeprefix("torch."),
                   frames=options.frames, scale=options.scale, scope=options.scope, quick=options.scale != 1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as counting:
        blocks = None
        if device.type == "meta":
            from .weightless import weightless

            blocks = counting.enter_context(weightless(model))
        bench = Bench(model, Path(folder), options, tell, blocks)
        for case, cells in plan(options):
            for words in bench.measure(case, cells, lambda: time() - begun > options.seconds):
                sys.stderr.write(f"left out: {words}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
