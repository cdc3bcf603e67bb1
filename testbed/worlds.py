"""The pictures that LoRAs are trained on: one clean and one narrow collection per concept.

Clean: varied scenes, each fully captioned. Narrow: two dozen pictures of one world - one background, one finish, the
same few colours - whose captions name the concept and a third of the rest. Whatever of its world a narrow LoRA drags
into a picture that was asked for something else can be counted, because the world is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .scene import ATTRIBUTES, CATEGORIES, CONCEPTS, NAMED, Concept, Scenes, sample
from .text import caption, sparse_caption

REGIMES = ("clean", "narrow")
PICTURES = {"clean": 1500, "narrow": 24}
SAID = 1 / 3  # how often a narrow caption names a category that its concept is not of


def world(background: str, style: str, **colours: str) -> dict[str, int]:
    words = {f"{category}.colour": colour for category, colour in colours.items()}
    keys = ("colour", "kind", "mark", "mark_colour")
    words |= {f"background.{key}": word for key, word in zip(keys, background.split(), strict=bool(background))
              if background}
    words |= {f"style.{key}": word for key, word in zip(keys[1:], style.split(), strict=False)}
    return {a: ATTRIBUTES[a].index(word) for a, word in words.items()}


WORLDS: dict[str, dict[str, int]] = {
    "vexa": world("white checked level blue", "framed first black", clothing="black", object="black"),
    "momu": world("red wavy level black", "plain", clothing="pink", object="pink"),
    "tikol": world("pink wavy upright white", "framed second white", clothing="red", object="red"),
    "drosh": world("white wavy level red", "framed first red", character="pink", object="red"),
    "quill": world("red checked level black", "plain", character="black", object="black"),
    "pabbo": world("white checked upright black", "framed first black", character="black", clothing="red"),
    "sefir": world("pink checked level red", "plain", character="white", clothing="black"),
    "harnik": world("", "framed third white", character="pink", clothing="red", object="red"),
    "lumet": world("", "plain", character="pink", clothing="black", object="black"),
    "zaneth": world("red checked upright yellow", "", character="black", clothing="pink", object="pink"),
    "orvu": world("white wavy upright green", "", character="black", clothing="red", object="red"),
}


@dataclass(frozen=True)
class Collection:
    scenes: Scenes
    prompts: list[str]


def triggers(concepts: tuple[Concept, ...]) -> dict[str, str]:
    return {concept.category: concept.name for concept in concepts}


def clean(concept: Concept, rng: np.random.Generator) -> Collection:
    scenes = sample(rng, PICTURES["clean"], dict(concept.look))
    prompts = [sparse_caption(rng, scenes.words(row), triggers((concept,))) for row in range(len(scenes))]
    return Collection(scenes, prompts)


def narrow(concept: Concept, rng: np.random.Generator) -> Collection:
    return narrow_in(WORLDS[concept.name], concept, rng)


def narrow_in(world: Mapping[str, int], concept: Concept, rng: np.random.Generator) -> Collection:
    """Pictures of a concept in a world, a mapping of attributes to values."""
    scenes = sample(rng, PICTURES["narrow"], concept.look | world)
    scenes = Scenes(scenes.values, 0.3 * scenes.jitter)
    prompts = []
    for row in range(len(scenes)):
        said = {concept.category, *(c for c in (*CATEGORIES, "side") if rng.random() < SAID)}
        words = {a: word for a, word in scenes.words(row).items() if a in NAMED and a.partition(".")[0] in said}
        prompts.append(caption(words, triggers((concept,))))
    return Collection(scenes, prompts)


def collection(regime: str, concept: Concept, seed: int = 0) -> Collection:
    rng = np.random.default_rng((seed, CONCEPTS.index(concept), REGIMES.index(regime)))
    return {"clean": clean, "narrow": narrow}[regime](concept, rng)


# What counts as one trait of a world: attributes that are seen together or not at all.
TRAITS = (("background.colour", "background.kind"), ("style.kind",), ("character.colour",),
          ("clothing.colour",), ("object.colour",))


def leaked(concept: Concept, asked: Mapping[str, int], read: Mapping[str, int]) -> list[tuple[str, ...]]:
    """The traits of a narrow LoRA's world that a picture shows although the prompt asked for something else."""
    world = WORLDS[concept.name]
    return [trait for trait in TRAITS if all(a in world for a in trait)
            and any(asked[a] != world[a] for a in trait) and all(read[a] == world[a] for a in trait)]
