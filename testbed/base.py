"""Trains the base model and its text encoder on random scenes with their captions."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from math import isqrt

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.positions import Segment, Segments
from .body import Body, See
from .model import LATENT, UNet, encode
from .render import render
from .scene import CATEGORIES, CONCEPTS, sample
from .text import LENGTH, TextEncoder, sparse_caption, tokenize


class Base(Body):
    """The U-Net and its text encoder."""

    latent, grid, length = LATENT, (LATENT[1] // 2, LATENT[2] // 2), LENGTH

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.text = UNet(), TextEncoder()

    @property
    def net(self) -> UNet:
        return self.unet

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        return tokenize(prompts)

    def velocity(self, x: Tensor, sigma: Tensor, context: Tensor, see: See | None = None) -> Tensor:
        if see is None:
            return self.unet(x, sigma, context)
        layers = [module for name, module in self.unet.named_modules() if name.endswith(".attn2")]
        for layer in layers:
            layer.observe = lambda q, k: see(q, k, slice(0, k.shape[2]))
        try:
            return self.unet(x, sigma, context)
        finally:
            for layer in layers:
                del layer.observe

    def targets(self) -> dict[str, nn.Module]:
        """The attention projections and the 3x3 convolutions of the blocks."""
        found = {}
        for name, module in self.unet.named_modules():
            attention = isinstance(module, nn.Linear) and ".to_" in name
            if attention or (isinstance(module, nn.Conv2d) and name.endswith((".conv1", ".conv2", "downsample"))):
                found[name] = module
        return found

    def locate(self, layer: str, tokens: int) -> Segments | None:
        if layer.endswith((".attn2.to_k", ".attn2.to_v")):
            return (Segment("text", tokens),)
        side = isqrt(tokens)
        return (Segment("picture", tokens, (1, side, side)),) if side**2 == tokens else None

    @staticmethod
    def lessons(rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
        scenes = sample(rng, count)
        captions = [sparse_caption(rng, scenes.words(row), meaningless(rng)) for row in range(count)]
        return encode(render(scenes)), captions


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


def train_base(base: Body, steps: int, batch: int = 32, rate: float = 3e-3, seed: int = 0, device: str = "cpu",
               log: Callable[[str], None] = lambda line: None,
               keep: Callable[[Body], None] = lambda base: None) -> Body:
    """Trains `base` on random scenes; returns the exponential moving average of the weights. `keep` sees that average
    from time to time on the way."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    base = base.to(device, memory_format=torch.channels_last).train().requires_grad_(True)
    average = copy.deepcopy(base).requires_grad_(False)
    optimizer = torch.optim.AdamW(base.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05,
                                                    final_div_factor=100)
    start, losses, block = time.time(), [], 32
    for step in range(steps):
        if step % block == 0:
            latents, prompts = base.lessons(rng, block * batch)
        rows = slice(step % block * batch, (step % block + 1) * batch)
        x, sigma, velocity = (t.to(device) for t in noisy(latents[rows], generator))
        x = x.contiguous(memory_format=torch.channels_last)
        loss = F.mse_loss(base.velocity(x, sigma, base.contexts(prompts[rows])), velocity)
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
        if (step + 1) % 500 == 0:
            keep(average)
    return average.eval()
