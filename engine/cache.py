"""Deep features of earlier model calls, kept for later ones."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from threading import Lock

from torch import Tensor

Features = Mapping[Hashable, Tensor]
"""What a model's seam keeps of one call: by name, [rows, ...]."""


@dataclass(frozen=True)
class _Entry:
    step: int
    features: Features


class FeatureCache:
    """Features by key, each with the step that it was made in. One run's: `clear` it when the run ends. Threads may
    share it, as those of several devices do.

    max_age   an entry of step s serves steps from s - max_age + 1 to s + max_age - 1 (samplers may step back)
    bytes     held now; peak: the most that was ever held
    """

    def __init__(self, max_age: int):
        self.max_age = max_age
        self.bytes = self.peak = 0
        self._entries: dict[Hashable, _Entry] = {}
        self._lock = Lock()

    def put(self, key: Hashable, step: int, features: Features, limit: float = float("inf")) -> bool:
        """Keep features in place of earlier ones under the key, and of those under any key that are too old by now
        (some keys are of one step alone: context windows that wander). False: `limit` bytes do not hold them, and
        neither they nor the earlier ones are kept."""
        size = sum(tensor.nbytes for tensor in features.values())
        with self._lock:
            for other in [other for other in self._entries if other == key or self.age(other, step) >= self.max_age]:
                self._drop(other)
            if self.bytes + size > limit:
                return False
            self._entries[key] = _Entry(step, dict(features))
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            return True

    def get(self, key: Hashable, step: int) -> Features | None:
        """The features, unless there are none or they are too old."""
        entry = self._entries.get(key)
        return None if entry is None or abs(step - entry.step) >= self.max_age else entry.features

    def age(self, key: Hashable, step: int) -> int | None:
        """Steps between the making of an entry and `step`; None where there is none."""
        entry = self._entries.get(key)
        return None if entry is None else abs(step - entry.step)

    def clear(self) -> None:
        self._entries.clear()
        self.bytes = 0

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= sum(tensor.nbytes for tensor in entry.features.values())
