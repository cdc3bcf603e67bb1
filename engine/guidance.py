"""What one run knows about guidance: per sample, whether it is still guided; per call, what was predicted."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.branch import Step
from ..kernels.guidance import combine, cosine, similarity_terms
from ..methods.guidance import AdaptiveGuidance, LinearAG
from ..methods.session import Sent

Rows = tuple[int, ...]


def noise_of(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """(x - x0) / sigma in fp32: the noise prediction, or the velocity of a flow model.  sigma: [B]."""
    return (x - x0).float() / sigma.float().view(-1, *[1] * (x.ndim - 1))


class ReadBack:
    """Small tensors on their way from the device to the host.

    On an accelerator a value is looked at two steps after it was sent, so that the host never waits for work that it
    has just queued; `exact` looks at it before the next step. On the CPU there is nothing to wait for.
    """

    def __init__(self, exact: bool):
        self.exact = exact
        self._sent: list[tuple[Rows | None, Sent]] = []

    def send(self, index: int, rows: Rows | None, values: Tensor) -> None:
        self._sent.append((rows, Sent(index, values)))

    def arrived(self, index: int | None) -> Iterator[tuple[int, Rows | None, list]]:
        """What may be looked at in step `index`; None: everything."""
        while self._sent:
            rows, sent = self._sent[0]
            if index is not None and sent.far and not self.exact and sent.step > index - 2:
                return
            del self._sent[0]
            yield sent.step, rows, sent.read()


class AdaptiveState:
    """Adaptive Guidance in one run.

    The decision is taken once per step, at its first model call, and holds for the whole step. It is applied on the
    device at once, through `weight`; the host learns of it later and then stops evaluating the negative. So the
    picture does not depend on how late the host learns of it.
    """

    def __init__(self, policy: AdaptiveGuidance, exact: bool = True):
        self.policy = policy
        self.back = ReadBack(exact)
        self.open: Rows | None = None  # rows whose negative is evaluated; None: all of them
        self.gamma: dict[int, list[float | None]] = {}  # step -> similarity per sample, None where it was not measured
        self._step: Step | None = None
        self._fresh = False
        self._fade: Tensor | None = None  # [B]: ramp_steps + 1 while guided, then one less each step, down to 0
        self._crossed: Tensor | None = None

    def begin(self, step: Step) -> Rows | None:
        """A model call begins: the rows whose negative it needs, None for all, empty for none."""
        if self._step is None or step.index != self._step.index:
            self._fresh = True
        self._step = step
        self._read(step.index)
        return self.open

    @property
    def fresh(self) -> bool:
        """True until this step's decision was taken."""
        return self._fresh

    def terms(self, x: Tensor, c: Tensor, u: Tensor) -> Tensor:
        """Similarity of two denoised predictions in the policy's space, as `cosine` takes it: [3, B]."""
        return similarity_terms(c, u) if self.policy.space == "x0" else similarity_terms(x - c, x - u)

    def decide(self, gamma: Tensor) -> None:
        """Take this step's decision from similarities [B]; rows whose negative was not evaluated are ignored."""
        if not self._fresh:
            return
        self._fresh = False
        if self._fade is None or self._fade.shape != gamma.shape:
            self._fade = torch.full_like(gamma, self.policy.ramp_steps + 1)
            self._crossed = torch.zeros_like(gamma, dtype=torch.bool)
        if self._step.index >= self.policy.min_steps:
            lowest = gamma if self.policy.per_sample else gamma.min().expand_as(gamma)
            self._crossed = self._crossed | (lowest >= self.policy.threshold)
        self._fade = torch.where(self._crossed, (self._fade - 1).clamp_min(0), self._fade)
        self.back.send(self._step.index, self.open, torch.stack([gamma, self._fade]))

    def weight(self, c: Tensor) -> Tensor:
        """How much of the guidance each sample of c [B, ...] gets in this step: [B, 1, ...], 1 to 0."""
        shape = (c.shape[0], *[1] * (c.ndim - 1))
        if self._fade is None:
            return c.new_ones(shape)
        fade = self._fade if self._fade.shape[0] == c.shape[0] else self._fade.min().expand(c.shape[0])
        return (fade / (self.policy.ramp_steps + 1)).to(c).view(shape)

    def finish(self) -> None:
        """The run is over: read what is still on its way."""
        self._read(None)

    def _read(self, index: int | None) -> None:
        for sent, measured, (gamma, fade) in self.back.arrived(index):
            self.gamma[sent] = [g if measured is None or row in measured else None for row, g in enumerate(gamma)]
            rows = tuple(row for row, left in enumerate(fade) if left > 0)
            self.open = None if len(rows) == len(fade) else rows


class LinearState:
    """LinearAG in one run: the predictions so far, and the negative that they foretell.

    watch   calibration: evaluate the negative in every call, also where it is predicted, and keep it as a target
    policy  None: every call is guided (calibration on full guidance)
    """

    def __init__(self, policy: LinearAG | None, watch: bool = False):
        self.policy, self.watch = policy, watch
        self.features: list[Tensor] = []  # c_0, u_0, c_1, u_1, ... in noise space, u as guidance used it
        self.targets: list[Tensor] = []  # u_0, u_1, ... as the model says it
        self.gamma: dict[str, list[Tensor]] = {"noise": [], "x0": []}  # similarity per call, [B] each
        self.steps: list[int] = []  # the step of each call
        self.off_course = False

    def begin(self, step: Step) -> str:
        """What this model call does with its negative: "guided", "predicted" or "conditional"."""
        call = len(self.steps)
        self.steps.append(step.index)
        if self.policy is None:
            return "guided"
        kind = self.policy.kind(step)
        fits = call < len(self.policy.steps) and self.policy.steps[call] == step.index
        if kind == "predicted" and (not fits or len(self.features) != 2 * call):
            self.off_course = True  # a call was left out or added by another node: the coefficients do not fit it
            return "guided"
        return kind

    def foretell(self, x: Tensor, c: Tensor, sigma: Tensor) -> Tensor:
        """The negative's denoised prediction from this call's conditional one and all earlier ones."""
        now = noise_of(x, c, sigma)
        row = self.policy.coefficients[len(self.steps) - 1]
        features = [*self.features, now]
        u = combine(features, row[:len(features)], row[-1])
        return (x.float() - u * sigma.float().view(-1, *[1] * (x.ndim - 1))).to(c.dtype)

    def keep(self, x: Tensor, c: Tensor, u: Tensor, sigma: Tensor, true_u: Tensor | None = None) -> None:
        """Remember a call's two denoised predictions; `true_u` where `u` is a predicted one."""
        self.features += [noise_of(x, c, sigma), noise_of(x, u, sigma)]
        if self.watch:
            self.targets.append(self.features[-1] if true_u is None else noise_of(x, true_u, sigma))
            self.gamma["noise"].append(cosine(similarity_terms(self.features[-2], self.targets[-1])))
            self.gamma["x0"].append(cosine(similarity_terms(c, u if true_u is None else true_u)))
