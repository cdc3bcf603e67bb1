"""ComposLoRA's protocol on the testbed: 480 sets of 2 to 5 LoRAs with exactly one character each.

ComposLoRA (arXiv 2402.16843) has two families of eleven LoRAs and takes every set with one character and at most one of
each other category: 24 / 72 / 96 / 48 sets per family for N = 2 / 3 / 4 / 5. Here a family is a second surrounding for
the same eleven concepts: the categories without a LoRA, and the side, are asked for in other ordinary words, and the
noise differs (at N = 5 no category is left: the side and the noise). That gives the same 48 / 144 / 192 / 96. The
second family does not say the side: where things are then comes from the noise, as in most prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .render import render
from .scene import (
    ATTRIBUTES,
    BY_NAME,
    CATEGORIES,
    COLOURS,
    CONCEPTS,
    JITTER,
    NAMED,
    PLAIN,
    Concept,
    Scenes,
    number,
    of_category,
)
from .text import caption
from .worlds import TRAITS, WORLDS, leaked, triggers

ORDER = ("character", "clothing", "style", "background", "object")  # ComposLoRA's order of LoRAs, Switch follows it
FAMILIES = 2
SEED = 7  # of surroundings and noise, where no other is asked for
UNSAID = ("mark", "mark_colour")  # what of a concept no ordinary word says: the rare word alone stands for it
# Colours that no narrow world uses, so that whatever leaks from a world differs from what was asked.
NEUTRAL = tuple(COLOURS.index(word) for word in ("yellow", "green", "cyan", "blue"))


@dataclass(frozen=True)
class LoraSet:
    """One task: a prompt that names every category, some of them with a LoRA's rare word.

    asked   what the prompt says, attribute -> value: everything but the marks of the concepts
    bare    whether it says a concept's rare word alone, without the ordinary words
    """

    index: int
    concepts: tuple[Concept, ...]
    asked: dict[str, int]
    seed: int
    bare: bool = False

    @property
    def loras(self) -> tuple[int, ...]:
        return tuple(CONCEPTS.index(concept) for concept in self.concepts)

    @property
    def laid_out(self) -> bool:
        """Whether the prompt says on which side the character stands."""
        return "side" in self.asked

    def prompt(self, concepts: Sequence[Concept] | None = None) -> str:
        """The prompt with the rare words of `concepts` (default: all of the set), ordinary words for everything."""
        named = tuple(self.concepts if concepts is None else concepts)
        silent = {concept.category for concept in named} if self.bare else set()
        words = {a: ATTRIBUTES[a][v] for a, v in self.asked.items() if a.partition(".")[0] not in silent}
        return caption(words, triggers(named))

    def said_bare(self) -> LoraSet:
        """The same task, its rare words without the ordinary ones."""
        return replace(self, bare=True)

    def ordinary(self, concept: Concept) -> str:
        """The ordinary words for a concept of the set."""
        own = {a: ATTRIBUTES[a][v] for a, v in self.asked.items() if a.startswith(concept.category)}
        return caption(own)

    def masks(self) -> tuple[Tensor, ...]:
        """Per concept where it is in the picture. Raises ValueError for a set that does not say the side."""
        if not self.laid_out:
            raise ValueError(f"set {self.index} does not say where its character stands")
        true = true_masks(self)
        return tuple(true[concept.category] for concept in self.concepts)

    def only(self, concept: Concept) -> LoraSet:
        """The same task, of which one concept alone is counted."""
        return replace(self, concepts=(concept,))

    def shown(self, read: Mapping[str, int]) -> list[bool]:
        """Of a picture in which the judge reads this: which concepts it shows."""
        return [read[concept.category] == number(concept) for concept in self.concepts]

    def looks(self) -> list[dict[str, int]]:
        """Per concept what it looks like, in the attributes of a scene."""
        return [concept.look for concept in self.concepts]

    def marks_right(self, read: Mapping[str, int]) -> float:
        """The share of what no ordinary word says of its concepts that a picture shows as they have it."""
        return float(np.mean([read[a] == value for look in self.looks() for a, value in look.items()
                              if a.rpartition(".")[2] in UNSAID]))

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


def surround(index: int, concepts: tuple[Concept, ...], seed: int = SEED, laid_out: bool = True) -> LoraSet:
    """Choose, by the seed, what the prompt says about everything that no LoRA of the set is about, and the noise.
    `laid_out`: whether it says the side."""
    rng = np.random.default_rng((seed, index))
    unsaid = {f"{concept.category}.{key}" for concept in concepts for key in UNSAID}
    fixed = {a: v for concept in concepts for a, v in concept.look.items() if a not in unsaid}
    for _ in range(1000):
        asked = ordinary(rng, ATTRIBUTES, unsaid) | fixed
        if apart(asked, concepts, [WORLDS[c.name] for c in concepts]):
            if not laid_out:
                del asked["side"]
            return LoraSet(index, concepts, asked, seed=1000 * seed + index)
    raise ValueError(f"no surrounding for {[c.name for c in concepts]}")


def chosen() -> list[tuple[int, tuple[Concept, ...]]]:
    """Family and concepts of the 480 sets."""
    return [(family, concepts) for size in (2, 3, 4, 5) for family in range(FAMILIES)
            for others in combinations([c for c in ORDER if c != "character"], size - 1)
            for concepts in product(*(of_category(c) for c in ("character", *others)))]


def all_sets(sizes: Sequence[int] = (2, 3, 4, 5), seed: int = SEED) -> list[LoraSet]:
    """The 480 sets, or those of the given sizes; a set's surrounding does not depend on `sizes`. Nearby indexes are
    sets that differ in their object alone: to part them in two, take another seed, not every other one."""
    return [surround(i, concepts, seed, laid_out=family == 0) for i, (family, concepts) in enumerate(chosen())
            if len(concepts) in sizes]


def some_sets(count: int | None, seed: int = SEED) -> list[LoraSet]:
    """A random sample of the protocol, in equal parts per size, the same sets for every seed; None: all of it."""
    return some_of(all_sets(seed=seed), count)


def some_of(sets: list[LoraSet], count: int | None) -> list[LoraSet]:
    """As many of the protocol's sets, in equal parts per size, always the same; None: all."""
    if count is None or count >= len(sets):
        return sets
    rng = np.random.default_rng(11)
    by_size = [[s for s in sets if len(s.concepts) == size] for size in (2, 3, 4, 5)]
    shuffled = [[group[i] for i in rng.permutation(len(group))] for group in by_size]
    rounds = [s for row in zip(*(group[:48] for group in shuffled), strict=True) for s in row]
    rest = [s for group in shuffled for s in group[48:]]
    return sorted((rounds + rest)[:count], key=lambda s: s.index)


