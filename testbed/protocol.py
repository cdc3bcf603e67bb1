"""ComposLoRA's protocol on the testbed: 480 sets of 2 to 5 LoRAs with exactly one character each.

ComposLoRA (arXiv 2402.16843) has two families of eleven LoRAs and takes every set with one character and at most one of
each other category: 24 / 72 / 96 / 48 sets per family for N = 2 / 3 / 4 / 5. Here a family is a second surrounding for
the same eleven concepts: the categories without a LoRA, and the side, are asked for in other ordinary words, and the
noise differs (at N = 5 no category is left: the side and the noise). That gives the same 48 / 144 / 192 / 96.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np

from .scene import ATTRIBUTES, BY_NAME, CATEGORIES, COLOURS, CONCEPTS, NAMED, PLAIN, Concept, number, of_category
from .text import caption
from .worlds import TRAITS, WORLDS, leaked, triggers

ORDER = ("character", "clothing", "style", "background", "object")  # ComposLoRA's order of LoRAs, Switch follows it
FAMILIES = 2
UNSAID = ("mark", "mark_colour")  # what of a concept no ordinary word says: the rare word alone stands for it
# Colours that no narrow world uses, so that whatever leaks from a world differs from what was asked.
NEUTRAL = tuple(COLOURS.index(word) for word in ("yellow", "green", "cyan", "blue"))


@dataclass(frozen=True)
class LoraSet:
    """One task: a prompt that names every category, some of them with a LoRA's rare word.

    asked   what the prompt says, attribute -> value: everything but the marks of the concepts
    """

    index: int
    concepts: tuple[Concept, ...]
    asked: dict[str, int]
    seed: int

    @property
    def loras(self) -> tuple[int, ...]:
        return tuple(CONCEPTS.index(concept) for concept in self.concepts)

    def prompt(self, concepts: Sequence[Concept] | None = None) -> str:
        """The prompt with the rare words of `concepts` (default: all of the set), ordinary words for everything."""
        words = {a: ATTRIBUTES[a][v] for a, v in self.asked.items()}
        return caption(words, triggers(tuple(self.concepts if concepts is None else concepts)))

    def only(self, concept: Concept) -> LoraSet:
        """The same task, of which one concept alone is counted."""
        return replace(self, concepts=(concept,))

    def shown(self, read: Mapping[str, int]) -> list[bool]:
        """Of a picture in which the judge reads this: which concepts it shows."""
        return [read[concept.category] == number(concept) for concept in self.concepts]

    def leaks(self, read: Mapping[str, int]) -> list[tuple[str, ...]]:
        """The traits of the worlds of its LoRAs that it shows although the prompt asked for something else."""
        return [trait for concept in self.concepts for trait in leaked(concept, self.asked, read)]


def apart(asked: Mapping[str, int], concepts: tuple[Concept, ...], worlds: Sequence[Mapping[str, int]]) -> bool:
    """The prompt can be drawn and judged: nothing in the colour of what it lies on, no category without a LoRA in a
    concept's ordinary words or in a colour or ground of an active world."""
    marked = [c for c in CATEGORIES if f"{c}.mark_colour" in asked and c != "style"]
    if any(asked[f"{c}.mark_colour"] == asked[f"{c}.colour"] for c in marked):
        return False
    if len({asked[f"{c}.colour"] for c in ("character", "clothing", "background")}) < 3:
        return False
    if asked["object.colour"] == asked["background.colour"]:
        return False
    taken = {"side", "style", *(chosen.category for chosen in concepts)}
    free = [c for c in CONCEPTS if c.category not in taken]
    if any(all(asked[a] == v for a, v in c.look.items() if a in NAMED) for c in free):
        return False
    traits = [trait for trait in TRAITS if trait[0].split(".")[0] not in taken]
    return not any(all(a in w and asked[a] == w[a] for a in trait) for trait in traits for w in worlds)


def ordinary(rng: np.random.Generator, attributes: Mapping[str, Sequence[str]], unsaid: set[str]) -> dict[str, int]:
    """Random ordinary words for all that is said, in colours of no world, without a style."""
    return {a: int(rng.choice(NEUTRAL) if a.endswith(".colour") else rng.integers(len(words)))
            for a, words in attributes.items() if a not in unsaid} | {"style.kind": PLAIN}


def surround(index: int, concepts: tuple[Concept, ...], seed: int = 7) -> LoraSet:
    """Choose, by the seed, what the prompt says about everything that no LoRA of the set is about."""
    rng = np.random.default_rng((seed, index))
    unsaid = {f"{concept.category}.{key}" for concept in concepts for key in UNSAID}
    fixed = {a: v for concept in concepts for a, v in concept.look.items() if a not in unsaid}
    for _ in range(1000):
        asked = ordinary(rng, ATTRIBUTES, unsaid) | fixed
        if apart(asked, concepts, [WORLDS[c.name] for c in concepts]):
            return LoraSet(index, concepts, asked, seed=1000 * seed + index)
    raise ValueError(f"no surrounding for {[c.name for c in concepts]}")


def chosen() -> list[tuple[int, tuple[Concept, ...]]]:
    """Family and concepts of the 480 sets."""
    return [(family, concepts) for size in (2, 3, 4, 5) for family in range(FAMILIES)
            for others in combinations([c for c in ORDER if c != "character"], size - 1)
            for concepts in product(*(of_category(c) for c in ("character", *others)))]


def all_sets(sizes: Sequence[int] = (2, 3, 4, 5)) -> list[LoraSet]:
    """The 480 sets, or those of the given sizes; a set's surrounding does not depend on `sizes`."""
    return [surround(i, concepts) for i, (_, concepts) in enumerate(chosen()) if len(concepts) in sizes]


def some_sets(count: int | None, seed: int = 11) -> list[LoraSet]:
    """A fixed random sample of the protocol, in equal parts per size; None: all of it."""
    return some_of(all_sets(), count, seed)


def some_of(sets: list[LoraSet], count: int | None, seed: int = 11) -> list[LoraSet]:
    if count is None or count >= len(sets):
        return sets
    rng = np.random.default_rng(seed)
    by_size = [[s for s in sets if len(s.concepts) == size] for size in (2, 3, 4, 5)]
    shuffled = [[group[i] for i in rng.permutation(len(group))] for group in by_size]
    rounds = [s for row in zip(*(group[:48] for group in shuffled), strict=True) for s in row]
    rest = [s for group in shuffled for s in group[48:]]
    return sorted((rounds + rest)[:count], key=lambda s: s.index)


def alone_set(concept: Concept, index: int) -> LoraSet:
    """A task for one LoRA by itself."""
    return surround(index, (concept,), seed=13 + list(BY_NAME).index(concept.name))
