"""A body of the testbed measured against its own criteria: is it good enough to measure with?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ..methods.merge import Merge
from .beds import UNET, Bed
from .joint.report import two_figures
from .judge import UNSEEN, Judge, accuracy
from .protocol import LoraSet
from .sampler import Picture, Sampler
from .scene import CONCEPTS

STRENGTH = 1.0


def judge_accuracy(judge: Judge, count: int = 4000, seed: int = 12345, bed: Bed = UNET) -> dict[str, float]:
    """Share of right answers on renders that the judge was not trained on, per head."""
    scenes = bed.school.exam(np.random.default_rng(seed), count)
    images = bed.school.render(scenes).to(next(judge.parameters()).device)
    return accuracy(judge, scenes, images, bed.school)


def base_obedience(sampler: Sampler, judge: Judge, count: int = 200, seed: int = 3, bed: Bed = UNET,
                   fixed: Mapping[str, int] | None = None) -> dict[str, float]:
    """Share of pictures of the bare base that show an attribute as prompted, per attribute; for the joint body also of
    pictures that show both figures right."""
    scenes = bed.scene.sample(np.random.default_rng(seed), count, dict(fixed or {}))
    read = judge.read(sampler.draw([Picture(bed.text.caption(scenes.words(i)), i) for i in range(count)]))
    answers = bed.school.labels(scenes)
    shares = {a: float((read[a] == v)[v != UNSEEN].mean()) for a, v in answers.items()
              if a in bed.scene.ATTRIBUTES and (v != UNSEEN).any()}
    return shares | (two_figures(read, answers) if bed is not UNET else {})


def alone(sampler: Sampler, judge: Judge, strength: float = STRENGTH, per_concept: int = 48, bed: Bed = UNET,
          change: Callable[[LoraSet], LoraSet] = lambda task: task) -> dict[str, tuple[float, float]]:
    """Per concept: share of pictures that show it with its LoRA alone, and with the same prompts but no LoRA."""
    tasks = [change(bed.alone_set(c, i)) for c in CONCEPTS for i in range(per_concept)]
    shares = []
    for method in (Merge((strength,)), None):
        read = judge.read(sampler.draw([Picture(t.prompt(), t.seed, t.loras, method) for t in tasks]))
        shown = [t.shown({head: int(v[i]) for head, v in read.items()})[0] for i, t in enumerate(tasks)]
        shares.append(np.array(shown).reshape(len(CONCEPTS), per_concept).mean(axis=1))
    return {c.name: (float(a), float(b)) for c, a, b in zip(CONCEPTS, *shares, strict=True)}


def report(bed: Bed, device: str = "cpu", regimes: Sequence[str] = ("clean", "narrow"),
           per_concept: int = 48) -> Iterator[str]:
    base, judge = bed.load_base(device), bed.load_judge(device)
    right = judge_accuracy(judge, bed=bed)
    yield "judge, held-out renders: " + ", ".join(f"{c} {right[c]:.3f}" for c in bed.parts)
    yield "judge, attributes: " + ", ".join(f"{a} {right[a]:.3f}" for a in bed.scene.ATTRIBUTES)
    for regime in regimes:
        with Sampler(base, bed.load_loras(regime)) as sampler:
            if regime == regimes[0]:
                obeyed = base_obedience(sampler, judge, bed=bed)
                named = np.mean([obeyed[a] for a in bed.scene.NAMED])
                yield f"base, as prompted: what captions name {named:.3f}; " + ", ".join(
                    f"{a} {v:.3f}" for a, v in obeyed.items())
            yield f"{regime}, {_line(alone(sampler, judge, per_concept=per_concept, bed=bed))}"
            if bed is not UNET:
                shares = alone(sampler, judge, per_concept=per_concept, bed=bed, change=lambda task: task.said_bare())
                yield f"{regime}, by the bare word, {_line(shares)}"


def _line(shares: Mapping[str, tuple[float, float]]) -> str:
    mean = np.mean(list(shares.values()), axis=0)
    return f"concept shown with its LoRA / without: mean {mean[0]:.3f} / {mean[1]:.3f}; " + ", ".join(
        f"{name} {a:.2f} / {b:.2f}" for name, (a, b) in shares.items())
