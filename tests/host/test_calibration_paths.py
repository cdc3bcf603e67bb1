"""Which paths a calibration samples, and what it says that they take."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import pytest
import torch
from lora_ensemble.host.guidance import calibrate as made
from lora_ensemble.host.guidance.calibrate import calibrate, cost

from .guidance_tools import SD15
from .models import base
from .test_calibration import paths

LARGE = torch.zeros(1, 1, 1, 1).expand(1, 16, 512, 512)


def test_seeds_go_on_with_the_first_one_behind_the_last(monkeypatch):
    seen, prepare = [], comfy.sample.prepare_noise

    def note(latent, seed, *args):
        seen.append(seed)
        return prepare(latent, seed, *args)

    monkeypatch.setattr(comfy.sample, "prepare_noise", note)
    calibrate(base("SD15"), paths(positive=SD15.cond(11), steps=2, seed=2**64 - 2, seeds=3, batch=2))
    assert seen == [2**64 - 2, 2**64 - 1, 0]


@pytest.mark.parametrize(("options", "rounds", "said"), [
    ({}, 1, "6 paths of 8 steps, 96 evaluations of the model or more, 0.50 GB for the predictions of 2 paths "),
    ({"seeds": 1}, 2, "2 paths of 8 steps, 64 evaluations of the model or more, 0.25 GB for the predictions of 1 path"),
])
def test_what_it_takes(options, rounds, said):
    """Both sides of every step of the paths that are sampled at a time, in four bytes each."""
    assert said in cost(paths(latent=LARGE, **options), rounds)


@pytest.mark.parametrize(("options", "said"), [
    ({"positive": []}, "there is no prompt"),
    ({"steps": made.CALLS + 1, "seeds": 1}, f"2 paths of {made.CALLS + 1:,} steps are more than can be solved"),
    ({"steps": 100, "seeds": made.EVALUATED // 200 + 1}, "of 100 steps are more than can be solved"),
    ({"latent": LARGE, "batch": 3}, "3 paths of 8 steps at a time take 1 GB, and this machine has 1"),
])
def test_more_than_can_be_done_is_refused_before_it_begins(options, said, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda device: 2**29 + 2**27)
    with pytest.raises(ValueError, match="Calibrate Guidance: .*" + said):
        cost(paths(**options), 1)
