"""What a run does, as text on the node that samples, while it samples: `send_progress_text` of the host's server.

Nothing is made or sent where nobody looks: without a server, without a client that asked for the run, or once it has
gone. What is said is known to the host anyway: no tensor is read.
"""

from __future__ import annotations

import logging
import sys
import time

from comfy_execution.utils import get_executing_context

from ...engine.record import RunRecord
from ..compose.watch import Told
from ..guidance.apply import guidance_record_of
from .story import line

EVERY = 0.25
"""Seconds between two texts of a run, at least."""
log = logging.getLogger("lora_ensemble")


def on_the_node(model, record: RunRecord, total: int) -> Told | None:
    """A watcher (compose/watch.py) that writes on the node that is executed."""
    server, context = _server(), get_executing_context()
    if server is None or context is None or not record.methods:
        return None
    client, node = server.client_id, context.node_id
    if client is None or node is None:
        return None
    said = [0.0]

    def told(over: bool) -> None:
        now = time.perf_counter()
        if not over and now - said[0] < EVERY or client not in server.sockets:
            return
        said[0] = now
        text = line(record, total, guidance_record_of(model), over)
        try:
            server.send_progress_text(text, node, client)
        except RuntimeError as error:  # the server is going down
            log.debug("live text: %s", error)

    return told


def _server():
    """The host's server, if there is one that can do this."""
    module = sys.modules.get("server")
    found = getattr(getattr(module, "PromptServer", None), "instance", None)
    return found if hasattr(found, "send_progress_text") else None
