"""One file per published method: which branches a step evaluates, and how their predictions are mixed.

A method is a frozen dataclass. A plain one has

    branches(step) -> tuple[Branch, ...]      the branches to evaluate at this step, at least one
    mix(step, predictions) -> Tensor          predictions [branches, ...] in that order -> [...]

    masks                                     where masks of LoRAs confine them: "layers", in the layers of the model
                                              (for one branch a step); "predictions", in its own mixing; no such
                                              attribute: nowhere

and one that needs more has `begin(context) -> Session` (session.py). Mixing weights sum to 1, so they may be applied to
denoised predictions as well as to noise or velocity. The rules of guidance, which see what was mixed, have a room of
their own: guidance/.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..kernels.branch import Branch, Step
from .session import RunContext, Session


class PlainMethod(Protocol):
    """A method whose steps do not depend on each other."""

    def branches(self, step: Step) -> tuple[Branch, ...]:
        """The branches to evaluate at this step, at least one."""

    def mix(self, step: Step, predictions: Tensor) -> Tensor:
        """Predictions [branches, ...] in that order -> [...]."""


class StatefulMethod(Protocol):
    """A method that starts a session with every run."""

    def begin(self, context: RunContext) -> Session:
        """A run begins: what the method keeps and learns while it lasts."""


Method = PlainMethod | StatefulMethod


def method_title(kind: str, by_words: bool = False) -> str:
    """A method as users call it, by the name of its class, which records have; `by_words`: its LoRAs act where their
    words are."""
    return "Routed" if by_words and kind == "Merge" else {"KLoRA": "K-LoRA", "ESTLoRA": "EST-LoRA"}.get(kind, kind)
