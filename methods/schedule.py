"""When the branches of a method run whole, and when cached deep features may stand in: refresh schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..kernels.branch import Step
from .cmlora import refresh_steps


class Schedule(Protocol):
    """Says of every step whether it refreshes.

    max_age   features of step s may serve steps up to s + max_age - 1; 1 means that nothing is ever reused
    """

    @property
    def max_age(self) -> int: ...

    def refreshes(self, step: Step) -> bool: ...


@dataclass(frozen=True)
class Uniform:
    """Every `interval`-th step refreshes, the first one included (DeepCache, arXiv 2312.00858)."""

    interval: int = 3

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"Uniform: interval must be at least 1, got {self.interval}")

    @property
    def max_age(self) -> int:
        return self.interval

    def refreshes(self, step: Step) -> bool:
        return step.index % self.interval == 0


@dataclass(frozen=True)
class NonUniform:
    """CMLoRA's schedule (`cmlora.refresh_steps`): every c1-th step at the start and the end, every c2-th between."""

    c1: int = 2
    c2: int = 3

    def __post_init__(self) -> None:
        if min(self.c1, self.c2) < 1:
            raise ValueError(f"NonUniform: intervals must be at least 1, got {self}")

    @property
    def max_age(self) -> int:
        return max(self.c1, self.c2)

    def refreshes(self, step: Step) -> bool:
        return step.index in refresh_steps(step.total, self.c1, self.c2)
