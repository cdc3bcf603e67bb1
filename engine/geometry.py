"""How a layer turns a weight and an input into an output, so that a delta of that weight can be applied beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Geometry:
    """A layer's linear map without its weight.

    apply          (x, weight-shaped tensor) -> output-shaped tensor; linear in the second argument
    channel        the channel dimension of inputs and outputs
    spatial        number of kernel dimensions (0: matrix product or norm)
    groups         convolution groups
    is_norm        True for normalisations, whose weight has one entry per channel
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    channel: int = -1
    spatial: int = 0
    groups: int = 1
    is_norm: bool = False

    def per_channel(self, vector: Tensor, like: Tensor) -> Tensor:
        """A vector with one entry per channel, shaped to broadcast over `like` and in its dtype."""
        return vector.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1 - self.channel % like.ndim))


def layer_of(root: nn.Module, name: str) -> nn.Module | None:
    """The module of a model by its name, "" for the model itself; None where there is none."""
    try:
        return root.get_submodule(name)
    except AttributeError:
        return None


def geometry_of(module: nn.Module) -> Geometry | None:
    """The geometry of a layer, or None for a layer whose weight cannot be routed (embeddings, bare parameters).

    Recognised by what a layer has, not by its class: the host's quantized and streamed layers derive from nn.Module
    alone. The weight itself is never looked at: it may be packed, on another device, or not there at all.
    """
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return Geometry(F.linear)
    if (isinstance(getattr(module, "kernel_size", None), tuple) and hasattr(module, "groups")
            and not getattr(module, "transposed", False)):
        spatial = len(module.kernel_size)
        return Geometry(lambda x, w: _conv(module, x, w), 1, spatial, module.groups) if spatial in _CONV else None
    if isinstance(module, nn.GroupNorm):
        return Geometry(lambda x, w: F.group_norm(x, module.num_groups, w, None, module.eps), 1, is_norm=True)
    if isinstance(module, nn.LayerNorm):
        return Geometry(lambda x, w: F.layer_norm(x, module.normalized_shape, w, None, module.eps), is_norm=True)
    if any(cls.__name__ == "RMSNorm" for cls in type(module).__mro__) and hasattr(module, "normalized_shape"):
        return Geometry(lambda x, w: F.rms_norm(x, tuple(module.normalized_shape), w, module.eps), is_norm=True)
    return None


ForwardOf = Callable[[nn.Module], "tuple[Callable | None, Callable[[Callable], Callable]]"]
"""(layer) -> its forward on tensors, None where it has none that can be called; and what makes of another forward on
tensors one for the layer, which may take them inside something else."""


def own_forward(layer: nn.Module) -> tuple[Callable, Callable[[Callable], Callable]]:
    """`ForwardOf` of a layer that takes and gives tensors."""
    return layer.forward, lambda forward: forward


def _conv(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's own convolution with another weight and no bias. Padding is read at each call, since nodes that make
    pictures tile change `padding_mode` on the live module. Of a layer that was enlarged since for more channels
    (IC-Light) the first ones are the weight's."""
    if x.shape[1] > weight.shape[1] * module.groups:
        x = x.narrow(1, 0, weight.shape[1] * module.groups)
    padding = module.padding
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    return _CONV[weight.ndim - 2](x, weight, None, module.stride, padding, module.dilation, module.groups)


def plain(x: Tensor) -> Tensor:
    """An ordinary tensor of an activation that the host may have quantized on the way into a layer."""
    return x if type(x) in (Tensor, nn.Parameter) else x.dequantize().to(x.dtype)


def no_bias(y: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """A fresh copy of a layer's output without its bias."""
    return y.clone() if bias is None else torch.sub(y, geometry.per_channel(bias, y))
