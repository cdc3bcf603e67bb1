"""Bases whose weights are packed: what the LoRAs add is as exact as on an ordinary base."""

from __future__ import annotations

import comfy.lora
import comfy.ops
import pytest
import torch
import torch.nn.functional as F
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.host.compose.read_weight import read_weight
from lora_ensemble.host.files.ensemble import LoRASpec
from torch import nn

from .builders import Rand, composite, hooked, kohya, lora, merge, same, sample, shapes, stock, three
from .kinds import EVERYWHERE
from .models import CPU, FAMILIES, base, patcher

FP8 = torch.float8_e4m3fn
FP8_KINDS = [FP8, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]  # the last two are AMD's


def fp8_pair(family: str, dtype: torch.dtype = FP8):
    """(a model whose weights are stored in fp8 and computed in fp32, the same model with those weights in fp32)."""
    import comfy.supported_models

    kind = FAMILIES[family]
    config = getattr(comfy.supported_models, kind.kind)(dict(kind.config))
    config.set_inference_dtype(dtype, torch.float32)
    packed = config.get_model({}, "", device=CPU)
    state = {key: value.to(dtype) if value.is_floating_point() else value
             for key, value in base(family).model.state_dict().items()}
    packed.load_state_dict(state)
    from .models import build

    plain = build(kind)
    plain.load_state_dict({key: value.float() if value.dtype == dtype else value for key, value in state.items()})
    layer = next(m for m in packed.diffusion_model.modules() if isinstance(m, nn.Linear))
    assert layer.weight.dtype == dtype, "the base must be stored in fp8"
    return patcher(packed), patcher(plain)


@pytest.mark.parametrize("dtype", FP8_KINDS, ids=str)
def test_fp8_base(dtype, loras):
    """Linear layers and convolutions, against the same values in fp32: the host's own merge would round the LoRA to fp8
    together with the weight."""
    packed, plain = fp8_pair("SD15", dtype)
    ensemble, kind = three(packed, loras), FAMILIES["SD15"]
    without = sample(plain)
    assert (sample(packed) - without).abs().max() < 1e-4 * without.abs().max()
    same(sample(merge(packed, ensemble)), sample(stock(plain, ensemble)), without)
    reference = sample(plain, "SD15", hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble))
    same(sample(composite(packed, ensemble)), reference, without)


@pytest.mark.parametrize("kind", ["DoRA", "DoRA inputs", "OFT", "GLoRA", "LoKr w1a w2a"])
def test_kinds_on_an_fp8_base(kind, loras):
    """DoRA's norms come from the weight as stored; everything else never looks at it."""
    packed, plain = fp8_pair("SD15")
    rand, tensors, state = Rand(1), {}, plain.model.state_dict()
    for layer in shapes(plain, lambda name: "attn" in name or "in_layers.2" in name):
        made = EVERYWHERE[kind](state[f"diffusion_model.{layer}.weight"], rand)
        tensors |= {f"{kohya(layer)}.{end}": value for end, value in made.items()}
    ensemble = [LoRASpec(loras(tensors), 0.7, 0)]
    ours = merge(packed, ensemble)
    same(sample(ours, steps=1), sample(stock(plain, ensemble), steps=1), sample(plain, steps=1))
    assert ours.get_attachment(KEY).record.problems == []


