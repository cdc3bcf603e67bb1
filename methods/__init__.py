"""One file per published method: which branches a step evaluates, and how their predictions are mixed.

A method is a frozen dataclass with

    branches(step) -> tuple[Branch, ...]      the branches to evaluate at this step, at least one
    mix(step, predictions) -> Tensor          predictions [branches, ...] in that order -> [...]

Mixing weights sum to 1, so they may be applied to denoised predictions as well as to noise or velocity.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..kernels.branch import Branch, Step


class Method(Protocol):
    """What the host needs to know of a method."""

    def branches(self, step: Step) -> tuple[Branch, ...]: ...

    def mix(self, step: Step, predictions: Tensor) -> Tensor: ...
