"""Layers that the host does not call: feed-forwards of int8 models, whose activation is folded into the product."""

from __future__ import annotations

import comfy.ops
import pytest
import torch
from lora_ensemble.benchmarks.packed import pack
from lora_ensemble.host.compose import fused
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec
from torch import nn

from .builders import composite, lora, merge, same, sample, shapes
from .models import FAMILIES, base, build, patcher, randomize
from .small_video import SMALL, built, forgotten, nothing_left  # noqa: F401

pytestmark = pytest.mark.skipif(not hasattr(comfy.ops, "linear_input_act"), reason="this ComfyUI folds nothing")
FEED_FORWARD = {"Wan": "ffn.2", "LTX-Video": "ff.net.2", "MiniMax H3": "fc2"}


def int8(module: nn.Module, ending: str) -> list[str]:
    """The linear layers whose names end so hold int8 weights from now on, in the host's class of quantized layers."""
    names = [name for name, layer in module.named_modules() if name.endswith(ending) and isinstance(layer, nn.Linear)
             and type(layer).__name__ != "_SparseLinear"]  # which takes no tensors
    pack(module, names, "int8")
    return names


def int8_wan():
    model = build(FAMILIES["Wan"])
    randomize(model)
    return patcher(model), int8(model.diffusion_model, FEED_FORWARD["Wan"])


@pytest.mark.parametrize("compose", [merge, composite], ids=["Merge", "Composite"])
def test_loras_act_on_layers_that_are_not_called(compose, loras, monkeypatch):
    """Guard: without it they had no effect. Against the host's own product with what the LoRA adds to it, computed by
    hand on the activation."""
    model, names = int8_wan()
    tensors = lora({name: torch.Size((48, 64)) for name in names}, 3, 4)
    ours = compose(model, [LoRASpec(loras(tensors), 0.8, 0)])
    found, plain = sample(ours, "Wan", steps=2), sample(model, "Wan", steps=2)
    host, root = comfy.ops.linear_input_act, model.model.diffusion_model
    deltas = {id(root.get_submodule(name)): 0.8 * up(tensors, name) @ down(tensors, name) for name in names}
    seen = []

    def by_hand(linear, x, act):
        seen.append(act)
        return host(linear, x, act) + comfy.ops.INPUT_ACT_EAGER[act](x) @ deltas[id(linear)].T

    monkeypatch.setattr(comfy.ops, "linear_input_act", by_hand)
    same(found, sample(model, "Wan", steps=2), plain, 1e-3)
    assert seen and record_of(ours).problems == []


def up(tensors: dict, name: str) -> torch.Tensor:
    return next(value for key, value in tensors.items() if key.endswith("lora_up.weight") and flat(name) in key)


def down(tensors: dict, name: str) -> torch.Tensor:
    return next(value for key, value in tensors.items() if key.endswith("lora_down.weight") and flat(name) in key)


def flat(name: str) -> str:
    return f"{name.replace('.', '_')}."


@pytest.mark.parametrize("name", FEED_FORWARD)
@pytest.mark.usefixtures("forgotten")
def test_every_feed_forward_that_is_folded_is_called(name):
    """With a forward of its own, as LoRAs give it; without, the host folds it as ever."""
    kind, model = SMALL[name], built(name)
    names = int8(model, FEED_FORWARD[name])
    if not names:
        pytest.skip(f"{name} has no such layers here")
    calls = []
    plain = kind.call(model, {})
    layer = model.get_submodule(names[0])
    forward = layer.forward
    layer.forward = lambda x: calls.append(names[0]) or forward(x)
    fused.call_routed_layers()
    try:
        assert torch.allclose(kind.call(model, {}), plain, atol=1e-4)
    finally:
        fused.as_before()
        del layer.forward
    assert calls == [names[0]]


def test_runs_put_back_what_the_host_had(loras):
    """Also where one run starts another, and where one fails."""
    host = comfy.ops.linear_input_act
    fused.call_routed_layers()
    fused.call_routed_layers()
    fused.as_before()
    assert comfy.ops.linear_input_act is not host
    fused.as_before()
    assert comfy.ops.linear_input_act is host
    model = base("SD15")
    ours = merge(model, [LoRASpec(loras(lora(shapes(model), 1, 4)), 0.8, 0)])

    def stop(*_):
        assert comfy.ops.linear_input_act is not host
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(ours, callback=stop)
    assert comfy.ops.linear_input_act is host


def test_what_later_releases_fold_in_is_theirs(monkeypatch):
    """Guard: a residual that is added in the product would be lost."""
    seen = []
    monkeypatch.setattr(comfy.ops, "linear_input_act", lambda *args, **kwargs: seen.append((args, kwargs)))
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: pytest.fail("not to be called")
    fused.call_routed_layers()
    comfy.ops.linear_input_act(layer, torch.ones(1, 2), "gelu_tanh", residual=torch.ones(1, 2))
    comfy.ops.linear_input_act(layer, torch.ones(1, 2), "rms_norm")
    fused.as_before()
    assert len(seen) == 2
