"""Adaptive Guidance (Castillo et al. 2023, arXiv 2312.12487, AAAI 2025): the negative is evaluated until it is like the
conditional prediction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...kernels.branch import Step
from ...kernels.guidance import cosine, similarity_terms
from ..counted import counted
from ..session import Sent
from .record import GuidanceRecord, known
from .session import CONDITIONAL, GuidanceSession, Need, Rows, Tell, rises

Space = Literal["noise", "x0"]
SPACES: tuple[Space, ...] = ("noise", "x0")


@dataclass(frozen=True)
class AdaptiveGuidance:
    """e = e_cfg while gamma_t < threshold; from the first step where it is reached on, e = e_c.

    threshold    gamma-bar; above 1 it is never reached
    space        where gamma_t is the cosine: "noise" (the paper; velocity for flow models) or "x0" (denoised
                 predictions, as asagi4's node has it). Thresholds of one space mean nothing in the other.
    per_sample   every picture of a batch decides for itself; otherwise all stop when the last one has reached it
    min_steps    steps that are guided whatever gamma is
    ramp_steps   steps over which guidance fades once the threshold is reached; 0: at once, as in the paper. The
                 negative is evaluated until it has faded.
    """

    threshold: float = 0.991
    space: Space = "noise"
    per_sample: bool = True
    min_steps: int = 0
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ValueError(f"Adaptive Guidance: space is '{self.space}'. Choose one of: {', '.join(SPACES)}.")
        if self.min_steps < 0 or self.ramp_steps < 0:
            raise ValueError("Adaptive Guidance: min_steps and ramp_steps must not be negative.")


class ReadBack:
    """Small tensors on their way from the device to the host.

    On an accelerator a value is looked at two steps after it was sent, so that the host never waits for work that it
    has just queued; `exact` looks at it before the next step. On the CPU there is nothing to wait for.
    """

    def __init__(self, exact: bool):
        self.exact = exact
        self._sent: list[tuple[object, Sent]] = []

    def send(self, index: int, about: object, values: Tensor) -> None:
        """Values of step `index`, and what is known `about` them."""
        self._sent.append((about, Sent(index, values)))

    def arrived(self, index: int | None) -> Iterator[tuple[int, object, list]]:
        """What may be looked at in step `index`, (step, about, values) each; None: everything."""
        while self._sent:
            about, sent = self._sent[0]
            if index is not None and sent.far and not self.exact and sent.step > index - 2:
                return
            del self._sent[0]
            yield sent.step, about, sent.read()


class AdaptiveSession(GuidanceSession):
    """Adaptive Guidance in one run.

    The decision is taken once per step, at its first model call, and holds for the whole step. It is applied on the
    device at once, through `weigh`; the host learns of it later and then stops evaluating the negative. So the picture
    does not depend on how late the host learns of it.

    It starts anew where the noise level rises (restarts): what was alike with little noise need not be with more.

    whole   of a picture in several runs, the steps of all of them
    """

    fades = True

    def __init__(self, policy: AdaptiveGuidance, exact: bool = True, tell: Tell | None = None, whole: int = 0):
        super().__init__(tell)
        self.policy, self._whole = policy, whole
        self.gamma: dict[int, list[float | None]] = {}  # step -> similarity per sample, None where it was not measured
        self._back = ReadBack(exact)
        self._open: Rows | None = None  # rows whose negative is evaluated; None: all of them
        self._step: Step | None = None
        self._level = 0.0  # noise level of the step's first call
        self._begun = 0  # how often it has started anew
        self._before = 0  # steps that other runs took of the picture
        self._pictures, self._windowed = 1, False
        self._fresh = False  # until this step's decision was taken
        self._terms: dict[str, Tensor] = {}  # of this call, per negative, added up over windows: [2, 2, B]
        self._fade: Tensor | None = None  # [B]: ramp_steps + 1 while guided, then one less each step, down to 0

    def go_on(self, steps: int, left: object, why: str, device: torch.device) -> str:
        """Pictures that were done with their negative stay so. `min_steps` counts over all runs."""
        self._before = steps
        if left is None:
            if why:
                self.tell(f"Adaptive Guidance: looks anew how alike the two sides are, since {why}; steps that are "
                          "guided in any case are those of the whole picture")
            return ""
        self._fade, self._open = left[0].to(device), left[1]
        return "Adaptive Guidance: pictures that were done with their negative in the earlier run stay so"

    def left(self) -> object:
        """Which pictures are guided no longer."""
        return None if self._fade is None else (self._fade.cpu(), self._open)

    def begin(self, step: Step, pictures: int = 1, windowed: bool = False) -> Need:
        """The negatives of all rows that are still guided, as far as the host knows."""
        if self._step is None or step.index != self._step.index:
            self._fresh = True
            if self._step is not None and rises(step.sigma, self._level):
                self._fade = self._open = None
                self._begun += 1
            self._level = step.sigma
        self._step, self._pictures, self._windowed, self._terms = step, pictures, windowed, {}
        self._read(step.index)
        return CONDITIONAL if self._open == () else Need(self._open)

    def keep(self, x: Tensor, c: Tensor, negatives: Mapping[str, Tensor], sigma: Tensor) -> None:
        """Measure this step's similarities, and decide by them; in context windows when all have been seen. Without
        noise both sides are the picture itself, and say nothing."""
        if not (self._fresh and self._step.sigma):
            return
        for name, u in negatives.items():
            terms = similarity_terms(c, u, x if self.policy.space == "noise" else None)
            if terms.shape[-1] != self._pictures:  # windows over the batch: frames decide together
                terms = terms.sum(-1, keepdim=True).expand(-1, -1, self._pictures)
            self._terms[name] = self._terms[name] + terms if name in self._terms else terms
        if not self._windowed:
            self._measured()

    def end(self) -> None:
        """Windows: the decision counts from the next step on."""
        if self._windowed and self._terms:
            self._measured()

    def _measured(self) -> None:
        """With several negatives (DualCFG, PerpNeg) all must agree with the conditional prediction."""
        gammas = [cosine(terms) for terms in self._terms.values()]
        self.decide(gammas[0] if len(gammas) == 1 else torch.stack(gammas).amin(0))

    def decide(self, gamma: Tensor) -> None:
        """Take this step's decision from similarities [B]; rows whose negative was not evaluated are ignored."""
        if not self._fresh:
            return
        self._fresh = False
        if self._fade is None or self._fade.shape != gamma.shape:
            self._fade = torch.full_like(gamma, self.policy.ramp_steps + 1)
        if self._before + self._step.index >= self.policy.min_steps:
            lowest = gamma if self.policy.per_sample else gamma.min().expand_as(gamma)
            self._fade = self._faded(lowest >= self.policy.threshold)
        self._back.send(self._step.index, (self._begun, self._open), torch.stack([gamma, self._fade]))

    def _faded(self, reached: Tensor) -> Tensor:
        """The fade of this step, where the threshold was reached in it or before."""
        ramp = self.policy.ramp_steps
        if not ramp:
            return self._fade.masked_fill(reached, 0.0)
        return torch.where(reached | (self._fade <= ramp), (self._fade - 1).clamp_min(0), self._fade)

    def weigh(self, c: Tensor) -> Tensor:
        """1 while guided, then falling over the ramp to 0."""
        if self._fade is None:
            return super().weigh(c)
        fade = self._fade if self._fade.shape[0] == c.shape[0] else self._fade.min().expand(c.shape[0])
        fade = fade / (self.policy.ramp_steps + 1) if self.policy.ramp_steps else fade
        return fade.to(c).view(c.shape[0], *[1] * (c.ndim - 1))

    def summary(self, record: GuidanceRecord) -> None:
        """The similarities of every step, and whether the settings were ones to be used with this model and run."""
        self._read(None)
        policy = self.policy
        for step in record.steps:
            step.gamma = known(self.gamma.get(step.index, ()))
        self._too_early()
        if record.finished and self._step is not None and policy.threshold <= 1:
            self._never()
            if record.evaluations == record.full and self._before + self._step.total >= self._whole:
                self._all_guided()

    def _read(self, index: int | None) -> None:
        for sent, (begun, measured), (gamma, fade) in self._back.arrived(index):
            self.gamma[sent] = [g if measured is None or row in measured else None for row, g in enumerate(gamma)]
            if begun == self._begun:
                rows = tuple(row for row, left in enumerate(fade) if left > 0)
                self._open = None if len(rows) == len(fade) else rows

    def _too_early(self) -> None:
        policy, first = self.policy, self.gamma.get(self.policy.min_steps)
        if first and not self._before and all(g is not None and g >= policy.threshold for g in first):
            self.tell(f"Adaptive Guidance: the similarity is above the threshold {policy.threshold:g} from the first "
                      f"step on that may be left out ({min(first):.6f}): this model, in the space '{policy.space}', "
                      "needs a higher threshold, in mode 'saving' a smaller share. Calibrate Guidance finds it.")

    def _never(self) -> None:
        """Nothing was saved: how near it came. The similarity need not rise to the end; along a flow that of velocities
        may be highest in the middle."""
        policy = self.policy
        counts = max if policy.per_sample else min
        seen = {index: counts(gamma) for index, gamma in self.gamma.items()
                if self._before + index >= policy.min_steps and gamma and None not in gamma}
        if not seen:
            return
        peak = max(seen, key=seen.get)
        if seen[peak] < policy.threshold:
            self.tell(f"Adaptive Guidance: the similarity never reached the threshold {policy.threshold:g}, so nothing "
                      f"was saved. It was highest in step {peak + 1} of {self._step.total} ({seen[peak]:.6f}). Take a "
                      "lower threshold or the other space; Calibrate Guidance finds it.")

    def _all_guided(self) -> None:
        """Nothing was saved, and not for want of similarity."""
        policy, steps = self.policy, self._before + self._step.total
        if self.gamma and policy.min_steps >= steps - 1:  # the step that ends guidance is evaluated in full
            self.tell(f"Adaptive Guidance: min_guided_steps is {policy.min_steps} and the picture has "
                      f"{counted(steps, 'step')}, which leaves none whose negative could be saved")
        elif self._fade is not None and 0 < self._fade.min() <= policy.ramp_steps:
            self.tell(f"Adaptive Guidance: ramp_steps is {policy.ramp_steps}, and guidance was still fading out when "
                      "the run ended, so nothing was saved")
        elif self._begun:
            self.tell("Adaptive Guidance: the noise level rises in this run, and guidance begins anew wherever it "
                      "does, so nothing was saved")
