"""Layers that take and give their tensor inside a container: the sparse ones of Trellis 2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from ...engine.geometry import own_forward

SPARSE = "_SparseLinear"
"""The class, which the host makes anew for every layer."""


def forward_of(layer: nn.Module) -> tuple[Callable | None, Callable[[Callable], Callable]]:
    """`ForwardOf` of the host's models; there is no forward on tensors where another node has replaced that of a layer
    with containers."""
    if type(layer).__name__ != SPARSE:
        return own_forward(layer)
    replaced = vars(layer).get("forward")
    on_tensors = partial(type(layer).__mro__[1].forward, layer) if replaced is None else \
        getattr(replaced, "on_tensors", None)
    return on_tensors, _in_container


def _in_container(on_tensors: Callable) -> Callable:
    """The forward of such a layer, given that on tensors."""
    def forward(x):
        return x.replace(on_tensors(x.feats))

    forward.on_tensors = on_tensors
    return forward
