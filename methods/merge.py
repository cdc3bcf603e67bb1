"""LoRA Merge: all adapters at once, W' = W + sum_i w_i B_i A_i (Zhong et al. 2024, arXiv 2402.16843, eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.branch import Branch, Step


@dataclass(frozen=True)
class Merge:
    """One branch with every adapter at its strength; a sum, not a mean."""

    masks = "layers"

    strengths: tuple[float, ...]

    def branches(self, step: Step) -> tuple[Branch, ...]:
        return (Branch(self.strengths),)

    def mix(self, step: Step, predictions: Tensor) -> Tensor:
        return predictions[0]
