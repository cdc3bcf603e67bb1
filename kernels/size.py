"""How large a delta is: the three numbers that LoRAs are compared by."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan


@dataclass(frozen=True)
class Size:
    """How large one LoRA's delta of one layer is, at strength 1. Not a number where it acts alone: nobody asks then.

    top      sum of its K largest absolute entries
    total    sum of all absolute entries
    energy   squared Frobenius norm
    """

    top: float = nan
    total: float = nan
    energy: float = nan

    def at(self, strength: float) -> Size:
        """The size at a strength."""
        return Size(abs(strength) * self.top, abs(strength) * self.total, strength**2 * self.energy)
