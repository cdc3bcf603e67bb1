"""LoRA Composite: every adapter alone, predictions averaged (Zhong et al. 2024, arXiv 2402.16843, eq. 3, w_i = 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.branch import Branch, Step, one_hot


@dataclass(frozen=True)
class Composite:
    """e = 1/k sum_i [ e_i(z) + s (e_i(z, c) - e_i(z)) ]. Guidance is linear, so the mean is taken on the conditional
    and the unconditional predictions before it, which is the same."""

    strengths: tuple[float, ...]

    def branches(self, step: Step) -> tuple[Branch, ...]:
        return tuple(one_hot(self.strengths, i) for i in range(len(self.strengths))) or (Branch(()),)

    def mix(self, step: Step, predictions: Tensor) -> Tensor:
        return predictions.mean(dim=0)
