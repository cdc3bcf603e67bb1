"""Beside nodes that enlarge a model's first convolution for a picture beside the noise (IC-Light, LayerDiffuse, fill
models): by a patch on its weights, before or behind ours."""

from __future__ import annotations

from types import MethodType

import comfy.conds
import comfy.model_management
import pytest
import torch
from lora_ensemble.host.files.ensemble import LoRASpec

from .builders import Rand, composite, lora, merge, same, sample, shapes, stock
from .models import base

FIRST = "input_blocks.0.0"
PICTURE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def enlarged(model):
    """All weights changed, the first one for four more channels."""
    rand = Rand(7)
    sizes = {f"diffusion_model.{name}.weight": shape for name, shape in shapes(model).items()}
    first = f"diffusion_model.{FIRST}.weight"
    sizes[first] = (32, 8, 3, 3)
    model = model.clone()
    model.add_patches({name: ("diff", [rand(*size, size=0.05), {"pad_weight": name == first}])
                       for name, size in sizes.items()})

    def extra_conds(self, **kwargs):
        return {"c_crossattn": comfy.conds.CONDCrossAttn(kwargs["cross_attn"]),
                "c_concat": comfy.conds.CONDNoiseShape(PICTURE)}

    model.add_object_patch("extra_conds", MethodType(extra_conds, model.model))
    return model


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    comfy.model_management.unload_all_models()


def anew(model):
    """An object patch and a weight of another size go with the model that is unloaded."""
    comfy.model_management.unload_all_models()
    return model


@pytest.mark.parametrize(("layers", "behind"), [(None, True), (None, False), (FIRST, False)])
def test_it_is_what_the_node_makes_of_the_loaders(layers, behind, loras):
    """Guard: `_conv`. Behind such a node ComfyUI's loader leaves out what a LoRA does to the first convolution."""
    model = anew(base("SD15"))
    found = shapes(model, lambda name: name in (layers or name) and not (behind and name == FIRST))
    ensemble = [LoRASpec(loras(lora(found, seed)), 0.8, 0) for seed in (1, 2, 3)]

    def both(make, some):
        return sample(make(enlarged(anew(model)), some) if behind else enlarged(make(anew(model), some)), steps=1)

    plain = sample(enlarged(model), steps=1)
    same(both(merge, ensemble), both(stock, ensemble), plain)
    same(both(composite, ensemble), sum(both(stock, [spec]) for spec in ensemble) / 3, plain)
