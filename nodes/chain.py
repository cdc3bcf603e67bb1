"""A chain of nodes with a muted one in it: the front end sends none of the nodes before it, and says nothing of that.

What is in the prompt looks like a chain that begins behind the muted node. The workflow that the front end sends along
for the metadata of pictures still has all nodes and links, so it can be seen there. Bypassing (Ctrl+B) closes the chain
around a node and loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from comfy_api.latest import io

MUTED = 2
BYPASSED = 4


def check_chain(node: type[io.ComfyNode], **inputs: object) -> None:
    """Refuse to run where an optional input got nothing because a muted node stands before it, and other nodes before
    that one would have brought something.

    inputs   those to look at, by name
    Raises ValueError. Where no workflow came with the prompt, there is no chain that could be broken.
    """
    hidden = node.hidden
    workflow = ((hidden.extra_pnginfo if hidden is not None else None) or {}).get("workflow")
    if not isinstance(workflow, Mapping):
        return
    for name in (name for name, value in inputs.items() if value is None):
        try:
            muted, lost = _broken(workflow, str(hidden.unique_id), name)
        except (LookupError, TypeError, ValueError, AttributeError):  # another form of workflow than is known here
            continue
        if lost:
            raise ValueError(
                f"{node.define_schema().display_name}: {_named(muted)} at the input {name} is muted, and with it all "
                f"that comes before it is lost: {', '.join(map(_named, lost[:4]))}. Bypass it instead (Ctrl+B): the "
                "chain then closes around it. Or disconnect the input.")


def _broken(workflow: Mapping[str, Any], unique_id: str, name: str) -> tuple[Mapping[str, Any] | None, list]:
    """(the muted node at an input, the nodes before it that are not muted)."""
    graph = workflow
    *outer, own = unique_id.split(":")
    for each in outer:  # a node in a subgraph: the ids of the nodes that hold it come first
        kind = _nodes(graph)[each]["type"]
        graph = next(part for part in workflow["definitions"]["subgraphs"] if part["id"] == kind)
    nodes, links = _nodes(graph), _origins(graph)
    slot = next((slot for slot in nodes[own].get("inputs", ()) if slot["name"] == name), None)
    first = nodes.get(links.get(slot["link"], "")) if slot is not None else None
    while first is not None and first["mode"] == BYPASSED:
        first = next(_before(first, slot["type"], nodes, links), None)
    if first is None or first["mode"] != MUTED:
        return None, []
    lost, waiting, seen = [], [first], set()
    while waiting:
        node = waiting.pop()
        if node["id"] in seen:
            continue
        seen.add(node["id"])
        if node["mode"] not in (MUTED, BYPASSED):
            lost.append(node)
        waiting += _before(node, slot["type"], nodes, links)
    return first, lost


def _nodes(graph: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {str(node["id"]): node for node in graph["nodes"]}


def _origins(graph: Mapping[str, Any]) -> dict[int, str]:
    """Link -> the node that it comes from; links are lists, and in subgraphs objects."""
    return {link["id"]: str(link["origin_id"]) if isinstance(link, Mapping) else None for link in graph["links"]
            if isinstance(link, Mapping)} | {link[0]: str(link[1]) for link in graph["links"]
                                             if not isinstance(link, Mapping)}


def _before(node: Mapping[str, Any], kind: str, nodes: Mapping, links: Mapping) -> Iterator[Mapping[str, Any]]:
    """The nodes that bring a node something of this kind."""
    for slot in node.get("inputs") or ():
        if slot["type"] == kind and links.get(slot.get("link")) in nodes:
            yield nodes[links[slot["link"]]]


def _named(node: Mapping[str, Any]) -> str:
    title = node.get("title") or node["type"]
    return f"'{title}' (node {node['id']})"
