"""A weight of the base model, read on its own."""

from __future__ import annotations

import comfy.lora
import comfy.model_patcher
import torch
from torch import Tensor


def read_weight(patcher, name: str) -> Tensor | None:
    """A tensor of the base model in fp32 as earlier nodes left it (their LoRAs included), or None where the model
    keeps it in a form that cannot be read. A lack of memory is no such form, and is not hidden."""
    key = f"diffusion_model.{name}"
    try:
        weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
        if key in patcher.backup:
            weight = patcher.backup[key].weight
        if convert is not None:
            weight = convert(weight, inplace=False)
        if hasattr(weight, "dequantize") and type(weight) not in (Tensor, torch.nn.Parameter):
            weight = weight.dequantize()
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
            return None
        weight = weight.detach().to(torch.float32, copy=True)
        return comfy.lora.calculate_weight(patcher.patches.get(key, []), weight, key)
    except (AttributeError, NotImplementedError, TypeError):  # no such tensor, or one of a class without that operation
        return None
