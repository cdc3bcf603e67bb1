"""Half precision, memory formats, inference mode, five dimensions: whole models of the host under other conditions."""

from __future__ import annotations

import comfy.sample
import pytest
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.host.files.ensemble import LoRASpec
from torch import nn

from .builders import composite, file_of, hooked, lora, merge, same, sample, shapes, stock, three
from .models import FAMILIES, base, build, patcher, randomize

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Norm of the error of a layer's output over its norm, with inputs and weights as they are, against float64: twice the
unit round-off of the dtype, once for the base output and once for the sum."""


def expected(weight: torch.Tensor, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    bias = None if module.bias is None else module.bias.double()
    if isinstance(module, nn.Linear):
        return F.linear(x.double(), weight, bias)
    return F.conv2d(x.double(), weight, bias, module.stride, module.padding, module.dilation, module.groups)


def delta(held: dict, layer: str, gain: float, dtype: torch.dtype) -> torch.Tensor:
    """gain * scale * up @ down in float64, the factors rounded as the bank holds them."""
    key = f"lora_unet_{layer.replace('.', '_')}"
    up, down = held[f"{key}.lora_up.weight"], held[f"{key}.lora_down.weight"]
    scale = float(held[f"{key}.alpha"]) / down.shape[0] if f"{key}.alpha" in held else 1.0
    up, down = (up.float() * scale).to(dtype).double(), down.to(dtype).double()
    return gain * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("make", [merge, composite])
@pytest.mark.parametrize("family", ["SD15", "SD3"])
def test_every_layer_against_float64(family, make, dtype, loras):
    """Inputs and outputs of all layers during a real run, row by row, with the weights that the branch stands for."""
    model = base(family, dtype)
    ensemble, worst, rows = three(model, loras), {}, []
    held = [file_of(spec) for spec in ensemble]
    ours = make(model, ensemble)
    names = set(shapes(model))

    def note(executor, *args, **kwargs):
        uuids = kwargs.get("transformer_options", args[-1] if isinstance(args[-1], dict) else {})["uuids"]
        run = ours.get_attachment(KEY).run
        rows[:] = [run.combos.get(uuid, run.single)[0] for uuid in uuids]
        return executor(*args, **kwargs)

    def check(name: str, module: nn.Module, args: tuple, y: torch.Tensor) -> None:
        for x_part, y_part, branch in zip(args[0].chunk(len(rows)), y.chunk(len(rows)), rows, strict=True):
            weight = module.weight.double() + sum(delta(file, name, gain, dtype)
                                                  for file, gain in zip(held, branch.gains, strict=True) if gain)
            right = expected(weight, module, x_part)
            error = ((y_part.double() - right).norm() / right.norm()).item()
            worst[name] = max(worst.get(name, 0.0), error)

    watched = ours.clone()
    watched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "note", note)
    handles = [module.register_forward_hook(lambda module, args, y, name=name: check(name, module, args, y))
               for name, module in model.model.diffusion_model.named_modules() if name in names]
    try:
        sample(watched, family, steps=1)
    finally:
        for handle in handles:
            handle.remove()
    assert len(worst) >= len(names) - 2
    assert max(worst.values()) < TOLERANCE[dtype], max(worst, key=worst.get)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_composite_in_half_precision(dtype, loras):
    """Nearer to the float32 picture than the host's own way, which rounds the merged weights, or at least as near."""
    model, kind = base("Flux", dtype), FAMILIES["Flux"]
    ensemble = three(model, loras)
    exact = base("Flux")
    plain = sample(exact, "Flux")
    right = sample(exact, "Flux", hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble))
    theirs = sample(model, "Flux", hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble))
    ours = sample(composite(model, ensemble), "Flux")
    effect = (right - plain).norm()
    assert (ours - right).norm() / effect < 1.5 * (theirs - right).norm() / effect


@pytest.mark.parametrize("other", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16], ids=str)
def test_files_in_fp8(other, loras):
    """Alone and beside files of other dtypes, with an alpha/rank that fp8 would round: what the host makes of them."""
    model = base("SD15")
    files = [{key: value.to(dtype) if value.ndim else value for key, value in lora(shapes(model), seed, 4, 2.6).items()}
             for seed, dtype in ((1, torch.float8_e4m3fn), (2, other))]
    ensemble = tuple(LoRASpec(loras(file), strength, 0.0) for file, strength in zip(files, (0.8, -0.5), strict=True))
    for some in (ensemble[:1], ensemble):
        same(sample(merge(model, some)), sample(stock(model, some)), sample(model))


def test_with_and_without_inference_mode(loras):
    """Tensors made in one mode must not reach the other: the server samples in inference mode, scripts may not."""
    ours, kind = merge(base("SD3"), three(base("SD3"), loras)), FAMILIES["SD3"]
    reference = sample(ours, "SD3")
    noise = kind.noise(seed=1)
    for _ in range(2):
        with torch.no_grad():
            out = comfy.sample.sample(ours, noise, 2, 3.0, "euler", "normal", kind.cond(11), kind.cond(12),
                                      torch.zeros_like(noise), seed=1, disable_pbar=True)
        assert torch.equal(out, reference)
        assert torch.equal(sample(ours, "SD3"), reference)


def test_channels_last(loras):
    model = build(FAMILIES["SD15"])
    randomize(model)
    last = patcher(model.to(memory_format=torch.channels_last))
    ensemble, kind = three(base("SD15"), loras), FAMILIES["SD15"]
    seen = []
    last.model.diffusion_model.input_blocks[1][0].in_layers[2].register_forward_hook(
        lambda module, args, y: seen.append(y.is_contiguous(memory_format=torch.channels_last)))
    ours = sample(composite(last, ensemble))
    assert all(seen) and seen
    reference = sample(base("SD15"), "SD15", hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble))
    same(ours, reference, sample(base("SD15")))


def test_video(loras):
    """Five dimensions: Wan's patch embedding is a three-dimensional convolution."""
    model, kind = base("Wan"), FAMILIES["Wan"]
    layers = shapes(model)
    assert any(len(shape) == 5 for shape in layers.values())
    ensemble = [LoRASpec(loras(lora({n: s for n, s in layers.items() if len(s) != 3}, seed, rank)), 0.7, 0)
                for seed, rank in ((1, 4), (2, 2))]
    plain = sample(model, "Wan")
    same(sample(merge(model, ensemble), "Wan"), sample(stock(model, ensemble), "Wan"), plain)
    reference = sample(model, "Wan", hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble))
    same(sample(composite(model, ensemble), "Wan"), reference, plain)
