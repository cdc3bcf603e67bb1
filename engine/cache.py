"""Deep features of earlier model calls, kept for later ones."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

Features = Mapping[Hashable, Tensor]
"""What a model's split point keeps of one call: by name, [rows, ...]."""

Home = tuple[torch.device, float]
"""A device that may hold features, and how many bytes of them in all."""


@dataclass(frozen=True)
class _Entry:
    step: int
    features: Features
    device: torch.device

    @property
    def bytes(self) -> int:
        return _nbytes(self.features)


class FeatureCache:
    """Features by key, each with the step that it was made in. One run's: `clear` it when the run ends. Threads may
    share it, as those of several devices do.

    max_age   an entry of step s serves steps from s - max_age + 1 to s + max_age - 1 (samplers may step back)
    bytes     held now, on all devices; peak: the most that was ever held
    """

    def __init__(self, max_age: int):
        self.max_age = max_age
        self.bytes = self.peak = 0
        self._entries: dict[Hashable, _Entry] = {}
        self._held: dict[torch.device, int] = {}
        self._lock = Lock()

    def put(self, key: Hashable, step: int, features: Features, homes: Sequence[Home]) -> torch.device | None:
        """Keep copies of features on the first of the homes that has room for them, and name it. They take the place of
        earlier ones under the key, and of those under any key that are too old by now (some keys are of one step alone:
        context windows that wander). None: no home has room, and neither they nor the earlier ones are kept."""
        size = _nbytes(features)
        with self._lock:
            for other in [other for other in self._entries if other == key or self.age(other, step) >= self.max_age]:
                self._drop(other)
            device = next((home for home, limit in homes if self._held.get(home, 0) + size <= limit), None)
            if device is None:
                return None
            # Copies: a view would hold the whole batch for as long as its oldest row is kept.
            kept = {name: tensor.to(device, copy=True) for name, tensor in features.items()}
            self._entries[key] = _Entry(step, kept, device)
            self._count(device, size)
            self.peak = max(self.peak, self.bytes)
            return device

    def get(self, key: Hashable, step: int) -> Features | None:
        """The features, unless there are none or they are too old."""
        entry = self._entries.get(key)
        return None if entry is None or abs(step - entry.step) >= self.max_age else entry.features

    def age(self, key: Hashable, step: int) -> int | None:
        """Steps between the making of an entry and `step`; None where there is none."""
        entry = self._entries.get(key)
        return None if entry is None else abs(step - entry.step)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._held.clear()
            self.bytes = 0

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._count(entry.device, -entry.bytes)

    def _count(self, device: torch.device, size: int) -> None:
        self._held[device] = self._held.get(device, 0) + size
        self.bytes += size


def _nbytes(features: Features) -> int:
    return sum(tensor.nbytes for tensor in features.values())
