"""LoRAtorio: patch by patch, the LoRA that departs most from the base model (Foteinopoulou et al. 2025, arXiv
2508.11624). The paper came without code; where it leaves a choice, the choice is an option here."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kernels.branch import Branch, Step, one_hot
from ..kernels.nested import pack_weights, unpack
from ..kernels.patches import confine, most_divergent, patch_cosine, softmin, stacked_like, upsample, weighted
from .counted import any_step, counted
from .session import POSITIVE, UNCONDITIONAL, Call, RunContext, Sent, Session

ENOUGH = 8
"""Steps in which the paper's kappa, counted in steps, has sharpened the weights. In 4 it has not, which costs the
testbed's clean LoRAs some of the concepts shown; in 8 sharper weights gain nothing there and lose on narrow ones."""


@dataclass(frozen=True)
class LoRAtorio:
    """e(z, c) = sum_i W_i e_i(z, c), and without prompt e(z) = lambda sum_i W_i e_i(z) + (1 - lambda) e_base(z), where
    W = softmin over LoRAs of the patch cosine between e_i(z, c) and e_base(z, c).

    strengths           one per adapter
    patch               side of a patch in latent pixels
    kappa, unit         inverse temperature 1 / tau = kappa * elapsed: sampling steps done, progress 0..1, or what has
                        passed of the model's time, 0..1000. The first step weighs all LoRAs alike, later ones ever
                        more sharply. "auto": steps; a run of fewer than ENOUGH sharpens as far as one of so many
    recenter_lambda     lambda; 1 switches re-centring off
    upsampling          of the weights from patches to pixels
    space               similarity of noise (velocity) or of denoised (x0) predictions
    top_k               0: all LoRAs take part. k: dynamic selection, the k that depart most
    scope               selection per picture, or for each patch
    recheck_every       with dynamic selection, steps between evaluations of the whole pool; between them only those
                        chosen last are evaluated. 1 is the paper: every member at every step
    reweigh_every       steps between weighings; between them the weights stay as they are. 1 is the paper. Ours: from
                        step to step the winner of a patch flickers, and no LoRA gets to finish what it began

    Where LoRAs have windows in time, a step knows those alone that are open; where none is, the base predicts.

    Where a latent has several parts (picture and sound), each has weights and a selection of its own; masks confine
    LoRAs in the first part.
    """

    strengths: tuple[float, ...]
    patch: int = 2
    kappa: float = 10.0
    unit: Literal["steps", "progress", "timesteps", "auto"] = "steps"
    recenter_lambda: float = 0.5
    upsampling: Literal["nearest", "bilinear"] = "nearest"
    space: Literal["noise", "x0"] = "noise"
    top_k: int = 0
    scope: Literal["image", "patch"] = "image"
    recheck_every: int = 1
    reweigh_every: int = 1

    masks = "predictions"

    def __post_init__(self) -> None:
        for name, least in (("patch", 1), ("kappa", 0), ("top_k", 0), ("recheck_every", 1),
                            ("reweigh_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"LoRAtorio: {name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.recenter_lambda <= 1:
            raise ValueError(f"LoRAtorio: recenter_lambda must be in [0, 1], got {self.recenter_lambda}")

    def begin(self, context: RunContext) -> LoRAtorioSession:
        """A run begins, with all LoRAs."""
        return LoRAtorioSession(self, context)

    def inverse_temperature(self, step: Step, times: tuple[float, ...] = ()) -> float:
        """1 / tau; `times` are the model's own, per step (RunContext.times), for the unit "timesteps"."""
        if self.unit == "steps" or (self.unit == "auto" and step.total >= ENOUGH):
            return self.kappa * step.index
        if self.unit == "auto":
            return self.kappa * (ENOUGH - 1) * step.progress
        if self.unit == "progress":
            return self.kappa * step.progress
        return self.kappa * 1000 * abs(times[0] - times[step.index])


class LoRAtorioSession(Session):
    """One run: the weights last found, for passes that have no positive side, and the members last chosen."""

    def __init__(self, method: LoRAtorio, context: RunContext):
        self.method, self.context = method, context
        self.pool = tuple(range(len(method.strengths)))
        self._chosen = self.pool
        self._newest: Sent | None = None
        self._step: int | None = None
        self._active = self.pool
        self._asked: tuple[int, ...] = ()  # those open when the pool was last evaluated
        self._asking = False  # whether this step does so
        self._of: tuple[int, Tensor, Tensor] | None = None
        self._weighed: tuple[int, ...] = ()  # the LoRAs that the weights are of
        self._window: Hashable = None  # and what of the latent
        self._weights: Tensor | None = None
        self._given: list[tuple[tuple[int, ...], list[Tensor]]] = []  # mean weights of the LoRAs, where some have none
        self._notes: dict[str, object] = {}
        self._guided = False  # whether there was an unconditional prediction

    @property
    def dynamic(self) -> bool:
        """Whether fewer LoRAs than there are take part in a step."""
        return 0 < self.method.top_k < len(self.pool)

    def branches(self, step: Step) -> tuple[Branch, ...]:
        """The LoRAs that take part, and the base last."""
        if step.index != self._step:
            self._step = step.index
            self._active = self._members(step)
            self._notes = {}
        base = Branch((0.0,) * len(self.pool))
        return (*(one_hot(self.method.strengths, i) for i in self._active), base)

    def mix(self, step: Step, call: Call) -> list[Tensor | None]:
        """Each cond's predictions by the weights per place of the positive side; an unconditional one re-centred on
        the base."""
        recentred = UNCONDITIONAL in (side for side, p in zip(call.sides, call.predictions, strict=True)
                                      if p is not None)
        self._guided = self._guided or recentred
        if not self._active:
            return [None if p is None else p[0] for p in call.predictions]
        weights = self._weights_for(step, call)
        self._notes["recentred"] = self._notes.get("recentred", False) or (
            recentred and self.method.recenter_lambda < 1)
        shares = {UNCONDITIONAL: self.method.recenter_lambda}
        return [None if p is None else weighted(p[-1], p[:-1], weights, shares.get(side, 1.0))
                for p, side in zip(call.predictions, call.sides, strict=True)]

    def notes(self) -> dict[str, object]:
        """active: LoRAs evaluated; weights: mean weight of each of them, per part of the latent where it has several;
        recentred: whether the base took part in an unconditional prediction (not without one: cfg 1,
        guidance-distilled models)."""
        return self._notes

    def chosen(self, names: Sequence[str]) -> list[str]:
        """How far the weights sharpen."""
        method, total = self.method, self.context.total
        if method.unit != "auto" or not method.kappa:
            return []
        last = method.inverse_temperature(Step(total - 1, total, 0.0))
        return [f"{counted(total, 'step')}: the inverse temperature rises to {last:g}"]

    def missed(self, names: Sequence[str]) -> list[str]:
        """LoRAs of a pool that never were among those that take part; a re-centring that was set and had nothing to do.
        """
        own, lines = self.method.recenter_lambda, []
        if own != LoRAtorio.recenter_lambda and not self._guided and names:
            lines.append(f"recenter_lambda {own:g} did nothing, since no negative was evaluated, as at cfg 1")
        met = {i for active, _ in self._given for i in active}
        took = {i for active, means in self._given for part in means
                for i, weight in zip(active, part.tolist(), strict=True) if weight > 0}
        if self.context.whole:
            return lines  # they do in another run of the picture
        return lines + [f"{names[i]} had no weight in {any_step(self.context.total)}: the {self.method.top_k} that "
                        "depart most from the base model were others" for i in sorted(met - took)]

    def _weights_for(self, step: Step, call: Call) -> Tensor:
        """Weights per pixel [N, B, 1, *size] of this call, packed as the latent is. Only a positive side defines them;
        a further pass on the same latent (perturbed attention, skipped layers) and passes without a positive side use
        those found last."""
        positive = next((p for p, side in zip(call.predictions, call.sides, strict=True)
                         if p is not None and side == POSITIVE), None)
        any_prediction = next(p for p in call.predictions if p is not None)
        shape = (len(self._active), any_prediction.shape[1], 1, *any_prediction.shape[3:])
        fits = self._weights is not None and self._weights.shape == shape and self._weighed == self._active
        if fits and (positive is None or self._is_further_pass(step, call) or self._keeps(step, call)):
            return self._weights
        if positive is None:
            self._notes["uniform"] = "a pass without a positive side came first"
            return torch.full(shape, 1 / shape[0], device=call.x.device)
        found = self._weigh(step, call, positive)
        self._of, self._weights = (step.index, call.x, call.sigma), pack_weights(found, call.parts)
        self._window = call.window
        self._weighed = self._active
        means = [weights.flatten(1).mean(dim=1) for weights in found]
        self._notes |= {"active": list(self._active), "weights": means if call.parts else means[0]}
        if self.dynamic:
            self._given.append((self._active, means))
        return self._weights

    def _keeps(self, step: Step, call: Call) -> bool:
        """Whether the weights of an earlier step still hold."""
        return (step.index % self.method.reweigh_every != 0 and call.window == self._window
                and self._of[0] // self.method.reweigh_every == step.index // self.method.reweigh_every)

    def _is_further_pass(self, step: Step, call: Call) -> bool:
        index, x, sigma = self._of
        return index == step.index and x is call.x and sigma is call.sigma

    def _weigh(self, step: Step, call: Call, positive: Tensor) -> list[Tensor]:
        """Per part of the latent its weights per pixel [N, B, 1, *size]."""
        vectors = call.x - positive if self.method.space == "noise" else positive
        found = [self._weigh_part(step, part) for part in unpack(vectors, call.parts)]
        if any(mask is not None for mask in self.context.masks):
            found[0] = confine(found[0], self._masks_like(found[0], call.masks_of(self.context)))
        return found

    def _weigh_part(self, step: Step, vectors: Tensor) -> Tensor:
        method = self.method
        similarity = patch_cosine(vectors, method.patch)
        keep = None
        if 0 < method.top_k < len(similarity):
            keep = most_divergent(similarity, method.top_k, method.scope)
            if self._asking and method.recheck_every > 1:
                self._report(step, keep)
        weights = softmin(similarity, method.inverse_temperature(step, self.context.times), keep)
        return upsample(weights, tuple(vectors.shape[3:]), method.patch, method.upsampling)

    def _masks_like(self, weights: Tensor, masks: Sequence[Tensor | None]) -> Tensor:
        """Masks of the active LoRAs, [N, 1 or B, 1, (frames or 1,) h, w] on the weights' device."""
        found = stacked_like(masks, weights)
        return found if len(self._active) == len(self.pool) else torch.stack([found[i] for i in self._active])

    def _members(self, step: Step) -> tuple[int, ...]:
        """Those whose windows are open, at every re-check and when they are others than before; between two, those
        chosen at the last one whose outcome is known."""
        may = self.context.open(step.index, len(self.pool))
        if may != self._asked:
            self._asked, self._chosen, self._newest = may, may, None
            self._asking = True
            return may
        if self._newest is not None and self._newest.step + 2 <= step.index:
            self._chosen = tuple(i for i, kept in zip(may, self._newest.read(), strict=True) if kept)
            self._newest = None
        self._asking = step.index % self.method.recheck_every == 0
        return may if self._asking or not self.dynamic else self._chosen

    def _report(self, step: Step, keep: Tensor) -> None:
        """Send the outcome of a re-check to the host, of all its calls and parts together. It is read two steps later,
        when it has long arrived: reading it at once would make the host wait for the device."""
        kept = keep.flatten(1).any(dim=1)
        if self._newest is not None and self._newest.step == step.index:
            kept = kept | self._newest.value
        self._newest = Sent(step.index, kept)
