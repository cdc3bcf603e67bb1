"""Our three methods against ComfyUI's own loaders and hooks, on small models of four families, in fp32."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.switch import Switch

from .builders import (
    composite,
    hooked,
    lora,
    merge,
    method,
    same,
    sample,
    schedule,
    shapes,
    stock,
    three,
)
from .models import FAMILIES, base

NAMES = ["SD15", "SDXL", "SD3", "Flux"]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", NAMES)
def test_merge_is_the_chain_of_loaders(family, batch, loras):
    model = base(family)
    ensemble = three(model, loras)
    reference = sample(stock(model, ensemble), family, batch=batch)
    same(sample(merge(model, ensemble), family, batch=batch), reference, sample(model, family, batch=batch))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", NAMES)
def test_composite_is_the_hook_composite(family, batch, loras):
    model, kind = base(family), FAMILIES[family]
    ensemble = three(model, loras)
    reference = sample(model, family, hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble), batch=batch)
    same(sample(composite(model, ensemble), family, batch=batch), reference, sample(model, family, batch=batch))


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("tau", [1, 2])
def test_switch_is_the_loader_of_each_turn(family, tau, loras):
    import comfy.sample
    import comfy.samplers

    model, kind = base(family), FAMILIES[family]
    ensemble, sigmas = three(model, loras), schedule(model, 4)
    sampler = comfy.samplers.sampler_object("euler")

    def run(model, noise, latent, part):
        with torch.inference_mode():
            return comfy.sample.sample_custom(model, noise, 3.0, sampler, part, kind.cond(11), kind.cond(12), latent,
                                              disable_pbar=True, seed=1)

    noise = kind.noise()
    reference = latent = torch.zeros_like(noise)
    for turn, start in enumerate(range(0, 4, tau)):
        part = sigmas[start:start + tau + 1]
        alone = stock(model, ensemble[turn % 3:turn % 3 + 1])
        reference = latent = run(alone, noise if start == 0 else torch.zeros_like(noise), latent, part)
    switched = method(model, ensemble, lambda s: Switch(s, tau))
    ours = run(switched, noise, torch.zeros_like(noise), sigmas)
    same(ours, reference, run(model, noise, torch.zeros_like(noise), sigmas))


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("make", [Merge, Switch, Composite])
def test_one_lora_is_the_loader(make, family, loras):
    model = base(family)
    ensemble = three(model, loras)[1:2]
    same(sample(method(model, ensemble, make), family), sample(stock(model, ensemble), family), sample(model, family))


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("make", [Merge, Switch, Composite])
def test_strength_zero_is_the_base_bit_for_bit(make, family, loras):
    model = base(family)
    ensemble = three(model, loras, (0.0, 0.0, 0.0))
    assert torch.equal(sample(method(model, ensemble, make), family, batch=2), sample(model, family, batch=2))


def test_a_file_of_zeros_is_the_base(loras):
    """Strength 0 leaves the forwards away; zeros go through them, and must add exactly nothing."""
    model = base("SD15")
    zeros = {key: value * 0 for key, value in lora(shapes(model), 1).items()}
    ensemble = [*three(model, loras)[:1]]
    ensemble = [type(ensemble[0])(loras(zeros), 1.0, 1.0)]
    assert torch.equal(sample(merge(model, ensemble)), sample(model))


@pytest.mark.parametrize("layers", ["linear", "convolutions"])
def test_loras_on_some_layers_only(layers, loras):
    from lora_ensemble.host.files.ensemble import LoRASpec

    model = base("SD15")
    all_layers = shapes(model)
    linear = {name for name, shape in all_layers.items() if len(shape) == 2}
    chosen = {n: s for n, s in all_layers.items() if (n in linear) == (layers == "linear")}
    half = dict(list(chosen.items())[::2])
    ensemble = [LoRASpec(loras(lora(chosen, 1)), 0.9, 0), LoRASpec(loras(lora(half, 2, 2)), 0.7, 0)]
    same(sample(merge(model, ensemble)), sample(stock(model, ensemble)), sample(model))
    reference = sample(model, "SD15", hooked(FAMILIES["SD15"].cond(11), ensemble),
                       hooked(FAMILIES["SD15"].cond(12), ensemble))
    same(sample(composite(model, ensemble)), reference, sample(model))
