#!/usr/bin/env python3
"""What composing N LoRAs costs in a real ComfyUI, against its own way of doing it.

    python3 run.py bench                                          this and quality.py, environments made as needed
    python3 benchmarks/speed.py --comfyui PATH [--device cuda]    only this, in an environment that ComfyUI runs in

Prints one JSON object per result, and a summary to stderr. The model is SD1.5's architecture with random weights. What
is compared runs in alternation in one process; ratios are ratios of medians. On a CPU, `cpu_` figures count processor
time of all threads instead of time on the clock: use them where other programs are busy.

    composite   seconds per sampling step: ComfyUI's hook LoRAs (each LoRA patches the weights for its own forward) over
                Composite (one batch, no weight touched). Nothing is timed before both give the same picture.
    start       seconds that the first step takes beyond a later one: patching of the weights against installing
    tax         one forward of the same batch: rows of N LoRAs over rows of the base model
    selection   a step with the LoRA that K-LoRA or EST-LoRA chooses at each layer over a step with one LoRA (Merge)
    memory      peak of a run above the level before it, and the bytes of the bank
    cache       (--only cache) steps of Composite over the same steps with the branch cache, interval 3 and depth 2; the
                relative error of the final latent, and the bytes held
    mixing      LoRAtorio's weights and CMLoRA's spectrum: their seconds per step over those of the step's forward
    guidance    what Adaptive Guidance and LinearAG add to a step, over the step's forward of one picture
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.speed", *sys.argv[1:]]))

import argparse
import json
import os
import tempfile

import torch
from torch import Tensor

from ..engine.forwards import RoutedForwards
from ..engine.sizes import measure
from ..kernels.branch import Branch, one_hot
from ..methods.composite import Composite
from ..methods.est import ESTLoRA
from ..methods.klora import KLoRA
from ..methods.merge import Merge
from . import sd15
from .deciding import bench_deciding
from .measure import Peak, alternate, environment, median, now, since
from .mixing import bench_mixing

STRENGTH = 0.8
PARITY = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def emit(**record) -> dict:
    """Print one result as a line of JSON; floats with four significant digits."""
    record = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()
    return record


class Sampling:
    """One run of ComfyUI's sampler: latent, first (Seconds of the first step), later (Seconds of each later one)."""

    def __init__(self, model, positive: list, negative: list, noise: Tensor, steps: int):
        with Peak(model.load_device) as peak:
            self.latent, times = sd15.sampled(model, positive, negative, noise, steps)
        self.first, *self.later = times
        self.peak = peak.bytes


def difference(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).double().norm() / reference.double().norm()).item()


def bench_composite(model, composed, conds: list, files: list[Path], noise: Tensor,
                    options: argparse.Namespace) -> float:
    """Composite against the stock hook composite: whole sampler steps, start of a run, memory. The ratio of steps."""
    # Composite first: memory that a run of hooks leaves with the allocator would hide what Composite needs.
    arms = {"composite": (composed, *conds), "hooks": (model, *sd15.hooked(conds, files, STRENGTH))}
    runs: dict[str, list[Sampling]] = {name: [] for name in arms}
    base = Sampling(model, *conds, noise, options.steps)
    for _ in range(options.rounds):
        for name, arm in arms.items():
            runs[name].append(Sampling(*arm, noise, options.steps))
        apart = difference(runs["composite"][0].latent, runs["hooks"][0].latent)
        if not apart <= PARITY[options.dtype]:
            raise SystemExit(f"N={len(files)}: the two results differ by {apart:.1e} of their norm, nothing is timed")
    ours, hooks = (median(seconds for run in runs[name] for seconds in run.later) for name in arms)
    first = {name: median(run.first for run in runs[name]) for name in arms}
    emit(bench="composite", n=len(files), ratio=hooks.wall / ours.wall, cpu_ratio=hooks.cpu / ours.cpu,
         hooks_seconds=hooks.wall, composite_seconds=ours.wall, base_seconds=median(base.later).wall,
         hooks_cpu_seconds=hooks.cpu, composite_cpu_seconds=ours.cpu, base_cpu_seconds=median(base.later).cpu,
         steps=options.rounds * (options.steps - 1), difference=apart,
         effect=difference(base.latent, runs["hooks"][0].latent))
    emit(bench="start", n=len(files), hooks_seconds=first["hooks"].wall - hooks.wall,
         composite_seconds=first["composite"].wall - ours.wall, hooks_cpu_seconds=first["hooks"].cpu - hooks.cpu,
         composite_cpu_seconds=first["composite"].cpu - ours.cpu)
    emit(bench="memory", n=len(files), base_bytes=base.peak, bank_bytes=bank_of(composed).model.nbytes(),
         **{f"{name}_bytes": max(run.peak for run in runs[name]) for name in arms})
    return hooks.wall / ours.wall


