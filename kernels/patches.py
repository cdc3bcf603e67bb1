"""LoRAtorio's weights: per patch, how far each LoRA's prediction turns away from the base model's, as a softmin over
LoRAs (Foteinopoulou et al. 2025, arXiv 2508.11624). Everything is computed in fp32 and stays on its device, in few
operations, as in every step: a GPU computes them in no time, and waits for the host to ask for each.

Latents are [B, C, h, w], video [B, C, frames, h, w] (each frame by itself) or sequences [B, C, length] (patches along
the length). Sizes that a patch does not divide are padded by repeating the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

NEAR_ZERO = 1e-6
"""A patch whose vector is shorter than this part of its picture's root mean square has no direction."""


def tiles(x: Tensor, patch: int) -> Tensor:
    """Non-overlapping patches of the channel mean.

    x [B, C, *size] with one, two or three entries in `size` -> [B, rows, high, columns, patch] in fp32: high * patch
    values per patch, of which a sequence has one row and a `high` of 1. The rows are those of all frames one below the
    other.
    """
    plane = x.float().mean(dim=1)
    high = patch if plane.ndim > 2 else 1
    plane = plane.reshape(len(plane), -1, *plane.shape[-2:]) if plane.ndim > 2 else plane[:, None, None]
    wide, tall = -plane.shape[-1] % patch, -plane.shape[-2] % high
    if wide or tall:
        plane = F.pad(plane, (0, wide, 0, tall), mode="replicate")
    return plane.flatten(1, 2).unflatten(-1, (-1, patch)).unflatten(1, (-1, high))


def patch_cosine(predictions: Tensor, patch: int) -> Tensor:
    """Omega[i, b, q] = cos(base patch, LoRA i's patch).

    predictions [N + 1, B, C, *size], the base model's last -> [N, B, rows, columns] in fp32. Where any of the vectors
    of a place is near zero, all LoRAs get 0 there: equal similarities are uniform weights.
    """
    planes = tiles(predictions.flatten(0, 1), patch).unflatten(0, predictions.shape[:2])
    norms = torch.linalg.vector_norm(planes, dim=(-3, -1), keepdim=True)
    places = norms.shape[-4] * norms.shape[-2]
    floor = torch.linalg.vector_norm(norms, dim=(-4, -2), keepdim=True) * (NEAR_ZERO / places**0.5)
    units = planes / norms.masked_fill((norms <= floor).any(dim=0), torch.inf)
    return (units[:-1] * units[-1]).sum(dim=(-3, -1))


def softmin(similarity: Tensor, inverse_temperature: float, keep: Tensor | None = None) -> Tensor:
    """exp(-s_i / tau) / sum_k exp(-s_k / tau) over the first dimension, in fp32.

    keep   boolean, like `similarity` up to broadcasting: LoRAs that are not kept get 0; at least one must be kept.
    inverse_temperature 0 gives uniform weights over those kept.
    """
    logits = -inverse_temperature * similarity.float()
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    return torch.softmax(logits, dim=0)


def most_divergent(similarity: Tensor, k: int, scope: Literal["image", "patch"] = "image") -> Tensor:
    """Which LoRAs are kept: the k with the lowest similarity to the base, judged per picture or per patch.

    similarity [N, B, rows, columns] -> boolean [N, B, rows, columns] (1 x 1 places with scope "image"). Of LoRAs that
    are equally similar, those listed first.
    """
    relevance = similarity.mean(dim=(-2, -1), keepdim=True) if scope == "image" else similarity
    if k >= len(relevance):
        return torch.ones_like(relevance, dtype=torch.bool)
    order = relevance.sort(dim=0, stable=True).indices
    return torch.zeros_like(relevance, dtype=torch.bool).scatter_(0, order[:k], True)


def upsample(weights: Tensor, size: tuple[int, ...], patch: int, mode: Literal["nearest", "bilinear"]) -> Tensor:
    """Weights per patch [N, B, rows, columns] -> per pixel [N, B, 1, *size]. Both modes are averages of a patch's
    neighbours with weights that sum to 1, so sums over LoRAs stay 1."""
    count, batch = weights.shape[:2]
    frames, h, w = (1,) * (3 - len(size)) + tuple(size)
    maps = weights.flatten(0, 1).unflatten(1, (frames, -1)).flatten(0, 1)[:, None]
    high = patch if len(size) > 1 else 1
    if mode == "nearest":
        rows, columns = maps.shape[-2:]
        full = maps[:, :, :, None, :, None].expand(-1, -1, -1, high, -1, patch).reshape(-1, 1, rows * high,
                                                                                        columns * patch)
    else:
        full = F.interpolate(maps, scale_factor=(high, patch), mode="bilinear", align_corners=False)
    full = full[..., :h, :w].unflatten(0, (count, batch, frames)).squeeze(3)
    return full.reshape(count, batch, 1, *size)


def stacked(masks: Sequence[Tensor | None]) -> Tensor:
    """The masks of N LoRAs in one tensor; ones for a LoRA that has none.

    Shape: [1 or B, 1, h, w] each, or with frames [1 or B, 1, frames, h, w], at least one -> [N, 1 or B, 1, (frames,)
    h, w], on its device. Where one has frames, a mask without them is the same in all.
    """
    given = [mask for mask in masks if mask is not None]
    film = any(mask.ndim == 5 for mask in given)
    given = [mask.unsqueeze(2) if film and mask.ndim == 4 else mask for mask in given]
    size = [max(mask.shape[axis] for mask in given) for axis in range(given[0].ndim)]
    rest = iter(given)
    return torch.stack([given[0].new_ones(size) if mask is None else next(rest).expand(*size) for mask in masks])


def stacked_like(masks: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """`stacked` for values [N, B, C, (frames,) h, w], on their device: [N, 1 or B, 1, (frames or 1,) h, w]."""
    found = stacked(masks).to(like.device)
    return found.unsqueeze(3) if found.ndim < like.ndim else found


def confine(weights: Tensor, masks: Tensor) -> Tensor:
    """Weights times masks, renormalised over the LoRAs; what their masks do not cover together is nobody's: grey
    borders fade into the base model, and where no mask lets any act all weights are 0.

    weights [N, B, 1, *size], masks [N, 1 or B, 1, ...] that broadcasts to it
    """
    allowed = weights * masks
    covered = masks.sum(dim=0).clamp_max(1)
    return allowed * (covered / allowed.sum(dim=0).clamp_min(torch.finfo(torch.float32).tiny))


def weighted(base: Tensor, loras: Tensor, weights: Tensor, share: float = 1.0) -> Tensor:
    """base + share * sum_i w_i (lora_i - base) = share * sum_i w_i lora_i + (1 - share) * base where weights sum to 1.

    base [B, C, *size], loras [N, B, C, *size], weights [N, B, 1, *size] -> like base. Written with differences, so that
    LoRAs equal to the base give the base exactly.
    """
    return torch.add(base, (weights.to(base.dtype) * (loras - base)).sum(dim=0), alpha=share)
