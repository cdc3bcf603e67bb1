"""The judge: a small CNN that reads every attribute of a scene from its picture, and per category which concept it is.

It is trained on renders with noise, blur and changes of contrast, so that it is fair to generated pictures, and on
many near misses: scenes that share all but one attribute with a concept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .render import render
from .scene import ATTRIBUTES, CATEGORIES, FREE, PLAIN, SPREAD, Scenes, of_category, sample, shows

HEADS: dict[str, int] = {a: len(words) for a, words in ATTRIBUTES.items()}
HEADS |= {category: 1 + len(of_category(category)) for category in CATEGORIES}  # 0: none of the concepts
UNSEEN = -100


class Judge(nn.Module):
    """[n, 3, height, width] in [0, 1] -> logits per head, {head: [n, classes]}."""

    def __init__(self, width: int = 48, hidden: int = 160, cells: int = 16, heads: dict[str, int] = HEADS):
        """cells: an eighth of the picture's height times an eighth of its width."""
        super().__init__()
        self.heads = heads
        sizes = (12, width, 2 * width, 2 * width, 128, 128)
        strides = (1, 2, 1, 2, 1)
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, stride, 1) for a, b, stride in
                                    zip(sizes[:-1], sizes[1:], strides, strict=True)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(b) for b in sizes[1:]])
        self.hidden = nn.Linear(128 * cells + 2 * 2 * width, hidden)  # what is where, and the texture of all
        self.out = nn.Linear(hidden, sum(heads.values()))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = F.pixel_unshuffle(image * 2 - 1, 2)
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if i == 2:
                texture = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)
        x = self.out(F.relu(self.hidden(torch.cat([x.flatten(1), texture], dim=1))))
        return dict(zip(self.heads, x.split(list(self.heads.values()), dim=1), strict=True))

    @torch.no_grad()
    def read(self, image: Tensor, chunk: int = 256) -> dict[str, np.ndarray]:
        """The most likely class per head, int64 [n]."""
        parts = [{h: logits.argmax(1) for h, logits in self(p).items()} for p in image.split(chunk)]
        return {h: torch.cat([p[h] for p in parts]).cpu().numpy() for h in self.heads}


def labels(scenes: Scenes) -> dict[str, np.ndarray]:
    """The right answer per head, int64 [n]; UNSEEN where the picture does not show it."""
    answer = dict(scenes.values)
    plain = answer["style.kind"] == PLAIN
    for a in ("style.mark", "style.mark_colour"):
        answer[a] = np.where(plain, UNSEEN, answer[a])
    for category in CATEGORIES:
        answer[category] = np.zeros(len(scenes), np.int64)
        for i, concept in enumerate(of_category(category)):
            answer[category][shows(scenes.values, concept)] = i + 1
    return answer


def exam(rng: np.random.Generator, n: int) -> Scenes:
    """Scenes that put every head to the test: per category 40 % show a concept, 25 % miss one by one attribute."""
    fixed = planted(rng, n, ATTRIBUTES, [[c.look for c in of_category(category)] for category in CATEGORIES])
    return sample(rng, n, fixed, concepts=True, spread=rng.choice((SPREAD, 1.0)))


def planted(rng: np.random.Generator, n: int, attributes: Iterable[str],
            parts: Sequence[Sequence[Mapping[str, int]]]) -> dict[str, np.ndarray]:
    """What is fixed of such scenes; per part of the picture, the looks of its concepts."""
    fixed = {a: np.full(n, FREE) for a in attributes}
    for looks in parts:
        which, fate = rng.integers(len(looks), size=n), rng.random(n)
        for i, look in enumerate(looks):
            missed = np.where(fate < 0.4, len(look), rng.integers(len(look), size=n))
            for k, (a, value) in enumerate(look.items()):
                fixed[a][(which == i) & (fate < 0.65) & (missed != k)] = value
    return fixed


def lessons(rng: np.random.Generator, n: int) -> Scenes:
    """What the judge learns from: half as in the exam, half any scenes, whose styles hide more of the rest."""
    parts, order = (exam(rng, n // 2), sample(rng, n - n // 2)), rng.permutation(n)
    return together(parts).take(order)


def together(parts: Sequence[Scenes]) -> Scenes:
    values = {a: np.concatenate([part.values[a] for part in parts]) for a in parts[0].values}
    return replace(parts[0], values=values, jitter=np.concatenate([part.jitter for part in parts]))


@dataclass(frozen=True)
class School:
    """What a judge learns and is examined on."""

    lessons: Callable[[np.random.Generator, int], Scenes] = lessons
    exam: Callable[[np.random.Generator, int], Scenes] = exam
    labels: Callable[[Scenes], dict[str, np.ndarray]] = labels
    render: Callable[[Scenes], Tensor] = render


FIRST = School()


def disturb(image: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, contrast, brightness and noise of a random strength per picture."""
    n = len(image)

    def amount(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator)

    image = torch.lerp(image, F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1), 0.6 * amount(1, 1, 1))
    image = (image - 0.5) * (0.8 + 0.35 * amount(1, 1, 1)) + 0.5 + 0.08 * (amount(3, 1, 1) - 0.5)
    noise = torch.randn(image.shape, generator=generator)
    return (image + 0.08 * amount(1, 1, 1) * noise).clamp(0, 1)


def train_judge(steps: int, batch: int = 96, rate: float = 3e-3, seed: int = 1, device: str = "cpu",
                log: Callable[[str], None] = lambda line: None, make: Callable[[], Judge] = Judge,
                school: School = FIRST) -> Judge:
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    judge = make().to(device).train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=rate, weight_decay=0.02)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    start, block = time.time(), 16
    for step in range(steps):
        if step % block == 0:
            scenes = school.lessons(rng, block * batch)
            images, answers = school.render(scenes), {h: torch.as_tensor(v) for h, v in school.labels(scenes).items()}
        rows = slice(step % block * batch, (step % block + 1) * batch)
        logits = judge(disturb(images[rows], generator).to(device))
        loss = sum(F.cross_entropy(logits[h], answers[h][rows].to(device), ignore_index=UNSEEN) for h in judge.heads)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % 100 == 0:
            log(f"judge step {step + 1}/{steps} loss {loss.item():.3f} {time.time() - start:.0f} s")
    return judge.eval()


def accuracy(judge: Judge, scenes: Scenes, images: Tensor, school: School = FIRST) -> dict[str, float]:
    """Share of right answers per head, over the rows where there is one."""
    read, answer = judge.read(images), school.labels(scenes)
    return {h: float((read[h] == answer[h])[answer[h] != UNSEEN].mean()) for h in judge.heads}