class Packed(nn.Module):
    """A layer as GGUF loaders make it: the weight is a blob of bytes with a shape of its own making, and only the
    layer's own forward can open it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", ((linear.weight.detach() / scale).round() + 128).to(torch.uint8))
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def opened(self) -> torch.Tensor:
        return (self.weight.float() - 128) * self.scale

    def forward(self, x):
        return F.linear(x, self.opened(), self.bias)


def packed_pair():
    """(a model with packed layers, the same values in ordinary ones)."""
    from .models import build

    packed, plain = (build(FAMILIES["SD15"]) for _ in range(2))
    for model in (packed, plain):
        model.load_state_dict(base("SD15").model.state_dict())
    for name, module in list(packed.diffusion_model.named_modules()):
        if isinstance(module, nn.Linear) and "attn" in name:
            owner, _, leaf = name.rpartition(".")
            layer = Packed(module)
            setattr(packed.diffusion_model.get_submodule(owner), leaf, layer)
            with torch.no_grad():
                plain.diffusion_model.get_submodule(name).weight.copy_(layer.opened())
    return patcher(packed), patcher(plain)


def test_nested_layers(loras):
    packed, plain = packed_pair()
    ensemble, kind = three(plain, loras), FAMILIES["SD15"]
    same(sample(merge(packed, ensemble)), sample(stock(plain, ensemble)), sample(plain))
    reference = sample(plain, "SD15", hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble))
    same(sample(composite(packed, ensemble)), reference, sample(plain))


def test_dora_on_an_unreadable_weight_is_named_once(loras, caplog):
    """What cannot be expressed is left out and said; the rest of the ensemble is exact."""
    packed, plain = packed_pair()
    rand, tensors, state = Rand(1), {}, plain.model.state_dict()
    layer = next(iter(shapes(plain, lambda name: name.endswith("attn1.to_q"))))
    made = EVERYWHERE["DoRA"](state[f"diffusion_model.{layer}.weight"], rand)
    tensors |= {f"{kohya(layer)}.{end}": value for end, value in made.items()}
    dora, other = LoRASpec(loras(tensors), 0.7, 0), LoRASpec(loras(lora(shapes(plain), 5)), 0.5, 0)
    ours = merge(packed, [dora, other])
    out = sample(ours, steps=3)
    problems = ours.get_attachment(KEY).record.problems
    assert len(problems) == 1 and dora.name in problems[0] and layer in problems[0] and "DoRA" in problems[0]
    assert sum("DoRA" in message for message in caplog.messages) == 1
    same(out, sample(stock(plain, [other]), steps=3), sample(plain, steps=3))


@torch.inference_mode()
def test_quantized_layers_of_the_host(loras):
    """ComfyUI's own mixed-precision layers derive from nn.Module alone and hold a tensor subclass."""
    from .models import build

    make = getattr(comfy.ops, "mixed_precision_ops", None)
    quant = pytest.importorskip("comfy.quant_ops", reason="this ComfyUI has no quantized tensors")
    if make is None or "float8_e4m3fn" not in getattr(quant, "QUANT_ALGOS", {}):
        pytest.skip("this ComfyUI has no mixed-precision layers")
    ops = make({}, compute_dtype=torch.float32)
    packed, plain = build(FAMILIES["SD3"]), build(FAMILIES["SD3"])
    for model in (packed, plain):
        model.load_state_dict(base("SD3").model.state_dict())
    for name, module in list(packed.diffusion_model.named_modules()):
        if isinstance(module, nn.Linear) and "attn.qkv" in name:
            layer = ops.Linear(module.in_features, module.out_features, bias=True, device=CPU, dtype=torch.float32)
            scale = module.weight.detach().abs().max() / 448
            text = b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}'
            conf = torch.tensor(list(text), dtype=torch.uint8)
            layer._load_from_state_dict({"l.weight": (module.weight.detach() / scale).to(FP8), "l.weight_scale": scale,
                                         "l.bias": module.bias.detach(), "l.comfy_quant": conf}, "l.", {}, False, [],
                                        [], [])
            owner, _, leaf = name.rpartition(".")
            setattr(packed.diffusion_model.get_submodule(owner), leaf, layer)
            with torch.no_grad():
                plain.diffusion_model.get_submodule(name).weight.copy_(layer.weight.dequantize())
    assert type(layer.weight.data) is not torch.Tensor and not isinstance(layer, nn.Linear)
    packed, plain = patcher(packed), patcher(plain)
    ensemble = three(plain, loras)
    same(sample(merge(packed, ensemble), "SD3"), sample(stock(plain, ensemble), "SD3"), sample(plain, "SD3"))
    rand, state = Rand(1), plain.model.state_dict()
    tensors = {f"{kohya(name)}.{end}": value
               for name in shapes(plain, lambda n: n.endswith("attn.qkv"))
               for end, value in EVERYWHERE["DoRA"](state[f"diffusion_model.{name}.weight"], rand).items()}
    dora = [LoRASpec(loras(tensors), 0.7, 0)]
    same(sample(merge(packed, dora), "SD3"), sample(stock(plain, dora), "SD3"), sample(plain, "SD3"))


def test_a_lack_of_memory_is_no_unreadable_weight(monkeypatch):
    """Guard: out of memory is a RuntimeError; a DoRA would be left out, and the picture be wrong."""
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")

    model = base("SD15")
    assert read_weight(model, "out.2.weight") is not None and read_weight(model, "no.such.weight") is None
    monkeypatch.setattr(comfy.lora, "calculate_weight", full)
    with pytest.raises(torch.OutOfMemoryError):
        read_weight(model, "out.2.weight")
