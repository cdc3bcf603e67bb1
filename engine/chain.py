"""Adapters whose order matters, evaluated one after the other as the host's loader would change the weight, without
reading the weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.lowrank import Number, Update
from .adapters import Op, Scales, part
from .geometry import Geometry, no_bias


class Link(NamedTuple):
    """One op of a chain at a gain, with the magnitude factors of a DoRA, and the places that it acts in, as a tensor
    that broadcasts over outputs; None: everywhere."""

    gain: Number
    op: Op
    scales: Scales = None
    places: Tensor | None = None


def chain(links: Sequence[Link], biases: Sequence[Link], base: Callable[[Tensor], Tensor], bias: Tensor | None,
          geometry: Geometry) -> Update:
    """An update that changes y, the layer's output with its bias, into that of the weight with all ops.

    base   the layer as it was; called once more where an op acts on inputs, however many do
    bias   the layer's own, None where it has none or it cannot be read
    """

    def value(k: int, x: Tensor, u: Tensor | None, y: Tensor | None) -> Tensor:
        """W_k (x + u) as a new tensor, without the bias, W_k the weight after k ops; y: the output at x, or None
        where it is not known. u moves the input by little, so the base's own precision is kept."""
        if k == 0:
            out = no_bias(base(x) if y is None else y, bias, geometry)
            return out if u is None else out.add_(no_bias(base(u), bias, geometry))
        gain, op, scales, places = links[k - 1]
        here = x if u is None else x + u
        if op.additive or not op.on_inputs(scales):
            out = value(k - 1, x, u, y)
            before = None if places is None else out.clone()
            op.change_(out, here, gain.value, geometry, scales)
            return out if places is None else torch.lerp(before, out, places)
        shift, before = op.shift(here, gain.value, geometry, scales), None
        if places is not None and not geometry.spatial:
            shift = shift * places  # a token of the output comes from the same token of the input
        elif places is not None:
            before = value(k - 1, x, u, y)
        if op.span is None:
            out = value(k - 1, x, shift if u is None else u + shift, y)
        else:  # the other rows of the weight must not see the shift
            moved = value(k - 1, shift, None, None)
            out = value(k - 1, x, u, y)
            part(out, op.span, geometry.channel, 0).add_(part(moved, op.span, geometry.channel, 0))
        if places is not None and before is None:
            before = out.clone()
        op.add_(out, here, gain.value, geometry, scales)
        return out if places is None else torch.lerp(before, out, places)

    def update(y: Tensor, x: Tensor) -> Tensor:
        out = value(len(links), x, None, y)
        y.copy_(out if bias is None else out + geometry.per_channel(bias, out))
        return add(y, x)

    add = additions(biases, geometry)
    return update


def additions(links: Sequence[Link], geometry: Geometry) -> Update:
    """An update by additive ops that are in no stack."""

    def update(y: Tensor, x: Tensor) -> Tensor:
        for gain, op, _, places in links:
            if places is None:
                op.add_(y, x, gain.value, geometry)
            else:
                delta = torch.zeros_like(y)
                op.add_(delta, x, gain.value, geometry)
                y.addcmul_(delta, places)
        return y

    return update
