"""A rule of guidance in one run: what the host asks it at every model call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.branch import Step
from ..schedule import Schedule
from .record import GuidanceRecord

Rows = tuple[int, ...]
Tell = Callable[[str], None]
"""What a session says to the user: a problem, and what was done about it. Each text is passed on once."""
NEAR = 1e-4
"""Noise levels that differ by less, relatively, are one."""


def rises(sigma: float, before: float) -> bool:
    """Whether a noise level is above the one before it, as where a restart begins."""
    return sigma > before * (1 + NEAR)


@dataclass(frozen=True)
class Need:
    """What a model call needs of its negatives.

    rows     the rows of the batch whose negatives are evaluated, None for all; `replace` stands in for the others
    guided   False: no negative takes part, and the guider is asked for its conditional side alone
    watch    evaluate all negatives whatever `rows` says, for `keep` to see; `rows` still says what guidance goes by
    """

    rows: Rows | None = None
    guided: bool = True
    watch: bool = False


FULL, REPLACED, CONDITIONAL = Need(), Need(()), Need((), guided=False)
"""Every negative is evaluated; none is, and all are replaced; none takes part."""


class GuidanceSession(ABC):
    """One rule in one run. Per model call of the sampler the host asks

        begin                  what is needed
        replace, keep, settle, weigh   once per evaluation of the guider's conds: several in a call where it is
                               evaluated in context windows, none where it is not guided or another node answers
        end                    when the call has gone well

    and `summary` when the run is over. Predictions are denoised ones [B, C, ...], a negative goes by the name that its
    guider gives it, and sigma is [B]. Nothing here may make the host wait for the device.

    fades   whether `weigh` may be below 1. A row that such a rule leaves out has faded: it comes out conditional,
            whatever other nodes make of two equal predictions. Of other rules a row that is left out is predicted
    whole   the steps of this run at which the model runs whole anyway, beside a cache that leaves out its deep layers
            at others; None: it always does. The host sets it before each call
    tracks  whether it goes, at calls without the negative, by a difference of the two sides that it saw at others: the
            conditional side must then be the same with the negative beside it and without. In context windows of a
            guider whose whole predictions the host shows, it sees those
    """

    fades = False
    tracks = False
    whole: Schedule | None = None

    def __init__(self, tell: Tell | None = None):
        self.tell: Tell = tell if tell is not None else lambda problem: None

    @abstractmethod
    def begin(self, step: Step, pictures: int = 1, windowed: bool = False) -> Need:
        """A model call begins, for so many pictures; `windowed`: the host evaluates it in context windows, so that the
        predictions that follow are those of parts."""

    def ready(self, names: Iterable[str], x: Tensor) -> bool:
        """Whether `replace` can stand in for these negatives; else they are evaluated, after `widen`."""
        return True

    def widen(self) -> None:  # noqa: B027
        """What this step needed in part, or not at all, is evaluated in full."""

    def replace(self, name: str, x: Tensor, c: Tensor, sigma: Tensor) -> Tensor:
        """What stands in for a negative that is not evaluated; by default the conditional prediction c, between which
        and c there is no guidance."""
        return c

    def keep(self, x: Tensor, c: Tensor, negatives: Mapping[str, Tensor], sigma: Tensor) -> None:  # noqa: B027
        """Look at the two sides of an evaluation, in which at least some rows of the negatives were evaluated."""

    def settle(self, name: str, x: Tensor, c: Tensor, u: Tensor, sigma: Tensor) -> Tensor:
        """The negative that guidance goes by where it was evaluated, in whole or in part, after `keep`; by default u as
        it is."""
        return u

    def weigh(self, c: Tensor) -> Tensor:
        """How much of the guidance each sample of c [B, ...] gets: [B, 1, ...], 1 to 0."""
        return c.new_ones(c.shape[0], *[1] * (c.ndim - 1))

    def end(self) -> None:  # noqa: B027
        """The model call is over."""

    def go_on(self, steps: int, left: object, why: str, device: torch.device) -> str:
        """Before the first call: earlier runs took so many steps of this picture.

        left     what a session of the same rule left, which has seen the same model under the same prompts up to the
                 noise level at which this run begins; None: there is none
        why      there is none, in words that go on after "since"; empty: that session had seen nothing
        device   of this run's predictions

        Returns what goes on, in words; empty: nothing does, and a rule that would have is told of.
        """
        return ""

    def left(self) -> object:
        """After `summary`, where the picture is not finished: what `go_on` takes; None: nothing was seen. It outlives
        the run, so whatever is not small is in main memory."""
        return None

    def summary(self, record: GuidanceRecord) -> None:  # noqa: B027
        """The run is over, `record.finished` or not: add to the record what only the rule knows."""


def noise_of(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """(x - x0) / sigma in fp32: the noise prediction, or the velocity of a flow model.  sigma: [B]."""
    return (x - x0).float() / sigma.float().view(-1, *[1] * (x.ndim - 1))
