"""A picture that is sampled in several runs, one model after the other: Wan 2.2's two noise levels, a base and its
refiner. What a run hands on is found by the noisy latent that it left, whoever passes it on and whatever model goes on
with it; nothing is handed on to a run that begins anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...methods.session import RunContext, Session
from .routes import RoutedLoRAs

Value = TypeVar("Value")
KEPT = 16
"""Runs that are remembered: ComfyUI keeps the first halves of several graphs, and a user goes from one to the other."""
SAMPLES = 512
"""Values by which a latent is recognised."""


@dataclass(frozen=True)
class Earlier:
    """What is known of the runs before.

    steps   that they took
    times   the model's own time of each, as `RunContext.times`; `sigmas` their noise levels
    maps    where words were found at their end, by what was asked (`Prompt.asked`)
    left    what the last one's methods left (`Session.left`), by `names_of`
    """

    steps: int
    times: tuple[float, ...]
    sigmas: tuple[float, ...] = ()
    maps: Mapping[Hashable, Tensor] = field(default_factory=dict)
    left: Mapping[Hashable, object] = field(default_factory=dict)


class Mark(NamedTuple):
    """By what a latent is recognised: its shape, and some of its values, on the CPU. Equal for one of several parts and
    for what a sampler makes of it, which has them side by side in one tensor."""

    shape: torch.Size
    values: Tensor

    @property
    def whole(self) -> bool:
        """Whether the latent holds numbers: a model that predicts none predicts none anywhere."""
        return bool(self.values.isfinite().all())


def mark_of(latent: Tensor) -> Mark:
    """A look at a latent, which waits for its device."""
    if latent.is_nested:
        latent = torch.cat([part.flatten(1).unsqueeze(1) for part in latent.unbind()], dim=-1)
    return Mark(latent.shape, _some(latent, SAMPLES))


class Left(Generic[Value]):
    """What was known at the end of the last runs, by the latent that they left."""

    def __init__(self, kept: int = KEPT):
        self._runs: deque[tuple[Mark, Value]] = deque(maxlen=kept)
        self._lock = RLock()  # a model that is collected meanwhile asks for `values`, in whatever thread that is

    def keep(self, latent: Mark, value: Value) -> None:
        """A run has left this latent."""
        with self._lock:
            self._runs.append((latent, value))

    def values(self) -> list[Value]:
        """What is known of each, the last one first."""
        with self._lock:
            return [value for _, value in reversed(self._runs)]

    def before(self, latent: Tensor) -> Value | None:
        """What is known of the run that left this latent; None where none did."""
        mark = mark_of(latent)
        with self._lock:
            # Some nodes keep latents in half precision.
            return next((value for known, value in reversed(self._runs) if known.shape == mark.shape
                         and torch.allclose(known.values, mark.values, rtol=1e-2, atol=1e-3)), None)


class Runs(Left[Earlier]):
    """The last runs with methods that ended with noise left."""

    def left(self, latent: Mark, context: RunContext, routes: Sequence[RoutedLoRAs],
             earlier: Earlier | None = None, sessions: Mapping[Hashable, Session] | None = None) -> None:
        """A run has left this latent, which itself may have gone on with one."""
        maps = {asked: found.cpu() for each in routes for asked, found in each.answers().items()}
        known = earlier.sigmas if earlier is not None else ()
        sigmas = (*known, *context.sigmas[:-1]) if len(known) == context.before else ()
        left = {name: session.left() for name, session in (sessions or {}).items()}
        self.keep(latent, Earlier(context.before + context.steps, context.times, sigmas, maps, left))


RUNS = Runs()


def names_of(methods: Sequence[object]) -> list[Hashable]:
    """What tells the methods on a MODEL from each other, and finds their like on another one."""
    kinds = [type(method).__name__ for method in methods]
    return [(kind, kinds[:k].count(kind)) for k, kind in enumerate(kinds)]


def parts_of_latent(latent: Tensor) -> Sequence[Tensor]:
    """Picture and sound of a latent that has both, the host's nested one; else itself."""
    return latent.unbind() if latent.is_nested else (latent,)


def bare(noise: Tensor) -> bool:
    """Whether a run adds no noise to its latent."""
    return not any(part.any() for part in parts_of_latent(noise))


def marks(tensor: Tensor, count: int) -> tuple:
    """The shape of a tensor and so many of its values, spread over it, as numbers."""
    return tuple(tensor.shape), tuple(_some(tensor, count).tolist())


def _some(tensor: Tensor, count: int) -> Tensor:
    """So many values of a tensor at equal distances, on the CPU, where the places are made: not every device has
    float64."""
    flat = tensor.detach().flatten()
    places = torch.linspace(0, max(len(flat) - 1, 0), min(count, len(flat)), dtype=torch.float64).long()
    return flat[places.to(flat.device)].float().cpu()
