"""What one adapter does to one layer.

An op changes the weight of a layer, W -> W'. Each op knows that change in two forms, which must agree:

    on_weight(w, gain)                  the weight form: slow, obvious, needs W; the reference, and DoRA's norms
    apply_(y, x, inner, gain, ...)      the forward form: y holds W x (no bias) and becomes W' x; W is never read

`inner(x)` evaluates the layer with the weight as it was before this op, for the kinds that act on the input side.
Ops whose forward form is y += gain * D x are additive: their order does not matter and the bias may be in y.

`span` is the slice (dim, start, length) of the weight that an op belongs to, where a model fuses several layers
into one (q, k and v of Flux); None means all of it. Floating-point factors are stored as given and cast where they
are used; scales and rotations stay in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels.decompose import magnitude_scale
from ..kernels.orthogonal import block_rotate, butterfly_rotate
from .geometry import Geometry

Span = tuple[int, int, int] | None
Inner = Callable[[Tensor], Tensor]
Scales = tuple[Tensor, bool] | None
"""DoRA's magnitude factors, and whether they act on outputs (`Decomposed.scales`)."""


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter, so that whoever moves the module moves it, that never asks for a gradient."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def part(tensor: Tensor, span: Span, channel: int, dim: int) -> Tensor:
    """The channels of an activation that a span of the weight's dimension `dim` (0 outputs, 1 inputs) covers."""
    return tensor if span is None or span[0] != dim else tensor.narrow(channel, span[1], span[2])


class Op(nn.Module):
    """Base of all ops; see the module's text.

    An op that holds other ops has no parameters beside them: hosts that load a model module by module pass over those
    of a module with children.
    """

    additive = True
    span: Span = None

    def on_weight(self, weight: Tensor, gain: float) -> Tensor:
        """The changed weight as a new tensor, in the dtype of `weight`."""
        weight = weight.clone()
        target = weight if self.span is None else weight.narrow(*self.span)
        target.copy_(self._changed(target, gain))
        return weight

    def _changed(self, weight: Tensor, gain: float) -> Tensor:
        return weight + gain * self.delta(weight).to(weight.dtype)

    def delta(self, like: Tensor) -> Tensor:
        """The dense delta of an additive op, on the device of `like`."""
        raise TypeError(f"{type(self).__name__} has no delta of its own")

    def apply_(self, y: Tensor, x: Tensor, inner: Inner, gain: float, geometry: Geometry,
               scales: Scales = None) -> None:
        """Forward form, in place on y. `scales` is for `Decomposed` alone."""
        x = part(x, self.span, geometry.x_channel, 1)
        part(y, self.span, geometry.channel, 0).add_(geometry.apply(x, self.delta(x).to(x.dtype)), alpha=gain)


