"""Trains a LoRA of the base for few steps without guidance, by what the base draws in many steps with it.

From the same noise the base with its guidance leaves a trail of states x(sigma). With the LoRA, one step from a state
of the trail is to end on it: a quarter or an eighth of the way further, as in pictures of four or eight steps. No LoRA
of the testbed takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .body import Body
from .loras import file_of, optimizer_of, trained_with_deltas
from .sampler import GUIDANCE

RANK = 8
LEVELS = 8  # states kept of a trail, its end apart
TEACHER_STEPS = 24  # the fewest from 20 on that meet all of these states
LONG = 0.7  # share of the lessons that are of a quarter of the way
TOGETHER = 48  # pictures drawn at once
AIMED = 12  # batches whose gradient says where the LoRA begins


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
    generator, losses = torch.Generator().manual_seed(seed), []

    def lesson() -> Tensor:
        """The loss of one batch of steps along the trails."""
        rows = torch.randint(pictures, (batch,), generator=generator)
        stride = 1 + (torch.rand(batch, generator=generator) < LONG).long()
        level = torch.randint(LEVELS, (batch,), generator=generator) // stride * stride
        x, further = states[level, rows], states[level + stride, rows]
        sigma, way = (1 - level / LEVELS).to(x.device), (stride / LEVELS)[:, None, None, None].to(x.device)
        return F.mse_loss(base.velocity(x, sigma, contexts[rows]), (x - further) / way)

    with trained_with_deltas(base, layers(base), RANK, generator) as deltas:
        _aim(base, deltas, lesson)
        optimizer, scheduler = optimizer_of(deltas, steps, rate)
        for step in range(steps):
            loss = lesson()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            if (step + 1) % 100 == 0:
                log(f"turbo step {step + 1}/{steps} loss {np.mean(losses[-100:]):.5f}")
    return file_of(deltas)


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
