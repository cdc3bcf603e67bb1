"""LoRA Switch: one adapter at a time, in turn (Zhong et al. 2024, arXiv 2402.16843, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.branch import Branch, Step, one_hot


@dataclass(frozen=True)
class Switch:
    """Adapter i = floor(((t - 1) mod (k tau)) / tau) + 1 acts at step t = 1..T; with the step index j = t - 1 counted
    from 0 that is order[(j // tau) mod k].

    strengths       one per adapter
    steps_per_lora  tau, sampling steps before the next adapter takes over. 0: as the run has steps, so that each
                    adapter has two turns where that can be, of 5 steps (the paper's) at most
    order           adapter indexes in the order of their turns; None: as listed
    late            True reproduces the released code, whose callback runs at the end of a step whose index is a
                    positive multiple of tau: every turn ends one step later, so the first one lasts tau + 1 steps
    """

    masks = "layers"

    strengths: tuple[float, ...]
    steps_per_lora: int = 0
    order: tuple[int, ...] | None = None
    late: bool = False

    def __post_init__(self) -> None:
        if self.steps_per_lora < 0:
            raise ValueError(f"Switch: steps_per_lora must be at least 0, got {self.steps_per_lora}")
        if self.order is not None and sorted(self.order) != list(range(len(self.strengths))):
            raise ValueError(f"Switch: order must name each of the {len(self.strengths)} LoRAs once, got {self.order}")

    def turn(self, total: int) -> int:
        """tau in a run of so many steps."""
        return self.steps_per_lora or min(max(total // (2 * max(len(self.strengths), 1)), 1), 5)

    def active(self, step: Step) -> int:
        """The adapter whose turn it is at a step."""
        order = self.order or tuple(range(len(self.strengths)))
        index = max(step.index - 1, 0) if self.late else step.index
        return order[index // self.turn(step.total) % len(order)]

    def branches(self, step: Step) -> tuple[Branch, ...]:
        if not self.strengths:
            return (Branch(()),)
        return (one_hot(self.strengths, self.active(step)),)

    def mix(self, step: Step, predictions: Tensor) -> Tensor:
        return predictions[0]
