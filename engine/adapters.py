"""What one adapter does to one layer.

An op changes the weight of a layer, W -> W'. Each op knows that change in two forms, which must agree:

    on_weight(w, gain)     the weight form: slow, obvious, needs W; the reference, and DoRA's norms
    the forward form       W is never read. By what it needs, an op is of one of three sorts:

    additive    W' = W + gain D:        add_(y, x, gain, geometry)            y += gain D x
    output      W' x by W x and x:      change_(y, x, gain, geometry, ...)    y holds W x (no bias), becomes W' x
    input       W' x = W (x + u) + ..:  shift(x, gain, geometry, ...) -> u, and add_ for the rest

The order of additive ops does not matter, and the bias may be in y.

`span` is the slice (dim, start, length) of the weight that an op belongs to, where a model fuses several layers
into one (q, k and v of Flux); None means all of it. Floating-point factors are stored as given and cast where they
are used; scales and rotations stay in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels.decompose import magnitude_scale
from ..kernels.deltas import kronecker
from ..kernels.orthogonal import block_rotate, butterfly_rotate
from .geometry import Geometry

Span = tuple[int, int, int] | None
Reader = Callable[[str], "Tensor | None"]
"""(parameter name) -> the base model's tensor in fp32, or None where it cannot be read."""
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
    rank = 0
    """The rank that the adapter was trained with; 0 where its factors do not say."""

    def on_inputs(self, scales: Scales = None) -> bool:
        """Whether an op that is not additive is of the sort `input`; else it is of the sort `output`."""
        return False

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

    def product(self, x: Tensor, geometry: Geometry) -> Tensor:
        """D x of an additive op, x the inputs of its span."""
        return geometry.apply(x, self.delta(x).to(x.dtype))

    def add_(self, y: Tensor, x: Tensor, gain: float, geometry: Geometry, scales: Scales = None) -> None:
        """y += gain D x; of an input op, what it adds beside the shift of x. `scales` is for `Decomposed` alone."""
        x = part(x, self.span, geometry.channel, 1)
        part(y, self.span, geometry.channel, 0).add_(self.product(x, geometry), alpha=gain)

    def change_(self, y: Tensor, x: Tensor, gain: float, geometry: Geometry, scales: Scales = None) -> None:
        """y, W x without a bias, becomes W' x. For output ops, and for additive ones among them."""
        self.add_(y, x, gain, geometry, scales)

    def shift(self, x: Tensor, gain: float, geometry: Geometry, scales: Scales = None) -> Tensor:
        """u of an input op: what x has to be moved by before the weight as it was acts on it."""
        raise TypeError(f"{type(self).__name__} does not act on inputs")


