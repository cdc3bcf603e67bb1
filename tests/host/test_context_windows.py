"""Places of LoRAs in context windows: each window has the frames of the masks and words that it holds, and the frame
that it is anchored to."""

from __future__ import annotations

from inspect import signature

import comfy.context_windows
import pytest
import torch
from lora_ensemble.host.compose.composition import places_of, record_of

from .builders import merge, same, sample, stock
from .models import base
from .test_masks import LAST, bare, pair
from .test_routed import prompt, routed, specs

OVER = {"Wan": (2, 1), "SD15": (0, 5)}
"""Family -> (the dimension that windows are over, pictures of a batch)."""


def windowed(model, family: str, schedule: str = "standard_static"):
    windows, model = comfy.context_windows, model.clone()
    if not OVER[family][0] and "causal_window_fix" not in signature(windows.IndexListContextHandler).parameters:
        pytest.skip("windows over a batch stop this ComfyUI itself")
    model.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule(schedule), windows.get_matching_fuse_method("pyramid"),
        context_length=2, context_overlap=1, dim=OVER[family][0])
    return model


@pytest.mark.parametrize("schedule", ["standard_static", "looped_uniform", "batched"])
@pytest.mark.parametrize("family", OVER)
def test_a_mask_for_each_frame(family, schedule, loras):
    """The first frames have the LoRA, the last ones nothing of it."""
    model, (dim, batch) = base(family), OVER[family]
    frames = torch.zeros(3 if dim else batch, 16, 16)
    frames[:2] = 1
    specs = pair(model, loras, LAST[family], (frames, None))[:1]
    ours, alone, plain = (sample(windowed(each, family, schedule), family, batch=batch, steps=1).transpose(0, dim)
                          for each in (merge(model, specs), stock(model, bare(specs)), model))
    same(ours[:2], alone[:2], plain[:2], 1e-4)
    assert torch.equal(ours[2:], plain[2:]) and not torch.equal(alone[2:], plain[2:])


def test_pictures_of_a_batch_do_not_see_each_other(loras):
    """So they are the same whatever window they are in."""
    model, batch = base("SD15"), OVER["SD15"][1]
    ours = routed(model, specs(model, loras), mode="once", trust=False)
    want = sample(ours, "SD15", prompt(), batch=batch, steps=3)
    maps = places_of(ours)[0].maps
    cut, plain = windowed(ours, "SD15"), sample(model, "SD15", prompt(), batch=batch, steps=3)
    same(sample(cut, "SD15", prompt(), batch=batch, steps=3), want, plain)
    assert record_of(cut).problems == []
    torch.testing.assert_close(places_of(cut)[0].maps, maps, rtol=1e-3, atol=1e-3)


def test_trust_is_not_measured_over_a_batch(loras):
    model = base("SD15")
    ours = windowed(routed(model, specs(model, loras), trust=True), "SD15")
    assert torch.isfinite(sample(ours, "SD15", prompt(), batch=5)).all()
    (problem,) = record_of(ours).problems
    assert "context windows over a batch" in problem


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("mode", ["once", "every step"])
def test_words_of_a_film_are_looked_for_in_every_window(mode, trust, loras):
    """Where a window was not looked into, its LoRAs would act everywhere."""
    model = base("Wan")
    ours = windowed(routed(model, specs(model, loras), mode=mode, trust=trust), "Wan")
    assert torch.isfinite(sample(ours, "Wan", prompt("Wan"), steps=3)).all()
    assert [step.rows for step in record_of(ours).steps] == [6, 4, 4] and record_of(ours).problems == []
    maps = places_of(ours)[0].maps
    assert maps.shape[2] == 3 and (maps.flatten(3).amin(-1) < 0.9).all()
