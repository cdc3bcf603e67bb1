"""The two small values that every floor passes around: a branch and a step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from torch import Tensor


@dataclass(frozen=True)
class Branch:
    """One variant of the model: how strongly each adapter of a bank acts.

    gains       one number per adapter, the user's strength already multiplied in; 0 means off
    per_module  exceptions: (module name, gains) pairs that replace `gains` for that module

    Branches are values: equal gains mean the same branch, and a branch may be a dictionary key.
    """

    gains: tuple[float, ...]
    per_module: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Branches are looked up several times per model call and may hold one exception per layer of a model.
        return hash((self.gains, self.per_module))

    @cached_property
    def _exceptions(self) -> dict[str, tuple[float, ...]]:
        return dict(self.per_module)

    def at(self, module: str) -> tuple[float, ...]:
        """The gains that hold for one module of the model."""
        return self._exceptions.get(module, self.gains) if self.per_module else self.gains

    @property
    def is_base(self) -> bool:
        """True where no adapter acts anywhere: such rows cost nothing beyond the base model."""
        return not any(self.gains) and not any(any(gains) for _, gains in self.per_module)


def one_hot(strengths: tuple[float, ...], i: int) -> Branch:
    """Adapter i alone, at its own strength."""
    return Branch(tuple(s if k == i else 0.0 for k, s in enumerate(strengths)))


def scaled(branch: Branch, shares: tuple[float, ...]) -> Branch:
    """The branch with each adapter's gains times its share."""
    return _changed(branch, lambda gains: tuple(gain * share for gain, share in zip(gains, shares, strict=True)))


def without(branch: Branch, adapters: Collection[int]) -> Branch:
    """The branch in which some adapters do nothing."""
    return _changed(branch, lambda gains: tuple(0.0 if i in adapters else gain for i, gain in enumerate(gains)))


def _changed(branch: Branch, of: Callable[[tuple[float, ...]], tuple[float, ...]]) -> Branch:
    return Branch(of(branch.gains), tuple((module, of(gains)) for module, gains in branch.per_module))


@dataclass(frozen=True)
class Step:
    """Where a run stands when the model is called.

    index     sampling step, 0 = noisiest
    total     number of steps of the run
    sigma     noise level of this call, in the model's own units
    """

    index: int
    total: int
    sigma: float

    @property
    def progress(self) -> float:
        """0 at the first step, 1 at the last (u = j / (T - 1), methods' normalised time)."""
        return self.index / (self.total - 1) if self.total > 1 else 0.0

    def time(self, flow: bool) -> float:
        """The noise level as the time of a flow."""
        return flow_time(self.sigma, flow)


Level = TypeVar("Level", float, Tensor)


def flow_time(sigma: Level, flow: bool) -> Level:
    """A noise level as the time of a flow, 0 to 1: sigma itself where it is one, else sigma / (1 + sigma)."""
    return sigma if flow else sigma / (1 + sigma)
