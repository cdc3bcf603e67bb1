"""From what ComfyUI's own loader made of a LoRA file to ops of a bank.

The loader maps file keys to weights for every model family and file format it knows; here its adapters, known by
their `name` and the order of their `weights`, become the engine's ops.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.lora
from torch import Tensor, nn

from ..engine.adapters import BOFT, OFT, Bias, Decomposed, Dense, GLoRA, LowRank, Op, Replace, Span, given
from ..engine.geometry import Geometry, geometry_of
from ..kernels.deltas import hadamard, kronecker, tucker, tucker_down
from ..kernels.orthogonal import cayley

PREFIX = "diffusion_model."


@dataclass
class ParsedLoRA:
    """One LoRA for one model.

    layers     layer name (below the diffusion model) -> ops
    patches    the loader's own patches for the diffusion model, for the weight path
    left_out   (loader key, reason) for each patch that no forward can express
    misfits    the same for those that no weight can take either: they were made for a layer of another shape
    unused     keys of the file that the loader found no place for
    """

    layers: dict[str, list[Op]] = field(default_factory=dict)
    patches: dict = field(default_factory=dict)
    left_out: list[tuple[object, str]] = field(default_factory=list)
    misfits: list[tuple[object, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


class _Inexpressible(Exception):
    """Why a patch cannot be a forward; the message is the reason."""


class _Misfit(_Inexpressible):
    """It was made for a layer of another shape."""


class _Nothing(Exception):
    """It changes nothing: a layer that a tool has cut down to rank 0."""


def parse(lora: dict[str, Tensor], key_map: dict, model: nn.Module) -> ParsedLoRA:
    """Map a LoRA's tensors on `model` (the host's base model) through the host's key map."""
    patches = comfy.lora.load_lora(lora, key_map, log_missing=False)
    parsed = ParsedLoRA(patches=patches, unused=_unused(lora, patches))
    for key, patch in patches.items():
        name, span, rows = (key, None, None) if isinstance(key, str) else (*key, None)[:3]
        try:
            layer, op = _op(name, span, rows, patch, model)
            parsed.layers.setdefault(layer, []).append(op)
        except _Nothing:
            continue
        except _Misfit as reason:
            parsed.misfits.append((key, str(reason)))
        except _Inexpressible as reason:
            parsed.left_out.append((key, str(reason)))
    return parsed


def _op(key: str, span: Span, rows: Callable | None, patch, model: nn.Module) -> tuple[str, Op]:
    layer, _, leaf = key.removeprefix(PREFIX).rpartition(".")
    module, geometry = _layer(model, layer) if key.startswith(PREFIX) else (None, None)
    if geometry is None:
        raise _Inexpressible("the layer is a bare parameter or of a kind that has no routed forward")
    if leaf == "bias":
        return layer, _bias(patch, module)
    if leaf != "weight":
        raise _Inexpressible(f"'{leaf}' is neither a weight nor a bias")
    shape = weight_shape(module)
    if span is not None:
        span = tuple(span)
        if span[1] + span[2] > shape[span[0]]:
            raise _Misfit(f"a slice that ends at {span[1] + span[2]} of a weight of {'x'.join(map(str, shape))}")
        shape = (*shape[:span[0]], span[2], *shape[span[0] + 1:])
    kind = patch[0] if isinstance(patch, tuple) else patch.name
    make = _MAKERS.get(kind)
    if make is None:
        raise _Inexpressible(f"adapter kind '{kind}' is not known")
    values = patch[1] if isinstance(patch, tuple) else patch.weights
    op = make(values, shape, geometry, span, rows)
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


