"""The line that a term of guidance moves on along between evaluations of the negative, and what steps that it stood in
for have gone astray by (`extrapolated.py` has the formulas)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.guidance import line
from .session import Rows

PART = 0.75
"""Of what went astray, how much a step makes up for. Less than all, since the model answers to a picture that has gone
astray; from a half to all is much the same (testbed/README.md)."""
SHORT = 0.5
"""A step makes up for others as if it were no shorter than this share of their mean: what it makes up for is divided by
its length."""


@dataclass
class Line:
    """The last two terms of a negative and their times, per picture: d0, d1 [B, ...] in fp32; t0, t1 [B]."""

    d0: Tensor
    d1: Tensor
    t0: Tensor
    t1: Tensor

    def to(self, device: torch.device) -> Line:
        """The same on a device."""
        return Line(*(each.to(device) for each in (self.d0, self.d1, self.t0, self.t1)))

    def at(self, t: Tensor) -> Tensor:
        """The term at time t [B]."""
        return line(self.d0, self.d1, self.t0, self.t1, t)

    def move(self, d: Tensor, t: Tensor, rows: Rows | None, later: bool) -> None:
        """Take in a new term for some rows, or all; it takes the last one's place unless its time is `later`."""
        if rows is None:
            if later:
                self.d0, self.t0 = self.d1, self.t1
            self.d1, self.t1 = d, t
            return
        known = torch.zeros_like(t, dtype=torch.bool)
        for row in rows:
            known[row] = True
        wide = (len(t), *[1] * (d.ndim - 1))
        if later:
            self.d0, self.t0 = torch.where(known.view(wide), self.d1, self.d0), torch.where(known, self.t1, self.t0)
        self.d1, self.t1 = torch.where(known.view(wide), d, self.d1), torch.where(known, t, self.t1)


class Astray:
    """When steps evaluated the negative and when lines stood in for it, since the lines begin: by how much a step makes
    up for those before it.

    times    of the steps of this run, with the time that the last one ends at
    before   steps that earlier runs took of the picture; steps are counted from there
    """

    def __init__(self, times: Sequence[float], before: int):
        self._lengths, self._before = [t - end for t, end in zip(times, times[1:], strict=False)], before
        self._evaluated: dict[int, float] = {}  # step -> time of its first call with negatives
        self._stood_in: dict[int, tuple[float, list[float]]] = {}  # step -> its length, times of its calls

    def begin_anew(self) -> None:
        self._evaluated, self._stood_in = {}, {}

    def evaluated(self, step: int, time: float) -> None:
        """A step evaluates the negative."""
        self._evaluated[step] = time

    def stood_in(self, step: int, time: float) -> None:
        """Lines stand in for the negatives of a call; said for each of them, it counts once."""
        _, calls = self._stood_in.setdefault(step, (self._length(step), []))
        if calls[-1:] != [time]:
            calls.append(time)

    def weight(self, last: int, now: int) -> float:
        """PART W of what a line missed at step `now`, where `last` was the one to evaluate the negative before; 0 where
        no line stood in between."""
        between = [self._stood_in[step] for step in range(last + 1, now) if step in self._stood_in]
        if not between or not self._evaluated[last] > self._evaluated[now]:
            return 0.0
        astray = sum(length * (self._evaluated[last] - sum(calls) / len(calls)) for length, calls in between)
        length = max(self._length(now), SHORT * sum(length for length, _ in between) / len(between))
        return PART * astray / (length * (self._evaluated[last] - self._evaluated[now])) if length > 0 else 0.0

    def left(self) -> tuple[dict, dict]:
        """What `go_on` takes, in a run that goes on with the picture."""
        return self._evaluated, self._stood_in

    def go_on(self, evaluated: dict, stood_in: dict) -> None:
        self._evaluated, self._stood_in = dict(evaluated), dict(stood_in)

    def _length(self, step: int) -> float:
        own = step - self._before
        return self._lengths[own] if 0 <= own < len(self._lengths) else 0.0
