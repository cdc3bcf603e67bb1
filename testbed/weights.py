"""Where the committed weights are, and how they are read and written: fp16 safetensors, computed with in fp32."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .base import Base
from .judge import Judge
from .loras import load_lora
from .scene import CONCEPTS, Concept

WEIGHTS = Path(__file__).resolve().parent / "weights"


def save_module(module: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: (t.half() if t.is_floating_point() else t).cpu().contiguous()
               for name, t in module.state_dict().items()}
    save_file(tensors, path, metadata={"format": "pt"})


def load_module(module: nn.Module, path: Path, device: str) -> nn.Module:
    module.load_state_dict(load_file(path))
    return module.to(device).eval().requires_grad_(False)


def load_base(device: str = "cpu") -> Base:
    """`.unet` and `.text`, fp32."""
    return load_module(Base(), WEIGHTS / "base.safetensors", device)


def load_judge(device: str = "cpu") -> Judge:
    return load_module(Judge(), WEIGHTS / "judge.safetensors", device)


def lora_path(regime: str, concept: Concept, folder: Path = WEIGHTS) -> Path:
    return folder / "loras" / regime / f"{concept.name}.safetensors"


def turbo_path(folder: Path = WEIGHTS, practised: bool = False) -> Path:
    """The LoRA for few steps without guidance (turbo.py)."""
    return folder / "loras" / f"turbo{'_practised' * practised}.safetensors"


def load_loras(regime: str, folder: Path = WEIGHTS) -> list[dict[str, torch.Tensor]]:
    """The tensors of all eleven files of a regime, in the order of CONCEPTS."""
    return [load_lora(lora_path(regime, concept, folder)) for concept in CONCEPTS]
