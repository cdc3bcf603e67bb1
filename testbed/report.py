"""A body of the testbed measured against its own criteria: is it good enough to measure with?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ..methods.merge import Merge
from .beds import UNET, Bed
from .body import Body
from .joint.report import two_figures
from .judge import UNSEEN, Judge, accuracy
from .protocol import LoraSet
from .sampler import GUIDANCE, STEPS, Picture, Sampler
from .scene import CONCEPTS, Scenes

STRENGTH = 1.0


class Likeness(NamedTuple):
    """Shares of the attributes that are as prompted, those that captions always name and the marks; root mean square
    of the difference to the guided pictures of many steps, colours in [0, 1]."""

    named: float
    marks: float
    error: float


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
    read, answers = judge.read(sampler.draw(_captioned(scenes, bed))), bed.school.labels(scenes)
    return _as_asked(read, answers, bed) | (two_figures(read, answers) if bed is not UNET else {})


def _captioned(scenes: Scenes, bed: Bed) -> list[Picture]:
    return [Picture(bed.text.caption(scenes.words(i)), i) for i in range(len(scenes))]


def _as_asked(read: Mapping[str, np.ndarray], answers: Mapping[str, np.ndarray], bed: Bed) -> dict[str, float]:
    return {a: float((read[a] == v)[v != UNSEEN].mean()) for a, v in answers.items()
            if a in bed.scene.ATTRIBUTES and (v != UNSEEN).any()}


def few_steps(base: Body, judge: Judge, count: int = 200, seed: int = 4, bed: Bed = UNET) -> dict[str, Likeness]:
    """Of the base and of the base with the LoRA for few steps, drawn in fewer steps and without guidance."""
    scenes = bed.scene.sample(np.random.default_rng(seed), count)
    pictures, answers = _captioned(scenes, bed), bed.school.labels(scenes)
    with Sampler(base, []) as sampler:
        whole = sampler.draw(pictures)
    found = {f"base, {STEPS} steps, guidance {GUIDANCE:g}": whole}
    for name, always in (("base", []), ("turbo", [bed.load_turbo()])):
        with Sampler(base, [], always) as sampler:
            found |= {f"{name}, {steps} steps, guidance 1": sampler.draw(pictures, steps, 1.0) for steps in (8, 4)}
    out = {}
    for name, images in found.items():
        shares = _as_asked(judge.read(images), answers, bed)
        named, marks = ([v for a, v in shares.items() if (a in bed.scene.NAMED) is of] for of in (True, False))
        error = float((images - whole).square().mean().sqrt())
        out[name] = Likeness(float(np.mean(named)), float(np.mean(marks)), error)
    return out


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
    if bed.schedule.turbo is not None:
        for name, like in few_steps(base, judge, bed=bed).items():
            yield (f"{name}: named {like.named:.3f}, marks {like.marks:.3f}, rms to {STEPS} guided steps "
                   f"{like.error:.4f}")
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
