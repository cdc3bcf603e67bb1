"""The pictures that the second body's LoRAs are trained on: the first body's clean and narrow collections.

Captions differ in one thing: with the probability BARE they say of the concept its rare word alone, so that the LoRA
answers to it. What a narrow LoRA is trained on shows one figure, as often left as right.
"""

from __future__ import annotations

import numpy as np

from .. import worlds as first
from ..judge import together
from ..scene import CONCEPTS, Concept, number
from ..worlds import PICTURES, REGIMES, SAID, WORLDS, Collection
from .base import BARE
from .scene import BOTH, FIGURE, NAMED, PARTS, SIDES, Scenes, look, sample
from .text import caption, sparse_caption


def part_of(concept: Concept, side: str) -> str:
    """Where a concept is in the picture, whose figure stands on this side."""
    return f"{side}.{concept.category}" if concept.category in FIGURE else concept.category


def world(concept: Concept, side: str) -> dict[str, int]:
    """The fixed attributes of a narrow LoRA's world, its figure on this side."""
    return {f"{side}.{a}" if a.partition(".")[0] in FIGURE else a: v for a, v in WORLDS[concept.name].items()}


def clean(concept: Concept, rng: np.random.Generator) -> tuple[list[Scenes], list[str]]:
    scenes, prompts = [], []
    for k, side in enumerate(SIDES):
        part = part_of(concept, side)
        figures = np.where(rng.random(PICTURES["clean"] // 2) < 0.6, BOTH, k)
        scenes.append(sample(rng, len(figures), {"figures": figures} | look(concept, part)))
        prompts += [sparse_caption(rng, scenes[-1].words(row), {part: concept.name}, BARE)
                    for row in range(len(figures))]
    return scenes, prompts


def narrow(concept: Concept, rng: np.random.Generator) -> tuple[list[Scenes], list[str]]:
    scenes, prompts = [], []
    for k, side in enumerate(SIDES):
        part = part_of(concept, side)
        some = sample(rng, PICTURES["narrow"] // 2, {"figures": k} | look(concept, part) | world(concept, side))
        scenes.append(Scenes(some.values, 0.3 * some.jitter))
        for row in range(len(some)):
            said = {p for p in PARTS if rng.random() < (1 - BARE if p == part else SAID)}
            words = {a: word for a, word in some.words(row).items()
                     if a in NAMED and (a == "figures" or a.rpartition(".")[0] in said)}
            prompts.append(caption(words, {part: concept.name}))
    return scenes, prompts


def collection(regime: str, concept: Concept, seed: int = 0) -> Collection:
    rng = np.random.default_rng((seed, CONCEPTS.index(concept), REGIMES.index(regime)))
    scenes, prompts = {"clean": clean, "narrow": narrow}[regime](concept, rng)
    return Collection(together(scenes), prompts)


def leaked(concept: Concept, part: str, asked: dict[str, int], read: dict[str, int]) -> list[tuple[str, ...]]:
    """The traits of a narrow LoRA's world that a picture shows, in either figure, although the prompt asked for
    something else; and the concept itself where another concept or none was asked for."""
    found = []
    for k, side in enumerate(SIDES):
        if asked["figures"] not in (k, BOTH):
            continue
        own = world(concept, side)
        traits = [tuple(f"{side}.{a}" if a.partition(".")[0] in FIGURE else a for a in trait) for trait in first.TRAITS]
        found += [trait for trait in traits if all(a in own for a in trait) and trait not in found
                  and any(asked.get(a, own[a]) != own[a] for a in trait) and all(read[a] == own[a] for a in trait)]
        other = part_of(concept, side)
        if other != part and read[other] == number(concept):
            found.append((other,))
    return found
