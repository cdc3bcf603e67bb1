"""What a run does, while it samples, over the websocket of the host's server: as text on the node that samples and on
those that applied its methods (`send_progress_text`), and as data for the panel of these (web/panel.js).

Nothing is made or sent where nobody looks: without a server, without a client that asked for the run, or once it has
gone. What is said is known to the host anyway: no tensor is read.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from comfy_execution.utils import get_executing_context

from ...engine.record import RunRecord
from ..compose.composition import KEY
from ..compose.watch import Listener, node_on_page
from ..guidance.apply import guidance_record_of
from .panel import shown
from .story import costs_of, line, saved, titles

EVERY = 0.25
"""Seconds between two texts of a run, at least."""
EVENT = "lora_ensemble.run"
"""The type of the message to the panels. Its data are an object, as clients expect of any message, with the id of the
prompt, by which they leave out what is not theirs, `workflow`, the id of the workflow that it was queued from or "",
and `panels`, what `panel.shown` gives."""
MARKUP = re.compile(r"[&<>[*`~\\]|\b_+|_+\b", re.ASCII)
log = logging.getLogger("lora_ensemble")


def unmarked(text: str) -> str:
    """A text of which every page makes that text. The classic canvas takes what stands on a node for HTML, and as late
    as in 2025 ran what was in it; Nodes 2.0 takes it for Markdown. Names of files, and the words that they hold, may
    look like either. `unmarked` in web/panel.js is the same."""
    return MARKUP.sub(lambda found: "".join(f"&#{ord(sign)};" for sign in found[0]), text).replace("\n", "  \n")


def say_on(node: str, text: str) -> None:
    """Show a text on a node of the page that queued the prompt, in place of the last one there; nowhere without such a
    page, or a server. Others, which the host would tell as well, have nodes of the same number."""
    server = _server()
    client = getattr(server, "client_id", None)
    if client is not None:
        server.send_progress_text(unmarked(text), node, client)


def on_the_node(model, record: RunRecord | None, total: int) -> Listener | None:
    """A watcher (compose/watch.py) that tells the client of the node that is executed."""
    server, context = _server(), get_executing_context()
    if server is None or context is None:
        return None
    client, node = server.client_id, node_on_page()
    if client is None or not node:
        return None
    if record is None or not record.methods:
        return _alone(model, record, total, server, client, node)
    applied, workflow = model.get_attachment(KEY).applied, _workflow(server, context.prompt_id)
    methods, called = [each.node for each in applied], titles(record, [each.routed is not None for each in applied])
    said = [0.0]

    def told(over: bool) -> None:
        now = time.perf_counter()
        if not over and now - said[0] < EVERY or client not in server.sockets:
            return
        said[0] = now
        guidance = guidance_record_of(model)
        costs = costs_of(record, guidance)
        text = line(record, called, costs, total, guidance, over)
        if not text:
            return
        notes = [*record.reasons, *record.problems, *(guidance.problems if guidance is not None else ())]
        panels = shown(record, called, methods, costs, total, over, notes)
        with _perhaps_going_down():
            if panels:  # before the texts: a panel remembers the height that its node had without either
                server.send_sync(EVENT, {"prompt_id": context.prompt_id, "workflow": workflow, "panels": panels},
                                 client)
            for each in dict.fromkeys((node, *filter(None, methods))):
                say_on(each, text)

    return told


def _alone(model, record: RunRecord | None, total: int, server, client: str, node: str) -> Listener:
    """Of a run without LoRAs, with guidance or a Branch Cache, whose nodes have no panel: when it is over, on the node
    that samples."""
    def told(over: bool) -> None:
        text = saved(record, guidance_record_of(model), total) if over and client in server.sockets else ""
        if text:
            with _perhaps_going_down():
                say_on(node, text)

    return told


@contextmanager
def _perhaps_going_down() -> Iterator[None]:
    """Around nothing but what is sent to a server, whose loop may have been closed: a run need not end for that."""
    try:
        yield
    except RuntimeError as error:
        log.debug("live text: %s", error)


def _workflow(server, prompt_id: str) -> str:
    """The id of the workflow that a prompt which runs was queued from, as the front end hands it over for pictures: a
    page with another one has nodes of the same numbers. Empty for prompts of other clients."""
    running = getattr(getattr(server, "prompt_queue", None), "currently_running", {}).values()
    extra = next((item[3] for item in running if len(item) > 3 and item[1] == prompt_id), None)
    for name in ("extra_pnginfo", "workflow", "id"):
        extra = extra.get(name) if isinstance(extra, dict) else None
    return extra if isinstance(extra, str) else ""


def _server():
    """The host's server, if there is one that can do this."""
    module = sys.modules.get("server")
    found = getattr(getattr(module, "PromptServer", None), "instance", None)
    return found if hasattr(found, "send_progress_text") else None
