#!/usr/bin/env python3
"""What the pack's own code costs beside the arithmetic: the host's time, which a fast GPU waits for.

    python3 benchmarks/host_time.py                        one layer call; needs torch alone
    python3 benchmarks/host_time.py --comfyui PATH         and whole steps in ComfyUI, with the interpreter it runs in
    python3 benchmarks/host_time.py --device cuda          the same with the work on a GPU
    python3 benchmarks/host_time.py --quick                some seconds, to see that it works

Everything is tiny, so that what remains is the host, and is measured in processor time of one thread, with torch in
that thread alone: on a busy machine these are the steadier figures. What is compared runs in turns; a difference is the
median of the differences within each round, between its quartiles. Prints one JSON object per result, then a table.

    layer   per call of an adapted linear layer: microseconds beyond the plain layer, of every case in CASES. Beside it
            the plain layer and the floor: the two bare products of one LoRA for all rows, without any wrapping.
    step    per step of ComfyUI's sampler, of SD1.5 and SDXL with all their layers but narrow: milliseconds beyond the
            model without LoRAs, of five merged LoRAs and of one, beside ComfyUI's own chain of loaders (weights are
            patched before the run) and its bypass loader, which takes one; Composite of five beside as large a batch;
            both with one LoRA more that is always on
    live    per message of what a run tells while it samples, text and panel: milliseconds, as a share of the time
            between two messages, which is the most that it can be of a step
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.host_time", *sys.argv[1:]]))

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor, nn

from ..engine.adapters import LowRank
from ..engine.bank import Bank
from ..engine.forwards import RoutedForwards
from ..engine.record import RunRecord, StepRecord
from ..kernels.branch import Branch, one_hot
from ..methods.merge import Merge
from . import models
from .measure import Results, Spread, in_turns, one_thread, spread
from .table import host_table

TOKENS, LAYERS = 8, 64
SIZES = {"32x32": (32, 32), "64x64": (64, 64)}
STRENGTHS = (0.8, 0.7, 0.9, 0.6, 0.75)
BYPASS = "ComfyUI's bypass loader, 1 LoRA"
EQUAL, UNEQUAL = (2,) * 5, (1, 2, 4, 2, 1)
"""Ranks as narrow as the layers: beside a layer of 1280 they would be 32 and more."""


@dataclass(frozen=True)
class Case:
    """One way to use an adapted layer.

    ranks     of the LoRAs that lie on every layer
    layouts   the branches of the batch's rows for one step after another, given the names of the layers
    slices    how many layers each layer is in one weight (q, k and v), with LoRAs for each of them apart
    """

    ranks: Sequence[int]
    layouts: Callable[[Sequence[str]], Iterator[list[Branch]]]
    slices: int = 1


def always(rows: list[Branch]) -> Callable[[Sequence[str]], Iterator[list[Branch]]]:
    """The same rows in every step."""
    def layouts(names: Sequence[str]) -> Iterator[list[Branch]]:
        while True:
            yield rows

    return layouts


def alone(count: int) -> list[Branch]:
    """A branch per LoRA."""
    return [one_hot(STRENGTHS[:count], i) for i in range(count)]


def merged(count: int) -> Case:
    return Case(EQUAL[:count], always([Branch(STRENGTHS[:count])] * 2))


def composite(ranks: Sequence[int]) -> Case:
    """Both conds of each LoRA side by side, as the host puts them."""
    return Case(ranks, always([branch for branch in alone(len(ranks)) for _ in range(2)]))


def scattered() -> Case:
    """The same rows in an order that makes no runs: all of one cond, then all of the other."""
    return Case(EQUAL, always(alone(5) * 2))


def loratorio() -> Case:
    base = Branch((0.0,) * 5)
    return Case(EQUAL, always([branch for branch in (*alone(5), base) for _ in range(2)]))


def chosen() -> Case:
    """K-LoRA: a LoRA of two for each layer, by a choice that no step shares with the last."""
    def layouts(names: Sequence[str]) -> Iterator[list[Branch]]:
        coin = Random(0)
        while True:
            yield [Branch((0.8, 0.0), tuple((name, (0.0, 0.9)) for name in names if coin.random() < 0.5))] * 2

    return Case(EQUAL[:2], layouts)


def always_on(case: Case) -> Case:
    """The same above a LoRA that acts in all rows, the first of the bank."""
    def layouts(names: Sequence[str]) -> Iterator[list[Branch]]:
        for rows in case.layouts(names):
            yield [Branch((1.0, *branch.gains)) for branch in rows]

    return Case((2, *case.ranks), layouts)


def fading(case: Case) -> Case:
    """The same while the window of the last LoRA closes: in every step it has another strength."""
    def layouts(names: Sequence[str]) -> Iterator[list[Branch]]:
        for step, rows in enumerate(case.layouts(names), start=1):
            yield [Branch((*branch.gains[:-1], branch.gains[-1] / (1 + step / 64))) for branch in rows]

    return replace(case, layouts=layouts)


def fused(case: Case) -> Case:
    """The same on layers that are three in one."""
    return replace(case, slices=3)


CASES: dict[str, Case] = {
    "Merge of 1": merged(1),
    "Merge of 5": merged(5),
    "Composite of 5, equal ranks": composite(EQUAL),
    "Composite of 5, unequal ranks": composite(UNEQUAL),
    "Composite of 5, scattered rows": scattered(),
    "LoRAtorio, 5 and the base": loratorio(),
    "K-LoRA, a choice per layer and step": chosen(),
    "Merge of 5, one of them fading": fading(merged(5)),
    "Composite of 5, unequal ranks, one of them fading": fading(composite(UNEQUAL)),
    "Merge of 5, one more always on": always_on(merged(5)),
    "Composite of 5, unequal ranks, one more always on": always_on(composite(UNEQUAL)),
    "q, k and v in one, Merge of 1": fused(merged(1)),
    "q, k and v in one, Merge of 5": fused(merged(5)),
    "q, k and v in one, Composite of 5, equal ranks": fused(composite(EQUAL)),
    "q, k and v in one, Composite of 5, unequal ranks": fused(composite(UNEQUAL)),
    "q, k and v in one, K-LoRA": fused(chosen()),
}
"""What is measured of a layer; a new way to act on one is a new line."""


def adapters(ranks: Sequence[int], names: Sequence[str], out: int, wide: int, slices: int = 1
             ) -> list[dict[str, list[LowRank]]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    spans = [None] if slices == 1 else [(0, k * out, out) for k in range(slices)]
    return [{name: [LowRank(random(out, rank), random(rank, wide), span=span) for span in spans] for name in names}
            for rank in ranks]


def check(case: str, routed: RoutedForwards, loras: list[dict[str, list[LowRank]]], rows: list[Branch],
          layers: nn.Sequential, x: Tensor) -> None:
    """Stop where the first or the last layer does not give what its row's LoRAs say: nothing is timed then."""
    for name, layer in (list(layers.named_children())[i] for i in (0, -1)):
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        plain = expected.clone()
        for row, branch in enumerate(rows):
            for gain, lora in zip(branch.at(name), loras, strict=True):
                expected[row] += torch.cat([gain * x[row] @ op.down.T.to(x) @ op.up.T.to(x) for op in lora[name]],
                                           dim=-1)
        with routed.rows(rows):
            apart = (layer(x) - expected).norm() / (expected - plain).norm()
        if not apart <= 1e-5:
            raise SystemExit(f"{case}: layer {name} is off by {apart:.1e} of the LoRAs' effect, nothing is timed")


