"""What a running ComfyUI says of its nodes (/object_info)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Info = dict[str, dict[str, Any]]
"""What /object_info says of every node."""


def inputs_of(info: Info, node: str) -> dict[str, list]:
    """The inputs of a node, required ones first."""
    groups = info[node]["input"]
    return {**groups.get("required", {}), **groups.get("optional", {})}


def choices(spec: Sequence[Any]) -> list[str]:
    """What an input offers, in both of ComfyUI's notations; nothing where it is no choice."""
    kind, *options = spec
    return kind if isinstance(kind, list) else (options[0].get("options") or [] if options else [])


def defaults(info: Info, node: str) -> dict[str, Any]:
    """What the widgets of a node begin with."""
    found = {}
    for name, spec in inputs_of(info, node).items():
        if len(spec) > 1 and "default" in spec[1]:
            found[name] = spec[1]["default"]
        elif choices(spec):
            found[name] = choices(spec)[0]
    return found
