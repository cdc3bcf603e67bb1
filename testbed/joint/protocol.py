"""The protocol on the second body: the first body's 480 sets, and sets with two characters.

In the first family of the 480 the figure stands alone, in the second one beside another, whom ordinary words describe.
Sets with two characters take every pair of them, each in a clothing LoRA of its own or in none, twice: 84 sets of 2, 3
and 4 LoRAs. What a character's LoRA does to the other one counts as a leak.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product

import numpy as np
from torch import Tensor

from ..protocol import FAMILIES, SEED, UNSAID, LoraSet, apart, chosen, ordinary
from ..scene import CONCEPTS, Concept, number, of_category
from ..worlds import WORLDS
from .scene import ATTRIBUTES, BOTH, FIGURE, SIDES, as_first, look
from .text import caption
from .worlds import leaked, part_of


@dataclass(frozen=True)
class JointSet(LoraSet):
    """One task, with the part of the picture that each concept is for.

    parts   as long as `concepts`
    """

    parts: tuple[str, ...] = ()

    @property
    def laid_out(self) -> bool:
        """Always: a figure is named with its side."""
        return True

    def prompt(self, concepts: Sequence[Concept] | None = None) -> str:
        """The prompt with the rare words of `concepts` (default: all of the set), ordinary words for everything."""
        named = {part: c for part, c in zip(self.parts, self.concepts, strict=True)
                 if concepts is None or c in concepts}
        words = {a: ATTRIBUTES[a][v] for a, v in self.asked.items()
                 if not (self.bare and a.rpartition(".")[0] in named)}
        return caption(words, {part: c.name for part, c in named.items()})

    def ordinary(self, concept: Concept) -> str:
        part = self.parts[self.concepts.index(concept)]
        return " ".join(ATTRIBUTES[f"{part}.{key}"][self.asked[f"{part}.{key}"]] for key in ("colour", "kind")
                        if f"{part}.{key}" in self.asked)

    def masks(self) -> tuple[Tensor, ...]:
        raise ValueError("the second body's renderer gives no masks")

    def only(self, concept: Concept) -> JointSet:
        return replace(self, concepts=(concept,), parts=(self.parts[self.concepts.index(concept)],))

    def looks(self) -> list[dict[str, int]]:
        return [look(c, part) for part, c in zip(self.parts, self.concepts, strict=True)]

    def shown(self, read: Mapping[str, int]) -> list[bool]:
        return [read[part] == number(c) for part, c in zip(self.parts, self.concepts, strict=True)]

    def leaks(self, read: Mapping[str, int]) -> list[tuple[str, ...]]:
        return [trait for part, c in zip(self.parts, self.concepts, strict=True)
                for trait in leaked(c, part, self.asked, read)]


def surround(index: int, concepts: tuple[Concept, ...], parts: tuple[str, ...], figures: int,
             seed: int = 7) -> JointSet:
    """Choose, by the seed, what the prompt says about everything that no LoRA of the set is about."""
    rng = np.random.default_rng((seed, index))
    unsaid = {f"{part}.{key}" for part in parts for key in UNSAID}
    fixed = {a: v for c, part in zip(concepts, parts, strict=True) for a, v in look(c, part).items() if a not in unsaid}
    standing = [side for k, side in enumerate(SIDES) if figures in (k, BOTH)]
    gone = {a for a in ATTRIBUTES if a.partition(".")[0] in SIDES and a.partition(".")[0] not in standing}
    worlds = [WORLDS[c.name] for c in concepts]
    around = {side: tuple(c for c, part in zip(concepts, parts, strict=True)
                          if c.category not in FIGURE or part.startswith(side)) for side in standing}
    for _ in range(5000):
        asked = ordinary(rng, ATTRIBUTES, unsaid | gone) | fixed | {"figures": figures}
        if all(apart(as_first(asked, side), around[side], worlds) for side in standing):
            return JointSet(index, concepts, asked, 1000 * seed + index, parts=parts)
    raise ValueError(f"no surrounding for {[c.name for c in concepts]}")


def placed(index: int, concepts: tuple[Concept, ...], company: bool, seed: int = 7) -> JointSet:
    """A set with one figure that is of concern, left or right by its index, alone or in company."""
    side = index // 2 % 2
    parts = tuple(part_of(c, SIDES[side]) for c in concepts)
    return surround(index, concepts, parts, BOTH if company else side, seed)


def all_sets(sizes: Sequence[int] = (2, 3, 4, 5), seed: int = SEED) -> list[JointSet]:
    return [placed(i, concepts, family > 0, seed) for i, (family, concepts) in enumerate(chosen())
            if len(concepts) in sizes]


def pairs(seed: int = SEED) -> list[JointSet]:
    """The sets with two characters."""
    clothes = (None, *of_category("clothing"))
    worn = [pair for pair in product(clothes, clothes) if pair[0] is None or pair[0] is not pair[1]]
    found = []
    for _, both, dress in product(range(FAMILIES), permutations(of_category("character"), 2), worn):
        placing = [(c, f"{side}.{c.category}") for side, c in (*zip(SIDES, both, strict=True),
                                                                *zip(SIDES, dress, strict=True)) if c is not None]
        concepts, parts = zip(*placing, strict=True)
        found.append(surround(1000 + len(found), concepts, parts, BOTH, seed))
    return found


def alone_set(concept: Concept, index: int) -> JointSet:
    """A task for one LoRA by itself, every other one in company."""
    return placed(index, (concept,), index % 2 == 1, seed=13 + CONCEPTS.index(concept))
