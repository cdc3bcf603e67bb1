"""Makes the testbed's weights from nothing, with fixed seeds: `python3 testbed/train.py [--device cpu|cuda]`.

Stages (`--stages base judge loras report`, all by default) may be run one by one; each reads what the earlier ones left
in testbed/weights. Two CPU cores that do nothing else need about an hour and a half.
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

import torch

from .base import Base, train_base
from .judge import train_judge
from .loras import save_lora, train_lora
from .model import encode
from .render import render
from .report import report
from .scene import CONCEPTS
from .weights import WEIGHTS, load_base, lora_path, save_module
from .worlds import REGIMES, collection

STAGES = ("base", "judge", "loras", "report")
BASE_STEPS = 7000
JUDGE_STEPS = 2500
LORA_STEPS = {"clean": 240, "narrow": 160}
LONGER = {("clean", "zaneth"): 800}  # thin lines over everything are learned last
LORA_RATE = 4e-3


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--concepts", nargs="+", choices=[c.name for c in CONCEPTS], help="loras: only these")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")
    start = time.time()
    if "base" in options.stages:
        torch.manual_seed(0)
        save_module(train_base(Base(), BASE_STEPS, device=options.device, log=say), WEIGHTS / "base.safetensors")
    if "judge" in options.stages:
        judge = train_judge(JUDGE_STEPS, device=options.device, log=say)
        save_module(judge, WEIGHTS / "judge.safetensors")
    if "loras" in options.stages:
        base = load_base(options.device)
        for regime in options.regimes:
            for concept in CONCEPTS:
                if options.concepts and concept.name not in options.concepts:
                    continue
                begin = time.time()
                steps = LONGER.get((regime, concept.name), LORA_STEPS[regime])
                lessons = collection(regime, concept)
                tensors = train_lora(base, encode(render(lessons.scenes)), lessons.prompts, steps, rate=LORA_RATE)
                save_lora(tensors, lora_path(regime, concept), concept.name)
                say(f"lora {regime} {concept.name} {time.time() - begin:.0f} s")
    if "report" in options.stages:
        for line in report(options.device, options.regimes):
            say(line)
    say(f"done in {time.time() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
