"""Beside AnimateDiff-Evolved, by small nodes of the same contract: modules of its own stand between the layers of a
model that is loaded, and its windows are frames of a batch, cut within ours or around them."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP
from lora_ensemble.host.compose.apply import bake
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from torch import Tensor, nn

from .builders import composite, lora, merge, same, sample, shapes, stock, three
from .models import base
from .test_masks import LAST

BEFORE, FRAMES = "output_blocks.1.2.conv", 6
"""A layer that the module stands before, so that it is `output_blocks.1.3.conv` while the model is loaded."""


class Motion(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.7 * x + 0.3 * x.flip(-1)


@pytest.fixture
def animated():
    """The node. What it leaves in a loaded model goes with the test."""
    made, motion = [], Motion()

    def make(model):
        model = model.clone()
        block = model.model.diffusion_model.output_blocks[1]
        model.set_injections("motion", [PatcherInjection(lambda _: block.insert(2, motion), lambda _: block.pop(2))])
        made.append(model)
        return model

    yield make
    comfy.model_management.unload_all_models()
    assert not any(isinstance(module, Motion) for model in made for module in model.model.modules())


def loaders(model, ensemble):
    """ComfyUI's, which find these layers while the model is not loaded alone."""
    comfy.model_management.unload_all_models()
    return stock(model, ensemble)


def baked(model, ensemble):
    return bake(model, None, tuple(ensemble), "Merge LoRAs")[0]


@pytest.mark.parametrize("make", [merge, baked])
def test_layers_behind_other_modules_are_found(make, animated, loras):
    """In the run (guard: `RoutedForwards.install`), and by a node that is executed while the model is loaded (guard:
    `as_in_files`)."""
    model = base("SD15")
    assert BEFORE in shapes(model)
    first, *rest = (LoRASpec(loras(lora({BEFORE: shapes(model)[BEFORE]}, seed)), 0.8, 0) for seed in (1, 2))
    wanted, other = (sample(animated(loaders(model, [spec])), batch=2) for spec in (first, *rest))
    without, plain = sample(model, batch=2), sample(animated(model), batch=2)
    assert not torch.equal(plain, without), "it does nothing"
    assert BEFORE not in shapes(model)
    same(sample(animated(make(model, [first])), batch=2), wanted, plain)
    ours = make(animated(model), rest)
    same(sample(ours, batch=2), other, plain)
    assert make is baked or record_of(ours).problems == []


def test_several_branches(animated, loras):
    model = base("SD15")
    ensemble = three(model, loras)
    alone = [sample(animated(loaders(model, [spec])), steps=1, batch=2) for spec in ensemble]
    plain = sample(animated(model), steps=1, batch=2)
    for order in (lambda: animated(composite(model, ensemble)), lambda: composite(animated(model), ensemble)):
        same(sample(ours := order(), steps=1, batch=2), sum(alone) / 3, plain)
        assert record_of(ours).problems == []


def in_windows(model):
    """Windows of four frames; the exposed parameters are those that other packs are to go by."""
    def windows(executor: Callable, model, conds, x, timestep, options):
        found, count = [torch.zeros_like(x) for _ in conds], torch.zeros(len(x), 1, 1, 1)
        for start in (0, 2):
            index = list(range(start, start + 4))
            told = {**options["transformer_options"], "ad_params": {
                "full_length": FRAMES, "context_length": 4, "sub_idxs": index}}
            out = executor(model, conds, x[index], timestep[index], {**options, "transformer_options": told})
            for whole, part in zip(found, out, strict=True):
                whole[index] += part
            count[index] += 1
        return [whole / count for whole in found]

    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "motion", windows)
    return model


@pytest.mark.parametrize("within", [True, False])
def test_a_mask_is_of_the_frames_of_a_window(within, loras):
    """Guard: `window_of`."""
    model = base("SD15")
    layer, where = {LAST["SD15"]: shapes(model)[LAST["SD15"]]}, torch.zeros(FRAMES, 8, 8)
    where[:3] = 1
    ensemble = [LoRASpec(loras(lora(layer, seed)), 0.8, 0, mask=Mask(mask))
                for seed, mask in ((1, where), (2, 1 - where))]
    ours = in_windows(merge(model, ensemble)) if within else merge(in_windows(model), ensemble)
    first, second = (sample(stock(model, [LoRASpec(spec.name, 0.8, 0)]), steps=1, batch=FRAMES) for spec in ensemble)
    same(sample(ours, steps=1, batch=FRAMES), torch.cat([first[:3], second[3:]]), sample(model, steps=1, batch=FRAMES))
    assert record_of(ours).problems == []
