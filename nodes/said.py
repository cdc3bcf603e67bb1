"""What a node has to say, shown on the node itself."""

from __future__ import annotations

from comfy_execution.utils import get_executing_context


def say(text: str) -> None:
    """Show a text on the node that runs. The front end shows texts among the outputs of its own preview nodes alone.
    Without a server, in a test say, nothing happens."""
    from server import PromptServer  # needs all that the server needs, which a node does not otherwise

    server, context = getattr(PromptServer, "instance", None), get_executing_context()
    if server is not None and context is not None:
        server.send_progress_text(text.replace("\n", "  \n"), context.node_id)  # Nodes 2.0 reads Markdown
