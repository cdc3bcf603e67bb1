"""Models of no file where ComfyUI has dynamic VRAM, as its server on a GPU has."""

from __future__ import annotations

import functools
import sys

import comfy.ops


def fill_layers() -> None:
    """From now on layers have weights from the start: with dynamic VRAM the host makes them as it reads a file."""
    memory = sys.modules.get("comfy.memory_management")  # which older releases lack
    if not getattr(memory, "aimdo_enabled", False):
        return
    for name in ("Linear", "Embedding"):
        kind = getattr(comfy.ops.disable_weight_init, name)
        kind.__init__ = _at_once(kind.__init__, memory)


def _at_once(init, memory):
    @functools.wraps(init)
    def filled(self, *args, **kwargs) -> None:
        before, memory.aimdo_enabled = memory.aimdo_enabled, False
        try:
            init(self, *args, **kwargs)
        finally:
            memory.aimdo_enabled = before

    return filled
