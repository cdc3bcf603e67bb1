"""From what ComfyUI's own loader made of a LoRA file to ops of a bank.

The loader maps file keys to weights for every model family and file format it knows; here its adapters, known by
their `name` and the order of their `weights`, become the engine's ops.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import comfy.lora
from torch import Tensor, nn

from ...engine.adapters import BOFT, OFT, Bias, Decomposed, Dense, GLoRA, Kron, LowRank, Op, Replace, Span, given
from ...engine.geometry import Geometry, geometry_of
from ...kernels.deltas import balanced, hadamard, hadamard_factors, kronecker, tucker, tucker_down
from ...kernels.orthogonal import cayley
from . import peft
from .files import LoRAFile
from .fit import (
    Broken,
    Misfit,
    Shape,
    check,
    check_alpha,
    check_result,
    check_values,
    enlarged_shape,
    is_old_glora,
    narrowed,
    plain_magnitude,
    scales,
)
from .formats import HEAD, with_aliases

PREFIX = "diffusion_model."


@dataclass
class Patches:
    """What a file does to one model, as the host's own loader reads it.

    found     loader key -> the loader's patch, for all that it applies without an error
    misfits   (loader key, why) for what it leaves out with a line in its log
    used      keys of the file that stand for one of these
    unread    a key of a layer of the model of whose tensors the loader makes nothing; empty: there is none
    enlarged  loader key -> the shape of a weight that becomes larger
    """

    found: dict = field(default_factory=dict)
    misfits: list[tuple[object, Misfit]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    unread: str = ""
    enlarged: dict[str, Shape] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Of the tensors of all patches."""
        return sum(tensor.nbytes for patch in self.found.values() for tensor in _values(patch))


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


class _Nothing(Exception):
    """It changes nothing: a layer that a tool has cut down to rank 0."""


def load(file: LoRAFile, key_map: Mapping, root: nn.Module, enlarged: Mapping[str, Shape],
         acts: bool = True) -> Patches:
    """Let the host's loader read a file for one model, layer by layer, and check what it makes of each.

    key_map    the host's: names in files -> keys of the model's weights, or (key, span[, function of rows])
    root       the model that these keys belong to
    enlarged   shapes of weights that other patches have made larger
    acts       whether any of it is to be applied; of what is not, no value is read
    Only tensors that have a place in the model are read. Raises `fit.Broken` for a file that the loader stops at.
    """
    patches, keys, sorted_keys = Patches(), {id(tensor): key for key, tensor in file.items()}, sorted(file)
    head = shape_of(root, HEAD)
    for name, target in with_aliases(key_map, file, head[0] if head else 0).items():
        if not _first(sorted_keys, name):
            continue  # the names of a layer's tensors all begin with the layer's
        key, span = (target, None) if isinstance(target, str) else target[:2]
        whole = enlarged.get(key) or shape_of(root, key)
        made = _read(file, name, target, whole and narrowed(whole, span))
        if not made:
            patches.unread = patches.unread or _first(sorted_keys, f"{name}.")
        for place, patch in made.items():
            used = {f"{name}.{end}" for end in ("alpha", "dora_scale", *peft.MAGNITUDES, *peft.BIASES)} & file.keys()
            used |= getattr(patch, "loaded_keys", set()) & file.keys()
            used |= {keys[id(value)] for value in _values(patch) if id(value) in keys}
            patches.used |= used
            for before in (patches.found, patches.enlarged):
                before.pop(place, None)
            shape = whole if place == target else shape_of(root, place)
            try:
                if place != target and span is not None:
                    raise Misfit("a bias for a slice of a layer")
                _check(file, used, patch, shape, span, acts)
            except Misfit as reason:
                patches.misfits.append((place if span is None else key, reason))
            except _Nothing:
                continue
            else:
                patches.found[place] = patch
                larger = enlarged_shape(patch, shape) if span is None else None
                if larger not in (None, shape):
                    patches.enlarged[place] = larger
    return patches


def _first(sorted_keys: Sequence[str], start: str) -> str:
    """The first key that begins like this; empty: none does."""
    at = bisect_left(sorted_keys, start)
    return sorted_keys[at] if at < len(sorted_keys) and sorted_keys[at].startswith(start) else ""


def _read(file: LoRAFile, name: str, target, shape: Shape | None) -> dict:
    """The host's patches for one name of its key map."""
    alpha, magnitude = (f"{name}.{end}" for end in ("alpha", "dora_scale"))
    check_alpha(alpha, file.get(alpha))
    tensors = ChainMap(peft.under_host_names(file, name, shape), file)
    if shape is not None and magnitude in file:
        tensors = ChainMap({magnitude: plain_magnitude(file[magnitude], shape)}, tensors)
    try:
        found = comfy.lora.load_lora(tensors, {name: target}, log_missing=False)
    except KeyError as missing:
        raise Broken(f"is damaged: the tensor '{missing.args[0]}' is missing. Use another version") from None
    return {place: peft.as_it_means(file, name, patch) for place, patch in found.items()}


def _check(file: LoRAFile, used: Collection[str], patch, shape: Shape | None, span: Span, acts: bool) -> None:
    """Raises Misfit, Broken, or _Nothing."""
    if shape is None:
        raise Misfit("the model has no such layer, or the layer no bias")
    used = [tensor for tensor in used if acts and (scales(patch) or not tensor.endswith(".alpha"))]
    for tensor in used:
        check_values(file, tensor)
    check(patch, shape, span)
    if not isinstance(patch, tuple) and patch.name == "lora":
        _, down, _, _, magnitude = patch.weights[:5]
        if not down.numel() and magnitude is None:
            raise _Nothing
    check_result(patch, shape, span, (file.peak(tensor) for tensor in used))


def _values(patch) -> Iterator[Tensor]:
    values = patch[1] if isinstance(patch, tuple) else patch.weights
    return (value for value in values if isinstance(value, Tensor))


def shape_of(root: nn.Module, key: str) -> Shape | None:
    """The shape of a model's weight; None where the model has no weight of this name."""
    layer, _, leaf = key.rpartition(".")
    try:
        module = root.get_submodule(layer)
    except AttributeError:
        return None
    tensor = getattr(module, leaf, None)
    if tensor is None:
        return None
    # By the layer's own description where there is one: the tensor may be packed.
    return weight_shape(module) if leaf == "weight" and geometry_of(module) else tuple(tensor.shape)


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
    module, geometry = _layer(model, layer) if key.startswith(PREFIX) else (None, None)
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
