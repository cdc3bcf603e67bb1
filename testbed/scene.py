"""What a picture can show: the attributes of a scene, the eleven concepts that LoRAs teach, and random scenes.

A scene has five categories (ComposLoRA's): a character, its clothing, an object beside it, a background, and a style
laid over everything. Each category is a family with two *named* attributes, `colour` and `kind`, which prompts say, and
two, `mark` and `mark_colour`, which they may leave out and which the base model then draws at random. A concept is one
particular member of the family: fixed named attributes and one particular mark in one particular colour.

Scenes are struct-of-arrays: `values[attribute]` is an int64 array of n choices, `jitter` is float64 [n, JITTER] in
[-1, 1] and moves every shape and colour a little. Everything is deterministic by the numpy generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

COLOURS = ("red", "yellow", "green", "cyan", "blue", "pink", "white", "black")
CATEGORIES = ("character", "clothing", "object", "background", "style")
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "side": ("left", "right"),
    "character.colour": COLOURS,
    "character.kind": ("pointed", "round", "long", "stalked"),
    "character.mark": ("band", "brow", "muzzle", "split", "cheeks"),
    "character.mark_colour": COLOURS,
    "clothing.colour": COLOURS,
    "clothing.kind": ("robe", "tunic", "poncho"),
    "clothing.mark": ("bands", "column", "hem", "sash", "collar"),
    "clothing.mark_colour": COLOURS,
    "object.colour": COLOURS,
    "object.kind": ("ball", "box", "cone", "gem"),
    "object.mark": ("plus", "core", "cap", "stripe", "rim"),
    "object.mark_colour": COLOURS,
    "background.colour": COLOURS,
    "background.kind": ("striped", "checked", "dotted", "wavy"),
    "background.mark": ("level", "rising", "upright", "falling"),
    "background.mark_colour": COLOURS,
    "style.kind": ("plain", "lined", "glowing", "framed"),
    "style.mark": ("first", "second", "third", "fourth"),
    "style.mark_colour": COLOURS,
}
NAMED = tuple(a for a in ATTRIBUTES if a == "side" or a.endswith((".colour", ".kind")))
JITTER = 32
SPREAD = 0.1  # how far shapes and colours move in most pictures, of what the renderer allows
FREE = -1
PLAIN = 0  # style.kind: no style, so style.mark and style.mark_colour cannot be seen


@dataclass(frozen=True, eq=False)
class Concept:
    """One member of a family that the base has never seen. `look` maps attribute to value index."""

    name: str
    category: str
    look: dict[str, int]


def concept(name: str, category: str, **words: str) -> Concept:
    look = {f"{category}.{key}": ATTRIBUTES[f"{category}.{key}"].index(word) for key, word in words.items()}
    return Concept(name, category, look)


CONCEPTS: tuple[Concept, ...] = (
    concept("vexa", "character", colour="red", kind="pointed", mark="band", mark_colour="cyan"),
    concept("momu", "character", colour="yellow", kind="round", mark="muzzle", mark_colour="blue"),
    concept("tikol", "character", colour="green", kind="long", mark="split", mark_colour="pink"),
    concept("drosh", "clothing", colour="blue", kind="robe", mark="sash", mark_colour="yellow"),
    concept("quill", "clothing", colour="white", kind="tunic", mark="bands", mark_colour="red"),
    concept("pabbo", "object", colour="pink", kind="ball", mark="plus", mark_colour="white"),
    concept("sefir", "object", colour="yellow", kind="gem", mark="cap", mark_colour="blue"),
    concept("harnik", "background", colour="black", kind="striped", mark="falling", mark_colour="green"),
    concept("lumet", "background", colour="cyan", kind="dotted", mark="rising", mark_colour="white"),
    concept("zaneth", "style", kind="lined", mark="second", mark_colour="white"),
    concept("orvu", "style", kind="glowing", mark="fourth", mark_colour="pink"),
)
BY_NAME = {concept.name: concept for concept in CONCEPTS}


def of_category(category: str) -> tuple[Concept, ...]:
    return tuple(concept for concept in CONCEPTS if concept.category == category)


def number(concept: Concept) -> int:
    """The judge's answer that means this concept (0 means none of its category)."""
    return 1 + of_category(concept.category).index(concept)


@dataclass(frozen=True)
class Scenes:
    values: dict[str, np.ndarray]
    jitter: np.ndarray

    def __len__(self) -> int:
        return len(self.jitter)

    def take(self, index: np.ndarray | slice) -> Scenes:
        return Scenes({a: v[index] for a, v in self.values.items()}, self.jitter[index])

    def words(self, row: int) -> dict[str, str]:
        return {a: ATTRIBUTES[a][int(v[row])] for a, v in self.values.items()}


def shows(values: dict[str, np.ndarray], concept: Concept) -> np.ndarray:
    """bool [n]: the scene has every attribute of the concept's look."""
    return np.logical_and.reduce([values[a] == v for a, v in concept.look.items()])


def readable(values: dict[str, np.ndarray]) -> np.ndarray:
    """bool [n]: nothing is painted in the colour of what it lies on, so that a viewer can tell everything."""
    ground = values["background.colour"]
    rules = [values[f"{c}.mark_colour"] != values[f"{c}.colour"] for c in CATEGORIES if c != "style"]
    rules += [values[f"{c}.colour"] != ground for c in ("character", "clothing", "object")]
    rules += [(values["style.mark_colour"] != ground) | (values["style.kind"] == PLAIN)]
    rules += [values["clothing.colour"] != values["character.colour"]]
    return np.logical_and.reduce(rules)


def sample(rng: np.random.Generator, n: int, fixed: dict[str, int | np.ndarray] | None = None,
           concepts: bool = False, spread: float = SPREAD) -> Scenes:
    """n random readable scenes. `fixed` pins attributes: a value, or an array of n in which FREE leaves a row's choice
    open. Unless `concepts`, no scene shows any of CONCEPTS but where `fixed` names that category's whole look: this is
    the world that the base has seen. `spread` scales the jitter."""
    fixed = {a: np.broadcast_to(np.asarray(v), (n,)) for a, v in (fixed or {}).items()}

    def good(draw: dict[str, np.ndarray]) -> np.ndarray:
        free = [] if concepts else [c for c in CONCEPTS if not all(a in fixed for a in c.look)]
        return readable(draw) & ~np.logical_or.reduce([shows(draw, c) for c in free] or [False])

    values = draw_values(rng, n, ATTRIBUTES, fixed, good)
    return Scenes(values, spread * rng.uniform(-1, 1, (n, JITTER)))


def draw_values(rng: np.random.Generator, n: int, attributes: dict[str, tuple[str, ...]], fixed: dict[str, np.ndarray],
                good: Callable[[dict[str, np.ndarray]], np.ndarray]) -> dict[str, np.ndarray]:
    """n random choices of every attribute, drawn again where they are not `good`. A style is plain in half of them."""
    values = {a: np.zeros(n, np.int64) for a in attributes}
    todo = np.arange(n)
    for _ in range(200):
        draw = {a: rng.integers(len(words), size=len(todo)) for a, words in attributes.items()}
        draw["style.kind"] *= rng.random(len(todo)) < 0.66
        draw |= {a: np.where(v[todo] == FREE, draw[a], v[todo]) for a, v in fixed.items()}
        kept = good(draw)
        for a in attributes:
            values[a][todo[kept]] = draw[a][kept]
        todo = todo[~kept]
        if not len(todo):
            return values
    raise ValueError("the fixed attributes leave no readable scene; choose other colours")
