"""What a picture of the second body can show: the first body's world on a wider stage, with one figure or two.

A figure is a character and its clothing. It stands left or right; the object stands in the middle, and background and
style are laid around and over everything. Attributes are the first body's, those of a figure with its side before them
("left.character.colour"). Concepts are the first body's too: a character or clothing may be worn on either side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import scene as first
from ..scene import CONCEPTS, FREE, SPREAD, Concept

SIDES = ("left", "right")
FIGURE = ("character", "clothing")
PARTS = (*(f"{side}.{category}" for side in SIDES for category in FIGURE), "object", "background", "style")
FIGURES = ("left", "right", "both")
BOTH = 2


def category_of(part: str) -> str:
    return part.rpartition(".")[2]


def parts_of(category: str) -> tuple[str, ...]:
    return tuple(part for part in PARTS if category_of(part) == category)


ATTRIBUTES: dict[str, tuple[str, ...]] = {"figures": FIGURES}
ATTRIBUTES |= {f"{part}.{key}": first.ATTRIBUTES[f"{category_of(part)}.{key}"] for part in PARTS
               for key in ("colour", "kind", "mark", "mark_colour") if f"{category_of(part)}.{key}" in first.ATTRIBUTES}
NAMED = tuple(a for a in ATTRIBUTES if a == "figures" or a.endswith((".colour", ".kind")))
JITTER = 48


@dataclass(frozen=True)
class Scenes(first.Scenes):
    """Attributes of a figure that is not there have values too, which mean nothing."""

    def take(self, index: np.ndarray | slice) -> Scenes:
        return Scenes({a: v[index] for a, v in self.values.items()}, self.jitter[index])

    def words(self, row: int) -> dict[str, str]:
        """The words of everything that the picture shows."""
        figures = FIGURES[int(self.values["figures"][row])]
        gone = {"left": "right.", "right": "left.", "both": "none."}[figures]
        return {a: ATTRIBUTES[a][int(v[row])] for a, v in self.values.items() if not a.startswith(gone)}


def stands(values: dict[str, np.ndarray], side: str) -> np.ndarray:
    """bool [n]: there is a figure on this side."""
    return values["figures"] != 1 - SIDES.index(side)


def seen(values: dict[str, np.ndarray], part: str) -> np.ndarray:
    """bool [n]: the picture has this part."""
    side = part.partition(".")[0]
    return stands(values, side) if side in SIDES else np.ones(len(values["figures"]), bool)


def as_first(values: dict, side: str) -> dict:
    """The values of one figure and of everything around it, by the first body's names."""
    other = SIDES[1 - SIDES.index(side)]
    return {a.removeprefix(f"{side}."): v for a, v in values.items() if not a.startswith(f"{other}.")}


def look(concept: Concept, part: str) -> dict[str, int]:
    """A concept's look as attributes of one part of the picture."""
    return {f"{part}.{a.partition('.')[2]}": v for a, v in concept.look.items()}


def shows(values: dict[str, np.ndarray], concept: Concept, part: str) -> np.ndarray:
    """bool [n]: this part of the scene is there and has every attribute of the concept's look."""
    return np.logical_and.reduce([seen(values, part), *(values[a] == v for a, v in look(concept, part).items())])


def readable(values: dict[str, np.ndarray]) -> np.ndarray:
    """bool [n]: the first body's rules hold around each figure that is there."""
    return np.logical_and.reduce([first.readable(as_first(values, side)) | ~stands(values, side) for side in SIDES])


def sample(rng: np.random.Generator, n: int, fixed: dict[str, int | np.ndarray] | None = None, concepts: bool = False,
           spread: float = SPREAD) -> Scenes:
    """As the first body's `sample`; two figures in 60 % of the scenes where `fixed` does not say."""
    fixed = {a: np.broadcast_to(np.asarray(v), (n,)) for a, v in (fixed or {}).items()}
    figures = rng.choice(len(FIGURES), size=n, p=(0.2, 0.2, 0.6))
    if "figures" in fixed:
        figures = np.where(fixed["figures"] == FREE, figures, fixed["figures"])
    fixed["figures"] = figures
    free = [] if concepts else [(c, part) for c in CONCEPTS for part in parts_of(c.category)
                                if not all(a in fixed for a in look(c, part))]

    def good(draw: dict[str, np.ndarray]) -> np.ndarray:
        return readable(draw) & ~np.logical_or.reduce([shows(draw, c, part) for c, part in free] or [False])

    values = first.draw_values(rng, n, ATTRIBUTES, fixed, good)
    return Scenes(values, spread * rng.uniform(-1, 1, (n, JITTER)))

