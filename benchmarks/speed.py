#!/usr/bin/env python3
"""What composing N LoRAs costs in a real ComfyUI, against its own way of doing it.

    python3 benchmarks/speed.py --comfyui PATH [--device cuda] [--model SDXL --size 1024]

Start it with the interpreter that ComfyUI runs in. Prints one JSON object per result, and a summary to stderr. The
model has the architecture of SD1.5, SDXL or Flux and random weights. What is compared runs in alternation in one
process; ratios are ratios of medians. On a CPU, `cpu_` figures count processor time of all threads instead of time on
the clock: use them where other programs are busy.

    composite   seconds per sampling step: ComfyUI's hook LoRAs (each LoRA patches the weights for its own forward) over
                Composite (one batch, no weight touched). Nothing is timed before both give the same picture.
    start       seconds that the first step takes beyond a later one, in a run after another of the same MODEL: patching
                of the weights against installing
    memory      peak of a run above the level before it, and the bytes of the bank
    tax         one forward of the same batch: rows of N LoRAs over rows of the base model; and the forwards of one LoRA
                after another over that of all
    selection   a step with the LoRA that K-LoRA or EST-LoRA chooses at each layer over a step with one LoRA (Merge)
    mixing      LoRAtorio's weights and CMLoRA's spectrum: their seconds per step over those of the step's forward
    guidance    what Adaptive Guidance and LinearAG add to a step, over the step's forward of one picture
    routed      a step of Routed LoRAs over one of Merge: with places that are found once, and read in every step
    cache       steps of Composite over the same steps with the branch cache as its node has it, a forecast, interval 3
                and depth 2; the relative error of the final latent, and the bytes held
    saving      a run with guidance over the same run with Adaptive Guidance that saves a quarter, and with LinearAG
    stack       a run of the stock hook composite over one of Composite with forecast cache and extrapolated guidance,
                at each interval and depth of --cuts
    floor       what a step's products would take at the device's matrix rate, as a share of a step of Composite;
                with --compile also compiled

The first six run unless --only names others. LoRAs of unequal rank (--ranks 4 8 16 32) are measured beside as many of
one rank.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.speed", *sys.argv[1:]]))

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine.bank import Bank
from ..engine.forwards import RoutedForwards
from ..engine.sizes import measure
from ..kernels.branch import Branch, Step, one_hot
from ..methods.composite import Composite
from ..methods.est import ESTLoRA
from ..methods.klora import KLoRA
from ..methods.merge import Merge
from . import models
from .deciding import bench_deciding, bench_saving
from .measure import Peak, Results, Seconds, alternate, difference, median, parser_of
from .methods import DEPTH, INTERVAL
from .mixing import bench_mixing
from .models import STRENGTH, bank_of, compose
from .routing import bench_routed
from .whole import Cut, bench_floor, bench_stack

PARITY = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}
USUAL = ("composite", "tax", "selection", "mixing", "guidance")
PARTS = (*USUAL, "routed", "cache", "saving", "stack", "floor")


@dataclass(frozen=True)
class WithBase(Composite):
    """Composite in which the model without LoRAs is one more of those averaged."""

    def branches(self, step: Step) -> tuple[Branch, ...]:
        return (*super().branches(step), Branch((0.0,) * len(self.strengths)))


class Sampling:
    """One run of ComfyUI's sampler: latent, first (Seconds of the first step), later (Seconds of each later one)."""

    def __init__(self, model, positive: list, negative: list, noise: Tensor, steps: int, cfg: float):
        with Peak(model.load_device) as peak:
            self.latent, times = models.sampled(model, positive, negative, noise, steps, cfg)
        self.first, *self.later = times
        self.peak = peak.bytes


