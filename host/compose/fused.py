"""Layers that the host computes without calling them, while LoRAs act on them.

`comfy.ops.linear_input_act` (since 0.33) folds the activation before a feed-forward's second layer into the product of
an int8 weight, and passes by the layer's forward. For the length of a run it calls routed layers; all others are
computed as ever.
"""

from __future__ import annotations

from threading import Lock

import comfy.ops
from torch import Tensor

NAME = "linear_input_act"
_lock = Lock()
_open: list[object] = []  # the host's own function, once per run that is under way


def call_routed_layers() -> None:
    """From now on layers with a forward of their own are called where the host would fold them into a product."""
    with _lock:
        fused = getattr(comfy.ops, NAME, None)
        if fused is None:
            return
        _open.append(_open[0] if _open else fused)
        if len(_open) == 1:
            setattr(comfy.ops, NAME, _calling(fused))


def as_before() -> None:
    """The end of what `call_routed_layers` began; the last one puts the host's function back."""
    with _lock:
        if _open:
            fused = _open.pop()
            if not _open:
                setattr(comfy.ops, NAME, fused)


def _calling(fused):
    known = getattr(comfy.ops, "INPUT_ACT_EAGER", {})

    def linear_input_act(linear, x: Tensor, input_act: str, *args, **kwargs) -> Tensor:
        # What later releases fold in besides is theirs to compute.
        if "forward" in vars(linear) and input_act in known and not args and not kwargs:
            return linear(known[input_act](x))
        return fused(linear, x, input_act, *args, **kwargs)

    return linear_input_act
