"""The judge of the second body: the first body's, on a wider picture and with the questions of both halves."""

from __future__ import annotations

import numpy as np

from ..judge import UNSEEN, Judge, School, planted, together
from ..scene import PLAIN, SPREAD, of_category
from .render import HEIGHT, WIDTH, render
from .scene import ATTRIBUTES, PARTS, Scenes, category_of, look, sample, seen, shows

HEADS: dict[str, int] = {a: len(words) for a, words in ATTRIBUTES.items()}
HEADS |= {part: 1 + len(of_category(category_of(part))) for part in PARTS}  # 0: none of the concepts


def make() -> Judge:
    return Judge(width=40, hidden=104, cells=HEIGHT * WIDTH // 64, heads=HEADS)


def labels(scenes: Scenes) -> dict[str, np.ndarray]:
    """The right answer per head, int64 [n]; UNSEEN where the picture does not show it."""
    values = scenes.values
    answer = {"figures": values["figures"]}
    for part in PARTS:
        there = seen(values, part)
        for a in (a for a in ATTRIBUTES if a.startswith(f"{part}.")):
            hidden = a.startswith("style.mark") & (values["style.kind"] == PLAIN)
            answer[a] = np.where(there & ~hidden, values[a], UNSEEN)
        answer[part] = np.where(there, 0, UNSEEN)
        for i, concept in enumerate(of_category(category_of(part))):
            answer[part][shows(values, concept, part)] = i + 1
    return answer


def exam(rng: np.random.Generator, n: int) -> Scenes:
    """Scenes that put every head to the test, as the first body's: per part many concepts and near misses."""
    fixed = planted(rng, n, ATTRIBUTES, [[look(c, part) for c in of_category(category_of(part))] for part in PARTS])
    return sample(rng, n, fixed, concepts=True, spread=rng.choice((SPREAD, 1.0)))


def lessons(rng: np.random.Generator, n: int) -> Scenes:
    """What the judge learns from: half as in the exam, half any scenes."""
    return together((exam(rng, n // 2), sample(rng, n - n // 2))).take(rng.permutation(n))


SCHOOL = School(lessons, exam, labels, render)
