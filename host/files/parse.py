"""From what ComfyUI's own loader made of a LoRA file (`patches.py`) to ops of a bank.

The host's adapters are known by their `name` and the order of their `weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from math import prod

from torch import Tensor, nn

from ...engine.adapters import BOFT, OFT, Bias, Decomposed, Dense, GLoRA, Kron, LowRank, Op, Replace, Span, given
from ...engine.geometry import Geometry, geometry_of, layer_of
from ...kernels.deltas import balanced, hadamard, hadamard_factors, kronecker, tucker, tucker_down
from ...kernels.orthogonal import cayley
from . import peft
from .fit import Shape, is_old_glora, narrowed
from .patches import Patches, weight_shape

PREFIX = "diffusion_model."


@dataclass
class ParsedLoRA:
    """One LoRA for one model.

    layers     layer name (below the diffusion model) -> ops
    left_out   (loader key, reason) for each patch that no forward can express
    otherwise  (loader key, reason) for each that is not what the host's loader makes of it
    """

    layers: dict[str, list[Op]] = field(default_factory=dict)
    left_out: list[tuple[object, str]] = field(default_factory=list)
    otherwise: list[tuple[object, str]] = field(default_factory=list)


class _Inexpressible(Exception):
    """Why a patch cannot be a forward; the message is the reason."""


def parse(patches: Patches, model: nn.Module, on_weights: Collection[str] = ()) -> ParsedLoRA:
    """Ops for all that a file does to `model` (the host's base model) and that a forward can express. `on_weights`:
    keys of weights that change their shape, so that nothing acts there beside them."""
    parsed = ParsedLoRA()
    for key, patch in patches.found.items():
        name, span, rows = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
        try:
            if name in on_weights and key not in patches.enlarged:
                raise _Inexpressible("another LoRA enlarges the layer")
            layer, op = _op(name, span, rows, patch, model)
            parsed.layers.setdefault(layer, []).append(op)
            if not isinstance(patch, tuple) and patch.name == "lokr" and _scrambled(patch.weights[1]):
                parsed.otherwise.append((key, "a LoKr of a convolution in one or three dimensions, whose values "
                                              "ComfyUI's own loader puts in other places than trainers do"))
        except _Inexpressible as reason:
            parsed.left_out.append((key, str(reason)))
    return parsed


def _op(key: str, span: Span, rows: Callable | None, patch, model: nn.Module) -> tuple[str, Op]:
    layer, _, leaf = key.removeprefix(PREFIX).rpartition(".")
    module = layer_of(model.diffusion_model, layer) if key.startswith(PREFIX) else None
    geometry = None if module is None else geometry_of(module)
    if geometry is None:
        raise _Inexpressible("the layer is a bare parameter or of a kind that has no routed forward")
    if leaf == "bias":
        return layer, _bias(patch)
    if leaf != "weight":
        raise _Inexpressible(f"'{leaf}' is neither a weight nor a bias")
    span = None if span is None else tuple(span)
    shape = narrowed(weight_shape(module), span)
    kind = patch[0] if isinstance(patch, tuple) else patch.name
    make = _MAKERS.get(kind)
    if make is None:
        raise _Inexpressible(f"adapter kind '{kind}' is not known")
    values = patch[1] if isinstance(patch, tuple) else patch.weights
    op = make(values, shape, geometry, span, rows)
    if isinstance(patch, peft.PEFTDoRA) and isinstance(op, Decomposed):
        op.of_changed = True
    if geometry.groups > 1 and _crosses_groups(op, shape[0], geometry.groups):
        raise _Inexpressible("it mixes channels of different groups of a convolution")
    return layer, op


def _crosses_groups(op: Op, out: int, groups: int) -> bool:
    """Whether an op of a grouped convolution mixes rows of the weight that see different inputs: such a change of the
    weight is no change of the outputs."""
    if isinstance(op, OFT):
        return (out // groups) % op.turn.shape[-1] != 0
    if isinstance(op, Decomposed):
        return op.magnitude.shape[0] != out
    return isinstance(op, (BOFT, GLoRA))


def _bias(patch) -> Op:
    if not isinstance(patch, tuple) or patch[0] != "diff":
        raise _Inexpressible("only differences of a bias can be routed")
    return Bias(patch[1][0])


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def _additive(build: Callable, factors: list, shape, scale: float, span: Span, rows: Callable | None) -> Dense:
    if rows is not None:
        return Dense(lambda *f: rows(build(*f).reshape(shape)), factors, shape, scale, span)
    return Dense(build, factors, shape, scale, span)


def _with_magnitude(op: Op, magnitude: Tensor | None, shape: Shape, span: Span, rows: Callable | None) -> Op:
    if magnitude is None:
        return op
    if rows is not None or (span is not None and span[0] != 0) or len(shape) < 2:
        raise _Inexpressible("DoRA on reordered rows, on a slice of the inputs or on a norm")
    op.span = None  # the decomposition narrows to the span itself
    return Decomposed(op, magnitude, span)


def _lora(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    up, down, alpha, mid, magnitude, reshape = (*values, None)[:6]
    if reshape is not None and tuple(reshape) != shape:
        raise _Inexpressible("it enlarges the layer")
    if not down.numel():
        raise _Inexpressible("DoRA of rank 0")
    scale = _scale(alpha, down.shape[0])
    if mid is not None:
        down = tucker_down(down.float(), mid.float())
    up = up.flatten(1)
    if geometry.groups > 1 or geometry.is_norm:
        op = _additive(lambda u, d: u @ d.flatten(1), [up, down], shape, scale, span, rows)
    else:
        up, down = balanced(up, down.reshape(-1, *shape[1:]))
        op = LowRank(up if rows is None else rows(up), down, scale, span)
    return _with_magnitude(op, magnitude, shape, span, rows)


def _loha(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    w1_a, w1_b, alpha, w2_a, w2_b, t1, t2, magnitude = values
    scale, rank = _scale(alpha, w1_b.shape[0]), w1_b.shape[0] * w2_b.shape[0]
    # One product of rank r1 r2, as long as its factors are at most half as large as the layer.
    small = rank * (shape[0] + prod(shape[1:])) <= prod(shape) / 2
    if t1 is None and _is_plain(geometry, rows) and small and rank:
        up, down = hadamard_factors(*(factor.float() for factor in (w1_a, w1_b, w2_a, w2_b)))
        op = LowRank(*balanced(up, down.reshape(-1, *shape[1:])), scale, span, w1_b.shape[0])
    else:
        op = _additive(hadamard, [w1_a, w1_b, w2_a, w2_b, t1, t2], shape, scale, span, rows)
    return _with_magnitude(op, magnitude, shape, span, rows)


def _halves(w1, w1_a, w1_b, w2, w2_a, w2_b, t2) -> tuple[Tensor, Tensor]:
    """The two matrices whose Kronecker product a LoKr is."""
    w1 = w1_a @ w1_b if w1 is None else w1
    if w2 is None:
        w2 = w2_a @ w2_b if t2 is None else tucker(t2, w2_a, w2_b)
    return w1, w2


def _scrambled(w2: Tensor | None) -> bool:
    """Whether the host's loader lays out a LoKr otherwise than LyCORIS and the host's own trainer: it multiplies a
    matrix by a kernel without giving it the kernel's dimensions, but for two."""
    return w2 is not None and w2.ndim in (3, 5)


def _lokr(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, magnitude = values
    rank = w2_b.shape[0] if w2 is None else w1_b.shape[0] if w1 is None else None
    scale = 1.0 if rank is None else _scale(alpha, rank)
    factors = [w1, w1_a, w1_b, w2, w2_a, w2_b, t2]
    left, right = _halves(*(None if factor is None else factor.float() for factor in factors))
    if _is_plain(geometry, rows) and left.shape[0] * right.shape[0] == shape[0] and shape[1] % left.shape[1] == 0:
        right = right.reshape(-1, shape[1] // left.shape[1], *shape[2:])  # kernel positions may lie in its columns
        smallest = min(min(factor.shape[:2]) for factor in factors if factor is not None)
        op = Kron(left, right, scale, span, smallest)
    else:
        op = _additive(lambda *parts: kronecker(*_halves(*parts)), factors, shape, scale, span, rows)
    return _with_magnitude(op, magnitude, shape, span, rows)


def _is_plain(geometry: Geometry, rows: Callable | None) -> bool:
    """Whether a layer's change may be evaluated as products of its factors."""
    return geometry.groups == 1 and not geometry.is_norm and rows is None


def _glora(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    a1, a2, b1, b2, alpha, magnitude = values
    if magnitude is not None or rows is not None or (span is not None and span[0] != 0):
        raise _Inexpressible("GLoRA with a magnitude, on reordered rows or on a slice of the inputs")
    old = is_old_glora(a1, a2, b1, b2, shape)
    a1, a2, b1, b2 = (t.flatten(1) for t in (a1, a2, b1, b2))
    # Files of the first LyCORIS releases order the factors the other way round: W a2 a1 + b2 b1.
    m_up, m_down, d_up, d_down = (a2, a1, b2, b1) if old else (a1, a2, b1, b2)
    if m_up.shape[0] != shape[1]:
        raise _Inexpressible("GLoRA that mixes kernel positions of a convolution")
    rank = a1.shape[0] if old else a2.shape[0]
    return GLoRA(m_up, m_down, d_up, d_down.reshape(-1, *shape[1:]), _scale(alpha, rank), span)


def _rotations(values, span: Span, rows: Callable | None) -> Tensor:
    blocks, _, alpha, magnitude = values
    if magnitude is not None or rows is not None or (span is not None and span[0] != 0):
        raise _Inexpressible("a rotation with a magnitude, on reordered rows or on inputs")
    return cayley(blocks, alpha or 0.0)


def _oft(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    return OFT(_rotations(values, span, rows), span)


def _boft(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    return BOFT(_rotations(values, span, rows), values[1], span)


def _diff(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    return _additive(given, [values[0]], shape, 1.0, span, rows)


def _set(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    return Replace(values[0].reshape(shape), span)


_MAKERS = {"lora": _lora, "loha": _loha, "lokr": _lokr, "glora": _glora, "oft": _oft, "boft": _boft,
           "diff": _diff, "set": _set}