class LowRank(Op):
    """W += gain * scale * up @ down. Shape: up [out, r], down [r, in, *k]; the bank stacks these of all adapters.

    rank   the rank that the adapter was trained with, where it is not r (a product of two low-rank matrices)
    """

    def __init__(self, up: Tensor, down: Tensor, scale: float = 1.0, span: Span = None, rank: int | None = None):
        super().__init__()
        self.up, self.down, self.scale, self.span = frozen(up), frozen(down), float(scale), span
        self.rank = down.shape[0] if rank is None else rank

    def delta(self, like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        up, down = self.up.to(like.device, dtype), self.down.to(like.device, dtype)
        return (up @ down.flatten(1) * self.scale).unflatten(1, down.shape[1:])

    def product(self, x: Tensor, geometry: Geometry) -> Tensor:
        hidden = geometry.apply(x, self.down.to(x)).movedim(geometry.channel, -1)
        return (hidden @ (self.up.to(x).T * self.scale)).movedim(-1, geometry.channel)


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


class Kron(Op):
    """LoKr: W += gain * scale * (left kron right), as two small products: what is never formed is the product.

    Shape: left [p, q], right [s, t, *k] -> weight [p s, q t, *k].
    """

    def __init__(self, left: Tensor, right: Tensor, scale: float = 1.0, span: Span = None, rank: int = 0):
        super().__init__()
        self.left, self.right, self.scale, self.span, self.rank = frozen(left), frozen(right), float(scale), span, rank

    def delta(self, like: Tensor) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        left, right = self.left.to(like.device, dtype), self.right.to(like.device, dtype)
        return kronecker(left, right) * self.scale

    def product(self, x: Tensor, geometry: Geometry) -> Tensor:
        left, right = self.left.to(x) * self.scale, self.right.to(x)
        x = x.unflatten(geometry.channel, (left.shape[1], -1))
        if not geometry.spatial:
            return torch.matmul(left, geometry.apply(x, right)).flatten(-2)
        hidden = geometry.apply(x.flatten(0, 1), right).unflatten(0, (-1, left.shape[1]))
        return torch.matmul(left, hidden.flatten(2)).view(x.shape[0], -1, *hidden.shape[3:])


class Bias(Op):
    """b += gain * v, one entry per output channel. Not a change of the weight: it is added after all of them."""

    def __init__(self, vector: Tensor):
        super().__init__()
        self.vector = frozen(vector)

    def add_(self, y: Tensor, x: Tensor, gain: float, geometry: Geometry, scales: Scales = None) -> None:
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
        mixed = torch.einsum("oi...,ij->oj...", weight, self.mix.delta(weight).to(weight))
        return weight + gain * (self.scale * mixed + self.plus.delta(weight).to(weight.dtype))

    def on_inputs(self, scales: Scales = None) -> bool:
        return True

    def shift(self, x: Tensor, gain: float, geometry: Geometry, scales: Scales = None) -> Tensor:
        last = x.movedim(geometry.channel, -1)
        mixed = (last @ self.mix.down.to(x).T @ self.mix.up.to(x).T).movedim(-1, geometry.channel)
        return mixed * (gain * self.scale)

    def add_(self, y: Tensor, x: Tensor, gain: float, geometry: Geometry, scales: Scales = None) -> None:
        self.plus.add_(y, x, gain, geometry)


class OFT(Op):
    """W += gain^2 (R - 1) W on the outputs, R block-diagonal. The square is the host loader's: it applies the strength
    once to the rotation and once to the difference. Shape: rotations [blocks, b, b], fp32."""

    additive = False

    def __init__(self, rotations: Tensor, span: Span = None):
        super().__init__()
        self.turn, self.span = frozen(rotations - torch.eye(rotations.shape[-1])), span

    def _changed(self, weight: Tensor, gain: float) -> Tensor:
        return weight + gain**2 * block_rotate(self.turn.to(weight), weight)

    def change_(self, y: Tensor, x: Tensor, gain: float, geometry: Geometry, scales: Scales = None) -> None:
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

    def change_(self, y: Tensor, x: Tensor, gain: float, geometry: Geometry, scales: Scales = None) -> None:
        target = part(y, self.span, geometry.channel, 0)
        turned = self._difference(target.movedim(geometry.channel, 0), gain)
        target.add_(turned.movedim(0, geometry.channel), alpha=gain)


class Decomposed(Op):
    """DoRA: W += gain (s * (W + D) - W), s the factor that gives W + D the learned magnitude (kernels/decompose.py).

    s depends on the weight as the ops before this one leave it; whoever evaluates the op supplies it. It acts on
    outputs or on inputs, and so does the op.

    of_changed   whether magnitudes of outputs are those of W + D, not of W as the host has it
    """

    additive = False
    of_changed = False

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
        return self._scales(weight, self.direction.delta(weight).to(weight.dtype))

    def _scales(self, weight: Tensor, delta: Tensor) -> tuple[Tensor, bool]:
        return magnitude_scale(self.magnitude.to(weight.device), weight, delta, self.of_changed)

    def _changed(self, weight: Tensor, gain: float) -> Tensor:
        delta = self.direction.delta(weight).to(weight.dtype)
        s, on_output = self._scales(weight, delta)
        s = s.reshape(-1, *[1] * (weight.ndim - 1)) if on_output else s.reshape(1, -1, *[1] * (weight.ndim - 2))
        return weight + gain * (s.to(weight.dtype) * (weight + delta) - weight)

    def on_inputs(self, scales: Scales = None) -> bool:
        return not scales[1]

    # s - 1 is formed in fp32 and is small: a product with it keeps the base output's own precision.

    def change_(self, y: Tensor, x: Tensor, gain: float, geometry: Geometry, scales: Scales = None) -> None:
        s, _ = scales
        target = part(y, self.span, geometry.channel, 0)
        target.addcmul_(target, geometry.per_channel(gain * (s - 1), target))
        target.addcmul_(self.direction.product(x, geometry), geometry.per_channel(gain * s, target))

    def shift(self, x: Tensor, gain: float, geometry: Geometry, scales: Scales = None) -> Tensor:
        return x * geometry.per_channel(gain * (scales[0] - 1), x)

    def add_(self, y: Tensor, x: Tensor, gain: float, geometry: Geometry, scales: Scales = None) -> None:
        scaled = x * geometry.per_channel(scales[0], x)
        part(y, self.span, geometry.channel, 0).add_(self.direction.product(scaled, geometry), alpha=gain)


class Replace(Op):
    """W = V: the layer's weight is replaced by the file's. Strength plays no part, as in the host's loader."""

    additive = False

    def __init__(self, value: Tensor, span: Span = None):
        super().__init__()
        self.value, self.span = frozen(value), span

    def _changed(self, weight: Tensor, gain: float) -> Tensor:
        return self.value.to(weight).reshape(weight.shape)

    def change_(self, y: Tensor, x: Tensor, gain: float, geometry: Geometry, scales: Scales = None) -> None:
        x = part(x, self.span, geometry.channel, 1)
        part(y, self.span, geometry.channel, 0).copy_(geometry.apply(x, self.value.to(x)))
