"""Composite and LoRAtorio (all weights alike, not re-centred) of two different LoRAs in one step, on every family that
can be built small, against the mean of ComfyUI's own results with each of them. Different LoRAs: with twins, rows that
take each other's would not show."""

from __future__ import annotations

import comfy.sample
import pytest
import torch
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.loratorio import LoRAtorio
from torch import Tensor

from .any_model import any_model, latent_of, prompt_of
from .builders import error, lora, method, stock
from .disturbed import skipped_where_older, watching
from .small_video import SMALL

NAME = {"name": str, "down": "lora_A.weight", "up": "lora_B.weight"}
ONE_ROW = {"MiniMax H3", "MiniMax H3 references", "HunyuanVideo I2V"}
"""Calls that the host makes with one row only."""


def layers_of(model) -> dict[str, torch.Size]:
    """The linear layers and convolutions that a call runs through, by the names of a LoRA file."""
    found, inner = {}, model.model.diffusion_model

    def see(layer, geometry, x, out):
        if not geometry.is_norm:
            found[f"diffusion_model.{layer}"] = inner.get_submodule(layer).weight.shape

    with watching(inner, see):
        model.model.kind.call(inner, {})
    return found


def parts(latent) -> Tensor:
    """All of a latent in one tensor."""
    return torch.cat([part.flatten(1) for part in latent.unbind()], dim=1) if latent.is_nested else latent


def drawn(model, batch: int, cfg: float) -> Tensor:
    """One step of Euler from noise, which is what the model predicts."""
    start = latent_of(model, batch)
    with torch.inference_mode():
        return parts(comfy.sample.sample(model, start, 1, cfg, "euler", "simple", prompt_of(model, 11),
                                         prompt_of(model, 12), start * 0, seed=1, disable_pbar=True))


METHODS = {"Composite": Composite, "LoRAtorio": lambda strengths: LoRAtorio(strengths, kappa=0.0, recenter_lambda=1.0)}


@pytest.mark.parametrize("calls", [[(1, 1.0), (2, 3.0)], [(2, 1.0), (1, 3.0)]])
@pytest.mark.parametrize("name", SMALL)
def test_the_mean_of_two_loras(name, calls, loras):
    if name in ONE_ROW:
        calls = [(1, 1.0)]
    with skipped_where_older(name):
        model = any_model(SMALL[name])
        layers = layers_of(model)
        plain = [drawn(model, *call) for call in calls]
    ensemble = [LoRASpec(loras(lora(layers, seed, **NAME)), strength, 0.0) for seed, strength in ((1, 0.8), (2, -0.6))]
    alone = [[drawn(one, *call) for call in calls] for one in (stock(model, [spec]) for spec in ensemble)]
    wrong = {}
    for method_name, make in METHODS.items():
        ours = method(model, ensemble, make)
        for k, call in enumerate(calls):
            mean = torch.stack([results[k] for results in alone]).mean(dim=0)
            found = error(drawn(ours, *call), mean, plain[k])
            if not found < 1e-4:
                wrong[(method_name, *call)] = round(found, 5)
    assert not wrong, f"(method, batch, cfg): differences as shares of the LoRAs' effect {wrong}"
