"""Latents of several parts in one tensor: a model that makes picture and sound together has a latent for each, and the
host samples both as one, [..., 1, elements], every part flattened in turn.

parts   per part its shape [C, *size], pictures not counted; () for an ordinary latent, which is its only part
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

Parts = tuple[tuple[int, ...], ...]


def unpack(x: Tensor, parts: Parts) -> list[Tensor]:
    """[..., 1, elements] -> per part a view [..., C, *size]; [x] where there are no parts."""
    if not parts:
        return [x]
    flat = x.squeeze(-2).split([prod(part) for part in parts], dim=-1)
    return [one.unflatten(-1, part) for one, part in zip(flat, parts, strict=True)]


def pack_weights(weights: Sequence[Tensor], parts: Parts) -> Tensor:
    """Weights per place of each part, [N, B, 1, *size], for the packed latent: [N, B, 1, elements], the same for all
    channels of a place. What there is where there are no parts."""
    if not parts:
        return weights[0]
    flat = [one.expand(-1, -1, part[0], *one.shape[3:]).flatten(2) for one, part in zip(weights, parts, strict=True)]
    return torch.cat(flat, dim=-1)[:, :, None]


def spread(weights: Tensor, shares: Sequence[float], predictions: Sequence[Tensor], parts: Parts) -> Tensor:
    """Weights of N LoRAs per place of the first part, for the packed latent: in its others each LoRA has its share at
    all places. The weights as they are where there are no parts.

    weights [N, 1 or B, 1, *size], predictions [N, B, C, *size] of each part
    """
    if not parts:
        return weights
    first, *others = predictions
    rest = []
    for other in others:
        whole = other.new_full((*other.shape[:2], 1, *other.shape[3:]), shares[0], dtype=torch.float32)
        for own, share in zip(whole, shares, strict=True):
            if share != shares[0]:
                own.fill_(share)
        rest.append(whole)
    return pack_weights([weights.expand(*first.shape[:2], 1, *first.shape[3:]), *rest], parts)
