"""A weight of the base model as it is read: with what earlier nodes have put on it, whoever has put that into it."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from lora_ensemble.host.compose.read_weight import read_weight
from lora_ensemble.host.files.ensemble import LoRASpec

from .builders import file_of, kohya, lora, stock
from .models import base

LAYER = "out.2"
NAME, KEY = f"{LAYER}.weight", f"diffusion_model.{LAYER}.weight"


def test_with_the_loras_of_loaders_before_and_after_they_are_in_it(loras):
    """Once, and as often as it is read: what is read is a copy, and what it is made from stays as it is."""
    model = base("SD15")
    layer = model.model.diffusion_model.get_submodule(LAYER)
    plain = layer.weight.detach().clone()
    spec = LoRASpec(loras(lora({LAYER: plain.shape}, 1)), 0.7, 0.0)
    up, down = (file_of(spec)[f"{kohya(LAYER)}.lora_{end}.weight"] for end in ("up", "down"))
    want = plain + 0.7 * (up.flatten(1) @ down.flatten(1)).view_as(plain)
    patched = stock(model, [spec])

    def read() -> None:
        for _ in range(2):
            torch.testing.assert_close(read_weight(patched, NAME), want)

    read()
    assert torch.equal(layer.weight, plain)
    comfy.model_management.load_models_gpu([patched])
    try:
        assert KEY in patched.backup
        read()
        assert torch.equal(patched.backup[KEY].weight, plain)
        torch.testing.assert_close(layer.weight.detach(), want)
    finally:
        patched.detach()
    assert torch.equal(layer.weight, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_nobodys_weight(dtype):
    model = base("SD15", dtype)
    own = model.model.diffusion_model.get_submodule(LAYER).weight
    before, found = own.detach().clone(), read_weight(model, NAME)
    assert found.dtype is torch.float32 and torch.equal(found, before.float())
    found.zero_()
    assert torch.equal(own, before)


class Opaque(torch.Tensor):
    """A packed weight of a class of its own, which nothing can be computed with."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def dequantize(self) -> torch.Tensor:
        return self.inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} of a packed weight")


def test_packed_weights_are_unpacked_by_their_class_or_their_layer(monkeypatch):
    model = base("SD15").clone()
    layer, inner = model.model.diffusion_model.get_submodule(LAYER), torch.rand(3, 4)
    model.backup = {KEY: SimpleNamespace(weight=Opaque(inner))}
    assert torch.equal(read_weight(model, NAME), inner)
    monkeypatch.setattr(layer, "convert_weight", lambda weight, inplace: 2 * weight, raising=False)
    model.backup = {}
    assert torch.equal(read_weight(model, NAME), 2 * layer.weight)


def test_what_cannot_be_read():
    """Bytes of a packed weight, a weight that is nowhere yet, a parameter that the layer lacks."""
    model = base("SD15").clone()
    for other in (torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(4, 4, device="meta")):
        model.backup = {KEY: SimpleNamespace(weight=other)}
        assert read_weight(model, NAME) is None
    model.backup = {}
    assert read_weight(model, NAME) is not None and read_weight(model, f"{LAYER}.scale") is None
