"""The base model: a U-Net with cross-attention that predicts the velocity of a flow, and its latent space.

Flow: x = (1 - sigma) x0 + sigma noise, and the model predicts v = noise - x0, so x0 = x - sigma v. The latent of a
32x32 RGB picture is its pixel-unshuffled self, [12, 16, 16], scaled to [-1, 1]: no autoencoder is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATENT = (12, 16, 16)


def encode(image: Tensor) -> Tensor:
    """[n, 3, 32, 32] in [0, 1] -> latent [n, 12, 16, 16]."""
    return F.pixel_unshuffle(image * 2 - 1, 2)


def decode(latent: Tensor) -> Tensor:
    """The inverse of `encode`, clamped to [0, 1]."""
    return (F.pixel_shuffle(latent, 2) / 2 + 0.5).clamp(0, 1)


class Attention(nn.Module):
    """Multi-head attention of x [n, tokens, width] to `context`, or to itself when that is None.

    observe   where it is set: sees (q [n, heads, tokens, d], k [n, heads, length of the context, d]) of each call with
              a context
    """

    observe: Callable[[Tensor, Tensor], None] | None = None

    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for t in (self.to_q(x), self.to_k(source), self.to_v(source)))
        if context is not None and self.observe is not None:
            self.observe(q, k)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt and a feed-forward, on a map [n, width, h, w]."""

    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, context, heads)
        self.ff_in = nn.Linear(width, 2 * width)
        self.ff_out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        size = x.shape[2:]
        t = x.flatten(2).transpose(1, 2)
        t = t + self.attn1(self.norm1(t))
        t = t + self.attn2(self.norm2(t), context)
        t = t + self.ff_out(F.gelu(self.ff_in(self.norm3(t))))
        return t.transpose(1, 2).unflatten(2, size)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, scaled and shifted by the time embedding."""

    def __init__(self, width_in: int, width: int, time: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width_in), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Linear(time, 2 * width)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(x) + h


def _placed(x: Tensor, place: Tensor) -> Tensor:
    """A map with what was learned about each place added; stretched for other sizes than the one of training."""
    if x.shape[2:] != place.shape[2:]:
        place = F.interpolate(place, size=x.shape[2:], mode="bilinear")
    return x + place.to(x.dtype)


class UNet(nn.Module):
    """forward(x [n, 12, h, w], timesteps [n], context [n, tokens, context_dim]) -> velocity like x.

    `timesteps` is sigma itself, in [0, 1]. h and w are even. Further arguments that a host passes are ignored.
    """

    def __init__(self, channels: int = 12, width: int = 48, deep: int = 96, context_dim: int = 96, time_dim: int = 128,
                 heads: int = 4):
        super().__init__()
        self.time_dim = time_dim
        self.time_in, self.time_out = nn.Linear(time_dim, time_dim), nn.Linear(time_dim, time_dim)
        self.pooled = nn.Linear(context_dim, time_dim)
        self.place = nn.Parameter(torch.zeros(1, width, *LATENT[1:]))
        self.place_deep = nn.Parameter(torch.zeros(1, deep, LATENT[1] // 2, LATENT[2] // 2))
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.down_res1 = ResBlock(width, width, time_dim)
        self.downsample = nn.Conv2d(width, deep, 3, stride=2, padding=1)
        self.down_res2 = ResBlock(deep, deep, time_dim)
        self.down_attn = TransformerBlock(deep, context_dim, heads)
        self.mid_res = ResBlock(deep, deep, time_dim)
        self.mid_attn = TransformerBlock(deep, context_dim, heads)
        self.up_res2 = ResBlock(2 * deep, deep, time_dim)
        self.up_attn = TransformerBlock(deep, context_dim, heads)
        self.upsample = nn.Conv2d(deep, 4 * width, 1)
        self.up_res1 = ResBlock(2 * width, width, time_dim)
        self.norm_out = nn.GroupNorm(8, width)
        self.conv_out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **_: object) -> Tensor:
        half = self.time_dim // 2
        frequencies = torch.exp(torch.linspace(0, math.log(1000.0), half, device=x.device))
        angles = timesteps.float()[:, None] * frequencies
        time = torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype)
        context = context.to(x.dtype)
        time = F.silu(self.time_out(F.silu(self.time_in(time))) + self.pooled(context.mean(1)))

        fine = self.down_res1(_placed(self.conv_in(x), self.place), time)
        coarse = _placed(self.downsample(fine), self.place_deep)
        coarse = self.down_attn(self.down_res2(coarse, time), context)
        h = self.mid_attn(self.mid_res(coarse, time), context)
        h = self.up_attn(self.up_res2(torch.cat([h, coarse], dim=1), time), context)
        h = F.pixel_shuffle(self.upsample(h), 2)
        h = self.up_res1(torch.cat([h, fine], dim=1), time)
        return self.conv_out(F.silu(self.norm_out(h)))
