"""Models whose weights are packed by the host's own quantisation, in every format that it has: all of them can be made
on a CPU, where the host computes them step by step.

What a LoRA adds to a layer is what it adds to the unpacked weight, `B A x` of the input as it comes. Most formats pack
the input as well, and a last digit that differs may round a value the other way in the next layer; so layers are
compared one by one, within a run, and pictures where the host takes its products of the unpacked weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.ops
import pytest
import torch
from lora_ensemble.benchmarks.packed import FORMATS, formats, pack
from lora_ensemble.host.compose import fused
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec
from torch import Tensor, nn

from .any_model import any_model
from .builders import composite, lora, merge, same, stock
from .small_video import SMALL, like
from .test_parity_families import NAME, drawn, layers_of

pytestmark = pytest.mark.skipif(not formats(), reason="this ComfyUI has no packed layers")

KINDS = {
    "Wan": like(SMALL["Wan"], "Wan", dim=64, ffn_dim=128),
    "LTX-Video": like(SMALL["LTX-Video"], "LTX-Video", attention_head_dim=32, cross_attention_dim=64),
    "MiniMax H3": SMALL["MiniMax H3"],
}
"""Families whose feed-forwards the host folds, in widths that every format can hold."""

ELSEWHERE = {
    "fp8 without a scale (e4m3fn, e5m2, and AMD's e4m3fnuz and e5m2fnuz), also of convolutions":
        "tensors of that dtype, which the host converts: test_quantized",
    "fp8 with a scale as older files have it": "the host makes its own fp8 of it when it loads such a file",
    "GGUF": "layers of another pack: test_quantized has one that holds what those hold",
    "NF4 of bitsandbytes, SVDQuant, AWQ":
        "the host has none of them; packs that bring them bring layers of their own, routed as GGUF's are",
}
"""What else people have, and where it is tested or why not. What none of this can show is the products of a GPU's own
kernels: benchmarks/int8.py checks every layer there before it measures."""


def linears(module: nn.Module) -> list[str]:
    """Layers that every format can hold."""
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)
            and layer.in_features % 64 == 0 and layer.out_features % 32 == 0]


def model_of(family: str, name: str, full_precision: bool = False):
    """(a model with packed layers, their names, the same model with the same weights unpacked)"""
    model, unpacked = any_model(KINDS[family]), any_model(KINDS[family])
    names = linears(model.model.diffusion_model)
    pack(model.model.diffusion_model, names, name, full_precision)
    with torch.no_grad():
        for each in names:
            weight = model.model.diffusion_model.get_submodule(each).weight
            unpacked.model.diffusion_model.get_submodule(each).weight.copy_(weight.dequantize())
    return model, names, unpacked


STRENGTHS = (0.8, 0.5, -0.6)


def files_of(model) -> list[dict[str, Tensor]]:
    """LoRAs on all linear layers and convolutions that a call runs through."""
    layers = layers_of(model)
    return [lora(layers, seed, rank, **NAME) for seed, rank in ((1, 4), (2, 8), (3, 4))]


def specs(files, loras) -> list[LoRASpec]:
    return [LoRASpec(loras(file), strength, 0.0) for file, strength in zip(files, STRENGTHS, strict=True)]


@contextmanager
def effects(model, names: list[str]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """(layer, its input, what was added to what the host makes of it), for each call of a packed layer in runs."""
    root, found, inner = model.model.diffusion_model, [], {}

    def within(layer):
        forward = layer.forward

        def own(x):
            y = forward(x)
            inner[layer] = x.clone(), y.clone()  # some models go on in the same memory
            return y

        return own

    def around(name):
        def seen(layer, args, out):
            x, y = inner.pop(layer)
            found.append((name, x, out - y))

        return seen

    handles = []
    for name in names:
        layer = root.get_submodule(name)
        layer.forward = within(layer)
        handles.append(layer.register_forward_hook(around(name)))
    try:
        yield found
    finally:
        for name, handle in zip(names, handles, strict=True):
            handle.remove()
            del root.get_submodule(name).forward


def far(added: Tensor, expected: Tensor) -> float:
    return ((added - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", formats())
@pytest.mark.parametrize("family", KINDS)
def test_each_layer_adds_what_it_adds_to_the_unpacked_weight(family, name, loras):
    """Of several that are merged, and of each in a branch of its own; also where the host folds an activation in."""
    model, names, unpacked = model_of(family, name)
    files = files_of(unpacked)
    ensemble = specs(files, loras)

    def change(i: int, layer: str) -> Tensor:
        up, down = (files[i][f"diffusion_model.{layer}.lora_{end}.weight"] for end in "BA")
        return STRENGTHS[i] * (up @ down).T

    merged, apart = merge(model, ensemble), composite(model, ensemble)
    with effects(model, names) as found:
        drawn(merged, 1, 1.0)
        called = {layer for layer, *_ in found}
        for layer, x, added in found:
            assert far(added, sum(x @ change(i, layer) for i in range(3))) < 1e-5, layer
        found.clear()
        drawn(apart, 1, 1.0)
        counted: dict[str, Counter] = {layer: Counter() for layer in names}
        for layer, x, added in found:
            for row, own in zip(x, added, strict=True) if len(x) == 3 else [(x, added)]:
                best = min(range(3), key=lambda i: far(own, row @ change(i, layer)))  # noqa: B023
                assert far(own, row @ change(best, layer)) < 1e-5, layer
                counted[layer][best] += 1
    assert called == set(names) and all(len(set(each.values())) == 1 and len(each) == 3 for each in counted.values())
    assert record_of(merged).problems == [] and any(name.endswith(("ffn.2", "net.2", "fc2")) for name in names)


@pytest.mark.parametrize(("family", "name"), [
    ("Wan", "fp8 e4m3"), ("LTX-Video", "fp8 e5m2"), ("MiniMax H3", "mxfp8"), ("Wan", "nvfp4")])
def test_pictures_are_those_of_the_unpacked_weights(family, name, loras):
    """In formats whose products the host takes of the unpacked weight where a file asks for it or a card can do no
    other; against its own loaders, which change the weights. Convolutions and layers that are not packed included."""
    model, _, unpacked = model_of(family, name, full_precision=True)
    ensemble = specs(files_of(unpacked), loras)
    plain = drawn(unpacked, 1, 1.0)
    same(drawn(merge(model, ensemble), 1, 1.0), drawn(stock(unpacked, ensemble), 1, 1.0), plain, 1e-4)
    mean = torch.stack([drawn(stock(unpacked, [spec]), 1, 1.0) for spec in ensemble]).mean(dim=0)
    same(drawn(composite(model, ensemble), 1, 1.0), mean, plain, 1e-4)


@pytest.mark.skipif(not hasattr(comfy.ops, fused.NAME), reason="this ComfyUI folds nothing")
def test_what_the_host_folds_is_seen(monkeypatch, loras):
    """Guard of the first test: a LoRA that the host passes by."""
    model, names, unpacked = model_of("Wan", "int8")
    merged = merge(model, specs(files_of(unpacked), loras))
    monkeypatch.setattr("lora_ensemble.host.compose.composition.call_routed_layers", lambda: None)
    monkeypatch.setattr("lora_ensemble.host.compose.composition.as_before", lambda: None)
    with effects(model, names) as found:
        drawn(merged, 1, 1.0)
    assert {layer for layer, *_ in found} == {layer for layer in names if not layer.endswith("ffn.2")}
    assert any("never called" in line for line in record_of(merged).problems)


def test_formats_are_all_that_the_host_has():
    """One that a new release adds fails here, until it is made above."""
    from comfy.quant_ops import QUANT_ALGOS

    assert QUANT_ALGOS.keys() <= {each.algorithm for each in FORMATS.values()}
