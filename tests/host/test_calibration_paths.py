"""Which paths a calibration samples, and what it says that they take."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import comfy.samplers
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


@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_paths_have_the_schedule_of_a_sampler_with_these_settings(denoise):
    """Else the coefficients would be refused by the sampler that they were made for."""
    coeffs = calibrate(base("SD15"), paths(positive=SD15.cond(11), steps=3, seeds=1, denoise=denoise))
    sampler = comfy.samplers.KSampler(base("SD15"), 3, torch.device("cpu"), "euler", "normal", denoise)
    assert coeffs.sigmas == tuple(sampler.sigmas.tolist())


@pytest.mark.parametrize("rounds", [1, 2])
def test_what_it_takes_is_logged_before_it_begins(rounds, caplog):
    def begun() -> None:
        assert f"{rounds * 2 * 2} evaluations of the model" in caplog.text
        raise comfy.model_management.InterruptProcessingException

    with caplog.at_level("INFO", logger="lora_ensemble"), pytest.raises(
            comfy.model_management.InterruptProcessingException):
        calibrate(base("SD15"), paths(positive=SD15.cond(11), steps=2, seeds=1), rounds == 2, progress=begun)


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
