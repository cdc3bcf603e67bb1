"""What a node has to say, shown on the node itself."""

from __future__ import annotations

from comfy_api.latest import io


def say(node: type[io.ComfyNode], text: str) -> None:
    """Show a text on the node that runs. The front end shows texts among the outputs of its own preview nodes alone.

    Needs the hidden inputs of `sockets.HIDDEN`; without a server, in a test say, nothing happens.
    """
    from server import PromptServer  # needs all that the server needs, which a node does not otherwise

    server = getattr(PromptServer, "instance", None)
    if server is not None and node.hidden is not None and node.hidden.unique_id is not None:
        server.send_progress_text(text.replace("\n", "  \n"), node.hidden.unique_id)  # Nodes 2.0 reads Markdown
