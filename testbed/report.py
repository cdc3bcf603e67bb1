"""The testbed measured against its own criteria: is it good enough to measure with?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..methods.merge import Merge
from .judge import UNSEEN, Judge, accuracy, exam, labels
from .protocol import LoraSet, alone_set
from .render import render
from .sampler import Picture, Sampler
from .scene import ATTRIBUTES, CATEGORIES, CONCEPTS, NAMED, Concept, sample
from .text import caption
from .weights import load_base, load_judge, load_loras

STRENGTH = 1.0


def judge_accuracy(judge: Judge, count: int = 4000, seed: int = 12345) -> dict[str, float]:
    """Share of right answers on renders that the judge was not trained on, per head."""
    scenes = exam(np.random.default_rng(seed), count)
    return accuracy(judge, scenes, render(scenes).to(next(judge.parameters()).device))


def base_obedience(sampler: Sampler, judge: Judge, count: int = 200, seed: int = 3) -> dict[str, float]:
    """Share of pictures of the bare base that show an attribute as prompted, per attribute."""
    scenes = sample(np.random.default_rng(seed), count)
    read = judge.read(sampler.draw([Picture(caption(scenes.words(i)), i) for i in range(count)]))
    return {a: float((read[a] == v)[v != UNSEEN].mean()) for a, v in labels(scenes).items() if a in ATTRIBUTES}


def alone(sampler: Sampler, judge: Judge, strength: float = STRENGTH,
          per_concept: int = 48) -> dict[str, tuple[float, float]]:
    """Per concept: share of pictures that show it with its LoRA alone, and with the same prompts but no LoRA."""
    tasks: list[LoraSet] = [alone_set(c, i) for c in CONCEPTS for i in range(per_concept)]
    shares = []
    for method in (Merge((strength,)), None):
        read = judge.read(sampler.draw([Picture(t.prompt(), t.seed, t.loras, method) for t in tasks]))
        shown = [int(read[t.concepts[0].category][i]) == number(t.concepts[0]) for i, t in enumerate(tasks)]
        shares.append(np.array(shown).reshape(len(CONCEPTS), per_concept).mean(axis=1))
    return {c.name: (float(a), float(b)) for c, a, b in zip(CONCEPTS, *shares, strict=True)}


def number(concept: Concept) -> int:
    """The judge's answer that means this concept (0 means none of its category)."""
    return 1 + [c.name for c in CONCEPTS if c.category == concept.category].index(concept.name)


def report(device: str = "cpu", regimes: Sequence[str] = ("clean", "narrow")) -> Iterator[str]:
    base, judge = load_base(device), load_judge(device)
    right = judge_accuracy(judge)
    yield "judge, held-out renders: " + ", ".join(f"{c} {right[c]:.3f}" for c in CATEGORIES)
    yield "judge, attributes: " + ", ".join(f"{a} {right[a]:.3f}" for a in ATTRIBUTES)
    for regime in regimes:
        with Sampler(base, load_loras(regime)) as sampler:
            if regime == regimes[0]:
                obeyed = base_obedience(sampler, judge)
                named = np.mean([obeyed[a] for a in NAMED])
                yield f"base, as prompted: colours, kinds and side {named:.3f}; " + ", ".join(
                    f"{a} {v:.3f}" for a, v in obeyed.items())
            shares = alone(sampler, judge)
            mean = np.mean(list(shares.values()), axis=0)
            yield f"{regime}, concept shown with its LoRA / without: mean {mean[0]:.3f} / {mean[1]:.3f}; " + ", ".join(
                f"{name} {a:.2f} / {b:.2f}" for name, (a, b) in shares.items())
