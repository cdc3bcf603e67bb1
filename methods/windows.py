"""When LoRAs act: a window in the time of a run for each (ours).

Time is counted as ComfyUI counts `start_percent` and `end_percent` of a ControlNet or a conditioning: by the noise
level, from 0 at the model's highest to 1 at its lowest, in equal parts of the model's own time. So a window means the
same for every number of steps and every sampler, and in a run that begins in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..kernels.branch import Branch, Step, scaled

NEAR = 1e-4
"""Times that differ by less are one: a tenth of a timestep of a model that has a thousand."""


@dataclass(frozen=True)
class Window:
    """From `start` up to but not including `end`, so that windows which meet share no step; an `end` of 1 includes the
    last step.

    fade   time in which the gain rises from 0 behind `start` and falls to 0 before `end`, linearly; none at an edge
           that is the beginning or the end of the schedule. At most what lets the gain reach 1
    """

    start: float = 0.0
    end: float = 1.0
    fade: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= 1 or not 0 <= self.end <= 1 or not 0 <= self.fade <= 1:
            raise ValueError(f"start, end and fade must be numbers from 0 to 1, got {self.start}, {self.end} and "
                             f"{self.fade}")
        if self.start >= self.end:
            raise ValueError(f"start is {self.start:g} and end is {self.end:g}: in such a window it would never act. "
                             "Choose a start below the end, or strength 0 to leave the LoRA out")

    @property
    def whole(self) -> bool:
        """Whether it is the whole run."""
        return self.start <= 0 and self.end >= 1

    def gain(self, time: float) -> float:
        """The share of the LoRA's strength that acts at a time; 0: the window is shut."""
        early, late = self.start > 0, self.end < 1
        if (early and time < self.start - NEAR) or (late and time > self.end - NEAR):
            return 0.0
        inside = [time - self.start] * early + [self.end - time] * late
        fade = min(self.fade, (self.end - self.start) / max(len(inside), 1))
        return min(max(min(inside) / fade, 0.0), 1.0) if inside and fade > 0 else 1.0


def gains_of(windows: Sequence[Window], times: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """Per step, at these times, the gain of each LoRA; () where all act in the whole run."""
    if all(window.whole for window in windows):
        return ()
    return tuple(tuple(window.gain(time) for window in windows) for time in times)


class InTime:
    """The branches of one method in one run, as windows let its LoRAs act.

    gains    as `RunContext.gains`
    before   steps of earlier runs in them, and
    steps    how many of them are this run's; None: the rest
    """

    def __init__(self, gains: Sequence[tuple[float, ...]], before: int = 0, steps: int | None = None):
        self.gains = gains
        self._own = gains[before:None if steps is None else before + steps]
        self._scaled: dict[tuple[Branch, tuple[float, ...]], Branch] = {}

    def __call__(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """The same branches, each LoRA's gain times that of its window; the same objects where nothing changes."""
        if not self.gains or all(gain == 1 for gain in self.gains[step.index]):
            return branches
        return tuple(self._branch(branch, self.gains[step.index]) for branch in branches)

    def shut(self, lora: int) -> bool:
        """Whether a LoRA's window is shut at every step of the run."""
        return bool(self._own) and not any(gains[lora] for gains in self._own)

    def _branch(self, branch: Branch, gains: tuple[float, ...]) -> Branch:
        key = branch, gains
        if key not in self._scaled:
            self._scaled[key] = scaled(branch, gains)
        return self._scaled[key]
