"""CMLoRA: LoRAs take turns in the lead, the others ride on cached features (Zou et al. 2025, arXiv 2502.04923).

High-frequency LoRAs (style, character, clothing, object) lead early, low-frequency ones (background) late. The
released code is followed in its numbers and not in its faults (tests/test_cmlora.py names each).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..kernels.branch import Branch, Step, one_hot
from ..kernels.nested import Parts, spread, unpack
from ..kernels.patches import stacked_like
from ..kernels.spectrum import high_share, radial_amplitude, radial_bins
from .counted import counted, verb
from .schedule import PAPER, AgeBySteps, oldest, refresh_steps
from .session import Call, RunContext, Sent, Session, masks_among
from .switch import own_turn


def dominance(start: float, refreshes: int, decay: Literal["none", "halving", "linear"]) -> float:
    """w after some refreshes: `start` without decay, less 1, 1/2, 1/4, ... with halving, less 0.5, 1, 1.5, ... with
    linear decay; never below 1 (equal weights), except where it started there."""
    lost = {"none": 0.0, "halving": 2 * (1 - 0.5**refreshes), "linear": 0.25 * refreshes * (refreshes + 1)}[decay]
    return max(start - lost, min(start, 1.0))


@dataclass(frozen=True)
class CMLoRA:
    """lambda_d = w / (w + N - 1) for the leading LoRA d, 1 / (w + N - 1) for the others.

    strengths       one per adapter
    high            per adapter: whether it is of the high-frequency class
    order           offline: the high class leads up to `boundary`, then the low class. online: the high class leads
                    while the latent's high-frequency share is at least `threshold`. async: all in turn, high class
                    first, a tenth of the run each. switch-a: only the leader acts, `steps_per_lora` steps at a time;
                    low ones join in after `boundary`
    boundary        share of the run, j / T
    threshold       g, against H_0.2 of the latent one step earlier (read without waiting for the device); of picture
                    and sound that are sampled together, the picture's
    start           w at the first step; None: N - 0.5
    decay           of w, per refresh (`dominance`)
    c1, c2          steps between refreshes (`refresh_steps`), at which the lead passes on, but for async, as in the
                    released code. 0: the paper's 2 and 3, and fewer where a LoRA would not lead otherwise, see
                    `intervals`
    caching         False: every branch runs whole at every step
    dominant_full   whether the leader runs whole at every step (the paper), or only at refreshes (released code)
    steps_per_lora  of switch-a. 0: by the number of steps, as Switch's, and the low class begins after `boundary`
    cache_age       steps over which what is cached of a LoRA serves, then it runs whole. None: as long as all take to
                    lead in turn (`oldest`). 0: by the number of steps (`AgeBySteps`), ours

    Ours, where LoRAs have masks: each acts in its own in the model's layers, and at a place those alone have a say that
    act there. Where they have windows in time, a step knows those alone that are open: they take the turns and share
    the weights, and N is their number.
    """

    masks = "layers"

    strengths: tuple[float, ...]
    high: tuple[bool, ...] | None = None
    order: Literal["offline", "online", "async", "switch-a"] = "offline"
    boundary: float = 0.6
    threshold: float = 0.4
    start: float | None = None
    decay: Literal["none", "halving", "linear"] = "none"
    c1: int = 0
    c2: int = 0
    caching: bool = True
    dominant_full: Literal["every_step", "on_refresh"] = "every_step"
    steps_per_lora: int = 0
    cache_age: int | None = None

    def __post_init__(self) -> None:
        for name in ("c1", "c2", "steps_per_lora"):
            if getattr(self, name) < 0:
                raise ValueError(f"CMLoRA: {name} must be at least 0, got {getattr(self, name)}")
        if self.cache_age is not None and self.cache_age < 0:
            raise ValueError(f"CMLoRA: cache_age must be at least 0, got {self.cache_age}")
        if self.start is not None and self.start <= 0:
            raise ValueError(f"CMLoRA: the dominance weight must be above 0, got {self.start}")
        if self.high is not None and len(self.high) != len(self.strengths):
            raise ValueError(f"CMLoRA: {counted(len(self.strengths), 'LoRA')} "
                             f"{verb(len(self.strengths), 'need')} as many classes, got {len(self.high)}")

    def begin(self, context: RunContext) -> CMLoRASession:
        """A run begins, with its first turn."""
        return CMLoRASession(self, context)

    def intervals(self, total: int) -> tuple[int, int]:
        """c1 and c2 in a run of so many steps. Those that are left open are the longest, not longer than the paper's,
        with which every LoRA leads while its class does (by `boundary`, also with the online order); 1 where that
        cannot be."""
        choices = [(self.c1 or c1, self.c2 or c2) for c1, c2 in (PAPER, (2, 2), (1, 2), (1, 1))]
        if self.order in ("async", "switch-a"):  # the lead does not pass on by them
            return choices[0]
        planned = replace(self, order="offline")
        return next((pair for pair in choices if len(planned.leaders(total, *pair)) == len(self.strengths)),
                    choices[-1])

    def oldest(self, total: int) -> int:
        """Age in steps, of a run of so many, at which cached features are no longer used."""
        intervals = self.intervals(total)
        if self.cache_age is None:
            return oldest(len(self.strengths), *intervals)
        return self.cache_age or AgeBySteps(len(self.strengths), *intervals).at(total)

    def leaders(self, total: int, c1: int, c2: int) -> set[int]:
        """Who leads in a run of so many steps, of order "offline"."""
        at, done, led = refresh_steps(total, c1, c2), 0, set()
        for step in (Step(index, total, 0.0) for index in range(total if self.strengths else 0)):
            done += step.index in at
            led.add(self.leader(step, self.group(step), done - 1))
        return led

    @property
    def classes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Indexes of the high-frequency LoRAs and of the low-frequency ones."""
        high = self.high or (True,) * len(self.strengths)
        return tuple(i for i, h in enumerate(high) if h), tuple(i for i, h in enumerate(high) if not h)

    def first_weight(self, count: int) -> float:
        """w at the first step, of so many LoRAs."""
        return max(count - 0.5, 1.0) if self.start is None else self.start

    def group(self, step: Step, share: float = 1.0, may: Collection[int] | None = None) -> tuple[int, ...]:
        """The LoRAs that take turns at a step; `share` is the measured high-frequency share of the online order, `may`
        those whose windows are open, at least one; None: all."""
        high, low = (tuple(i for i in each if may is None or i in may) for each in self.classes)
        early = share >= self.threshold if self.order == "online" else step.index <= self.boundary * step.total
        if self.order == "async" or (self.order == "switch-a" and not early):
            return high + low
        return (high or low) if early else (low or high)

    def leader(self, step: Step, group: tuple[int, ...], refreshes: int) -> int:
        """Whose turn it is, within the group; `refreshes` before this step."""
        turn = refreshes
        if self.order == "switch-a" and self.steps_per_lora:
            turn = step.index // self.steps_per_lora
        elif self.order == "switch-a":
            low, first = self.classes[1], math.floor(self.boundary * step.total) + 1  # the low class's first step
            turn, there = step.index, set(low) & set(group)
            if step.index >= first and there and there != set(group):  # its turns begin anew, with the low class
                turn, group = step.index - first, sorted(group, key=lambda i: i not in low)
            turn //= own_turn(step.total, len(self.strengths))
        elif self.order == "async":
            turn = step.index // max(round(0.1 * step.total), 1)
        return group[turn % len(group)]


