"""Who is told of runs while they sample."""

from __future__ import annotations

from collections.abc import Callable

from ...engine.record import RunRecord

Listener = Callable[[bool], None]
"""Called after every step, and with True when the run is over, however it ended."""
Watcher = Callable[[object, RunRecord | None, int], Listener | None]
"""(MODEL, record as it grows, None where guidance alone is on the MODEL, number of steps) -> who is told of the run;
None: nobody looks at this one."""
_watchers: list[Watcher] = []


def watch(watcher: Watcher) -> None:
    """Have it asked at the beginning of every run from now on."""
    if watcher not in _watchers:
        _watchers.append(watcher)


def watching(model, record: RunRecord | None, total: int) -> list[Listener]:
    """Those who are told of a run."""
    return [listener for watcher in _watchers if (listener := watcher(model, record, total)) is not None]