def linears(out: int, wide: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(wide, out) for _ in range(LAYERS))).requires_grad_(False)


def bench_layer(tell: Results, name: str, case: Case, size: str, rounds: int, device: torch.device) -> dict:
    """Host time of one layer call, from passes over LAYERS layers in which a step's rows are given once."""
    out, wide = SIZES[size]
    total = out * case.slices
    # Each has layers of its own: those that another has just called would be nearer to the processor.
    plain, multiplied, adapted = (linears(total, wide).to(device) for _ in range(3))
    names = [layer for layer, _ in adapted.named_children()]
    loras, layouts = adapters(case.ranks, names, out, wide, case.slices), case.layouts(names)
    routed, rows = RoutedForwards(adapted, Bank(loras, dtype=torch.float32).to(device)), next(layouts)
    x, down, up = (torch.randn(shape, device=device) for shape in ((len(rows), TOKENS, wide), (8, wide), (total, 8)))

    def without() -> None:
        for layer in plain:
            layer(x)

    def bare() -> None:
        for layer in multiplied:
            layer(x).view(-1, total).addmm_(x.view(-1, wide) @ down.T, up.T)

    def ours() -> None:
        with routed.rows(next(layouts)):
            for layer in adapted:
                layer(x)

    routed.install()
    try:
        with torch.inference_mode():
            check(name, routed, loras, rows, adapted, x)
            found = in_turns({"plain": without, "floor": bare, "ours": ours}, rounds, device, warmups=3)
    finally:
        routed.remove()
    each = {arm: [1e6 * seconds.thread / LAYERS for seconds in times] for arm, times in found.items()}
    added, floor = (beyond(each[arm], each["plain"]) for arm in ("ours", "floor"))
    return tell("layer", case=name, layer=size, rows=len(rows), ranks=list(case.ranks), unit="us",
                plain=spread(each["plain"]).middle, floor=floor.middle, added=added.middle,
                quartiles=[added.low, added.high], rounds=rounds)


