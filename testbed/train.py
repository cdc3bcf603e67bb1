"""Makes the testbed's weights from nothing, with fixed seeds: `python3 testbed/train.py [--body unet|joint]`.

Stages (`--stages base judge loras turbo report`, all by default) may be run one by one; each reads what the earlier
ones left in the body's folder of weights. Two CPU cores that do nothing else need about an hour and a half per body.
The stage `practised` makes a second LoRA for few steps, which nothing else needs, and is run where it is named alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "testbed.train", *sys.argv[1:]]))

import argparse
import time

import numpy as np
import torch

from .base import train_base
from .beds import BEDS, Bed
from .body import Body
from .judge import train_judge
from .loras import save_lora, train_lora
from .model import encode
from .practice import PRACTICE, lineups, pictures_of
from .report import report
from .scene import CONCEPTS, Concept
from .turbo import PRACTISED, train_practised, train_turbo
from .weights import lora_path, save_module, turbo_path
from .worlds import REGIMES

STAGES = ("base", "judge", "loras", "turbo", "report")
FURTHER = ("practised",)  # not by default


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def make_base(bed: Bed, device: str) -> None:
    def keep(base: Body) -> None:
        save_module(base, bed.weights / "base.safetensors")

    torch.manual_seed(0)
    base = bed.make_base()
    for seed, (steps, rate) in enumerate(bed.schedule.base):
        base = train_base(base, steps, rate=rate, seed=seed, device=device, log=say, keep=keep)
        keep(base)


def make_lora(bed: Bed, base: Body, regime: str, concept: Concept) -> None:
    begin, schedule = time.time(), bed.schedule
    lessons = bed.collection(regime, concept)
    steps = schedule.longer.get((regime, concept.name), schedule.loras[regime])
    tensors = train_lora(base, encode(bed.school.render(lessons.scenes)), lessons.prompts, steps,
                         rate=schedule.lora_rate)
    save_lora(tensors, lora_path(regime, concept, bed.weights), concept.name)
    say(f"lora {regime} {concept.name} {time.time() - begin:.0f} s")


def make_turbo(bed: Bed, base: Body) -> None:
    begin, (pictures, steps) = time.time(), bed.schedule.turbo
    save_lora(train_turbo(base, pictures, steps, log=say), turbo_path(bed.weights), "turbo")
    say(f"turbo {time.time() - begin:.0f} s")


def make_practised(bed: Bed, base: Body) -> None:
    """From the LoRA for few steps that is there, with LoRAs that are made for this and not kept."""
    begin, loras = time.time(), []
    for number in range(len(PRACTICE)):
        met = pictures_of(number)
        loras.append(train_lora(base, encode(bed.school.render(met.scenes)), met.prompts, bed.schedule.loras["narrow"],
                                rate=bed.schedule.lora_rate))
        say(f"practice {number + 1}/{len(PRACTICE)} {time.time() - begin:.0f} s")
    pictures, steps, rate, seed = PRACTISED
    prompts, branches = lineups(np.random.default_rng(seed), pictures)
    tensors = train_practised(base, bed.load_turbo(), loras, prompts, branches, steps, rate=rate, seed=seed, log=say)
    save_lora(tensors, turbo_path(bed.weights, practised=True), "turbo")
    say(f"practised {time.time() - begin:.0f} s")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--body", choices=BEDS, default="unet")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--stages", nargs="+", choices=(*STAGES, *FURTHER), default=list(STAGES))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--concepts", nargs="+", choices=[c.name for c in CONCEPTS], help="loras: only these")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")
    bed, start = BEDS[options.body], time.time()
    if "base" in options.stages:
        make_base(bed, options.device)
    if "judge" in options.stages:
        judge = train_judge(bed.schedule.judge, device=options.device, log=say, make=bed.make_judge, school=bed.school)
        save_module(judge, bed.weights / "judge.safetensors")
    if "loras" in options.stages:
        base = bed.load_base(options.device)
        for regime in options.regimes:
            for concept in CONCEPTS:
                if not options.concepts or concept.name in options.concepts:
                    make_lora(bed, base, regime, concept)
    for stage, make in (("turbo", make_turbo), ("practised", make_practised)):
        if stage in options.stages:
            if bed.schedule.turbo is None:
                say(f"{stage}: the body '{bed.name}' has none")
            else:
                make(bed, bed.load_base(options.device))
    if "report" in options.stages:
        for line in report(bed, options.device, options.regimes):
            say(line)
    say(f"done in {time.time() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
