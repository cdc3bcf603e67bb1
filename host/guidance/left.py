"""What a run with guidance leaves for the next one of its picture, and how much of main memory that may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from weakref import ReferenceType

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...methods.guidance.extrapolated import NEAR
from ..compose.earlier import Left, Mark
from .identity import describe_model

HELD = 256 * 2**20
"""Bytes that the runs before the last may hold together with it. The last one's are kept whatever they take: it is the
one that the next sampler of a graph goes on with."""
GIVEN_UP = f"what it had left was given up, since later runs left more than {HELD // 2**20} MB"


@dataclass
class Guided:
    """A run with guidance that left noise.

    policy     the rule in words
    model      what was sampled; `name` is that of its weights, its LoRAs and their strengths
    prompts    what both sides were asked for
    sigma      the noise level at its end
    steps      taken of the picture, those of the runs before included
    left       what the session left; None: nothing was seen, or it was given up
    given_up   whether it was, for other runs' sake or because its model is gone
    """

    policy: str
    model: ReferenceType
    name: str
    prompts: tuple
    sigma: float
    steps: int
    left: object
    given_up: bool = False

    def unlike(self, policy: str, model: ModelPatcher, prompts: tuple, sigma: float) -> str:
        """Why what was left does not hold for a run that goes on with the picture; empty: it does."""
        if self.model() is not model.model:
            return "it goes on with the picture of another model"
        if describe_model(model) != self.name:
            return "the model goes on with other LoRAs or settings"
        if self.policy != policy:
            return "the rule is another one"
        if self.prompts != prompts:
            return "the prompts are others"
        if abs(sigma - self.sigma) > NEAR * self.sigma:
            return "it does not begin at the noise level of its end"
        return GIVEN_UP if self.given_up else ""

    def give_up(self) -> None:
        """Let go of the tensors; that the run was, and its steps, stays known."""
        self.left, self.given_up = None, self.given_up or self.left is not None


class GuidedRuns(Left[Guided]):
    """The last runs with guidance that left noise; what they hold is bounded, and goes with its model."""

    def keep(self, latent: Mark, value: Guided) -> None:
        super().keep(latent, value)
        held = 0
        for run in self.values():  # the last one first
            size = nbytes(run.left)
            if run is not value and held + size > HELD:
                run.give_up()
            else:
                held += size

    def model_gone(self, model: ReferenceType) -> None:
        """For a `ref`: nobody can go on with what is left of that model."""
        for run in self.values():
            if run.model is model:
                run.give_up()


def nbytes(held: object) -> int:
    """Bytes that all tensors in a value of dataclasses, tuples, lists and mappings keep: of a view, those of the whole.
    """
    if isinstance(held, Tensor):
        return held.untyped_storage().nbytes()
    if isinstance(held, Mapping):
        return sum(map(nbytes, held.values()))
    if is_dataclass(held):
        return sum(nbytes(getattr(held, each.name)) for each in fields(held))
    return sum(map(nbytes, held)) if isinstance(held, (tuple, list)) else 0