class LowRank(Op):
    """W += gain * scale * up @ down. Shape: up [out, r], down [r, in, *k]; the bank stacks these of all adapters."""

    def __init__(self, up: Tensor, down: Tensor, scale: float = 1.0, span: Span = None):
        super().__init__()
        self.up, self.down, self.scale, self.span = frozen(up), frozen(down), float(scale), span

    def delta(self, like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        up, down = self.up.to(like.device, dtype), self.down.to(like.device, dtype)
        return (up @ down.flatten(1) * self.scale).unflatten(1, down.shape[1:])


class Dense(Op):
    """W += gain * scale * D, with D rebuilt from its factors at each use, so that only the factors are held.

    build   pure function of the factors; shape: the shape that its result takes, that of the weight (or its span)
    """

    def __init__(self, build: Callable[..., Tensor], factors: list[Tensor | None], shape: tuple[int, ...],
                 scale: float = 1.0, span: Span = None):
        super().__init__()
        self.factors = nn.ParameterList([frozen(f) for f in factors if f is not None])
        self.present = [f is not None for f in factors]
        self.build, self.shape, self.scale, self.span = build, tuple(shape), float(scale), span

    def delta(self, like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        held = iter(self.factors)
        factors = [next(held).to(like.device, dtype) if there else None for there in self.present]
        return (self.build(*factors) * self.scale).reshape(self.shape)


def given(tensor: Tensor) -> Tensor:
    """`Dense.build` of a delta that the file holds as it is."""
    return tensor


class Bias(Op):
    """b += gain * v, one entry per output channel. Not a change of the weight: it is added after all of them."""

    def __init__(self, vector: Tensor):
        super().__init__()
        self.vector = frozen(vector)

    def apply_(self, y: Tensor, x: Tensor, inner: Inner, gain: float, geometry: Geometry,
               scales: Scales = None) -> None:
        y.add_(geometry.per_channel(self.vector.to(y.device), y), alpha=gain)


class GLoRA(Op):
    """W += gain * scale * (W M + D) with M = m_up m_down acting on the inputs (arXiv 2306.07967).

    Shape: m_up [in, r], m_down [r, in], d_up [out, r], d_down [r, in, *k].
    """

    additive = False

    def __init__(self, m_up: Tensor, m_down: Tensor, d_up: Tensor, d_down: Tensor, scale: float = 1.0,
                 span: Span = None):
        super().__init__()
        self.scale, self.span = float(scale), span
        self.mix, self.plus = LowRank(m_up, m_down), LowRank(d_up, d_down, scale, span)

    def _changed(self, weight: Tensor, gain: float) -> Tensor:
        mixed = torch.einsum("oi...,ij->oj...", weight, (self.mix.up @ self.mix.down).to(weight))
        return weight + gain * (self.scale * mixed + self.plus.delta(weight).to(weight.dtype))

    def apply_(self, y: Tensor, x: Tensor, inner: Inner, gain: float, geometry: Geometry,
               scales: Scales = None) -> None:
        last = x.movedim(geometry.x_channel, -1)
        mixed = (last @ self.mix.down.to(x).T @ self.mix.up.to(x).T).movedim(-1, geometry.x_channel)
        target = part(y, self.span, geometry.channel, 0)
        target.add_(part(inner(mixed), self.span, geometry.channel, 0), alpha=gain * self.scale)
        self.plus.apply_(y, x, inner, gain, geometry)


class OFT(Op):
    """W += gain^2 (R - 1) W on the outputs, R block-diagonal. The square is the host loader's: it applies the strength
    once to the rotation and once to the difference. Shape: rotations [blocks, b, b], fp32."""

    additive = False

    def __init__(self, rotations: Tensor, span: Span = None):
        super().__init__()
        self.turn, self.span = frozen(rotations - torch.eye(rotations.shape[-1])), span

    def _changed(self, weight: Tensor, gain: float) -> Tensor:
        return weight + gain**2 * block_rotate(self.turn.to(weight), weight)

    def apply_(self, y: Tensor, x: Tensor, inner: Inner, gain: float, geometry: Geometry,
               scales: Scales = None) -> None:
        target = part(y, self.span, geometry.channel, 0)
        turned = block_rotate(self.turn.to(target), target.movedim(geometry.channel, 0))
        target.add_(turned.movedim(0, geometry.channel), alpha=gain**2)


class BOFT(Op):
    """W += gain (R_gain - 1) W on the outputs, R_gain a chain of block rotations each drawn towards 1 by the gain (the
    host loader's rule), times an optional rescale. Shape: rotations [stages, blocks, b, b], rescale [out] or None."""

    additive = False

    def __init__(self, rotations: Tensor, rescale: Tensor | None = None, span: Span = None):
        super().__init__()
        self.rotations, self.span = frozen(rotations), span
        self.rescale = None if rescale is None else frozen(rescale.flatten())

    def _difference(self, w: Tensor, gain: float) -> Tensor:
        wide = w.to(torch.promote_types(w.dtype, torch.float32))
        rotations = self.rotations.to(wide)
        eye = torch.eye(rotations.shape[-1], device=wide.device, dtype=wide.dtype)
        turned = butterfly_rotate(rotations * gain + (1 - gain) * eye, wide)
        if self.rescale is not None:
            turned = turned * self.rescale.to(wide).reshape(-1, *[1] * (w.ndim - 1))
        return (turned - wide).to(w.dtype)

    def _changed(self, weight: Tensor, gain: float) -> Tensor:
        return weight + gain * self._difference(weight, gain)

    def apply_(self, y: Tensor, x: Tensor, inner: Inner, gain: float, geometry: Geometry,
               scales: Scales = None) -> None:
        target = part(y, self.span, geometry.channel, 0)
        turned = self._difference(target.movedim(geometry.channel, 0), gain)
        target.add_(turned.movedim(0, geometry.channel), alpha=gain)


class Decomposed(Op):
    """DoRA: W += gain (s * (W + D) - W), s the factor that gives W + D the learned magnitude (kernels/decompose.py).

    s depends on the weight as the ops before this one leave it; whoever evaluates the op supplies it.
    """

    additive = False

    def __init__(self, direction: Op, magnitude: Tensor, span: Span = None):
        super().__init__()
        self.direction, self.span = direction, span
        self.held = nn.ParameterList([frozen(magnitude)])

    @property
    def magnitude(self) -> Tensor:
        return self.held[0]

    def scales(self, weight: Tensor) -> tuple[Tensor, bool]:
        """(s, acts on outputs) for the weight as it stands before this op."""
        weight = weight if self.span is None else weight.narrow(*self.span)
        return magnitude_scale(self.magnitude.to(weight.device), weight, self.direction.delta(weight).to(weight.dtype))

    def _changed(self, weight: Tensor, gain: float) -> Tensor:
        delta = self.direction.delta(weight).to(weight.dtype)
        s, on_output = magnitude_scale(self.magnitude.to(weight.device), weight, delta)
        s = s.reshape(-1, *[1] * (weight.ndim - 1)) if on_output else s.reshape(1, -1, *[1] * (weight.ndim - 2))
        return weight + gain * (s.to(weight.dtype) * (weight + delta) - weight)

    def apply_(self, y: Tensor, x: Tensor, inner: Inner, gain: float, geometry: Geometry,
               scales: Scales = None) -> None:
        s, on_output = scales
        target = part(y, self.span, geometry.channel, 0)
        delta = self.direction.delta(x).to(x.dtype)
        # s - 1 is formed in fp32 and is small: a product with it keeps the base output's own precision.
        if on_output:
            target.addcmul_(target, geometry.per_channel(gain * (s - 1), target))
            target.addcmul_(geometry.apply(x, delta), geometry.per_channel(gain * s, target))
        else:
            less = x * geometry.per_channel(s - 1, x, geometry.x_channel)
            target.add_(part(inner(less), self.span, geometry.channel, 0), alpha=gain)
            target.add_(geometry.apply(x + less, delta), alpha=gain)


class Replace(Op):
    """W = V: the layer's weight is replaced by the file's. Strength plays no part, as in the host's loader."""

    additive = False

    def __init__(self, value: Tensor, span: Span = None):
        super().__init__()
        self.value, self.span = frozen(value), span

    def _changed(self, weight: Tensor, gain: float) -> Tensor:
        return self.value.to(weight).reshape(weight.shape)

    def apply_(self, y: Tensor, x: Tensor, inner: Inner, gain: float, geometry: Geometry,
               scales: Scales = None) -> None:
        x = part(x, self.span, geometry.x_channel, 1)
        part(y, self.span, geometry.channel, 0).copy_(geometry.apply(x, self.value.to(x)))
