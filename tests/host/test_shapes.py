"""LoRAs whose shape is special: enlarged layers, and convolutions in groups."""

from __future__ import annotations

import comfy.lora
import comfy.ops
import pytest
import torch
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.files.files import LoRAFile
from lora_ensemble.host.files.parse import parse
from lora_ensemble.host.files.patches import load
from lora_ensemble.kernels.branch import Branch
from torch import nn

from .builders import Rand, composite, kohya, lora, merge, same, sample, shapes, stock
from .kinds import EVERYWHERE
from .models import base

NAME = {"name": str, "down": "lora_A.weight", "up": "lora_B.weight"}


def flux_lora(reshape: tuple[int, int] | None, layers=None) -> dict:
    """A LoRA of Flux with `reshape_weight` on its first layer, as control LoRAs have it."""
    layers = layers or {"img_in": shapes(base("Flux"))["img_in"]}
    named = {f"diffusion_model.{layer}": shape for layer, shape in layers.items()}
    tensors = lora(named, 1, **NAME)
    if reshape is not None:
        tensors["diffusion_model.img_in.reshape_weight"] = torch.tensor(reshape)
    return tensors


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("make", [merge, composite])
def test_layers_of_rank_zero_change_nothing(make, alpha, loras):
    """What resizing a LoRA may leave of a layer; the other layers, and other LoRAs there, act as ever."""
    model, cut = base("SD15"), lora(shapes(base("SD15")), 1, alpha=alpha)
    whole = dict(cut)
    for layer in list(shapes(model))[::2]:
        key = kohya(layer)
        cut[f"{key}.lora_up.weight"] = cut[f"{key}.lora_up.weight"][:, :0].clone()
        cut[f"{key}.lora_down.weight"] = cut[f"{key}.lora_down.weight"][:0].clone()
        for end in ("lora_up.weight", "lora_down.weight", "alpha"):
            whole.pop(f"{key}.{end}", None)
    other = LoRASpec(loras(lora(shapes(model), 2)), -0.5, 0.0)
    ours, reference = (make(model, (LoRASpec(loras(file), 0.8, 0.0), other)) for file in (cut, whole))
    assert torch.equal(sample(ours), sample(reference)) and ours.get_attachment(KEY).applied[0].problems == ()


def test_reshape_to_the_shape_that_is_there(loras):
    model = base("Flux")
    spec = LoRASpec(loras(flux_lora(tuple(shapes(model)["img_in"]))), 0.8, 0)
    for ours in (merge(model, [spec]), composite(model, [spec])):
        same(sample(ours, "Flux"), sample(stock(model, [spec]), "Flux"), sample(model, "Flux"))
        assert ours.get_attachment(KEY).applied[0].problems == ()


def test_an_enlarged_layer_is_named_and_left_out(loras):
    """Guard: the shape is compared; factors of an enlarged layer do not fit the forward of the layer that is there."""
    model = base("Flux")
    (out, wide), block = shapes(model)["img_in"], "double_blocks.0.img_attn.proj"
    enlarged = flux_lora((out, 2 * wide), {"img_in": torch.Size((out, 2 * wide)), block: shapes(model)[block]})
    rest = {key: value for key, value in enlarged.items() if "img_in" not in key}
    ours = composite(model, [LoRASpec(loras(enlarged), 0.8, 0)])
    reference = composite(model, [LoRASpec(loras(rest), 0.8, 0)])
    (problem,) = ours.get_attachment(KEY).applied[0].problems
    assert "1 key such as diffusion_model.img_in.weight: it enlarges the layer; left out" in problem
    assert torch.equal(sample(ours, "Flux"), sample(reference, "Flux"))
    assert not torch.equal(sample(ours, "Flux"), sample(model, "Flux"))


def grouped(groups: int) -> nn.Module:
    """What parse() needs of a base model: its diffusion model, here one convolution in groups."""
    torch.manual_seed(0)
    model = nn.Module()
    model.diffusion_model = nn.Module()
    model.diffusion_model.conv = comfy.ops.disable_weight_init.Conv2d(8, 8, 3, padding=1, groups=groups)
    nn.init.normal_(model.diffusion_model.conv.weight)
    nn.init.normal_(model.diffusion_model.conv.bias)
    return model


def parsed(model: nn.Module, kind: str):
    weight = model.diffusion_model.conv.weight.detach()
    tensors = {f"conv.{end}": value for end, value in EVERYWHERE[kind](weight, Rand(1)).items()}
    patches = load(LoRAFile(tensors), {"conv": "diffusion_model.conv.weight"}, model, {})
    assert patches.used == tensors.keys() and not patches.misfits
    return patches, parse(patches, model)


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr w1 w2", "DoRA", "OFT", "diff", "set_weight"])
def test_grouped_convolution(kind):
    """Kinds that keep to the groups act as the host's patched weight does (OFT's blocks of 4 lie within groups)."""
    model = grouped(2)
    loaded, found = parsed(model, kind)
    assert not found.left_out
    conv, x = model.diffusion_model.conv, torch.randn(2, 8, 5, 5)
    routed = RoutedForwards(model.diffusion_model, Bank([found.layers]),
                            lambda name: model.diffusion_model.get_parameter(name).detach().float())
    before = conv(x)
    routed.install()
    with torch.inference_mode(), routed.rows([Branch((0.7,)), Branch((0.0,))]):
        ours = conv(x)
    routed.remove()
    patches = [(0.7, loaded.found["diffusion_model.conv.weight"], 1.0, None, None)]
    weight = comfy.lora.calculate_weight(patches, conv.weight.detach().clone(), "diffusion_model.conv.weight")
    reference = nn.functional.conv2d(x, weight, conv.bias, padding=1, groups=2)
    torch.testing.assert_close(ours[0], reference[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(ours[1], before[1]) and not torch.allclose(ours[0], before[0], atol=0.05)


@pytest.mark.parametrize(("kind", "groups"), [("OFT", 4), ("BOFT", 2), ("GLoRA", 2), ("DoRA inputs", 2)])
def test_a_kind_that_mixes_groups_is_refused(kind, groups):
    """Guard: a rotation of weight rows that see different inputs is no rotation of the outputs."""
    _, found = parsed(grouped(groups), kind)
    assert [reason for _, reason in found.left_out] == ["it mixes channels of different groups of a convolution"]
    assert not found.layers
