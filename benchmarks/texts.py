"""LoRAs that change the text encoder too, merged into it or each for its own words alone:
`python3 benchmarks/texts.py [--regime R] [--seed S] [--sets K] [--ways WAY ...] [--methods NAME ...] [--device cuda]`.

Trains a LoRA of each of the testbed's concepts, on the U-Net and on the one layer of its text encoder, and draws
the sets of the protocol. Prints a JSON line per method and way: the share of all concepts that show, with 95 %
intervals over the sets of it and of its difference to the method's first way, the same per size of set, and of the
pictures with a leak.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.texts", *sys.argv[1:]]))

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels.branch import Branch, Step
from ..methods.prompt import LoRAWords, find_clauses
from ..testbed.base import Base
from ..testbed.beds import UNET
from ..testbed.evaluate import RECIPES, interval, scores
from ..testbed.loras import PREFIX, train_lora
from ..testbed.model import encode
from ..testbed.protocol import some_of
from ..testbed.routing import tokens_of
from ..testbed.sampler import Picture, Sampler, low_rank
from ..testbed.scene import CONCEPTS, Concept
from ..testbed.worlds import REGIMES

LAYERS = ("linear1", "linear2", "self_attn.out_proj")
"""Of the text encoder's layer, those that LoRAs change."""
TEXT = "text."
WAYS = ("merged", "own words", "own words, merged negative", "off")
""""merged": all changes in one text encoder. "own words": each LoRA's words are encoded with its change alone, what is
nobody's without any, the negative prompt too: what the node does. "merged negative": that one with all changes. "off":
the text encoder as it is."""


def text_layers(base: Base) -> dict[str, nn.Module]:
    return {f"{TEXT}{name}": base.text.layers.layers[0].get_submodule(name) for name in LAYERS}


def trained(base: Base, regime: str, concept: Concept, steps: int | None, seed: int) -> dict[str, Tensor]:
    """The tensors of a LoRA's file, trained as the testbed's are, the text encoder too."""
    lessons, schedule = UNET.collection(regime, concept), UNET.schedule
    steps = steps or schedule.longer.get((regime, concept.name), schedule.loras[regime])
    return train_lora(base, encode(UNET.school.render(lessons.scenes)), lessons.prompts, steps, rate=schedule.lora_rate,
                      seed=seed, text=text_layers(base))


class TextSampler(Sampler):
    """A sampler in which LoRAs change the text encoder, in one of WAYS; each picture is one of the whole set."""

    def __init__(self, base: Base, loras: Sequence[Mapping[str, Tensor]], concepts: Sequence[Concept], way: str):
        inside = PREFIX + TEXT
        super().__init__(base, [{key: value for key, value in file.items() if not key.startswith(inside)}
                                for file in loras])
        self.texts = [{name: op for name, op in low_rank(file).items() if name.startswith(TEXT)} for file in loras]
        self.names, self.way = [concept.name for concept in concepts], way
        self._negatives: Tensor | None = None  # while it draws

    @contextmanager
    def _changed(self, loras: Sequence[int]) -> Iterator[None]:
        """The text encoder with these LoRAs' changes merged."""
        layers = text_layers(self.base)
        kept = {name: layer.weight.data for name, layer in layers.items()}
        for lora in loras:
            for name, (op,) in self.texts[lora].items():
                delta = (op.up @ op.down * op.scale).to(kept[name])
                layers[name].weight.data = layers[name].weight.data + delta
        try:
            yield
        finally:
            for name, layer in layers.items():
                layer.weight.data = kept[name]

    def encoded(self, prompt: str, loras: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(the prompt, the empty negative) of a picture of these LoRAs, [1, tokens, width] each."""
        def by(some: Sequence[int], text: str) -> Tensor:
            with self._changed(some):
                return self.base.contexts([text])

        own = self.way.startswith("own words")
        negative = by(loras if self.way in ("merged", "own words, merged negative") else (), "")
        if not own:
            return by(loras if self.way == "merged" else (), prompt), negative
        words = [LoRAWords(self.names[lora], self.names[lora]) for lora in loras]
        context = by((), prompt).clone()
        clauses = find_clauses(tokens_of(prompt, length=self.base.length), words).loras
        for lora, found in zip(loras, clauses, strict=True):
            context[:, list(found.tokens)] = by((lora,), prompt)[:, list(found.tokens)]
        return context, negative

    def draw(self, pictures: Sequence[Picture], *more, **options) -> Tensor:
        if self._negatives is not None:  # the same pictures once more, of LoRAs that yield
            return super().draw(pictures, *more, **options)
        with torch.inference_mode():
            both = [self.encoded(picture.prompt, picture.loras) for picture in pictures]
        known = {picture.prompt: positive for picture, (positive, _) in zip(pictures, both, strict=True)}
        self._negatives = torch.cat([negative for _, negative in both])
        known[""] = self._negatives[:1]  # in place of which `_predict` gives each picture its own
        self.base.contexts = lambda prompts: torch.cat([known[text] for text in prompts])
        try:
            return super().draw(pictures, *more, **options)
        finally:
            del self.base.contexts
            self._negatives = None

    def _predict(self, x: Tensor, step: Step, contexts: Tensor, pictures: Tensor, branches: list[Branch],
                 routed=None, read: Sequence[int] = (), sides: int = 1) -> Tensor:
        if sides == 2:  # each picture has a negative of its own
            half = len(branches) // 2
            contexts = torch.cat([contexts[:half], self._negatives[pictures[half:]]])
        return super()._predict(x, step, contexts, pictures, branches, routed, read, sides)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--regime", choices=REGIMES, default="narrow")
    parser.add_argument("--seed", type=int, default=101, help="of the surroundings and the noise")
    parser.add_argument("--sets", type=int, help="how many of the 480, in equal parts per size")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--methods", nargs="+", choices=RECIPES, default=["Routed as the files are", "Merge"])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda: each trains LoRAs a little otherwise")
    parser.add_argument("--training-seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two LoRAs of two steps each: to see that it works")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    base, judge = UNET.load_base(options.device), UNET.load_judge(options.device)
    sets = some_of(UNET.all_sets(seed=options.seed), options.sets)
    concepts = [CONCEPTS[lora] for lora in sets[0].loras[:2]] if options.quick else list(CONCEPTS)
    if options.quick:
        sets = [task for task in sets if set(task.concepts) == set(concepts)]
    files = {}
    for concept in concepts:
        files[concept] = trained(base, options.regime, concept, 2 if options.quick else None, options.training_seed)
        sys.stderr.write(f"trained {concept.name}\n")
    loras = [files.get(concept, {}) for concept in CONCEPTS]
    for method in options.methods:
        first: np.ndarray | None = None
        for way in options.ways:
            with TextSampler(base, loras, CONCEPTS, way) as sampler:
                found = scores(sampler, judge, sets, RECIPES[method], 1.0)
            each = np.array([one.shown for one in found])
            first = each if first is None else first
            sizes = {f"n = {n}": round(float(np.mean([one.shown for one in found if one.size == n])), 4)
                     for n in sorted({one.size for one in found})}
            line = {"benchmark": "texts", "regime": options.regime, "method": method, "way": way, "seed": options.seed,
                    "training_seed": options.training_seed, "sets": len(sets), "device": options.device,
                    "shown": round(float(each.mean()), 4), "shown_95": interval(each),
                    "more": round(float((each - first).mean()), 4), "more_95": interval(each - first), **sizes,
                    "leaked": round(float(np.mean([one.leaked for one in found])), 4)}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