class Bench:
    """The parts of this benchmark on one model: noise, conds, and LoRA files of the ranks asked for and of one rank."""

    def __init__(self, model, folder: Path, tell: Results, options: argparse.Namespace):
        self.model, self.tell, self.options = model, tell, options
        self.cfg = models.ARCHITECTURES[options.model].cfg
        self.noise, self.conds = models.inputs(options.model, model, options.size)
        most = max(*options.n, 2)
        ranks = [options.ranks[i % len(options.ranks)] for i in range(most)]
        self.files = models.write_loras(folder, options.model, model, ranks, options.scope)
        same = round(sum(options.ranks) / len(options.ranks))
        self.equal = None
        if len(set(options.ranks)) > 1:
            self.equal = models.write_loras(folder, options.model, model, [same] * most, options.scope)

    def sampling(self, model, conds: Sequence[list] | None = None, steps: int | None = None) -> Sampling:
        return Sampling(model, *(conds or self.conds), self.noise, steps or self.options.steps, self.cfg)

    def sets(self, count: int) -> dict[str, list[Path]]:
        """The files of N LoRAs, and as many of equal rank where these are not."""
        equal = {} if self.equal is None else {"equal": self.equal[:count]}
        return {"composite": self.files[:count], **equal}

    def composite(self, count: int) -> str:
        """Composite against the stock hook composite: whole sampler steps, start of a run, memory."""
        options, base = self.options, self.options.base
        kind = WithBase if base else Composite
        hooks = models.hooked(self.conds, self.files[:count], base)
        # Composite first: memory that a run of hooks leaves with the allocator would hide what Composite needs.
        arms, node = {}, {}
        for name, files in self.sets(count).items():
            composed, node[name] = compose(self.model, files, lambda active: kind(active.strengths))
            arms[name] = (composed, self.conds)
        bank = bank_of(arms["composite"][0]).model.nbytes()
        arms["hooks"] = (self.model, hooks)
        runs: dict[str, list[Sampling]] = {name: [] for name in arms}
        plain = self.sampling(self.model)
        for _ in range(options.rounds):
            for name, arm in arms.items():
                self.sampling(*arm, steps=1)  # hooks make the host load its model anew for every other MODEL
                runs[name].append(self.sampling(*arm))
            if len(runs["hooks"]) == 1:
                apart = self._parity(runs["composite"][0].latent, runs["hooks"][0].latent, count)
        later = {name: median(seconds for run in runs[name] for seconds in run.later) for name in arms}
        first = {name: median(run.first for run in runs[name]) for name in arms}
        ours, theirs, alone = later["composite"], later["hooks"], median(plain.later)
        self.tell("composite", n=count, base=base, ratio=theirs.wall / ours.wall, cpu_ratio=theirs.cpu / ours.cpu,
                  base_seconds=alone.wall, base_cpu_seconds=alone.cpu, node_seconds=node["composite"],
                  **{f"{name}_seconds": each.wall for name, each in later.items()},
                  **{f"{name}_cpu_seconds": each.cpu for name, each in later.items()},
                  steps=options.rounds * (options.steps - 1), **apart,
                  effect=difference(plain.latent, runs["hooks"][0].latent))
        begun = {name: first[name].wall - later[name].wall for name in arms}
        # A first step of ours that was no longer than the others counts as one millisecond longer.
        self.tell("start", n=count, ratio=begun["hooks"] / max(begun["composite"], 1e-3),
                  **{f"{name}_seconds": each for name, each in begun.items()},
                  **{f"{name}_cpu_seconds": first[name].cpu - later[name].cpu for name in arms})
        peaks = {name: max(run.peak for run in runs[name]) for name in arms}
        self.tell("memory", n=count, base_bytes=plain.peak, bank_bytes=bank, ratio=peaks["hooks"] / peaks["composite"],
                  extra_ratio=(peaks["hooks"] - plain.peak) / max(bank, 1),
                  **{f"{name}_bytes": each for name, each in peaks.items()})
        return f"Composite {theirs.wall / ours.wall:.2f} times as fast as the stock hook composite"

    def _parity(self, ours: Tensor, hooks: Tensor, count: int) -> dict[str, float]:
        """How far the pictures of Composite and of the hooks are apart. Random weights multiply what rounding does to
        them: where it is more than expected, the hooks' picture with strengths of one rounding more says how much.
        Nothing is timed where Composite is further away than three times that."""
        apart, dtype = difference(ours, hooks), self.options.dtype
        if apart <= PARITY[dtype]:
            return {"difference": apart}
        nudged = STRENGTH * (1 + torch.finfo(dtype).eps)
        moved = difference(self.sampling(self.model, models.hooked(self.conds, self.files[:count], self.options.base,
                                                                   nudged)).latent, hooks)
        if not apart <= 3 * moved:
            raise SystemExit(f"N={count}: the two results differ by {apart:.1e} of their norm, nothing is timed; one "
                             f"rounding of the strengths moves the hooks' by {moved:.1e}")
        return {"difference": apart, "rounding": moved}

    def tax(self, count: int) -> str:
        """One forward of Composite's batch with every row of some LoRA over the same batch with base rows, and the
        forwards of one LoRA after another over it; and what installing takes."""
        import comfy.model_management

        for name, files in self.sets(count).items():
            bank = bank_of(compose(self.model, files)[0])
            comfy.model_management.load_models_gpu([self.model, bank])
            found = self._taxed(count, bank.model)
            lora, base, apart = found["lora"], found["base"], found["apart"]
            self.tell("tax", n=count, ranks=sorted({int(file.stem.rpartition("rank")[2]) for file in files}),
                      tax=lora.wall / base.wall - 1, cpu_tax=lora.cpu / base.cpu - 1,
                      apart_ratio=apart.wall / lora.wall, lora_seconds=lora.wall, base_seconds=base.wall,
                      apart_seconds=apart.wall, install_seconds=found["install"].wall, layers=len(bank.model.sites),
                      repeats=self.options.repeats)
            if name == "composite":
                tax = lora.wall / base.wall - 1
        return f"tax of the LoRAs on their batch {100 * tax:.1f} %"

    def _taxed(self, count: int, bank: Bank) -> dict[str, Seconds]:
        device, per_row = self.model.load_device, 1 if self.cfg == 1 else 2
        one, all_rows = (models.forward_of(self.model, self.conds, self.noise, n, self.cfg) for n in (1, count))
        routed = RoutedForwards(self.model.model.diffusion_model, bank)
        alone = [one_hot((STRENGTH,) * count, i) for i in range(count)]

        def forward(branches: list[Branch], evaluate: Callable[[], Tensor]) -> None:
            with routed.rows(branches):
                evaluate()

        def installing() -> None:
            routed.install()
            routed.remove()

        install = alternate({"install": installing}, 5, device)
        arms = {"lora": lambda: forward([branch for branch in alone for _ in range(per_row)], all_rows),
                "base": lambda: forward([Branch((0.0,) * count)] * count * per_row, all_rows),
                "apart": lambda: [forward([branch] * per_row, one) for branch in alone]}
        routed.install()
        try:
            return install | alternate(arms, self.options.repeats, device)
        finally:
            routed.remove()

    def selection(self) -> str:
        """Whole sampler steps of K-LoRA and EST-LoRA with two LoRAs against Merge with one, of the same engine."""
        options, pair = self.options, self.files[:2]
        arms = {"single": compose(self.model, pair[:1], lambda active: Merge(active.strengths))[0]}
        seconds = {}
        for name, kind in (("klora", KLoRA), ("est", ESTLoRA)):
            arms[name], seconds[name] = compose(self.model, pair, lambda active, kind=kind: kind.of(
                measure(active.bank, (True, False)), active.strengths, (True, False)))
        runs: dict[str, list[Sampling]] = {name: [] for name in arms}
        for round_ in range(options.rounds):
            for name in list(arms)[::1 if round_ % 2 else -1]:
                runs[name].append(self.sampling(arms[name]))
        later = {name: median(seconds for run in runs[name] for seconds in run.later) for name in arms}
        lines = []
        for name in ("klora", "est"):
            over = later[name].wall / later["single"].wall - 1
            self.tell("selection", method=name, over_single=over,
                      cpu_over_single=later[name].cpu / later["single"].cpu - 1, seconds=later[name].wall,
                      single_seconds=later["single"].wall, cpu_seconds=later[name].cpu,
                      single_cpu_seconds=later["single"].cpu, node_seconds=seconds[name],
                      layers=len(bank_of(arms[name]).model.sites), steps=options.rounds * (options.steps - 1))
            lines.append(f"{name} step {100 * over:+.1f} % over a step with one LoRA")
        return ", ".join(lines)

    def mixing(self, count: int) -> str:
        shares = bench_mixing(self.model, self.conds, count, self.noise, max(self.options.repeats, 10))
        for name, found in shares.items():
            self.tell("mixing", n=count, method=name, **found)
        return f"mixing at most {100 * max(found['share'] for found in shares.values()):.2f} % of a step"

    def guidance(self) -> str:
        shares = bench_deciding(self.model, self.conds, self.noise, max(self.options.repeats, 10))
        for name, found in shares.items():
            self.tell("guidance", policy=name, **found)
        return f"guidance takes at most {100 * max(found['share'] for found in shares.values()):.2f} % of a step"

    def routed(self, count: int) -> str:
        options = self.options
        found = bench_routed(self.model, self.files[:count], self.conds, self.noise, max(options.steps, 4),
                             options.rounds, self.cfg)
        for name, each in found.items():
            self.tell("routed", n=count, mode=name, **each)
        return ", ".join(f"routed, {name}, {each['cpu_ratio']:.3f} of a merge" for name, each in found.items())

    def cache(self, count: int) -> str:
        """Composite with every branch whole over Composite with the branch cache (forecast, interval 3, depth 2):
        seconds of the same steps, all but the first of a run; the second is whole, and one in three after it."""
        from ..host.compose.apply import with_cache
        from ..host.compose.cache import CacheSpec
        from ..host.compose.composition import record_of
        from ..methods.schedule import Uniform

        options, composed = self.options, compose(self.model, self.files[:count])[0]
        spec = CacheSpec(Uniform(3, first=2), depth=2, forecast=True)
        arms = {"whole": composed, "cached": with_cache(composed, spec)}
        runs: dict[str, list[Sampling]] = {name: [] for name in arms}
        for _ in range(options.rounds):
            for name, model in arms.items():
                runs[name].append(self.sampling(model, steps=options.run_steps))
        counted = 3 * ((options.run_steps - 1) // 3)
        wall = {name: sum(s.wall for run in found for s in run.later[:counted]) for name, found in runs.items()}
        cpu = {name: sum(s.cpu for run in found for s in run.later[:counted]) for name, found in runs.items()}
        notes = [step.notes["cache"] for step in record_of(arms["cached"]).steps]
        self.tell("cache", n=count, ratio=wall["whole"] / wall["cached"], cpu_ratio=cpu["whole"] / cpu["cached"],
                  whole_seconds=wall["whole"], cached_seconds=wall["cached"], steps=counted * options.rounds,
                  difference=difference(runs["cached"][0].latent, runs["whole"][0].latent),
                  cache_bytes=max(note["bytes"] for note in notes), reused_rows=sum(note["reused"] for note in notes),
                  whole_bytes=max(run.peak for run in runs["whole"]),
                  cached_bytes=max(run.peak for run in runs["cached"]))
        return f"with the branch cache {wall['whole'] / wall['cached']:.2f} times as fast"

    def saving(self, count: int) -> str:
        composed, options = compose(self.model, self.files[:count])[0], self.options
        found = bench_saving(composed, self.conds, self.noise, options.run_steps, options.rounds)
        for name, each in found.items():
            self.tell("saving", n=count, policy=name, **each)
        return ", ".join(f"with {name} {each['ratio']:.2f} times as fast" for name, each in found.items())

    def stack(self, count: int) -> str:
        composed, options = compose(self.model, self.files[:count])[0], self.options
        found = bench_stack(self.model, models.hooked(self.conds, self.files[:count]), composed, self.conds, self.noise,
                            options.run_steps, options.rounds, self.cfg, options.cuts)
        for each in found.values():
            self.tell("stack", n=count, **each)
        ratios = ", ".join(f"{each['ratio']:.2f} (interval {interval}, depth {depth})"
                           for (interval, depth), each in found.items())
        return f"with cache and extrapolated guidance {ratios} times as fast as the stock hook composite"

    def floor(self, count: int) -> str:
        composed, options = compose(self.model, self.files[:count])[0], self.options
        found = bench_floor(composed, self.conds, self.noise, options.steps, self.cfg, options.dtype, options.compile)
        self.tell("floor", n=count, **found)
        return f"products are {100 * found['share']:.0f} % of a step"


def cut(text: str) -> Cut:
    """"3:2" -> interval and depth of a cache."""
    interval, depth = map(int, text.split(":"))
    return interval, depth


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of("speed", __doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=list(models.ARCHITECTURES), default="SD1.5")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="default: fp32 on a CPU, fp16 elsewhere, for "
                                                                          "Flux bf16")
    parser.add_argument("--n", type=int, nargs="+", default=[2, 4], help="numbers of LoRAs")
    parser.add_argument("--size", type=int, default=256, help="picture size in pixels")
    parser.add_argument("--scale", type=float, default=1.0, help="width of the model as a share of the true one")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16], help="of the LoRAs, in turn")
    parser.add_argument("--base", action="store_true", help="composite: the base model is one more of those averaged")
    parser.add_argument("--scope", choices=["attention", "linear", "conv"], default="linear",
                        help="what the LoRAs act on: linears of attention; also those of feed-forward and projections; "
                             "of a U-Net also convolutions")
    parser.add_argument("--steps", type=int, default=3, help="sampler steps per run, the first not timed as a step")
    parser.add_argument("--run-steps", type=int, default=13, help="the same for cache, saving and stack")
    parser.add_argument("--cuts", type=cut, nargs="+", default=[(INTERVAL, DEPTH)], metavar="INTERVAL:DEPTH",
                        help="stack: of the cache, each with a run of its own; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each way, in turns")
    parser.add_argument("--repeats", type=int, default=2, help="forwards of each kind for the tax, in turns")
    parser.add_argument("--memory", type=float, metavar="GB", help="leave so much of a GPU's memory, the rest is taken")
    parser.add_argument("--compile", action="store_true", help="floor: also with torch.compile")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(USUAL))
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step is the start of the run")
    if options.run_steps < 4:
        parser.error("--run-steps must be at least 4: the first one is not timed, and one in three refreshes")
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    usual = "fp32" if options.device == "cpu" else "bf16" if options.model == "Flux" else "fp16"
    options.dtype = names[options.dtype or usual]
    return options


def ballast(gigabytes: float | None, device: torch.device) -> Tensor | None:
    """Memory of the GPU that is held so that `gigabytes` are left for all else."""
    if gigabytes is None or device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return torch.empty(max(int(free - gigabytes * 2**30), 0), dtype=torch.uint8, device=device)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    version = models.start_comfyui(options.comfyui, options.device)
    device = torch.device(options.device)
    held = ballast(options.memory, device)
    model = models.build(options.model, options.scale, options.dtype, device)
    tell = Results(device, comfyui=version, model=options.model, dtype=str(options.dtype).removeprefix("torch."),
                   size=options.size, scale=options.scale, ranks=options.ranks, scope=options.scope,
                   **({} if held is None else {"memory": options.memory}))
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(model, Path(folder), tell, options)
        for count in options.n:
            found = [getattr(bench, part)(count) for part in options.only if part not in ("selection", "guidance")]
            lines.append(f"N={count}:  " + "  ".join(found))
        lines += [getattr(bench, part)() for part in options.only if part in ("selection", "guidance")]
    sys.stderr.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
