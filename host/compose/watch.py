"""Who is told of runs while they sample, and of which node they are."""

from __future__ import annotations

from collections.abc import Callable

from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

from ...engine.record import RunRecord

Listener = Callable[[bool], None]
"""Called after every step, and with True when the run is over, however it ended."""
Watcher = Callable[[object, RunRecord | None, int], Listener | None]
"""(MODEL, record as it grows, None where guidance alone is on the MODEL, number of steps) -> who is told of the run;
None: nobody looks at this one."""
_watchers: list[Watcher] = []


def watch(watcher: Watcher) -> None:
    """Have it asked at the beginning of every run from now on."""
    _watchers.append(watcher)


def watching(model, record: RunRecord | None, total: int) -> list[Listener]:
    """Those who are told of a run."""
    return [listener for watcher in _watchers if (listener := watcher(model, record, total)) is not None]


def node_on_page() -> str:
    """The id of the node that is executed, as pages have it: of a node that a loop has made, that of the one which it
    stands for. Empty where none is executed."""
    context = get_executing_context()
    if context is None or context.node_id is None:
        return ""
    return str(get_progress_state().dynprompt.get_display_node_id(context.node_id))
