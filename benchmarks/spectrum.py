#!/usr/bin/env python3
"""The spectrum of the testbed's LoRAs: does the class that CMLoRA would measure agree with what each LoRA depicts?

    python3 benchmarks/spectrum.py [--prompts K] [--regime clean|narrow|both]

Every LoRA draws K pictures alone, and the base model the same ones without it. Prints one JSON line per LoRA: the
relative change of the latent's high-frequency share over the second half of the run, its standard error over the
pictures, and the class measured beside the one that its role has in CMLoRA. An unsure LoRA goes by its role.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.spectrum", *sys.argv[1:]]))

import argparse
import json

import torch

from ..kernels.branch import Branch
from ..kernels.spectrum import high_share, late_change, radial_amplitude, radial_bins
from ..methods.frequency import LOW_FREQUENCY, frequency_class
from ..methods.session import Session
from ..testbed.model import LATENT
from ..testbed.protocol import alone_set
from ..testbed.sampler import Picture, Sampler
from ..testbed.scene import CONCEPTS
from ..testbed.weights import load_base, load_loras
from ..testbed.worlds import REGIMES


class Watched:
    """One branch at a strength, whose latents are measured."""

    def __init__(self, strength: float):
        self.strength = strength
        self.shares: list[torch.Tensor] = []

    def begin(self, context) -> Session:
        return Watching(self)


class Watching(Session):
    def __init__(self, method: Watched):
        self.method, self.bins = method, radial_bins(*LATENT[1:])

    def observe(self, step, x) -> None:
        self.method.shares.append(high_share(radial_amplitude(x, self.bins.to(x.device))).mean())

    def branches(self, step) -> tuple[Branch, ...]:
        return (Branch((self.method.strength,)),)

    def mix(self, step, call) -> list:
        return [None if p is None else p[0] for p in call.predictions]


def shares(watched: list[Watched]) -> torch.Tensor:
    """[steps, pictures]"""
    return torch.stack([torch.stack(one.shares) for one in watched], dim=1)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--regime", choices=(*REGIMES, "both"), default="both")
    options = parser.parse_args(arguments)
    base, agreed, total = load_base(), 0, 0
    for regime in REGIMES if options.regime == "both" else (options.regime,):
        with Sampler(base, load_loras(regime)) as sampler:
            for lora, concept in enumerate(CONCEPTS):
                arms = {strength: [Watched(strength) for _ in range(options.prompts)] for strength in (1.0, 0.0)}
                sampler.draw([Picture(task.prompt((concept,)), task.seed + k, (lora,), watched)
                              for arm in arms.values() for k, watched in enumerate(arm)
                              for task in [alone_set(concept, k)]])
                change, error = late_change(shares(arms[1.0]), shares(arms[0.0]))
                said = "low" if concept.category in LOW_FREQUENCY else "high"
                found = frequency_class(change, error)
                agreed, total = agreed + (found in (said, "unsure")), total + 1
                line = {"benchmark": "spectrum", "regime": regime, "lora": concept.name, "role": concept.category,
                        "change": round(change, 3), "error": round(error, 3), "measured": found, "said": said}
                sys.stdout.write(json.dumps(line) + "\n")
                sys.stdout.flush()
    sys.stdout.write(f"{agreed} of {total} LoRAs go by the class of their role\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
