"""LinearAG (Castillo et al. 2023, arXiv 2312.12487, AAAI 2025): the negative is foretold from all predictions before.

It needs coefficients that were calibrated on this model, sampler and schedule: see calibration.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...kernels.branch import Step
from ...kernels.guidance import combine
from ..counted import counted
from .session import CONDITIONAL, FULL, REPLACED, GuidanceSession, Need, Tell, noise_of


@dataclass(frozen=True)
class LinearAG:
    """The paper's policy: in the first half, true CFG and CFG with a predicted negative take turns; in the second half
    the conditional prediction alone.

    The paper says that they alternate, and not which comes first. Steps 0, 2, 4 and so on are true here, counted from
    the start of the run: step 0 has to be, since a negative is foretold from earlier ones and there is none yet. With
    20 steps that makes 5 x 2 + 5 x 1 + 10 x 1 = 25 evaluations, the number that the paper reports; with an odd number
    of steps the middle one belongs to the first half.

    coefficients   one row per model call: what each feature so far weighs in that call's negative. Column 2i is the
                   conditional prediction of call i, 2i + 1 its negative one, the last column the intercept.
    steps          the step that each call belongs to; samplers may call the model several times in one
    """

    coefficients: tuple[tuple[float, ...], ...]
    steps: tuple[int, ...]

    def kind(self, step: Step) -> Literal["guided", "predicted", "conditional"]:
        """What a step does with its negative."""
        return self.kind_at(step.index, step.total)

    @staticmethod
    def kind_at(index: int, total: int) -> Literal["guided", "predicted", "conditional"]:
        """The same, for a step by number."""
        if 2 * index >= total:
            return "conditional"
        return "predicted" if index % 2 else "guided"


class LinearSession(GuidanceSession):
    """LinearAG in one run: the predictions so far, and the negative that they foretell. For one negative.

    before, whole   where the policy is that of a picture in several runs: its steps before this one, and all of them
    """

    def __init__(self, policy: LinearAG, tell: Tell | None = None, before: int = 0, whole: int = 0):
        super().__init__(tell)
        self.policy, self._before, self._whole = policy, before, whole
        # the step of each call
        self.steps: list[int] = [step for step in policy.steps if step < before] if before else []
        self.features: list[Tensor] = []  # c_0, u_0, c_1, u_1, ... in noise space, u as guidance used it
        self._windowed = False
        self._missing = "the earlier run of this picture is not known" if before else ""

    def go_on(self, steps: int, left: object, why: str, device: torch.device) -> str:
        """The predictions of the runs before are features of this one's."""
        if not self._before:
            self.tell("LinearAG: begins anew in this run of the picture, since "
                      f"{why or 'it was calibrated along another schedule'}")
            return ""
        if left is None:
            self._missing = why or self._missing
            return ""
        self.steps, features = list(left[0]), left[1]
        self.features, self._missing = [feature.to(device) for feature in features], ""
        return f"LinearAG: the predictions of {counted(len(self.steps), 'call')} of the earlier run are known"

    def left(self) -> object:
        """All predictions so far, where a negative is still to be foretold from them."""
        if not self._whole or not self.steps:
            return None
        done = LinearAG.kind_at(self.steps[-1] + 1, self._whole) == "conditional"
        return tuple(self.steps), () if done else tuple(feature.cpu() for feature in self.features)

    def begin(self, step: Step, pictures: int = 1, windowed: bool = False) -> Need:
        """As the policy says, and in full where its coefficients do not fit the calls of this run."""
        if self._whole:
            step = replace(step, index=step.index + self._before, total=self._whole)
        call = len(self.steps)
        self.steps.append(step.index)
        self._windowed = windowed
        kind = self.policy.kind(step)
        if kind != "predicted":
            return CONDITIONAL if kind == "conditional" else FULL
        if windowed:
            self.tell("LinearAG: context windows leave no whole predictions to foretell the negative from; those steps "
                      "were guided in full")
            return FULL
        if self._missing:
            self.tell(f"LinearAG: begins anew in this run of the picture, since {self._missing}; steps whose negative "
                      "it would have foretold were guided in full")
            return FULL
        if self.policy.steps[call:call + 1] != (step.index,) or len(self.features) != 2 * call:
            self.tell("LinearAG: another node left out or added model calls, the coefficients do not fit them; those "
                      "steps were guided in full")
            return FULL
        return REPLACED

    def replace(self, name: str, x: Tensor, c: Tensor, sigma: Tensor) -> Tensor:
        """The negative that this call's conditional prediction and all earlier ones foretell."""
        row = self.policy.coefficients[len(self.steps) - 1]
        features = [*self.features, noise_of(x, c, sigma)]
        noise = combine(features, row[:len(features)], row[-1])
        u = (x.float() - noise * sigma.float().view(-1, *[1] * (x.ndim - 1))).to(c.dtype)
        self.features = [*features, noise_of(x, u, sigma)]
        return u

    def keep(self, x: Tensor, c: Tensor, negatives: Mapping[str, Tensor], sigma: Tensor) -> None:
        """Remember both sides; parts of them, as context windows show them, are of no use."""
        if not self._windowed:
            (u,) = negatives.values()
            self.features += [noise_of(x, c, sigma), noise_of(x, u, sigma)]
