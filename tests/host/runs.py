"""What the tests of pictures that are sampled in several runs share: parts of a run, the methods, two models."""

from __future__ import annotations

import comfy.sample
import torch
from lora_ensemble.host.compose import earlier, wrappers
from lora_ensemble.host.guidance import apply as guided
from lora_ensemble.host.guidance.left import GuidedRuns
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.switch import Switch
from lora_ensemble.nodes.klora import LoRAEnsembleKLoRA
from torch import Tensor

from .builders import three
from .models import FAMILIES, build, patcher, randomize

STEPS = 8
ROUNDING = 1e-4  # a latent is scaled out of one run and into the next


def no_runs(monkeypatch) -> earlier.Runs:
    """As if nothing had been sampled; what methods leave from now on."""
    runs = earlier.Runs()
    monkeypatch.setattr(wrappers, "RUNS", runs)
    monkeypatch.setattr(guided, "GUIDED", GuidedRuns())
    return runs


def part(model, first: int, last: int, latent: Tensor | None = None, family: str = "SD15", cfg: float = 3.0,
         noisy: bool = False, positive: list | None = None, scheduler: str = "simple") -> Tensor:
    """What KSampler (Advanced) does from step to step."""
    kind = FAMILIES[family]
    start = kind.noise(1, 8, 1)
    latent = torch.zeros_like(start) if latent is None else latent
    noise = start if first == 0 or noisy else torch.zeros_like(start)
    with torch.inference_mode():
        return comfy.sample.sample(model, noise, STEPS, cfg, "euler", scheduler, positive or kind.cond(11),
                                   kind.cond(12), latent, disable_noise=first > 0 and not noisy, start_step=first,
                                   last_step=last, force_full_denoise=last == STEPS, disable_pbar=True, seed=1)


def k_lora(model, loras):
    ensemble = three(model, loras, (0.8, 0.5, 0.6))[:2]
    options = {each.id: each.default for each in LoRAEnsembleKLoRA.define_schema().inputs if hasattr(each, "default")}
    return LoRAEnsembleKLoRA.execute(model=model, ensemble=ensemble, **options).args[0]


MAKES = {
    "Switch": lambda strengths: Switch(strengths, 1),
    "Switch, turns": lambda strengths: Switch(strengths, order=(2, 0, 1), late=True),
    "CMLoRA": lambda strengths: CMLoRA(strengths, (True, False, True), caching=False, decay="halving"),
    # The first step of all has no measurement before it and is the high class's; all others are the low one's.
    "CMLoRA online": lambda strengths: CMLoRA(strengths, (True, False, True), "online", threshold=0.99, caching=False),
    "CMLoRA async": lambda strengths: CMLoRA(strengths, order="async", caching=False),
    "LoRAtorio": lambda strengths: LoRAtorio(strengths, kappa=0.4),
    "LoRAtorio, timesteps": lambda strengths: LoRAtorio(strengths, kappa=0.02, unit="timesteps"),
    "Composite": Composite,
}


def two_models():
    """Two Wan models of different weights, for high and low noise."""
    found = []
    for seed in (0, 1):
        model = build(FAMILIES["Wan"])
        randomize(model, seed)
        found.append(patcher(model))
    return found
