"""When the branches of a method run whole, and when cached deep features may stand in: refresh schedules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..kernels.branch import Step

PAPER = 2, 3
"""CMLoRA's c1 and c2."""
SHARE = 0.15
"""Share of a run over which deep features may serve: 3 in 20 steps, which the testbed knows, and none in 9 and fewer,
whose steps differ too much."""
LONGEST = 5
"""Most steps over which deep features serve, however long the run: DeepCache's in 50."""
FIRST, SECOND = 0.375, 0.875
"""Progress at which CMLoRA's refresh interval goes from c1 to c2 and back."""


class Schedule(Protocol):
    """Says of every step whether it refreshes.

    max_age   features of step s may serve steps up to s + max_age - 1; 1 means that nothing is ever reused
    """

    @property
    def max_age(self) -> int: ...

    def refreshes(self, step: Step) -> bool: ...


def served(total: int) -> int:
    """Steps over which deep features may serve in a run of so many; 1: their own."""
    return max(round(SHARE * total), 1)


def own_interval(total: int) -> int:
    """Steps from one full computation to the next, by the number of steps of the run. 1: all of them."""
    return min(served(total), LONGEST)


def refresh_steps(total: int, c1: int = 2, c2: int = 3) -> frozenset[int]:
    """CMLoRA's, at which the lead passes on: every c1-th, in the middle of the run every c2-th."""
    first, second = math.ceil(FIRST * total), math.ceil(SECOND * total)
    return frozenset((*range(0, first, c1), *range(first, second, c2), *range(second, total, c1)))


def oldest(count: int, c1: int = 0, c2: int = 0) -> int:
    """Age in steps at which cached features of CMLoRA are no longer used: what it would be if all LoRAs took turns. c1
    or c2 0: at most, whatever the number of steps."""
    return max(count, 1) * max(c1 or PAPER[0], c2 or PAPER[1])


@dataclass(frozen=True)
class AgeBySteps:
    """The age at which CMLoRA's cached features are no longer used, by the number of steps (`at`): `oldest`, as the
    paper has it in its 200, but no more than SHARE of the steps."""

    count: int
    c1: int = 0
    c2: int = 0

    def at(self, total: int) -> int:
        return min(oldest(self.count, self.c1, self.c2), served(total))


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

    @property
    def words(self) -> str:
        return f"interval is {self.interval}"

    def refreshes(self, step: Step) -> bool:
        return step.index < self.first or step.index % self.interval == 0


@dataclass(frozen=True)
class NonUniform:
    """CMLoRA's schedule (`refresh_steps`): every c1-th step at the start and the end, every c2-th between."""

    c1: int = PAPER[0]
    c2: int = PAPER[1]

    def __post_init__(self) -> None:
        if min(self.c1, self.c2) < 1:
            raise ValueError(f"NonUniform: intervals must be at least 1, got {self}")

    @property
    def max_age(self) -> int:
        return max(self.c1, self.c2)

    @property
    def words(self) -> str:
        return f"every {self.c1}. step, in the middle every {self.c2}."

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


@dataclass(frozen=True)
class CachePlan:
    """The schedule and depth that a budget has come to, and what they cost.

    schedule, depth   of the cache
    whole             steps of the run that are computed whole
    rest              what another step takes, as a share of a whole one's operations
    share             what all steps take together, as a share of those of a run without a cache
    """

    schedule: Uniform | NonUniform
    depth: int
    whole: int
    rest: float
    share: float


def schedules(of: BySteps) -> tuple[Uniform | NonUniform, ...]:
    """What a budget may choose from, the most exact first."""
    return tuple(Uniform(k, of.first) for k in range(2, LONGEST + 1)) if of.uniform else (NonUniform(),)


def within(budget: float, total: int, rests: Mapping[int, float], choices: Sequence[Uniform | NonUniform]) -> CachePlan:
    """The first of the schedules with which a run of `total` steps takes no more than `budget` of its operations at
    some depth, and the greatest such depth; where there is none, whatever takes least.

    rests   per depth: operations of a step that is not whole, as a share of a whole one's

    The shortest interval first: errors grow three times and more from interval 2 to 4 (testbed/README.md).
    """
    def plan(schedule: Uniform | NonUniform, depth: int) -> CachePlan:
        whole = sum(schedule.refreshes(Step(index, total, 0.0)) for index in range(total))
        return CachePlan(schedule, depth, whole, rests[depth], (whole + (total - whole) * rests[depth]) / total)

    if not rests:
        raise ValueError("within: a model without a depth to cut it at has nothing to choose")
    found = [[plan(schedule, depth) for depth in sorted(rests, reverse=True)] for schedule in choices]
    every = [each for one in found for each in one]
    return next((each for each in every if each.share <= budget), None) or min(every, key=lambda each: each.share)
