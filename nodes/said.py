"""What a node has to say, shown on the node itself."""

from __future__ import annotations

from comfy_execution.utils import get_executing_context

from ..host.compose.watch import node_on_page
from ..host.look.live import say_on

_last: tuple[tuple[str, str], tuple[str, ...]] = ("", ""), ()
"""(prompt, node) that spoke last, and what it said."""


def say(text: str) -> None:
    """Show a text on the node that runs, below what it has said before in this prompt and does not say in it again: the
    front end puts each text in the place of the last one. It shows texts among the outputs of its own preview nodes
    alone. Where no node runs, in a test say, nothing happens."""
    global _last
    context = get_executing_context()
    if context is not None:
        node = context.prompt_id, context.node_id
        before, lines = _last[1] if _last[0] == node else (), set(text.splitlines())
        said = *(each for each in before if not lines.issuperset(each.splitlines())), text
        _last = node, said
        say_on(node_on_page(), "\n".join(said))
