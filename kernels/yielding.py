"""A low-rank delta that yields to others: it does not see what theirs see."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1e-6
"""Directions of less energy than this part of the strongest one's are rounding."""


def hidden(factor: Tensor, other: Tensor) -> Tensor:
    """Rows that span what the product other @ factor sees of its input, each direction with the product's own energy.

    factor [r, in], other [out, r] -> [r, in] in fp64: (other^T other)^(1/2) factor
    """
    factor, other = factor.double(), other.double()
    energy, turn = torch.linalg.eigh(other.mT @ other)
    return energy.clamp_min(0).sqrt()[:, None] * (turn.mT @ factor)


def directions(rows: Tensor, most: int) -> Tensor:
    """The strongest orthonormal directions of these rows, at most so many: [rows, in] -> [in, k] in fp64.

    Found from the products of the rows with each other, so that many inputs cost little; what is no more than rounding
    is left out, as are rows of zeros.
    """
    rows = rows.double()
    energy, turn = torch.linalg.eigh(rows @ rows.mT)
    least = SMALLEST * energy.amax()
    energy, turn = energy.flip(0)[:most], turn.flip(1)[:, :most]
    kept = energy > least
    return rows.mT @ (turn[:, kept] / energy[kept].sqrt())


def yielding(factor: Tensor, others: Sequence[Tensor]) -> Tensor:
    """The factor of a delta on the side of its inputs, without its part in the directions that others see.

    factor   [r, in]
    others   `hidden` of each other delta, [r_j, in]. They take half of all directions at most, the strongest ones
    -> like factor; in fp32 where that has 8 bits, which another rounding would spoil
    """
    taken = directions(torch.cat(list(others)), factor.shape[1] // 2)
    wide = factor.double()
    return (wide - (wide @ taken) @ taken.mT).to(factor.dtype if factor.element_size() > 1 else torch.float32)
