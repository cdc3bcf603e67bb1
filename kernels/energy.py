"""Squared Frobenius norm of B A through Gram matrices."""

from __future__ import annotations

from torch import Tensor


def energy(down: Tensor, up: Tensor) -> Tensor:
    """Semantics: sum_ij (up @ down)_ij^2 = sum((up^T up) * (down down^T)), which is also the sum of the squared
    singular values; the product itself is never formed.

    Shape: down [*, r, in], up [*, out, r] -> [*]; layers of equal shape may be stacked in the leading dimensions.
    Computed and returned in float64: the two Gram matrices may cancel, and float32 loses three digits there.
    """
    down, up = down.double(), up.double()
    return ((up.mT @ up) * (down @ down.mT)).sum(dim=(-2, -1)).clamp(min=0.0)