def _layer(model: nn.Module, layer: str) -> tuple[nn.Module | None, Geometry | None]:
    try:
        module = model.diffusion_model.get_submodule(layer)
    except AttributeError:
        return None, None
    return module, geometry_of(module)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a layer's weight by the layer's own description: the tensor may be packed or elsewhere."""
    if hasattr(module, "in_features"):
        return (module.out_features, module.in_features)
    if hasattr(module, "kernel_size"):
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return (module.num_channels,) if hasattr(module, "num_channels") else tuple(module.normalized_shape)


def _bias(patch, module: nn.Module) -> Op:
    if not isinstance(patch, tuple) or patch[0] != "diff":
        raise _Inexpressible("only differences of a bias can be routed")
    if getattr(module, "bias", None) is None:
        raise _Inexpressible("the layer has no bias")
    if patch[1][0].numel() != weight_shape(module)[0]:
        raise _Misfit(f"bias of {patch[1][0].numel()} entries for a layer of {weight_shape(module)[0]}")
    return Bias(patch[1][0].flatten())


def _fits(numel: int, shape: tuple[int, ...]) -> None:
    expected = 1
    for size in shape:
        expected *= size
    if numel != expected:
        raise _Misfit(f"the file's delta has {numel} entries, the layer's weight {'x'.join(map(str, shape))}")


def _scale(alpha: float | None, rank: int) -> float:
    return 1.0 if alpha is None else alpha / rank


def _additive(build: Callable, factors: list, shape, scale: float, span: Span, rows: Callable | None) -> Dense:
    if rows is not None:
        return Dense(lambda *f: rows(build(*f).reshape(shape)), factors, shape, scale, span)
    return Dense(build, factors, shape, scale, span)


def _with_magnitude(op: Op, magnitude: Tensor | None, span: Span, rows: Callable | None) -> Op:
    if magnitude is None:
        return op
    if rows is not None or (span is not None and span[0] != 0):
        raise _Inexpressible("DoRA on reordered rows or on a slice of the inputs")
    op.span = None  # the decomposition narrows to the span itself
    return Decomposed(op, magnitude, span)


def _lora(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    up, down, alpha, mid, magnitude, reshape = (*values, None)[:6]
    if reshape is not None and tuple(reshape) != shape:
        raise _Inexpressible("it enlarges the layer")
    if not down.numel():
        raise _Nothing if magnitude is None else _Inexpressible("DoRA of rank 0")
    scale = _scale(alpha, down.shape[0])
    if mid is not None:
        down = tucker_down(down.float(), mid.float()).to(down.dtype)
    up = up.flatten(1)
    if up.shape[0] != shape[0]:
        raise _Misfit(f"the file's delta has {up.shape[0]} rows, the layer's weight {'x'.join(map(str, shape))}")
    _fits(up.shape[0] * down[0].numel(), shape)
    if geometry.groups > 1 or geometry.is_norm:
        op = _additive(lambda u, d: u @ d.flatten(1), [up, down], shape, scale, span, rows)
    else:
        op = LowRank(up if rows is None else rows(up), down.reshape(-1, *shape[1:]), scale, span)
    return _with_magnitude(op, magnitude, span, rows)


def _loha(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    w1_a, w1_b, alpha, w2_a, w2_b, t1, t2, magnitude = values
    _fits(w1_b.shape[1] * (w1_a.shape[0] if t1 is None else w1_a.shape[1] * t1[0, 0].numel()), shape)
    op = _additive(hadamard, [w1_a, w1_b, w2_a, w2_b, t1, t2], shape, _scale(alpha, w1_b.shape[0]), span, rows)
    return _with_magnitude(op, magnitude, span, rows)


def _kron(w1, w1_a, w1_b, w2, w2_a, w2_b, t2) -> Tensor:
    w1 = w1_a @ w1_b if w1 is None else w1
    if w2 is None:
        w2 = w2_a @ w2_b if t2 is None else tucker(t2, w2_a, w2_b)
    return kronecker(w1, w2)


def _lokr(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, magnitude = values
    rank = w2_b.shape[0] if w2 is None else w1_b.shape[0] if w1 is None else None
    scale = 1.0 if rank is None else _scale(alpha, rank)
    small = w1_a.shape[0] * w1_b.shape[1] if w1 is None else w1.numel()
    if w2 is not None:
        large = w2.numel()
    else:
        large = w2_b.shape[1] * (w2_a.shape[0] if t2 is None else w2_a.shape[1] * t2[0, 0].numel())
    _fits(small * large, shape)
    op = _additive(_kron, [w1, w1_a, w1_b, w2, w2_a, w2_b, t2], shape, scale, span, rows)
    return _with_magnitude(op, magnitude, span, rows)


def _glora(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    a1, a2, b1, b2, alpha, magnitude = values
    a1, a2, b1, b2 = (t.flatten(1) for t in (a1, a2, b1, b2))
    if magnitude is not None or rows is not None or (span is not None and span[0] != 0):
        raise _Inexpressible("GLoRA with a magnitude, on reordered rows or on a slice of the inputs")
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if new and not (old and a2.shape[0] == shape[0] == shape[1]):
        old = False
    # Files of the first LyCORIS releases order the factors the other way round: W a2 a1 + b2 b1.
    m_up, m_down, d_up, d_down = (a2, a1, b2, b1) if old else (a1, a2, b1, b2)
    if m_up.shape[0] != shape[1]:
        raise _Inexpressible("GLoRA that mixes kernel positions of a convolution")
    _fits(d_up.shape[0] * d_down.shape[1], shape)
    rank = a1.shape[0] if old else a2.shape[0]
    return GLoRA(m_up, m_down, d_up, d_down.reshape(-1, *shape[1:]), _scale(alpha, rank), span)


def _orthogonal(values, shape, span: Span, rows: Callable | None, blocks_at: int) -> tuple[Tensor, Tensor | None]:
    blocks, rescale, alpha, magnitude = values
    if magnitude is not None or rows is not None or (span is not None and span[0] != 0):
        raise _Inexpressible("a rotation with a magnitude, on reordered rows or on inputs")
    if blocks.shape[blocks_at] * blocks.shape[-1] != shape[0]:
        raise _Inexpressible(f"rotations of {blocks.shape[blocks_at] * blocks.shape[-1]} channels for {shape[0]}")
    return cayley(blocks, alpha or 0.0), rescale


def _oft(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    return OFT(_orthogonal(values, shape, span, rows, 0)[0], span)


def _boft(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    rotations, rescale = _orthogonal(values, shape, span, rows, 1)
    stages, size = rotations.shape[0], rotations.shape[-1]
    if shape[0] % (2**stages * (size // 2)):
        raise _Inexpressible(f"{stages} stages of rotations of {size} channels for {shape[0]}")
    return BOFT(rotations, rescale, span)


def _diff(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    if tuple(values[0].shape) != tuple(shape):
        raise _Misfit(f"a difference of shape {tuple(values[0].shape)} for a weight of shape {shape}")
    return _additive(given, [values[0]], shape, 1.0, span, rows)


def _set(values, shape, geometry: Geometry, span: Span, rows: Callable | None) -> Op:
    _fits(values[0].numel(), shape)
    return Replace(values[0].reshape(shape), span)


_MAKERS = {"lora": _lora, "loha": _loha, "lokr": _lokr, "glora": _glora, "oft": _oft, "boft": _boft,
           "diff": _diff, "set": _set}


def _unused(lora: dict[str, Tensor], patches: dict) -> list[str]:
    used: set[str] = set()
    for patch in patches.values():
        # All adapters of one load share the loader's set of used keys, plain differences included.
        used |= getattr(patch, "loaded_keys", set())
    return [] if not used else [key for key in lora if key not in used]
