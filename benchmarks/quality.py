"""Quality of LoRA composition, measured: `python3 benchmarks/quality.py [--sets K] [--regime clean|narrow|both]`.

Runs ComposLoRA's protocol on the testbed (480 sets of 2 to 5 LoRAs with fixed seeds) and lets the testbed's judge say
what each picture shows. Prints one JSON line per regime, method and N, then a summary table:

    shown      share of the requested concepts that the pictures show
    all        share of pictures that show all of them
    marks      share of the concepts' marks that are right, which no ordinary word of the prompt says
    leaked     share of pictures with a trait of a LoRA's narrow world although the prompt asked for something else
    branches   branch evaluations per picture, each with both sides of guidance, or the one that guidance 1 has
    seconds    per picture, batched

with 95 % intervals from a bootstrap over the sets. "Alone" draws each LoRA of a set by itself on the set's prompt
without the other rare words, and counts only its own concept and leaks.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.quality", *sys.argv[1:]]))

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch

from ..testbed.beds import BEDS, JOINT, UNET, Bed
from ..testbed.evaluate import LAYOUTS, RECIPES, Row, evaluate, summary
from ..testbed.joint.protocol import pairs
from ..testbed.protocol import SEED, LoraSet, some_of
from ..testbed.sampler import GUIDANCE, STEPS
from ..testbed.weights import turbo_path
from ..testbed.worlds import REGIMES

DEFAULT = ("Alone", "Merge", "Merge 0.6", "Routed", "Routed once", "Routed contrast", "Switch", "Composite", "CMLoRA",
           "LoRAtorio", "KLoRA", "ESTLoRA")


def style_pairs(bed: Bed, seeds: int, seed: int = SEED) -> list[LoraSet]:
    """The sets of a character and a style, what K-LoRA and EST-LoRA were made for, each with several seeds."""
    found = [task for task in bed.all_sets(seed=seed)
             if len(task.concepts) == 2 and {c.category for c in task.concepts} == {"character", "style"}]
    return [replace(task, seed=task.seed + 1_000_000 * k) for task in found for k in range(seeds)]


def run(chosen: Sequence[LoraSet], regimes: Sequence[str], methods: Sequence[str], strength: float, device: str,
        tell: Callable[[Row], None], bed: Bed = UNET, layouts: Sequence[str] = ("both",), steps: int = STEPS,
        guidance: float | Sequence[float] = GUIDANCE, turbo: bool = False, practised: bool = False) -> list[Row]:
    """All rows of the table; `tell` sees each as soon as it is there. The renderer's masks are known of the sets alone
    whose prompts say the layout. `turbo`: the LoRA for few steps is always on; `practised`: that one which has met
    other LoRAs."""
    base, judge, rows = bed.load_base(device), bed.load_judge(device), []
    always = [bed.load_turbo(practised)] if turbo or practised else []
    for regime in regimes:
        loras = bed.load_loras(regime)
        for name in methods:
            recipe = RECIPES.get(name)
            sets = [task for task in chosen if task.laid_out] if recipe and recipe.place == "masks" else chosen
            for row in evaluate(regime, name, recipe, sets, base, judge, loras, strength, steps, guidance, always,
                                layouts):
                rows.append(row)
                tell(row)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--body", choices=BEDS, default="unet", help="the testbed's model and world")
    parser.add_argument("--two", action="store_true", help="joint body: the sets with two characters")
    parser.add_argument("--bare", action="store_true", help="joint body: rare words without the ordinary ones")
    parser.add_argument("--sets", type=int, help="a fixed random sample of this many sets, in equal parts per N")
    parser.add_argument("--pairs", type=int, metavar="SEEDS",
                        help="only the sets of a character and a style, with this many seeds each")
    parser.add_argument("--regime", choices=(*REGIMES, "both"), default="both")
    parser.add_argument("--seed", type=int, default=SEED,
                        help="of the surroundings and the noise: none of the tables is of a seed that anything was "
                             "chosen on")
    parser.add_argument("--layout", choices=(*LAYOUTS, "each"), default="both",
                        help="only the sets whose prompt says the side of the character, or does not; each: all of "
                             "them, with lines for either kind as well")
    parser.add_argument("--sizes", type=int, nargs="+", choices=(2, 3, 4, 5), help="only the sets of so many LoRAs")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, help=f"at 1 there is no negative side; default: {GUIDANCE:g}, with "
                                                       "--turbo 1")
    parser.add_argument("--guided", type=int, nargs="+", metavar="STEP",
                        help="guidance in these steps alone, counted from 1, and none in the others; of "
                             f"{GUIDANCE:g} where --guidance says nothing else")
    parser.add_argument("--turbo", action="store_true",
                        help="unet body: the LoRA for few steps without guidance is always on")
    parser.add_argument("--practised", action="store_true",
                        help="as --turbo, the LoRA for few steps that was trained among other LoRAs")
    parser.add_argument("--methods", nargs="+", choices=("Alone", *RECIPES), default=DEFAULT, metavar="METHOD",
                        help=f"of {', '.join(('Alone', *RECIPES))}")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    regimes = REGIMES if options.regime == "both" else (options.regime,)

    def tell(row: Row) -> None:
        sys.stdout.write(json.dumps({"benchmark": "quality"} | asdict(row)) + "\n")
        sys.stdout.flush()

    bed = BEDS[options.body]
    few = options.turbo or options.practised
    if few and bed.schedule.turbo is None:
        parser.error(f"the body '{bed.name}' has no LoRA for few steps: --turbo and --practised are for --body unet")
    if options.practised and not turbo_path(bed.weights, practised=True).is_file():
        parser.error("that LoRA is not among the files of the repository; python3 testbed/train.py --stages practised "
                     "makes it")
    if options.guided and not set(options.guided) <= set(range(1, options.steps + 1)):
        parser.error(f"--guided: steps from 1 to {options.steps} (--steps)")
    guidance = options.guidance if options.guidance is not None else 1.0 if few and not options.guided else GUIDANCE
    if options.guided:
        guidance = tuple(guidance if step in options.guided else 1.0 for step in range(1, options.steps + 1))
    if (options.two or options.bare) and bed is not JOINT:
        parser.error("--two and --bare are for --body joint")
    chosen = pairs(options.seed) if options.two else some_of(bed.all_sets(seed=options.seed), options.sets)
    chosen = style_pairs(bed, options.pairs, options.seed) if options.pairs else chosen
    each = LAYOUTS if options.layout == "each" else (options.layout,)
    chosen = [task for task in chosen if "both" in each or task.laid_out is (options.layout == "said")]
    chosen = [task for task in chosen if options.sizes is None or len(task.concepts) in options.sizes]
    chosen = [task.said_bare() for task in chosen] if options.bare else chosen
    rows = run(chosen, regimes, options.methods, options.strength, options.device, tell, bed, each, options.steps,
               guidance, options.turbo, options.practised)
    sys.stdout.write("\n" + summary(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