class CMLoRASession(Session):
    """One run: who leads, how old each LoRA's cached features are, and the share measured last."""

    whole_batch = False

    def __init__(self, method: CMLoRA, context: RunContext):
        self.method, self.context = method, context
        self.count = len(method.strengths)
        self.open = tuple(range(self.count))
        self.intervals = method.intervals(context.total)
        self.refreshes = sorted(refresh_steps(context.total, *self.intervals))
        self.oldest = method.oldest(context.total)
        self.lead: int | None = None
        self._led: set[int] = set()
        self._there: set[int] = set()  # whose windows were open at some step
        self.weight = method.first_weight(self.count)
        self._step: int | None = None
        self._made = [-1] * self.count
        self._gains: list[float | None] = [None] * self.count  # with which what is cached was made
        self._fresh: tuple[bool, ...] = ()
        self._share = 1.0 if context.left is None else context.left
        self._sent: Sent | None = None
        self._bins: dict[tuple, Tensor] = {}  # per size of the latent, which a sampler may change, and device
        self._notes: dict[str, object] = {}

    def observe(self, step: Step, x: Tensor) -> None:
        """Take the step's turn; with the online order, measure the latent for the next one."""
        if step.index == self._step or not self.count:
            return
        self._step = step.index
        self._notes = {}
        self.open = self.context.open(step.index, self.count)
        if self.method.order == "online":
            self._measure(step, x)
        if self.open:
            self._there.update(self.open)
            self._take_turn(step)

    def branches(self, step: Step) -> tuple[Branch, ...]:
        """Every LoRA alone whose window is open; with order "switch-a" the leader alone. The base where none is."""
        if not self.open:
            return (Branch((0.0,) * self.count),)
        if self.method.order == "switch-a":
            return (one_hot(self.method.strengths, self.lead),)
        return tuple(one_hot(self.method.strengths, i) for i in self.open)

    def refresh(self, step: Step) -> tuple[bool, ...]:
        """The leader runs whole as `dominant_full` says, another LoRA where what is cached of it is too old."""
        return self._fresh if self.open and self.method.order != "switch-a" else (True,)

    def mix(self, step: Step, call: Call) -> list[Tensor | None]:
        """The weighted mean of each cond's predictions, in which the leader weighs most."""
        return [None if p is None else self._mixed(p, call) for p in call.predictions]

    def notes(self) -> dict[str, object]:
        """led: index of the leader; weight: its lambda; whole: LoRAs that may not come from a cache; high_share of the
        latent, with the online order."""
        return self._notes

    def chosen(self, names: Sequence[str]) -> list[str]:
        """After how many steps the lead passes on."""
        method, head = self.method, f"{counted(self.context.total, 'step')}, {counted(len(names), 'LoRA')}"
        if method.order == "switch-a":
            turn = own_turn(self.context.total, self.count)
            return [] if method.steps_per_lora else [f"{head}: steps_per_lora is {turn}"]
        c1, c2 = self.intervals
        fixed = method.order == "async" or (method.c1 and method.c2)
        out = [] if fixed else [f"{head}: c1 is {c1}, c2 is {c2}"]
        if method.caching and method.cache_age == 0:
            serve = f"serve {self.oldest} steps" if self.oldest > 1 else "do not serve, so few steps differ too much"
            out.append(f"{head}: cached features {serve}")
        return out

    def missed(self, names: Sequence[str]) -> list[str]:
        """LoRAs that never led, by their classes."""
        if self.method.order == "switch-a" or not self._led or len(names) < 2:
            return []  # a LoRA that does not lead does not act there at all
        if self.context.whole:
            return []  # it leads in another run of the picture
        out, steps = [], self.context.total
        for word, own in zip(("fine detail", "backgrounds"), self.method.classes, strict=True):
            own = [i for i in own if i in self._there]
            never = [names[i] for i in own if i not in self._led]
            if never and len(never) == len(own):
                out.append(f"the class of {word} never led in {counted(steps, 'step')} ({', '.join(never)})")
            elif never:
                out.append(f"{', '.join(never)} never led in {counted(steps, 'step')}")
        return out

    def left(self) -> float | None:
        """The high-frequency share of the latent at the last step, by which the next run's first one goes."""
        return None if self._sent is None else self._sent.read()

    def _mixed(self, predictions: Tensor, call: Call) -> Tensor:
        """sum_i lambda_i e_i = mean + (w - 1) / (w + N - 1) (e_d - mean), which is the mean exactly for w = 1."""
        if len(predictions) == 1:
            return predictions[0]
        lead = self.open.index(self.lead)
        if masks := masks_among(call.masks_of(self.context), self.open):
            return (self._where(predictions, lead, masks, call.parts).to(predictions.dtype) * predictions).sum(dim=0)
        share = (self.weight - 1) / (self.weight + len(self.open) - 1)
        return torch.lerp(predictions.mean(dim=0), predictions[lead], share)

    def _where(self, predictions: Tensor, lead: int, masks: list[Tensor | None], parts: Parts) -> Tensor:
        """lambda_i m_i / sum_j lambda_j m_j: LoRAs that act nowhere at a place, where their branches are the base's,
        have no say there. Where none acts all branches are the base's, and the leader speaks for them."""
        latents = unpack(predictions, parts)
        confined = stacked_like(masks, latents[0])
        weights = confined.expand(len(confined), latents[0].shape[1], *confined.shape[2:]).clone()
        weights[lead] *= self.weight
        total = weights.sum(dim=0)
        leads = torch.zeros_like(weights)
        leads[lead] = 1
        weights = torch.where(total > 0, weights / total.clamp_min(torch.finfo(torch.float32).tiny), leads)
        each = 1 / (self.weight + len(self.open) - 1)
        shares = [self.weight * each if i == lead else each for i in range(len(weights))]
        return spread(weights, shares, latents, parts)

    def _measure(self, step: Step, x: Tensor) -> None:
        """Read the share of the step before, and send this step's on its way."""
        if self._sent is not None:
            self._share = self._sent.read()
        size = (1, *x.shape[2:])[-2:]
        if (size, x.device) not in self._bins:
            self._bins[size, x.device] = radial_bins(*size, x.device)
        share = high_share(radial_amplitude(x, self._bins[size, x.device])).mean()
        self._sent = Sent(step.index, share)
        self._notes["high_share"] = share

    def _take_turn(self, step: Step) -> None:
        method, now = self.method, step.index
        done = sum(at <= now for at in self.refreshes)
        lead = method.leader(step, method.group(step, self._share, self.open), done - 1)
        passed_on = now in self.refreshes or lead != self.lead
        self.lead = lead
        self._led.add(lead)
        self.weight = dominance(method.first_weight(len(self.open)), done - 1, method.decay)
        leads_whole = method.dominant_full == "every_step" or passed_on
        gains = self.context.gains[now] if self.context.gains else (1.0,) * self.count
        whole = [i for i in self.open if not method.caching or self._made[i] < 0
                 or abs(now - self._made[i]) >= self.oldest or self._gains[i] != gains[i]
                 or (i == lead and leads_whole)]
        for i in whole:
            self._made[i], self._gains[i] = now, gains[i]
        self._fresh = tuple(i in whole for i in self.open)
        share = 1.0 if method.order == "switch-a" else self.weight / (self.weight + len(self.open) - 1)
        self._notes |= {"led": lead, "weight": share, "whole": whole}
