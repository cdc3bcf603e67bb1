"""Nodes that sample by themselves start from what a KSampler starts from."""

from __future__ import annotations

import comfy.sample
import pytest
import torch
from lora_ensemble.host.look.latent import latent_of
from lora_ensemble.nodes.calibration import LoRAEnsembleCalibrateGuidance
from lora_ensemble.nodes.leave_one_out import LoRAEnsembleLeaveOneOut
from lora_ensemble.nodes.spectrum import LoRAEnsembleSpectrum

import nodes as host_nodes

from .builders import merge, three
from .models import FAMILIES, base

SD15 = FAMILIES["SD15"]
HOW = {"model": None, "positive": SD15.cond(11), "negative": SD15.cond(12), "seed": 5, "steps": 1, "cfg": 3.0,
       "sampler_name": "euler", "scheduler": "normal"}
LATENTS = {
    "empty, for a smaller factor": {"samples": torch.zeros(1, 4, 16, 16), "downscale_ratio_spacial": 4},
    "empty, of other channels": {"samples": torch.zeros(2, 16, 8, 8), "downscale_ratio_spacial": 8},
    "a picture": {"samples": SD15.noise(1, seed=3), "downscale_ratio_spacial": 4},
    "one of a batch": {"samples": SD15.noise(1, seed=3), "batch_index": [2]},
}


def leave_one_out(model, ensemble, latent) -> None:
    LoRAEnsembleLeaveOneOut.execute(**{**HOW, "model": merge(model, ensemble)}, latent_image=latent, denoise=1.0)


def spectrum(model, ensemble, latent) -> None:
    LoRAEnsembleSpectrum.execute(**{**HOW, "model": model}, ensemble=ensemble, latent_image=latent)


def calibrate(model, ensemble, latent) -> None:
    LoRAEnsembleCalibrateGuidance.execute(**{**HOW, "model": model, "steps": 3}, latent_image=latent, denoise=1.0,
                                          seeds=1, batch_size=1, second_round=False, intercept=False)


@pytest.mark.parametrize("node", [leave_one_out, spectrum, calibrate])
@pytest.mark.parametrize("name", LATENTS)
def test_nodes_start_where_a_ksampler_does(name, node, loras, monkeypatch):
    model, latent, seen, sample = base("SD15"), LATENTS[name], [], comfy.sample.sample

    def starts(_, noise, *args, **options):
        seen.append((noise[:1], args[6][:1]))
        return sample(_, noise, *args, **options)

    monkeypatch.setattr(comfy.sample, "sample", starts)
    with torch.inference_mode():
        host_nodes.common_ksampler(model, HOW["seed"], 1, 3.0, "euler", "normal", HOW["positive"], HOW["negative"],
                                   latent)
        node(model, three(model, loras), latent)
    (noise, start), *ours = seen
    assert ours and all(torch.equal(each, start) for _, each in ours)
    # A calibration has seeds of its own, one for each of its paths.
    assert all(torch.equal(each, noise) for each, _ in ours) or (node is calibrate and "batch_index" in latent)


def test_a_picture_stays_as_it_is():
    latent = LATENTS["a picture"]
    assert torch.equal(latent_of(base("SD15"), latent), latent["samples"])