def alone_set(concept: Concept, index: int) -> LoraSet:
    """A task for one LoRA by itself."""
    return surround(index, (concept,), seed=13 + list(BY_NAME).index(concept.name))


def true_masks(task: LoraSet) -> dict[str, Tensor]:
    """Per category where it is in a picture of a set whose prompt says the side, [16, 16] on the latent's grid: as the
    renderer draws it, one place wider all around; the background's is the rest, a style's is everywhere."""
    values = dict.fromkeys(ATTRIBUTES, 0) | task.asked
    for concept in task.concepts:
        values |= concept.look
    values["style.kind"] = PLAIN

    def drawn(changes: dict[str, int]) -> Tensor:
        scene = {a: np.array([v]) for a, v in (values | changes).items()}
        return render(Scenes(scene, np.zeros((1, JITTER))))[0]

    found = {}
    for category in ("character", "clothing", "object"):
        one, other = (drawn({f"{category}.colour": c, f"{category}.mark_colour": c}) for c in (0, 3))
        found[category] = F.max_pool2d(((one - other).abs().amax(0) > 0.05).float()[None], 2)
    rest = 1 - torch.stack(list(found.values())).amax(dim=0)
    masks = {category: F.max_pool2d(mask, 3, 1, 1)[0] for category, mask in found.items()}
    return {**masks, "background": F.max_pool2d(rest, 3, 1, 1)[0], "style": torch.ones_like(rest[0])}