def beyond(times: Sequence[float], reference: Sequence[float]) -> Spread:
    """How much more each took than the other of the same round."""
    return spread([time - other for time, other in zip(times, reference, strict=True)])


def bare_products(model, name: str, rank: int):
    """The MODEL with two bare products in each of its linear layers, without any wrapping, in ComfyUI's own object
    patches: what one LoRA of this rank takes at least."""
    patched = model.clone()

    def added(base: Callable[[Tensor], Tensor], down: Tensor, up: Tensor) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            y = base(x)
            y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ down, up)
            return y

        return forward

    for layer, weight in models.targets(name, model, "linear"):
        down, up = (torch.zeros(shape, device=weight.device) for shape in ((weight.shape[1], rank),
                                                                           (rank, weight.shape[0])))
        forward = model.get_model_object(f"diffusion_model.{layer}.forward")
        patched.add_object_patch(f"diffusion_model.{layer}.forward", added(forward, down, up))
    return patched


def step_arms(model, name: str, files: list[Path]) -> dict[str, tuple[str, object]]:
    """Name -> (what it is compared with, MODEL); a MODEL of None is one that this ComfyUI cannot make."""
    *files, further = files

    def merge(count: int, always: Sequence[Path] = ()):
        return models.compose(model, files[:count], lambda active: Merge(active.strengths), always)[0]

    return {
        "no LoRA, 2 rows": ("", model), "no LoRA, 10 rows": ("", model),
        "ComfyUI's loaders, 5 LoRAs in the weights": ("no LoRA, 2 rows", models.stock(model, files)),
        "two bare products per layer": ("no LoRA, 2 rows", bare_products(model, name, sum(UNEQUAL))),
        BYPASS: ("no LoRA, 2 rows", models.stock(model, files[:1], bypass=True)),
        "Merge of 1": ("no LoRA, 2 rows", merge(1)), "Merge of 5": ("no LoRA, 2 rows", merge(5)),
        "Merge of 5, one more always on": ("no LoRA, 2 rows", merge(5, [further])),
        "Composite of 5": ("no LoRA, 10 rows", models.compose(model, files)[0]),
        "Composite of 5, one more always on": ("no LoRA, 10 rows", models.compose(model, files, always=[further])[0]),
    }  # fmt: skip