def bench_cache(composed, count: int, conds: list, noise: Tensor, options: argparse.Namespace) -> float:
    """Composite with every branch whole over Composite with the branch cache (interval 3, depth 2): seconds of the
    same steps, of which one in three refreshes. The ratio."""
    from ..host.apply import with_cache
    from ..host.cache import CacheSpec
    from ..host.composition import record_of
    from ..methods.schedule import Uniform

    arms = {"whole": composed, "cached": with_cache(composed, CacheSpec(Uniform(3), depth=2))}
    runs: dict[str, list[Sampling]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, model in arms.items():
            runs[name].append(Sampling(model, *conds, noise, options.cache_steps))
    counted = 3 * ((options.cache_steps - 1) // 3)
    wall = {name: sum(s.wall for run in found for s in run.later[:counted]) for name, found in runs.items()}
    cpu = {name: sum(s.cpu for run in found for s in run.later[:counted]) for name, found in runs.items()}
    notes = [step.notes["cache"] for step in record_of(arms["cached"]).steps]
    emit(bench="cache", n=count, ratio=wall["whole"] / wall["cached"], cpu_ratio=cpu["whole"] / cpu["cached"],
         whole_seconds=wall["whole"], cached_seconds=wall["cached"], steps=counted * options.rounds,
         difference=difference(runs["cached"][0].latent, runs["whole"][0].latent),
         cache_bytes=max(note["bytes"] for note in notes), reused_rows=sum(note["reused"] for note in notes),
         whole_bytes=max(run.peak for run in runs["whole"]), cached_bytes=max(run.peak for run in runs["cached"]))
    return wall["whole"] / wall["cached"]


def bench_tax(model, composed, conds: list, count: int, noise: Tensor, options: argparse.Namespace) -> float:
    """One forward of Composite's batch with every row of some LoRA over the same batch with base rows, and what
    installing takes. The tax as a fraction."""
    import comfy.model_management

    device, bank = model.load_device, bank_of(composed)
    comfy.model_management.load_models_gpu([model, bank])
    evaluate = sd15.forward_of(model, conds, noise, count)
    alone = [one_hot((STRENGTH,) * count, i) for i in range(count) for _ in range(2)]
    routed = RoutedForwards(model.model.diffusion_model, bank.model)

    def forward(branches: list[Branch]) -> None:
        with routed.rows(branches):
            evaluate()

    def installing() -> None:
        routed.install()
        routed.remove()

    install = alternate({"install": installing}, 5, device)["install"].wall
    arms = {"lora": lambda: forward(alone), "base": lambda: forward([Branch((0.0,) * count)] * (2 * count))}
    routed.install()
    try:
        seconds = alternate(arms, options.repeats, device)
    finally:
        routed.remove()
    lora, base = seconds["lora"], seconds["base"]
    emit(bench="tax", n=count, tax=lora.wall / base.wall - 1, cpu_tax=lora.cpu / base.cpu - 1, lora_seconds=lora.wall,
         base_seconds=base.wall, install_seconds=install, layers=len(bank.model.sites), repeats=options.repeats)
    return lora.wall / base.wall - 1


def bench_selection(model, conds: list, files: list[Path], noise: Tensor, options: argparse.Namespace) -> str:
    """Whole sampler steps of K-LoRA and EST-LoRA with two LoRAs against Merge with one, of the same engine."""
    pair = files[:2]
    arms = {"single": compose(model, files[:1], lambda active: Merge(active.strengths))[0]}
    seconds = {}
    for name, kind in (("klora", KLoRA), ("est", ESTLoRA)):
        arms[name], seconds[name] = compose(model, pair, lambda active, kind=kind: kind.of(
            measure(active.bank, (True, False)), active.strengths, (True, False)))
    runs: dict[str, list[Sampling]] = {name: [] for name in arms}
    for round_ in range(options.rounds):
        for name in list(arms)[::1 if round_ % 2 else -1]:
            runs[name].append(Sampling(arms[name], *conds, noise, options.steps))
    later = {name: median(seconds for run in runs[name] for seconds in run.later) for name in arms}
    lines = []
    for name in ("klora", "est"):
        over = later[name].wall / later["single"].wall - 1
        emit(bench="selection", method=name, over_single=over,
             cpu_over_single=later[name].cpu / later["single"].cpu - 1, seconds=later[name].wall,
             single_seconds=later["single"].wall, cpu_seconds=later[name].cpu,
             single_cpu_seconds=later["single"].cpu, node_seconds=seconds[name],
             layers=len(bank_of(arms[name]).model.sites), steps=options.rounds * (options.steps - 1))
        lines.append(f"{name} step {100 * over:+.1f} % over a step with one LoRA")
    return ", ".join(lines)


def bank_of(composed):
    """The patcher that holds the bank of a composed MODEL."""
    from ..host.composition import KEY

    return composed.get_additional_models_with_key(KEY)[0]


def compose(model, files: list[Path], make=lambda active: Composite(active.strengths)):
    """The MODEL that a method's node would give, and the seconds that takes with the files read already."""
    from ..host.apply import apply_method
    from ..host.ensemble import LoRASpec
    from ..host.files import read

    ensemble = tuple(LoRASpec(file.name, STRENGTH, 0.0) for file in files)
    for spec in ensemble:
        read(spec.name)
    start = now()
    composed, _ = apply_method(model, None, ensemble, make, "Composite")
    return composed, since(start).wall


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="speed", description=__doc__.split("\n\n")[0])
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_UNDER_TEST"), metavar="PATH")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], help="default: fp32 on a CPU, fp16 elsewhere")
    parser.add_argument("--n", type=int, nargs="+", default=[2, 4], help="numbers of LoRAs")
    parser.add_argument("--size", type=int, default=256, help="picture size in pixels")
    parser.add_argument("--scale", type=float, default=1.0, help="width of the model as a share of SD1.5's")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scope", choices=["linear", "conv"], default="linear",
                        help="what the LoRAs act on: linears of attention and feed-forward; conv: also convolutions")
    parser.add_argument("--steps", type=int, default=3, help="sampler steps per run, the first not timed as a step")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each way, in turns")
    parser.add_argument("--repeats", type=int, default=2, help="forwards of each kind for the tax, in turns")
    parser.add_argument("--only", choices=["composite", "tax", "selection", "mixing", "guidance", "cache"],
                        help="leave the other parts out; cache runs only when it is named")
    parser.add_argument("--cache-steps", type=int, default=13, help="sampler steps per run for the cache")
    options = parser.parse_args(arguments)
    if not options.comfyui:
        parser.error("name a ComfyUI with --comfyui PATH or in COMFYUI_UNDER_TEST")
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step is the start of the run")
    if options.cache_steps < 4:
        parser.error("--cache-steps must be at least 4: the first one is not timed, and one in three refreshes")
    names = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    options.dtype = names[options.dtype or ("fp32" if options.device == "cpu" else "fp16")]
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    version = sd15.start_comfyui(options.comfyui, options.device)
    import folder_paths

    device = torch.device(options.device)
    model = sd15.build(options.scale, options.dtype, device)
    channels = model.model.model_config.unet_config["model_channels"]
    emit(bench="environment", comfyui=version, dtype=str(options.dtype).removeprefix("torch."), size=options.size,
         channels=channels, rank=options.rank, scope=options.scope, **environment(device))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, options.size // 8, options.size // 8, generator=generator)
    conds = [[[torch.randn(1, 77, 768, generator=generator), {}]] for _ in range(2)]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.add_model_folder_path("loras", folder, is_default=True)
        files = [Path(folder) / f"speed-{i}.safetensors" for i in range(max(options.n))]
        for seed, file in enumerate(files):
            sd15.write_lora(file, model, seed, options.rank, options.scope)
        for count in options.n:
            composed, seconds = compose(model, files[:count])
            emit(bench="node", n=count, seconds=seconds)
            line = f"N={count}:"
            if options.only == "cache":
                ratio = bench_cache(composed, count, conds, noise, options)
                line += f"  with the branch cache {ratio:.2f} times as fast"
            if options.only in (None, "composite"):
                ratio = bench_composite(model, composed, conds, files[:count], noise, options)
                line += f"  Composite {ratio:.2f} times as fast as the stock hook composite"
            if options.only in (None, "tax"):
                tax = bench_tax(model, composed, conds, count, noise, options)
                line += f"  tax of the LoRAs on their batch {100 * tax:.1f} %"
            if options.only in (None, "mixing"):
                shares = bench_mixing(model, conds, count, noise, max(options.repeats, 10))
                for name, found in shares.items():
                    emit(bench="mixing", n=count, method=name, **found)
                line += f"  mixing at most {100 * max(found['share'] for found in shares.values()):.2f} % of a step"
            lines.append(line)
            del composed
        if options.only in (None, "selection") and len(files) > 1:
            lines.append(bench_selection(model, conds, files, noise, options))
        if options.only in (None, "guidance"):
            shares = bench_deciding(model, conds, noise, max(options.repeats, 10))
            for name, found in shares.items():
                emit(bench="guidance", policy=name, **found)
            most = max(found["share"] for found in shares.values())
            lines.append(f"guidance takes at most {100 * most:.2f} % of a step")
    sys.stderr.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
