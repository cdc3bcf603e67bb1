"""A style over a background, by depth: `python3 benchmarks/depth.py [--seeds S ...] [--sets K] [--arms NAME ...]`.

Routing cannot part the two, since both fill the picture. Here the style is weaker in some layers and stronger in
others, on the testbed's sets of five LoRAs whose prompts say the layout; all else is Routed. Prints a JSON line per
arm: the share of all concepts that show, with 95 % intervals over the sets of it and of its difference to the first arm
of the run, of those of each category, and of the pictures with a leak.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.depth", *sys.argv[1:]]))

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..kernels.branch import Branch, Step
from ..testbed.beds import BEDS, Bed
from ..testbed.evaluate import BATCH, RECIPES, interval, lineup, score, sizes
from ..testbed.protocol import SEED, LoraSet
from ..testbed.sampler import Picture, Sampler
from ..testbed.worlds import REGIMES

Shares = Callable[[str, float], float]
"""(part of the model, energy of the style's delta of a layer over the background's) -> what the style is multiplied
by there."""


@dataclass(frozen=True)
class Fixed:
    """Merge whose LoRAs have gains of their own in some layers."""

    branch: Branch
    masks = "layers"

    def branches(self, step: Step) -> tuple[Branch, ...]:
        return (self.branch,)

    def mix(self, step: Step, predictions: torch.Tensor) -> torch.Tensor:
        return predictions[0]


def part_of(layer: str) -> str:
    """What a layer belongs to. U-Net: "words" (keys and values of the text), "attention" and "convolution" of the
    coarse level, "fine" (the convolutions of the finest). Transformer: the "first" or "last" half of its blocks,
    "words" for layers of the text alone."""
    if "txt_" in layer or ".attn2.to_k" in layer or ".attn2.to_v" in layer:
        return "words"
    if "_blocks." in layer:
        return "first" if layer.startswith("double") else "last"
    if ".attn" in layer:
        return "attention"
    return "fine" if layer.startswith(("down_res1", "up_res1")) else "convolution"


def _by_part(**shares: float) -> Shares:
    return lambda part, ratio: shares.get(part, 1.0)


ARMS: Mapping[str, Shares] = {
    "routed": _by_part(),
    "attention 0.7, fine 1.3": _by_part(attention=0.7, fine=1.3),
    "attention 0.7": _by_part(attention=0.7),
    "coarse 0.8, fine 1.3": _by_part(attention=0.8, convolution=0.8, fine=1.3),
    "all 0.85": lambda part, ratio: 1.0 if part == "words" else 0.85,
    "by energy": lambda part, ratio: 1.0 if part == "words" else (2 * ratio / (1 + ratio)) ** 0.5,
    "first 0.7, last 1.2": _by_part(first=0.7, last=1.2),
    "first 1.2, last 0.7": _by_part(first=1.2, last=0.7),
}
""""by energy": the style yields where the background changes the weight more than it does, and is stronger where
less."""


def with_depth(task: LoraSet, sampler: Sampler, shares: Shares) -> Picture:
    """The routed picture of a set with a style and a background, the style's gain in each layer times what `shares`
    says."""
    own = lineup(task, 1.0, sampler.bank)
    style, ground = own.roles.index("style"), own.roles.index("background")
    measured, exceptions = sizes(own), []
    for layer in sampler.bank.sites:
        here = measured.get(layer, {})
        known = style in here and ground in here
        share = shares(part_of(layer), here[style].energy / here[ground].energy if known else 1.0)
        if share != 1:
            exceptions.append((layer, tuple(share if n == style else 1.0 for n in range(len(own.roles)))))
    picture = RECIPES["Routed as the files are"].picture(task, sampler.bank)
    return replace(picture, method=Fixed(Branch(own.strengths, tuple(exceptions))))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--body", choices=BEDS, default="unet")
    parser.add_argument("--regime", choices=REGIMES, default="narrow")
    parser.add_argument("--seeds", type=int, nargs="+", default=[SEED], help="of the surroundings and the noise")
    parser.add_argument("--sets", type=int, default=48, help="of each seed at most")
    parser.add_argument("--size", type=int, choices=(2, 3, 4, 5), default=5, help="LoRAs of a set")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM",
                        help=f"of {', '.join(ARMS)}")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    bed = BEDS[options.body]
    chosen = [task for seed in options.seeds for task in sets_of(bed, seed, options.size)[:options.sets]]
    judge = bed.load_judge()
    with Sampler(bed.load_base(), bed.load_loras(options.regime)) as sampler:
        first: list[float] = []
        for arm in options.arms:
            shown: dict[str, list[bool]] = {}
            each, leaks = [], 0
            for start in range(0, len(chosen), BATCH):
                batch = chosen[start:start + BATCH]
                read = judge.read(sampler.draw([with_depth(task, sampler, ARMS[arm]) for task in batch]))
                for i, task in enumerate(batch):
                    seen, leaked = score(task, {head: int(values[i]) for head, values in read.items()})
                    each.append(float(np.mean(seen)))
                    leaks += leaked
                    for concept, one in zip(task.concepts, seen, strict=True):
                        shown.setdefault(concept.category, []).append(one)
            first = first or each
            line = {"benchmark": "depth", "body": bed.name, "regime": options.regime, "seeds": options.seeds,
                    "arm": arm, "sets": len(chosen), "shown": round(float(np.mean(each)), 4),
                    "shown_95": interval(np.array(each)), "more": round(float(np.mean(each) - np.mean(first)), 4),
                    "more_95": interval(np.array(each) - np.array(first)), "leaked": round(leaks / len(chosen), 4),
                    **{category: round(float(np.mean(ones)), 4) for category, ones in sorted(shown.items())}}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
    return 0


def sets_of(bed: Bed, seed: int, size: int) -> list[LoraSet]:
    """Those with a style and a background whose prompts say the layout, in an order that is no order of LoRAs."""
    found = [task for task in bed.all_sets(seed=seed) if task.laid_out and len(task.concepts) == size
             and {"style", "background"} <= {concept.category for concept in task.concepts}]
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


if __name__ == "__main__":
    sys.exit(main())
