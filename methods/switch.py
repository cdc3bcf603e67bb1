"""LoRA Switch: one adapter at a time, in turn (Zhong et al. 2024, arXiv 2402.16843, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..kernels.branch import Branch, Step, one_hot
from .counted import counted, verb
from .session import PlainSession, RunContext, Session

TAIL = 0.1
"""Share of a run that is the subject's at its end."""


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
    last            the adapter that has the last steps, a tenth of the run, whosever turn they were; None: none. The
                    tail of W-Switch (arXiv 2606.03792), there 5 steps of the character's. Ours: it leaves each adapter
                    one turn
    by_prompt       turns as long as the prompt says something by each adapter's words, as W-Switch has them: adapter i
                    acts for max(1, round(tau w_i / max w)) steps, w_i = `RunContext.shares`

    Ours, where LoRAs have windows in time: see `turns`.
    """

    masks = "layers"

    strengths: tuple[float, ...]
    steps_per_lora: int = 0
    order: tuple[int, ...] | None = None
    late: bool = False
    last: int | None = None
    by_prompt: bool = False

    def __post_init__(self) -> None:
        if self.steps_per_lora < 0:
            raise ValueError(f"Switch: steps_per_lora must be at least 0, got {self.steps_per_lora}")
        if self.order is not None and sorted(self.order) != list(range(len(self.strengths))):
            raise ValueError(f"Switch: order must name each of the {counted(len(self.strengths), 'LoRA')} once, "
                             f"got {self.order}")
        if self.last is not None and not 0 <= self.last < len(self.strengths):
            raise ValueError(f"Switch: there is no LoRA {self.last} for the last steps")

    def tail(self, total: int) -> int:
        """How many of so many steps are the last adapter's: a tenth, one at least, where each adapter has a turn before
        them."""
        if self.last is None:
            return 0
        turns = (len(self.strengths) - 1) * max(self.steps_per_lora, 1) + 1 + self.late  # each has begun its first
        return max(min(max(round(total * TAIL), 1), total - turns), 0)

    def turn(self, total: int) -> int:
        """tau in a run of so many steps."""
        return self.steps_per_lora or own_turn(total - self.tail(total), len(self.strengths))

    def lengths(self, total: int, shares: Sequence[float] = ()) -> tuple[int, ...]:
        """Steps of each adapter's turn. Without shares all have the same."""
        tau, most = self.turn(total), max(shares, default=0.0)
        if not self.by_prompt or most <= 0:
            return (tau,) * len(self.strengths)
        return tuple(max(1, round(tau * share / most)) for share in shares)

    def turns(self, open_at: Sequence[Sequence[int]], shares: Sequence[float] = ()) -> list[int | None]:
        """Whose turn each step is. A turn ends after its steps or when the window of its adapter shuts, and goes on to
        the next in order whose window is open; None where none is. Where all are open, turns have one length and no
        adapter has the last steps, this is the formula.

        open_at   per step, the adapters whose windows are open
        shares    as `RunContext.shares`
        """
        total = len(open_at)
        order, lengths = self.order or tuple(range(len(self.strengths))), self.lengths(total, shares)
        out: list[int | None] = []
        place, left = -1, 0
        for j, may in enumerate(open_at):
            if j >= total - self.tail(total) and self.last in may:
                out.append(self.last)
                continue
            if not left or order[place] not in may:
                following = [(place + k) % len(order) for k in range(1, len(order) + 1)]
                first, place = place < 0, next((p for p in following if order[p] in may), place)
                left = lengths[order[place]] + (self.late and first)
            out.append(order[place] if may else None)
            left = left - 1 if may else 0
        return out

    def begin(self, context: RunContext) -> Session:
        return SwitchSession(self, context)

    def mix(self, step: Step, predictions: Tensor) -> Tensor:
        return predictions[0]


def own_turn(total: int, count: int) -> int:
    """Steps of a turn, so that each of `count` adapters has two where that can be, of 5 steps at most."""
    return min(max(total // (2 * max(count, 1)), 1), 5)


class SwitchSession(PlainSession):
    """One run: whose turn each of its steps is."""

    def __init__(self, method: Switch, context: RunContext):
        super().__init__(method)
        self._total, self._shares, count = context.total, context.shares, len(method.strengths)
        open_at = [context.open(index, count) for index in range(context.total)]
        self._turns = method.turns(open_at, context.shares) if count else []

    def branches(self, step: Step) -> tuple[Branch, ...]:
        """The adapter whose turn it is; the base model where no window is open."""
        strengths = self.method.strengths
        active = self._turns[step.index] if strengths else None
        return (Branch((0.0,) * len(strengths)) if active is None else one_hot(strengths, active),)

    def chosen(self, names: Sequence[str]) -> list[str]:
        """How long a turn is, and whose the last steps are."""
        method, out, steps = self.method, [], counted(self._total, "step")
        if not method.steps_per_lora:
            out.append(f"{steps}, {counted(len(names), 'LoRA')}: steps_per_lora is {method.turn(self._total)}")
        if method.by_prompt and any(self._shares):
            out.append("turns by the prompt: " + ", ".join(f"{name} {length}" for name, length in zip(
                names, method.lengths(self._total, self._shares), strict=True)))
        if method.last is not None:
            count = method.tail(self._total)
            out.append(f"the last {counted(count, 'step')} {verb(count, 'are')} those of LoRA '{names[method.last]}'"
                       if count else f"{steps} {verb(self._total, 'leave')} none at the end for LoRA "
                            f"'{names[method.last]}' alone")
        return out

    def missed(self, names: Sequence[str]) -> list[str]:
        """Turns by a prompt that does not say what it would be without words, and LoRAs that have none in it."""
        if not self.method.by_prompt:
            return []
        if not any(self._shares):
            return ["turns have one length: no prompt says what it would be without a LoRA's words. Connect clip, "
                    "encode the prompts with the CLIP of this node, and use the LoRAs' words in them"]
        without = [f"'{name}'" for name, share in zip(names, self._shares, strict=True) if not share]
        if not without or self.method.turn(self._total) == 1:
            return []
        return [f"no prompt has words of LoRA {', '.join(without)}: each turn is then 1 step. "
                "Use the LoRA's words in the prompt, mark some for it, or set lengths to 'equal'"]
