"""Trains the base model and its text encoder on random scenes with their captions."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .model import UNet, encode
from .render import render
from .scene import CATEGORIES, CONCEPTS, sample
from .text import TextEncoder, sparse_caption, tokenize


class Base(nn.Module):
    """The U-Net and the text encoder, as one thing to train and to store."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text = UNet(), TextEncoder()


def noisy(latent: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A training example of the flow: x at a random sigma, sigma [n], and the velocity to predict."""
    noise = torch.randn(latent.shape, generator=generator)
    sigma = torch.sigmoid(0.5 + 1.2 * torch.randn(len(latent), generator=generator))
    s = sigma[:, None, None, None]
    return (1 - s) * latent + s * noise, sigma, noise - latent


def meaningless(rng: np.random.Generator) -> dict[str, str]:
    """A rare word somewhere in every third caption: it says nothing, so that the base learns to pass over such words
    and prompts with them are not foreign to it."""
    if rng.random() < 0.67:
        return {}
    return {CATEGORIES[rng.integers(len(CATEGORIES))]: CONCEPTS[rng.integers(len(CONCEPTS))].name}


def train_base(base: Base, steps: int, batch: int = 32, rate: float = 3e-3, seed: int = 0, device: str = "cpu",
               log: Callable[[str], None] = lambda line: None) -> Base:
    """Trains `base` on random scenes; returns the exponential moving average of the weights."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    base = base.to(device, memory_format=torch.channels_last).train().requires_grad_(True)
    average = copy.deepcopy(base).requires_grad_(False)
    optimizer = torch.optim.AdamW(base.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05,
                                                    final_div_factor=100)
    start, losses, block = time.time(), [], 32
    for step in range(steps):
        if step % block == 0:
            scenes = sample(rng, block * batch)
            prompts = [sparse_caption(rng, scenes.words(row), meaningless(rng)) for row in range(len(scenes))]
            latents, tokens = encode(render(scenes)), tokenize(prompts)
        rows = slice(step % block * batch, (step % block + 1) * batch)
        x, sigma, velocity = (t.to(device) for t in noisy(latents[rows], generator))
        x = x.contiguous(memory_format=torch.channels_last)
        loss = F.mse_loss(base.unet(x, sigma, base.text(tokens[rows].to(device))), velocity)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(base.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        decay = min(0.998, 1 - 1 / (step / 4 + 2))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(base.parameters()), 1 - decay)
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            log(f"base step {step + 1}/{steps} loss {np.mean(losses[-100:]):.4f} {time.time() - start:.0f} s")
    return average.eval()
