"""Routed layers under torch.compile.

To the compiler a routed layer is its own forward followed by one opaque operator, so that a graph is neither broken
at every layer nor compiled anew for other LoRAs, strengths or batch layouts. A layer keeps its handle for as long as it
lives; what the handle does is looked up when the graph runs.

A CUDA graph repeats the kernels of one call without looking anything up, so the operator must never be recorded into
one. Inductor leaves it out by its tag (torch 2.9); what records it all the same is stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_numbers = count()
_handles: WeakKeyDictionary[nn.Module, dict[int, int]] = WeakKeyDictionary()
_routes: dict[int, Callable[[Tensor, Tensor], None]] = {}


def handle_of(module: nn.Module, position: int) -> int:
    """The number of a layer for its position-th bank."""
    own = _handles.setdefault(module, {})
    if position not in own:
        own[position] = next(_numbers)
    return own[position]


def connect(handle: int, route: Callable[[Tensor, Tensor], None]) -> None:
    """From now on the handle does route(y, x), which changes y in place."""
    _routes[handle] = route


def disconnect(handle: int, route: Callable[[Tensor, Tensor], None]) -> None:
    """The handle does nothing again; a route that somebody else has connected since stays."""
    if _routes.get(handle) is route:
        del _routes[handle]


def run(y: Tensor, x: Tensor, handle: int) -> None:
    """Semantics: y += the deltas of each row's branch at the layer of this handle.

    Raises RuntimeError while a CUDA graph is recorded.
    """
    if y.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("LoRA Ensemble: a CUDA graph would repeat the LoRAs of one step for ever. In the node that "
                           "compiles the model choose backend 'inductor' instead of 'cudagraphs', and a mode without "
                           "CUDA graphs ('default').")
    route = _routes.get(handle)
    if route is not None:
        route(y, x)


_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
route_ = torch.library.custom_op("lora_ensemble::route_", run, mutates_args=("y",),
                                 schema="(Tensor(a!) y, Tensor x, int handle) -> ()",
                                 **({"tags": _TAGS} if _TAGS else {}))


@route_.register_fake
def _(y: Tensor, x: Tensor, handle: int) -> None:
    return None
