"""What PEFT writes for a layer besides a LoRA's factors, and ComfyUI's own loader passes over: the magnitudes of a DoRA
and a bias of the second factor."""

from __future__ import annotations

import torch
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor

from .files import LoRAFile
from .fit import Shape

MAGNITUDES = tuple(f"lora_magnitude_vector{end}" for end in ("", ".weight", ".default", ".default.weight"))
BIASES = ("lora_B.bias", "lora_B.default.bias")


def under_host_names(file: LoRAFile, name: str, shape: Shape | None) -> dict[str, Tensor]:
    """These tensors of the layer `name` under names that the host's loader knows: magnitudes, one per output whatever
    dimensions they have, and the bias as a change of the layer's own, scaled as the LoRA is."""
    magnitude, bias, down = (next((file[key] for end in ends if (key := f"{name}.{end}") in file), None)
                             for ends in (MAGNITUDES, BIASES, ("lora_A.weight", "lora_A.default.weight")))
    found = {}
    if magnitude is not None:
        fits = shape is not None and len(shape) > 1 and magnitude.numel() == shape[0]
        found[f"{name}.dora_scale"] = magnitude.reshape(-1, *[1] * (len(shape) - 1)) if fits else magnitude
    if bias is not None:
        alpha, rank = file.get(f"{name}.alpha"), down.shape[0] if down is not None and down.ndim else 0
        found[f"{name}.diff_b"] = bias if alpha is None or not rank else bias.float() * (float(alpha) / rank)
    return found


def as_it_means(file: LoRAFile, name: str, patch):
    """The host's patch for a layer, with the norm that PEFT's magnitudes are for."""
    if isinstance(patch, LoRAAdapter) and any(f"{name}.{end}" in file for end in MAGNITUDES):
        return PEFTDoRA(patch.loaded_keys, patch.weights)
    return patch


class PEFTDoRA(LoRAAdapter):
    """A DoRA whose magnitudes are those of the outputs of the changed weight, as the paper has it (arXiv 2402.09353).
    The host divides by the norms of the weight before the change."""

    def calculate_weight(self, weight: Tensor, key, strength: float, *more) -> Tensor:
        up, down, alpha, mid, magnitude, *rest = self.weights
        direction = LoRAAdapter(self.loaded_keys, (up, down, alpha, mid, None, *rest))
        before, after = map(_norms, (weight, direction.calculate_weight(weight.clone(), key, 1.0, *more)))
        eps = torch.finfo(weight.dtype).eps
        scaled = magnitude.to(before) * ((before + eps) / (after + eps))
        return LoRAAdapter(self.loaded_keys, (up, down, alpha, mid, scaled, *rest)).calculate_weight(
            weight, key, strength, *more)


def _norms(weight: Tensor) -> Tensor:
    """Of each output, in fp32 and with as many dimensions as the weight."""
    return torch.linalg.vector_norm(weight.float(), dim=tuple(range(1, weight.ndim)), keepdim=True)
