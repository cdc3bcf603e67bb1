"""Trains LoRAs of the base, and their files.

A file is ordinary: `diffusion_model.<module>.lora_A.weight` [r, in(, 3, 3)], `.lora_B.weight` [out, r(, 1, 1)] and
`.alpha`, fp16 safetensors, as ComfyUI's loader maps it for a model that it knows nothing special about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from .base import noisy
from .body import Body

RANK = 4
PREFIX = "diffusion_model."


class _Delta(nn.Module):
    """A trainable low-rank delta of one weight, W + B A: small convolutions cost more than a changed big one."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        down = torch.randn((rank, *weight.shape[1:]), generator=generator) / weight[0].numel() ** 0.5
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, *[1] * (weight.ndim - 2), device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up.flatten(1) @ self.down.flatten(1)).view_as(weight)


@contextmanager
def trained_with_deltas(base: Body, modules: Mapping[str, nn.Module], rank: int,
                        generator: torch.Generator) -> Iterator[dict[str, nn.Module]]:
    """The frozen base, these of its layers with low-rank deltas on them while the block runs; gives the deltas by
    layer."""
    base.requires_grad_(False)
    deltas = {name: _Delta(module.weight, rank, generator) for name, module in modules.items()}
    for name, delta in deltas.items():
        parametrize.register_parametrization(modules[name], "weight", delta)
    try:
        yield deltas
    finally:
        base.eval()
        for module in modules.values():
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def optimizer_of(deltas: Mapping[str, nn.Module], steps: int, rate: float) -> tuple[AdamW, OneCycleLR]:
    optimizer = AdamW([p for d in deltas.values() for p in d.parameters()], lr=rate, weight_decay=0.0)
    return optimizer, OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1, final_div_factor=10)


def file_of(deltas: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a LoRA file."""
    tensors = {}
    for name, delta in deltas.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = delta.down.detach().cpu().half().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = delta.up.detach().cpu().half().contiguous()
        tensors[f"{PREFIX}{name}.alpha"] = torch.tensor(float(len(delta.down)), dtype=torch.float16)
    return tensors


def train_lora(base: Body, latents: Tensor, prompts: Sequence[str], steps: int, batch: int = 16,
               rate: float = 4e-3, seed: int = 0, rank: int = RANK,
               text: Mapping[str, nn.Module] | None = None) -> dict[str, Tensor]:
    """The frozen base with low-rank deltas, trained on pictures and captions; returns the tensors of a LoRA file.

    text   layers of the text encoder that are trained too, by name
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    device = next(base.parameters()).device
    with torch.no_grad():
        contexts = base.contexts(prompts).cpu()
    with trained_with_deltas(base, base.targets() | (text or {}), rank, generator) as deltas:
        optimizer, scheduler = optimizer_of(deltas, steps, rate)
        base.train()
        for _ in range(steps):
            rows = torch.randint(len(latents), (batch,), generator=generator)
            x, sigma, velocity = (t.to(device) for t in noisy(latents[rows], generator))
            context = base.contexts([prompts[row] for row in rows]) if text else contexts[rows].to(device)
            loss = F.mse_loss(base.velocity(x, sigma, context), velocity)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
    return file_of(deltas)


def save_lora(tensors: dict[str, Tensor], path: Path, name: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt", "ss_output_name": name})


def load_lora(path: Path) -> dict[str, Tensor]:
    return load_file(path)
