"""LoRA Switch: one adapter at a time, in turn (Zhong et al. 2024, arXiv 2402.16843, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..kernels.branch import Branch, Step, one_hot
from .session import PlainSession, RunContext, Session


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

    Ours, where LoRAs have windows in time: see `turns`.
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

    def turns(self, open_at: Sequence[Sequence[int]]) -> list[int | None]:
        """Whose turn each step is, where not all may act at all steps. A turn ends after tau steps or when the window
        of its adapter shuts, and goes on to the next in order whose window is open; None where none is. Where all are
        open this is `active`.

        open_at   per step, the adapters whose windows are open
        """
        order, tau = self.order or tuple(range(len(self.strengths))), self.turn(len(open_at))
        out: list[int | None] = []
        place, left = -1, 0
        for may in open_at:
            if not left or order[place] not in may:
                following = [(place + k) % len(order) for k in range(1, len(order) + 1)]
                left = tau + (self.late and place < 0)
                place = next((p for p in following if order[p] in may), place)
            out.append(order[place] if may else None)
            left = left - 1 if may else 0
        return out

    def begin(self, context: RunContext) -> Session:
        return SwitchInTime(self, context) if context.gains else PlainSession(self)

    def branches(self, step: Step) -> tuple[Branch, ...]:
        if not self.strengths:
            return (Branch(()),)
        return (one_hot(self.strengths, self.active(step)),)

    def mix(self, step: Step, predictions: Tensor) -> Tensor:
        return predictions[0]


class SwitchInTime(PlainSession):
    """One run in which some adapters have windows."""

    def __init__(self, method: Switch, context: RunContext):
        super().__init__(method)
        count = len(method.strengths)
        self._turns = method.turns([context.open(index, count) for index in range(context.total)])

    def branches(self, step: Step) -> tuple[Branch, ...]:
        """The adapter whose turn it is; the base model where no window is open."""
        strengths, active = self.method.strengths, self._turns[step.index]
        return (Branch((0.0,) * len(strengths)) if active is None else one_hot(strengths, active),)
