"""Orthogonal adapters: OFT (arXiv 2306.07280) and BOFT (arXiv 2311.06243) rotate the output channels of a layer."""

from __future__ import annotations

import torch
from torch import Tensor


def cayley(blocks: Tensor, constraint: float = 0.0) -> Tensor:
    """Rotation matrices of unconstrained blocks: R = (I + Q)(I - Q)^-1 with Q = blocks - blocks^T.

    Q is shrunk to Frobenius norm `constraint` (over all blocks) where that is positive and exceeded.
    Shape: [..., b, b] -> [..., b, b]; computed and returned in fp32, or fp64 for fp64 blocks.
    """
    blocks = blocks if blocks.dtype == torch.float64 else blocks.float()
    q = blocks - blocks.mT
    if constraint > 0:
        norm = torch.linalg.vector_norm(q) + 1e-8
        q = q * (constraint / norm).clamp(max=1.0)
    eye = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
    return (eye + q) @ torch.linalg.inv(eye - q)


def block_rotate(rotations: Tensor, w: Tensor) -> Tensor:
    """OFT: turn each block of channels by its own rotation, out[k, m] = sum_n R[k, n, m] w[k, n].

    Shape: rotations [blocks, b, b], w [channels = blocks * b, ...] -> the same. The index order is the files'.
    """
    return torch.einsum("knm,kn...->km...", rotations, w.unflatten(0, rotations.shape[:2])).flatten(0, 1)


def butterfly_rotate(rotations: Tensor, w: Tensor) -> Tensor:
    """BOFT: `stages` block rotations, each between a shuffle of the channels and its inverse.

    Shape: rotations [stages, blocks, b, b], w [channels = blocks * b, ...] -> the same. Stage i brings channels
    together that lie 2**i * b/2 apart.
    """
    size = rotations.shape[-1]
    for i, stage in enumerate(rotations):
        stride = 2**i * (size // 2)
        w = w.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        w = torch.einsum("bij,bj...->bi...", stage, w).flatten(0, 1)
        w = w.unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    return w
