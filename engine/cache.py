"""Deep features of earlier model calls, kept for later ones, or moved on along the line through the last two.

A line is believed the less the farther it reaches: for a place s lengths of the line beyond its end features go on by
s / (1 + s / 2) lengths, as fast as the line at first and never by more than two. Features settle as noise falls, so
that the slope between two whole passes, which is that of the middle between them, is too steep for what comes after.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
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
    time: float
    features: Features
    device: torch.device
    earlier: _Entry | None = None

    @property
    def bytes(self) -> int:
        return _nbytes(self.features)

    def ahead(self, time: float, reach: float) -> float:
        """How far features of a time go on along the line through the earlier ones and these, in lengths of it. 0, too,
        where there is no line, or where it would have to be believed farther than `reach` times its length, or back in
        time."""
        if self.earlier is None or self.earlier.time == self.time:
            return 0.0
        share = (time - self.time) / (self.time - self.earlier.time)
        return share / (1 + share / 2) if 0 < share <= reach else 0.0


class FeatureCache:
    """Features by key, each with the step that it was made in. One run's: `clear` it when the run ends. Threads may
    share it, as those of several devices do.

    max_age    an entry of step s serves steps from s - max_age + 1 to s + max_age - 1 (samplers may step back)
    forecast   keep the last two of a key, of two steps
    bytes      held now, on all devices; peak: the most that was ever held
    """

    def __init__(self, max_age: int, forecast: bool = False):
        self.max_age, self.forecast = max_age, forecast
        self.bytes = self.peak = 0
        self._entries: dict[Hashable, _Entry] = {}
        self._held: dict[torch.device, int] = {}
        self._lock = Lock()

    def put(self, key: Hashable, step: int, features: Features, homes: Sequence[Home],
            time: float = 0.0) -> torch.device | None:
        """Keep copies of features on the first of the homes that has room for them, and name it. They take the place of
        earlier ones under the key (with `forecast`: of those before these), and of those under any key that are too old
        by now, with `forecast` twice that (some keys are of one step alone: context windows that wander). None: no home
        has room, and neither they nor the earlier ones are kept.

        time   of the model call; needed for a forecast
        """
        size = _nbytes(features)
        with self._lock:
            earlier = self._earlier(key, step, features)
            # Too old to be used, but a line may begin at them.
            oldest = (2 if self.forecast else 1) * self.max_age
            for other in [other for other in self._entries if other == key or self.age(other, step) >= oldest]:
                self._drop(other)
            if earlier is not None:
                self._count(earlier.device, earlier.bytes)
            device = next((home for home, limit in homes if self._held.get(home, 0) + size <= limit), None)
            if device is None:
                if earlier is not None:
                    self._count(earlier.device, -earlier.bytes)
                return None
            # Copies: a view would hold the whole batch for as long as its oldest row is kept.
            kept = {name: tensor.to(device, copy=True) for name, tensor in features.items()}
            self._entries[key] = _Entry(step, time, kept, device, earlier)
            self._count(device, size)
            self.peak = max(self.peak, self.bytes)
            return device

    def get(self, key: Hashable, step: int) -> Features | None:
        """The features, unless there are none or they are too old."""
        entry = self._entries.get(key)
        return None if entry is None or abs(step - entry.step) >= self.max_age else entry.features

    def at(self, key: Hashable, step: int, time: float, device: torch.device) -> Features | None:
        """The features on a device; those of this time, on the line through the last two of the key, where there are
        two."""
        if self.get(key, step) is None:
            return None
        entry = self._entries[key]
        ahead = entry.ahead(time, self.max_age)
        if not ahead:
            return {name: tensor.to(device) for name, tensor in entry.features.items()}
        before = entry.earlier.features
        return {name: torch.lerp(tensor.to(device), before[name].to(device), -ahead)
                for name, tensor in entry.features.items()}

    def side_by_side(self, keys: Sequence[Hashable], step: int, time: float, device: torch.device) -> Features:
        """`at` of several keys, one behind the other. What all of them go on by alike is one operation, and not one for
        each."""
        entries = [self._entries[key] for key in keys]
        shares = {entry.ahead(time, self.max_age) for entry in entries}
        if len(shares) > 1:
            found = [self.at(key, step, time, device) for key in keys]
            return {name: torch.cat([each[name] for each in found]) for name in found[0]}
        now, ahead = _joined(entries, device), shares.pop()
        if not ahead:
            return now
        before = _joined([entry.earlier for entry in entries], device)
        return {name: tensor.lerp_(before[name], -ahead) for name, tensor in now.items()}

    def age(self, key: Hashable, step: int) -> int | None:
        """Steps between the making of an entry and `step`; None where there is none."""
        entry = self._entries.get(key)
        return None if entry is None else abs(step - entry.step)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._held.clear()
            self.bytes = 0

    def _earlier(self, key: Hashable, step: int, features: Features) -> _Entry | None:
        """What new features of a key make a line with: the last ones of another step, of the same shapes."""
        last = self._entries.get(key) if self.forecast else None
        if last is not None and last.step == step:
            last = last.earlier
        if last is None or {name: tensor.shape for name, tensor in last.features.items()} != \
                {name: tensor.shape for name, tensor in features.items()}:
            return None
        return replace(last, earlier=None)

    def _drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        while entry is not None:
            self._count(entry.device, -entry.bytes)
            entry = entry.earlier

    def _count(self, device: torch.device, size: int) -> None:
        self._held[device] = self._held.get(device, 0) + size
        self.bytes += size


def _joined(entries: Sequence[_Entry], device: torch.device) -> dict[Hashable, Tensor]:
    return {name: torch.cat([entry.features[name].to(device) for entry in entries]) for name in entries[0].features}


def _nbytes(features: Features) -> int:
    return sum(tensor.nbytes for tensor in features.values())
