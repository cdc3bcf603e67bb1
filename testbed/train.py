"""Makes the testbed's weights from nothing, with fixed seeds: `python3 testbed/train.py [--device cpu|cuda]`.

Stages (`--stages base judge loras report`, all by default) may be run one by one; each reads what the earlier ones left
in testbed/weights. Two CPU cores that do nothing else need about an hour and a half.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: load the pack by path, then this module out of it
    import importlib.util

    _spec = importlib.util.spec_from_file_location("_run", Path(__file__).resolve().parents[1] / "run.py")
    _run = sys.modules["_run"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_run)
    _run.load_pack()
    __package__ = "lora_ensemble.testbed"

import argparse
import time

import torch

from .base import Base, train_base
from .judge import train_judge
from .loras import save_lora, train_lora
from .report import report
from .scene import CONCEPTS, SPREAD
from .weights import WEIGHTS, load_base, lora_path, save_module
from .worlds import REGIMES, collection

STAGES = ("base", "judge", "loras", "report")
# (steps, spread of the jitter, learning rate): first loosely drawn scenes, then those of the protocol
BASE_PHASES = ((2200, 1.0, 1.5e-3), (8000, SPREAD, 1.8e-3))
JUDGE_STEPS = 1500
LORA_STEPS = {"clean": 160, "narrow": 160}
LORA_RATE = {"clean": 4e-3, "narrow": 4e-3}


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
        base = Base()
        for seed, (steps, spread, rate) in enumerate(BASE_PHASES):
            base = train_base(base, steps, spread, rate=rate, seed=seed, device=options.device, log=say)
        save_module(base, WEIGHTS / "base.safetensors")
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
                tensors = train_lora(base, collection(regime, concept), LORA_STEPS[regime], rate=LORA_RATE[regime])
                save_lora(tensors, lora_path(regime, concept), concept.name)
                say(f"lora {regime} {concept.name} {time.time() - begin:.0f} s")
    if "report" in options.stages:
        for line in report(options.device, options.regimes):
            say(line)
    say(f"done in {time.time() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
