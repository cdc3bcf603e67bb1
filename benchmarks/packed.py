"""Linear layers whose weights are packed by ComfyUI's own quantisation, in its own class, as it loads them of a file.

Everything here needs a ComfyUI whose `comfy.ops` has such layers (`formats` is empty otherwise).
"""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch
from torch import nn


class Format(NamedTuple):
    """algorithm: as ComfyUI calls it. options: of its quantisation. rotated: inputs are rotated in groups, whose
    sizes are powers of four."""

    algorithm: str
    options: dict = {}
    rotated: bool = False


FORMATS = {
    "int8": Format("int8_tensorwise"),
    "int8 per row": Format("int8_tensorwise", {"per_channel": True}),
    "int8 convrot": Format("int8_tensorwise", {"per_channel": True, "convrot": True}, True),
    "fp8 e4m3": Format("float8_e4m3fn", {"scale": "recalculate"}),
    "fp8 e5m2": Format("float8_e5m2", {"scale": "recalculate"}),
    "mxfp8": Format("mxfp8"),
    "nvfp4": Format("nvfp4"),
    "w4a4 convrot": Format("convrot_w4a4", {}, True),
    "w4a4 convrot, int8": Format("convrot_w4a4", {"linear_dtype": "int8"}, True),
    "w4a8": Format("asym_w4a8_int8", {}, True),
}


def formats() -> list[str]:
    """Those that this ComfyUI has."""
    import comfy.ops

    if importlib.util.find_spec("comfy.quant_ops") is None or not hasattr(comfy.ops, "mixed_precision_ops"):
        return []
    from comfy.quant_ops import QUANT_ALGOS

    return [name for name, each in FORMATS.items() if each.algorithm in QUANT_ALGOS]


def packed(layer: nn.Linear, name: str, full_precision: bool = False) -> nn.Module:
    """The layer with its weight in a format of FORMATS, on its device, computed in the dtype that it has.

    full_precision   products of the unpacked weight, as files may ask for (`full_precision_matrix_mult`); without it
                     most formats pack the input as well
    """
    import comfy.ops
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    algorithm, options, rotated = FORMATS[name]
    weight = layer.weight.detach()
    if rotated:
        group = next(size for size in (256, 64, 16, 4) if layer.in_features % size == 0)
        options = options | {"convrot_groupsize": group}
    layout = QUANT_ALGOS[algorithm]["comfy_tensor_layout"]
    linear = comfy.ops.mixed_precision_ops({}, weight.dtype, full_precision).Linear
    shape = (layer.in_features, layer.out_features, layer.bias is not None, weight.device)
    written, read = linear(*shape), linear(*shape)
    written.bias, written.quant_format, written.layout_type = layer.bias, algorithm, layout
    written.weight = nn.Parameter(QuantizedTensor.from_float(weight, layout, **options), requires_grad=False)
    read.load_state_dict(written.state_dict())
    return read.requires_grad_(False)


def pack(root: nn.Module, names: list[str], name: str, full_precision: bool = False) -> None:
    """Put packed layers in the places of some linear ones of a model, made where ComfyUI makes its own: its loaders run
    in inference mode, and there alone it can move them."""
    for each in names:
        owner, _, leaf = each.rpartition(".")
        with torch.inference_mode():
            setattr(root.get_submodule(owner), leaf, packed(root.get_submodule(each), name, full_precision))
