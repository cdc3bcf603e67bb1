"""Trains LoRAs of the base for few steps without guidance, by what the base draws in many steps with it.

From the same noise the base with its guidance leaves a trail of states x(sigma). With the LoRA, one step from a state
of the trail is to end on it: a quarter or an eighth of the way further, as in pictures of four or eight steps. No LoRA
that anything is measured with takes part. The first knows the base alone, as most such LoRAs do; the practised one goes
on from it where other LoRAs act, in the teacher as in the student (practice.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.bank import Bank
from ..engine.forwards import RoutedForwards
from ..kernels.branch import Branch
from .body import Body
from .loras import PREFIX, file_of, optimizer_of, trained_with_deltas
from .sampler import GUIDANCE, low_rank

RANK = 8
LEVELS = 8  # states kept of a trail, its end apart
TEACHER_STEPS = 24  # the fewest from 20 on that meet all of these states
LONG = 0.7  # share of the lessons that are of a quarter of the way
TOGETHER = 48  # pictures drawn at once
AIMED = 12  # batches whose gradient says where the LoRA begins
PRACTISED = 384, 400, 1.5e-3, 5  # of the practised one: trails, steps, learning rate, seed

Rows = Callable[[Sequence[int]], AbstractContextManager[None]]
"""While open, row r of a batch is drawn with the LoRAs of the r-th of these pictures."""


@torch.no_grad()
def trail(base: Body, noise: Tensor, contexts: Tensor, steps: int = TEACHER_STEPS,
          guidance: float = GUIDANCE) -> Tensor:
    """States of pictures drawn by Euler's steps with guidance, [LEVELS + 1, n, *latent], from noise [n, *latent] and
    contexts [n, tokens, width]."""
    x, states = noise, [noise]
    both = torch.cat([contexts, base.contexts([""]).expand_as(contexts)])
    for index, (sigma, following) in enumerate(pairwise(torch.linspace(1, 0, steps + 1).tolist())):
        sigmas = torch.full((2 * len(x),), sigma, device=x.device)
        positive, negative = base.velocity(x.repeat(2, 1, 1, 1), sigmas, both).chunk(2)
        x = x + (following - sigma) * (negative + guidance * (positive - negative))
        if (index + 1) % (steps // LEVELS) == 0:
            states.append(x)
    return torch.stack(states)


@torch.no_grad()
def trails(base: Body, pictures: int, seed: int) -> tuple[Tensor, Tensor]:
    """The trails of as many pictures of random scenes, and the contexts that they were drawn for."""
    device = next(base.parameters()).device
    _, prompts = base.lessons(np.random.default_rng(seed), pictures)
    noise = torch.randn((pictures, *base.latent), generator=torch.Generator().manual_seed(seed)).to(device)
    contexts = base.contexts(prompts)
    states = [trail(base, *part) for part in zip(noise.split(TOGETHER), contexts.split(TOGETHER), strict=True)]
    return torch.cat(states, dim=1), contexts


def layers(base: Body) -> dict[str, nn.Module]:
    """What the LoRA acts on: every layer."""
    return {name: module for name, module in base.net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}


def train_turbo(base: Body, pictures: int, steps: int, batch: int = 16, rate: float = 4e-3, seed: int = 0,
                log: Callable[[str], None] = lambda line: None) -> dict[str, Tensor]:
    """The tensors of a LoRA file for `base`, made from so many pictures in so many steps."""
    states, contexts = trails(base, pictures, seed)
    log(f"turbo: {pictures} trails")
    generator = torch.Generator().manual_seed(seed)

    def lesson() -> Tensor:
        return _lesson(base, states, contexts, generator, batch)

    with trained_with_deltas(base, layers(base), RANK, generator) as deltas:
        _aim(base, deltas, lesson)
        _follow(deltas, lesson, steps, rate, log)
    return file_of(deltas)


def train_practised(base: Body, begin: Mapping[str, Tensor], loras: Sequence[Mapping[str, Tensor]],
                    prompts: Sequence[str], branches: Sequence[Branch], steps: int, batch: int = 16,
                    rate: float = 1.5e-3, seed: int = 0, log: Callable[[str], None] = lambda line: None
                    ) -> dict[str, Tensor]:
    """The tensors of a LoRA file for `base`, from those of another one on, trained where other LoRAs act.

    branches   per prompt how strongly each of `loras` does
    """
    generator = torch.Generator().manual_seed(seed)
    forwards = RoutedForwards(base.net, Bank([low_rank(tensors) for tensors in loras]))

    def at_work(pictures: Sequence[int]) -> AbstractContextManager[None]:
        return forwards.rows([branches[i] for i in pictures])

    noise = torch.randn((len(prompts), *base.latent), generator=generator)
    with torch.no_grad():
        contexts = base.contexts(prompts)
    forwards.install()
    try:
        parts = []
        for rows in torch.arange(len(prompts)).split(TOGETHER // 2):
            with at_work([*rows.tolist(), *rows.tolist()]):
                parts.append(trail(base, noise[rows], contexts[rows]))
        states = torch.cat(parts, dim=1)
    finally:
        forwards.remove()
    log(f"practised: {len(prompts)} trails")
    with trained_with_deltas(base, layers(base), RANK, generator) as deltas:
        for name, delta in deltas.items():
            delta.down.data.copy_(begin[f"{PREFIX}{name}.lora_A.weight"])
            delta.up.data.copy_(begin[f"{PREFIX}{name}.lora_B.weight"])
        forwards.install()
        try:
            _follow(deltas, lambda: _lesson(base, states, contexts, generator, batch, at_work), steps, rate, log)
        finally:
            forwards.remove()
    return file_of(deltas)


def _lesson(base: Body, states: Tensor, contexts: Tensor, generator: torch.Generator, batch: int,
            at_work: Rows = lambda pictures: nullcontext()) -> Tensor:
    """The loss of one batch of steps along the trails."""
    rows = torch.randint(len(contexts), (batch,), generator=generator)
    stride = 1 + (torch.rand(batch, generator=generator) < LONG).long()
    level = torch.randint(LEVELS, (batch,), generator=generator) // stride * stride
    x, further = states[level, rows], states[level + stride, rows]
    sigma, way = (1 - level / LEVELS).to(x.device), (stride / LEVELS)[:, None, None, None].to(x.device)
    with at_work(rows.tolist()):
        return F.mse_loss(base.velocity(x, sigma, contexts[rows]), (x - further) / way)


def _follow(deltas: Mapping[str, nn.Module], lesson: Callable[[], Tensor], steps: int, rate: float,
            log: Callable[[str], None]) -> None:
    """Train the deltas."""
    (optimizer, scheduler), losses = optimizer_of(deltas, steps, rate), []
    for step in range(steps):
        loss = lesson()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            log(f"turbo step {step + 1}/{steps} loss {np.mean(losses[-100:]):.5f}")


def _aim(base: Body, deltas: Mapping[str, nn.Module], lesson: Callable[[], Tensor]) -> None:
    """Let the LoRA begin in the directions along which the weights themselves would go: its A is the gradient's first
    right singular vectors, as in LoRA-GA (arXiv 2407.05000); its B stays zero, and the base as it is."""
    weights = {name: module.parametrizations["weight"].original.requires_grad_(True)
               for name, module in layers(base).items()}
    for _ in range(AIMED):
        lesson().backward()
    for name, weight in weights.items():
        right = torch.linalg.svd(weight.grad.flatten(1), full_matrices=False).Vh
        deltas[name].down.data.copy_(right[:RANK].view_as(deltas[name].down))
        weight.grad = None
        weight.requires_grad_(False)