def bench_step(tell: Results, name: str, rounds: int, steps: int, scale: float, device: torch.device) -> list[dict]:
    """Host time of a sampler step (cfg 7, so two rows per picture): the median of the steps of each run but its first,
    in which weights are patched and banks installed."""
    model = models.build(name, scale, torch.float32, device)
    one, conds = models.inputs(name, model, 64, tokens=8)
    five = one.repeat(5, 1, 1, 1)
    with tempfile.TemporaryDirectory() as folder:
        files = models.write_loras(Path(folder), name, model, (*UNEQUAL, 2))
        arms = {arm: made for arm, made in step_arms(model, name, files).items() if made[1] is not None}
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for round_ in range(-1, rounds):
            for arm in list(arms)[::1 if round_ % 2 else -1]:
                noise = five if arm == "no LoRA, 10 rows" else one
                _, found = models.sampled(arms[arm][1], *conds, noise, steps)
                if round_ >= 0:
                    times[arm].append(1e3 * spread([seconds.thread for seconds in found[1:]]).middle)
    layers = sum(1 for _ in models.targets(name, model, "linear"))
    lines = []
    for arm, (reference, _) in arms.items():
        if reference:
            added, plain = beyond(times[arm], times[reference]), spread(times[reference]).middle
            lines.append(tell("step", case=arm, model=name, layers=layers, unit="ms", plain=plain, added=added.middle,
                              quartiles=[added.low, added.high], share=added.middle / plain, rounds=rounds,
                              steps=steps - 1))
    return lines


LIVE = ((4, 30), (20, 50), (4, 1000))
"""Numbers of LoRAs and steps."""


def bench_live(tell: Results, loras: int, steps: int, rounds: int) -> dict:
    """Host time of what is told at the last step of a run of CMLoRA with a branch cache, of which most is known."""
    from ..host.look.live import EVERY
    from ..host.look.panel import shown
    from ..host.look.story import costs_of, line

    branches = [[[0.8 * (i == k) for i in range(loras)]] for k in range(loras)]
    notes = {"CMLoRA": {"led": 0, "weight": 0.5}, "cache": {"reused": 2, "ages": [1] * loras}}
    record = RunRecord(["CMLoRA"], [[f"lora_{k}.safetensors" for k in range(loras)]],
                       [StepRecord(k, 1.0, branches, 1, 2 * loras, 0.5, notes) for k in range(steps)])

    def message() -> None:
        costs = costs_of(record, None)
        json.dumps([line(record, ["CMLoRA"], costs, steps), shown(record, ["CMLoRA"], ["1"], costs, steps)])

    found = in_turns({"ours": message}, rounds, torch.device("cpu"), warmups=3)["ours"]
    taken, plain = spread([1e3 * seconds.thread for seconds in found]), 1e3 * EVERY
    return tell("live", case=f"{loras} LoRAs, {steps} steps", model="a message", layers="text and panel", unit="ms",
                plain=plain, added=taken.middle, quartiles=[taken.low, taken.high], share=taken.middle / plain,
                rounds=rounds)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="host_time", description=__doc__.split("\n\n")[0])
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_UNDER_TEST"), metavar="PATH",
                        help="without one only layers are measured")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="+", choices=("layer", "step", "live"),
                        default=["layer", "step", "live"])
    parser.add_argument("--models", nargs="+", choices=("SD1.5", "SDXL"), default=["SD1.5", "SDXL"])
    parser.add_argument("--rounds", type=int, help="of layers (default 200) and runs (default 10)")
    parser.add_argument("--steps", type=int, default=8, help="sampler steps of a run, the first not timed")
    parser.add_argument("--scale", type=float, default=0.1, help="width of the models as a share of the true one")
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it works and measures nothing")
    options = parser.parse_args(arguments)
    one_thread()
    if options.quick:
        options.rounds, options.steps = options.rounds or 2, 3
    device = torch.device(options.device)
    version = models.start_comfyui(options.comfyui, options.device) if options.comfyui else None
    tell = Results(device, comfyui=version)
    found = []
    if "layer" in options.only:
        found += [bench_layer(tell, name, case, size, options.rounds or 200, device)
                  for size in SIZES for name, case in CASES.items()]
    if "step" in options.only and version:
        for name in options.models:
            found += bench_step(tell, name, options.rounds or 10, options.steps, options.scale, device)
    if "live" in options.only and version:
        found += [bench_live(tell, loras, steps, options.rounds or 200) for loras, steps in LIVE]
    sys.stdout.write("\n" + host_table(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
