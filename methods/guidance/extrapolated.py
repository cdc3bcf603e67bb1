"""Extrapolated guidance: the negative is evaluated at some steps, and between them the term of guidance moves on along
the line through the last two.

    d = e(c) - e(u)        d(t) = d1 + (d1 - d0) (t - t1) / (t1 - t0)        e = e(c) + (w - 1) d(t)

A step that evaluates the negative again makes up for what the line has missed since, which is known then: with d2 found
at t2 the term at a time t between was about d1 + (d2 - d1) (t - t1) / (t2 - t1), so the steps of lengths h_j in which
the line stood in went astray by (d2 - d(t2)) sum_j h_j (t_j - t1) / (t2 - t1), and this step, of length h2, goes by

    d2 + PART W (d2 - d(t2))        W = sum_j h_j (t_j - t1) / (h2 (t2 - t1))

Turns lie closer together at both ends of a run, where the term changes most, and the last step is always one: nothing
could make up for an error of its own any more.

Beside a branch cache turns are taken where the model runs whole anyway, or so soon after that the negative's features
are young enough: else all branches would run whole once more, for d needs both sides alike.

Ours: by noise level and not by step, so that any sampler and schedule will do, without a calibration, for any number of
negatives. What others reuse of guidance is held (FasterCache, arXiv 2410.19355) or fitted (LinearAG, see linear.py);
what each costs is in testbed/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels.branch import Step, flow_time
from ...kernels.guidance import relative_size
from ..session import Sent
from .line import Astray, Line
from .record import GuidanceRecord, known
from .session import FULL, NEAR, REPLACED, GuidanceSession, Need, Rows, Tell, rises
from .turns import spread_steps, steps_among

WIDEST = 4
"""Steps from one evaluation to the next at most. In short runs fewer: see `widest`."""
FEW = 8
"""Runs of fewer steps evaluate the first three: their first two are so far apart that the line through them may lead
anywhere."""


def widest(total: int) -> int:
    """Steps from one evaluation to the next at most, in a run of so many: beyond a quarter of the run, and in one of
    fewer than six steps beyond 1, fewer steps are nearer to the true solution at the same cost (testbed/README.md)."""
    return 1 if total < 6 else min(max(total // 4, 2), WIDEST)


@dataclass(frozen=True)
class Extrapolation:
    """Which steps evaluate the negative.

    saving       share of all evaluations to save at most, two per step; the rest is spread (`spread_steps`), no farther
                 apart than `widest`
    tolerance    None, or instead of `saving`: the relative error of the term that is accepted. A picture's next
                 evaluation is as far off as the last error allows, which grows with the square of the distance
    first        steps at the start that are evaluated in any case, at least 2
    per_sample   with a tolerance, every picture of a batch decides for itself
    """

    saving: float = 0.3
    tolerance: float | None = None
    first: int = 2
    per_sample: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.saving <= 0.5:
            raise ValueError(f"Extrapolated guidance: saving must be from 0 to 0.5, got {self.saving}.")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"Extrapolated guidance: tolerance must be above 0, got {self.tolerance}.")

    def steps(self, total: int) -> tuple[int, ...]:
        """The steps of a run of so many that evaluate the negative, for `saving`. All of them where nothing can be
        saved."""
        early = 1 if total < FEW else 0
        head = min(max(self.first - 2, early), total)  # before the two that the first line goes through
        rest, gap = total - head, widest(total)
        fewest = rest if gap == 1 else 2 - (2 - rest) // gap
        spread = spread_steps(rest, max(math.ceil(total * (1 - 2 * self.saving) - 1e-9) - head, fewest), gap)
        return (*range(head), *(head + index for index in spread))


class ExtrapolatedSession(GuidanceSession):
    """Extrapolated guidance in one run. A decision is taken once per step, for all its model calls; a line goes through
    the first calls of its two steps.

    It starts anew, with two steps in full, where the noise level rises (restarts) and where guidance was off for longer
    than an extrapolation reaches (schedules of cfg).

    flow            whether sigma is the time of a flow; else that time is sigma / (1 + sigma), and the term that of the
                    velocity of the same path, so that a model is extrapolated alike in both forms
    sigmas          the schedule of the run, noisiest first, with the noise level that its last step ends at
    before, whole   of a picture in several runs, the steps before this one and all of them. Turns are those of the
                    whole picture
    """

    tracks = True

    def __init__(self, policy: Extrapolation, flow: bool, sigmas: Sequence[float], tell: Tell | None = None,
                 before: int = 0, whole: int = 0):
        super().__init__(tell)
        self.policy, self.flow = policy, flow
        self._before, self._whole = before, whole
        self._end: tuple = ()
        self._astray = Astray([flow_time(sigma, flow) for sigma in sigmas], before)
        self.misses: dict[int, list[float | None]] = {}  # step -> relative error per picture, None where not known
        self._lines: dict[str, Line] = {}
        self._missed: dict[str, Tensor] = {}  # by how much the line did in this step, [B, ...], if it makes up for that
        self._weights: list[float] = []  # of what was missed, per picture
        self._now = 0.0  # time of this call
        self._step: Step | None = None  # with the noise level of its first call
        self._need, self._parts = FULL, False
        self._kept = False  # whether this step's terms are in the lines
        self._origin = 0  # the step that the lines begin at
        self._newest = 0.0  # noise level of the newest term
        self._planned: frozenset[int] | None = None
        self._widest = WIDEST
        self._last: list[int] = []  # per picture, the step that was evaluated last; empty: none was
        self._gaps: list[int] = []  # per picture, steps from there to the next
        self._measured: Tensor | None = None
        self._evaluated: Rows = ()
        self._sent: list[tuple[Rows, list[int], Sent]] = []

    def go_on(self, steps: int, left: object, why: str, device: torch.device) -> str:
        """The lines, whose turn it was last, and what was measured and not yet looked at."""
        if left is None:
            if why:
                self.tell(f"Extrapolated guidance: begins anew in this run of the picture, since {why}; its first two "
                          "steps need the negative")
            return ""
        lines, self._last, self._gaps, self._origin, self._newest, self._sent, astray = left
        self._lines = {name: line.to(device) for name, line in lines.items()}
        self._last, self._gaps, self._sent = list(self._last), list(self._gaps), list(self._sent)
        self._astray.go_on(*astray)
        self._plan(self._whole)
        return "Extrapolated guidance: the term goes on along the line of the earlier run"

    def left(self) -> object:
        """What `go_on` takes."""
        if not self._lines or not self._last:
            return None
        return {name: line.to(torch.device("cpu")) for name, line in self._lines.items()}, *self._end

    def begin(self, step: Step, pictures: int = 1, windowed: bool = False) -> Need:
        """The negatives of the pictures whose turn it is."""
        step = replace(step, index=step.index + self._before, total=self._whole or step.total)
        self._parts = windowed
        if windowed:
            self.tell("Extrapolated guidance: this guider has a formula of its own, and in context windows it shows no "
                      "whole predictions; the negative was evaluated in every step")
            return FULL
        if self._step is None or step.index != self._step.index:
            self._kept = False
            self._read(step.index - 2)
            up = self._step is not None and rises(step.sigma, self._step.sigma)
            self._step = step
            known = len(self._last) == pictures and not up
            self._missed = {}
            if known and step.index - min(self._last) <= self._widest:
                self._need = self._turn(step.index)
            else:
                self._begin_anew(step, pictures)
        self._now = step.time(self.flow)
        return self._need

    def ready(self, names: Iterable[str], x: Tensor) -> bool:
        """Whether each of these negatives has a line."""
        return all(name in self._lines and self._lines[name].d1.shape == x.shape for name in names)

    def widen(self) -> None:
        """It is every picture's turn."""
        self._need = FULL

    def replace(self, name: str, x: Tensor, c: Tensor, sigma: Tensor) -> Tensor:
        """c less the extrapolated term."""
        t = self._time(sigma)
        self._astray.stood_in(self._step.index, self._now)
        return torch.addcmul(c.float(), self._lines[name].at(t), _wide(t, c)).to(c.dtype)

    def keep(self, x: Tensor, c: Tensor, negatives: Mapping[str, Tensor], sigma: Tensor) -> None:
        """Move the lines on, and measure by how much they missed."""
        if self._parts or self._kept:
            return
        rows, t = self._need.rows, self._time(sigma)
        later = abs(self._step.sigma - self._newest) > NEAR * self._newest
        self._newest = self._step.sigma
        self._astray.evaluated(self._step.index, self._now)
        for name, u in negatives.items():
            d = (u.float() - c.float()) / _wide(t, c)  # e(c) - e(u), since e = (x - x0) / t
            known = self._lines.get(name)
            if known is None or known.d1.shape != d.shape:
                self._lines[name] = Line(d, d, t, t)
                continue
            if self._step.index > self._origin + 1:
                missed = d - known.at(t)
                miss = relative_size(missed, d)
                self._measured = miss if self._measured is None else torch.maximum(self._measured, miss)
                self._weights = self._weigh_misses(rows)
                if any(self._weights):
                    self._missed[name] = missed
            known.move(d, t, rows, later)
        self._evaluated = tuple(range(len(c))) if rows is None else rows

    def settle(self, name: str, x: Tensor, c: Tensor, u: Tensor, sigma: Tensor) -> Tensor:
        """u moved by what its line has missed since the last evaluation, in all calls of the step."""
        missed, weights = self._missed.get(name), self._weights
        if missed is None:
            return u
        t, alike = self._time(sigma), len(set(weights)) == 1
        t = t if alike else t * _filled(weights, t)
        return torch.addcmul(u.float(), missed, _wide(t, u), value=weights[0] if alike else 1.0).to(u.dtype)

    def end(self) -> None:
        """The step's turns are taken, and what was measured is on its way."""
        if not (taken := self._evaluated):
            return
        index = self._step.index
        self._last = self._last or [index] * len(self._gaps)
        if self._measured is not None:
            gaps = [index - last for last in self._last]
            self._sent.append((taken, gaps, Sent(index, self._measured)))
        for row in taken:
            self._last[row] = index
        self._kept, self._evaluated, self._measured = True, (), None

    def summary(self, record: GuidanceRecord) -> None:
        """By how much the extrapolated terms missed, where that was seen; and what there was to save."""
        # before all that was sent is looked at
        self._end = (tuple(self._last), tuple(self._gaps), self._origin, self._newest, tuple(self._sent),
                     self._astray.left())
        self._read(None)
        for step in record.steps:
            step.missed = known(self.misses.get(step.index + self._before, ()))
        if record.finished:
            self._saved(record)

    def _saved(self, record: GuidanceRecord) -> None:
        policy, full = self.policy, record.full
        if not any(step.negative for step in record.steps):
            return  # the run says so
        if record.evaluations == full:
            self.tell("Extrapolated guidance: nothing was saved, and the picture is that of full guidance")
        elif policy.tolerance is None and record.evaluations > (1 - policy.saving + 0.5 / len(record.steps)) * full:
            moved = "" if self.whole is None else ", moved to where the Branch Cache runs whole"
            self.tell(f"Extrapolated guidance: {100 * (1 - record.evaluations / full):.0f} % were saved and not "
                      f"{100 * policy.saving:.0f} %: the first two steps need the negative, also after a restart, and "
                      f"so do the last and one of every few{moved}; to save more, take fewer steps")

    # --- what the line has missed ---

    def _weigh_misses(self, rows: Rows | None) -> list[float]:
        """PART W of each picture: 0 where it is not its turn, or was in the step before."""
        now = self._step.index
        return [self._astray.weight(last, now) if rows is None or row in rows else 0.0
                for row, last in enumerate(self._last)]

    # --- whose turn it is ---

    def _begin_anew(self, step: Step, pictures: int) -> None:
        self._origin, self._need = step.index, FULL
        self._lines, self._last, self._gaps = {}, [], [2] * pictures
        self._astray.begin_anew()
        self._plan(step.total)

    def _plan(self, total: int) -> None:
        """A run of so many steps, from where the lines begin."""
        self._widest, self._planned = widest(total - self._origin), None

    def _plan_turns(self) -> frozenset[int]:
        """The steps from where the lines begin up to the last. Not before the second, since by then a cache has chosen
        its own."""
        policy, begin, step = self.policy, self._origin, self._step
        left = step.total - begin
        steps = (policy if not begin else replace(policy, first=2)).steps(left)
        if self.whole is not None:
            before = self._before  # those of earlier runs are over and done with
            whole = [index - begin for index in range(begin, step.total)
                     if index < before or self.whole.refreshes(Step(index - before, step.total - before, 0.0))]
            steps = steps_among(steps, whole, self.whole.max_age, self._widest)
        return frozenset(begin + each for each in steps)

    def _turn(self, index: int) -> Need:
        policy, last = self.policy, self._last
        if policy.tolerance is None:  # a step that was planned may have been left out by another node
            self._planned = self._plan_turns() if self._planned is None else self._planned
            return FULL if any(step in self._planned for step in range(last[0] + 1, index + 1)) else REPLACED
        if index < max(self._origin + 2, policy.first) or index == self._step.total - 1:
            return FULL
        rows = tuple(row for row, gap in enumerate(self._gaps) if index - last[row] >= gap)
        return FULL if len(rows) == len(last) or (rows and not policy.per_sample) else Need(rows)

    def _read(self, index: int | None) -> None:
        """What was measured in steps up to `index`. One step later than could be, also where there is no device to wait
        for: turns must not depend on it."""
        while self._sent and (index is None or self._sent[0][-1].step <= index):
            rows, gaps, sent = self._sent.pop(0)
            misses = sent.read()
            self.misses[sent.step] = [miss if row in rows else None for row, miss in enumerate(misses)]
            if self.policy.tolerance is not None and len(misses) == len(self._gaps):
                for row in rows:
                    reach = gaps[row] * math.sqrt(self.policy.tolerance / max(misses[row], 1e-6))
                    self._gaps[row] = min(max(int(reach), 1), self._widest) if reach > 0 else 1  # nan

    def _time(self, sigma: Tensor) -> Tensor:
        return flow_time(sigma.float().clamp_min(torch.finfo(torch.float32).tiny), self.flow)


def _filled(values: Sequence[float], like: Tensor) -> Tensor:
    """[B], like `like`, without a copy that the host would wait for."""
    filled = torch.full_like(like, values[0])
    for row, value in enumerate(values):
        if value != values[0]:
            filled[row] = value
    return filled


def _wide(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))
