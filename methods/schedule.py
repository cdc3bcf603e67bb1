"""When the branches of a method run whole, and when cached deep features may stand in: refresh schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..kernels.branch import Step
from .cmlora import PAPER, refresh_steps


class Schedule(Protocol):
    """Says of every step whether it refreshes.

    max_age   features of step s may serve steps up to s + max_age - 1; 1 means that nothing is ever reused
    """

    @property
    def max_age(self) -> int: ...

    def refreshes(self, step: Step) -> bool: ...


SHARE, LONGEST = 0.15, 5
"""Share of a run over which deep features may serve, and the most steps: 3 in 20 steps, which the testbed knows, 5 in
50 as DeepCache has it, and none in 9 and fewer, whose steps differ too much."""


def own_interval(total: int) -> int:
    """Steps from one full computation to the next, by the number of steps of the run. 1: all of them."""
    return min(max(round(SHARE * total), 1), LONGEST)


@dataclass(frozen=True)
class Uniform:
    """Every `interval`-th step refreshes, the first `first` ones included (DeepCache, arXiv 2312.00858, has 1)."""

    interval: int = 3
    first: int = 1

    def __post_init__(self) -> None:
        if min(self.interval, self.first) < 1:
            raise ValueError(f"Uniform: interval and first must be at least 1, got {self}")

    @property
    def max_age(self) -> int:
        return self.interval

    def refreshes(self, step: Step) -> bool:
        return step.index < self.first or step.index % self.interval == 0


@dataclass(frozen=True)
class NonUniform:
    """CMLoRA's schedule (`cmlora.refresh_steps`): every c1-th step at the start and the end, every c2-th between."""

    c1: int = PAPER[0]
    c2: int = PAPER[1]

    def __post_init__(self) -> None:
        if min(self.c1, self.c2) < 1:
            raise ValueError(f"NonUniform: intervals must be at least 1, got {self}")

    @property
    def max_age(self) -> int:
        return max(self.c1, self.c2)

    def refreshes(self, step: Step) -> bool:
        return step.index in refresh_steps(step.total, self.c1, self.c2)


@dataclass(frozen=True)
class BySteps:
    """A schedule that is known once the number of steps is, see `at`.

    uniform   every `own_interval`-th step, and the first `first` ones. False: CMLoRA's, with intervals of at most that
    """

    uniform: bool = True
    first: int = 1

    @property
    def max_age(self) -> int:
        return LONGEST if self.uniform else max(PAPER)

    def at(self, total: int) -> Uniform | NonUniform:
        """The schedule of a run of so many steps."""
        interval = own_interval(total)
        return Uniform(interval, self.first) if self.uniform else NonUniform(*(min(c, interval) for c in PAPER))

    def refreshes(self, step: Step) -> bool:
        return self.at(step.total).refreshes(step)
