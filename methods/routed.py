"""Routed: every LoRA acts where its words are, all in one evaluation (ours).

    layers of the picture      y[p] = W x[p] + sum_i s_i m_i(p)           B_i A_i x[p]
    keys, values of the text   y[t] = W x[t] + sum_i s_i [t in phrase i]  B_i A_i x[t]

m_i comes from the attention of the picture to the clauses of its prompt, or from what a prediction loses without a
clause (kernels/routing.py). The routing of a method says nothing of branches and mixes: it confines any method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..kernels.branch import Step
from ..kernels.routing import compete, trust

MODES = ("every step", "once", "contrast")
LOW, HIGH = 0.4, 0.75
"""Energy outside a LoRA's place over that inside: up to LOW it is let out of its place, from HIGH on it is not."""


@dataclass(frozen=True)
class Routing:
    """Where the LoRAs of a method act, and when that is found out.

    mode     "every step": from the attention of each step for the next. "once": from the first step's. "contrast":
             once, from predictions of the base model with and without each clause, for models whose attention cannot be
             read
    gamma    how sharply places are divided; 0 lets every LoRA act everywhere
    start    share of the steps after which places are first looked for; before, no LoRA acts
    trust    whether a LoRA that does little outside its place may act there, as far as it does little (`trusted`)
    yields   whether a style yields, in its weights, to a background, which is in the same place (engine/yielding.py)
    """

    mode: Literal["every step", "once", "contrast"] = "every step"
    gamma: float = 2.0
    start: float = 0.0
    trust: bool = False
    yields: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"Routing: mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"Routing: gamma must be a number of at least 0, got {self.gamma}")
        if not 0 <= self.start < 1:
            raise ValueError(f"Routing: start must be at least 0 and less than 1, got {self.start}")

    def first(self, total: int) -> int:
        """The step at which LoRAs begin to act."""
        return min(int(self.start * total + 0.5), total - 1)


@dataclass(frozen=True)
class Clauses:
    """The clauses of one prompt, and whose they are.

    members      [clauses, tokens], 1 where a token belongs to a clause. All clauses of a LoRA are one here
    own          per LoRA its clause; None: it has none in this prompt
    rivals       the clauses that compete for places
    everywhere   per LoRA whether it acts at all places: a style, or a LoRA without a clause
    """

    members: Tensor
    own: tuple[int | None, ...]
    rivals: tuple[int, ...]
    everywhere: tuple[bool, ...]

    @property
    def words(self) -> Tensor:
        """[LoRAs, tokens]: which tokens a LoRA acts on; all where it has no clause."""
        everything = self.members.new_ones(self.members.shape[1])
        return torch.stack([everything if clause is None else self.members[clause] for clause in self.own])

    def places(self, attention: Tensor, gamma: float) -> Tensor:
        """Attention to the clauses [B, clauses, *grid] -> where the LoRAs act, [B, LoRAs, *grid]."""
        own = [None if wide else clause for clause, wide in zip(self.own, self.everywhere, strict=True)]
        return compete(attention, own, self.rivals, gamma)


def trusted(share: Tensor) -> Tensor:
    """How far LoRAs may leave their places [..], by their energy outside over that inside (engine/reach.py)."""
    return trust(share, LOW, HIGH)


def loosened(maps: Tensor, free: Tensor | None) -> Tensor:
    """Maps [B, LoRAs, *grid] of LoRAs that may leave their places as far as `free` [B, LoRAs] says."""
    if free is None:
        return maps
    free = free.to(maps).reshape(*free.shape, *[1] * (maps.ndim - 2))
    return torch.addcmul(maps, 1 - maps, free)


def clauses_of(tokens: int, phrases: Sequence[Sequence[int]], others: Sequence[Sequence[int]],
               everywhere: Sequence[bool]) -> Clauses:
    """The clauses of a prompt of so many tokens.

    phrases      per LoRA the positions of its words, none where it has none
    others       those of each clause without a LoRA
    everywhere   per LoRA whether it acts at all places, whatever its words (a style); its words do not compete
    """
    rows = [positions for positions in phrases if positions]
    numbers = iter(range(len(rows)))
    own = tuple(next(numbers) if positions else None for positions in phrases)
    rivals = [clause for clause, wide in zip(own, everywhere, strict=True) if clause is not None and not wide]
    rivals += range(len(rows), len(rows) + len(others))
    members = torch.zeros(len(rows) + len(others), tokens)
    for row, positions in zip(members, (*rows, *others), strict=True):
        row[[p for p in positions if p < tokens]] = 1.0
    return Clauses(members, own, tuple(rivals),
                   tuple(wide or clause is None for clause, wide in zip(own, everywhere, strict=True)))


class Routes:
    """What one run knows of its places, whoever reads them: when to look, and what is to be done meanwhile."""

    def __init__(self, routing: Routing):
        self.routing = routing
        self.found = False

    def acts(self, step: Step) -> bool:
        """Whether LoRAs act at all at a step."""
        return step.index >= self.routing.first(step.total)

    def probes(self, step: Step) -> bool:
        """Whether places must be looked for in an evaluation of its own, before this one: the base model's, of the
        positive side alone."""
        return self.acts(step) and not self.found

    def reads(self, step: Step) -> bool:
        """Whether this evaluation's attention is read as well."""
        return self.routing.mode == "every step" or (self.routing.mode == "once" and not self.acts(step))
