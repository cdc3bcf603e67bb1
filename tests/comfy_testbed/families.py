"""The tests' small models of real families as a node's outputs, and what guidance did with a MODEL."""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

from .wrap import load_pack

FAMILIES = ["SD15", "SD3", "Flux"]
CHECKPOINTS = ["SDXL", "Flux", "Qwen-Image", "Z-Image", "Krea 2", "Flux.2", "Wan", "LTX-2", "MiniMax H3"]


def load_family(name: str) -> tuple[Any, ...]:
    """A MODEL with random weights, and three CONDITIONINGs for it."""
    load_pack()
    models = importlib.import_module("lora_ensemble.tests.host.models")
    return models.base(name), *(models.FAMILIES[name].cond(seed) for seed in (11, 12, 13))


def load_checkpoint(name: str, seed: int = 0) -> tuple[Any, ...]:
    """MODEL, CLIP, VAE and a VAE for sound of a family, small, with random weights and the host's own tokenizer."""
    load_pack()
    checkpoints = importlib.import_module("lora_ensemble.tests.host.small_checkpoints")
    return checkpoints.model(name, seed), checkpoints.text_encoder(name), checkpoints.VAE(), checkpoints.SoundVAE()


def guidance_record(model: Any) -> str:
    """What guidance did in the last run of a MODEL, as JSON."""
    return json.dumps(model.get_attachment("lora_ensemble_guidance").record.as_dict())


def kept_bytes() -> dict[str, int]:
    """What the pack that this server has loaded keeps, by the end of the module's name: bytes of LoRA files and banks.
    """
    loaded = {end: [module for name, module in sys.modules.items() if name.endswith(f".host.{end}")]
              for end in ("files.files", "compose.banks")}
    return {end: sum(module.kept_bytes() for module in modules) for end, modules in loaded.items()}
