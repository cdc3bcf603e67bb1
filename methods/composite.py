"""LoRA Composite: every adapter alone, predictions averaged (Zhong et al. 2024, arXiv 2402.16843, eq. 3, w_i = 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.branch import Branch, Step, one_hot
from ..kernels.nested import Parts, spread, unpack
from ..kernels.patches import stacked_like, weighted
from .session import Call, PlainSession, RunContext, Session, masks_among


@dataclass(frozen=True)
class Composite:
    """e = 1/k sum_i [ e_i(z) + s (e_i(z, c) - e_i(z)) ]. Guidance is linear, so the mean is taken on the conditional
    and the unconditional predictions before it, which is the same.

    Ours, where LoRAs have masks: e = e_0 + sum_i w_i (e_i - e_0), w_i = m_i / max(sum_j m_j, 1), e_0 the base model's.
    Without a mask m_i is 1, so that LoRAs without masks are averaged as ever. Where they have windows in time, those
    that are open are composed; where none is, the base model predicts.
    """

    strengths: tuple[float, ...]

    masks = "predictions"

    def branches(self, step: Step) -> tuple[Branch, ...]:
        return tuple(one_hot(self.strengths, i) for i in range(len(self.strengths))) or (Branch(()),)

    def mix(self, step: Step, predictions: Tensor) -> Tensor:
        return predictions.mean(dim=0)

    def begin(self, context: RunContext) -> Session:
        confined = context.gains or any(mask is not None for mask in context.masks)
        return ConfinedComposite(self, context) if confined else PlainSession(self)


class ConfinedComposite(Session):
    """One run with masks or windows: every LoRA in its region and its time, the base where there is none."""

    whole_batch = False

    def __init__(self, method: Composite, context: RunContext):
        self.method, self.context = method, context

    def branches(self, step: Step) -> tuple[Branch, ...]:
        """The LoRAs whose windows are open, and the base last where it may have a share: all of them have masks, or
        there is none."""
        may, strengths = self._open(step), self.method.strengths
        base = all(mask is not None for mask in masks_among(self.context.masks, may) or [None] * len(may))
        return (*(one_hot(strengths, i) for i in may), *[Branch((0.0,) * len(strengths))] * base)

    def mix(self, step: Step, call: Call) -> list[Tensor | None]:
        masks = masks_among(call.masks_of(self.context), self._open(step))
        if not masks:
            return [None if p is None else self.method.mix(step, p) for p in call.predictions]
        if any(mask is None for mask in masks):  # one acts everywhere, so that the weights of the LoRAs sum to 1
            return [None if p is None else weighted(p[0], p[1:], self._like(p, masks, call.parts)[1:])
                    for p in call.predictions]
        return [None if p is None else weighted(p[-1], p[:-1], self._like(p[:-1], masks, call.parts))
                for p in call.predictions]

    def _open(self, step: Step) -> tuple[int, ...]:
        return self.context.open(step.index, len(self.method.strengths))

    def _like(self, predictions: Tensor, masks: list[Tensor | None], parts: Parts) -> Tensor:
        """Weights that broadcast over the LoRAs' predictions. Of latents of several parts masks are the first's."""
        latents = unpack(predictions, parts)
        confined = stacked_like(masks, latents[0])
        return spread(confined / confined.sum(dim=0).clamp_min(1), [1 / len(confined)] * len(confined), latents, parts)
