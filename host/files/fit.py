"""Whether the tensors that a file has for one layer fit together and fit the layer: decided here, before anything is
applied, for every kind of adapter.

The host's loader stops with an exception at some of what may be wrong; the file is refused then (`Broken`). At the
rest it writes a line into its log and leaves the layer as it is; so does the pack, by name (`Misfit`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import comfy.lora
import torch
from torch import Tensor

from ...engine.adapters import Span
from .files import LoRAFile

SUSPICIOUS = 1e6
"""From this product of the largest entries on, a layer's change is computed to see what becomes of it."""
LARGEST = torch.finfo(torch.float16).max
Shape = tuple[int, ...]
_NUMBERS = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
_COUNTS = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


class Misfit(Exception):
    """Why a layer is left out; the message is the reason."""


class Torn(Misfit):
    """The layer's tensors do not fit each other, whatever the model."""


class Broken(Exception):
    """Why a file is refused; the message is the reason."""


def check(patch, shape: Shape, span: Span) -> None:
    """Whether a patch of the host's (an adapter or a plain difference) fits a weight of `shape`, of which it changes
    `span`. Raises Misfit and Broken."""
    if span is not None and span[1] + span[2] > shape[span[0]]:
        raise Misfit(f"a slice that ends at {span[1] + span[2]} of a weight of {named(shape)}")
    shape = narrowed(shape, span)
    kind, values = (patch[0], patch[1]) if isinstance(patch, tuple) else (patch.name, patch.weights)
    enlarged = enlarged_shape(patch, shape)
    if enlarged is not None and enlarged != shape and span is not None:
        raise Misfit("it enlarges a slice of the layer")
    if kind in _CHECKS:
        _CHECKS[kind](values, enlarged or shape)


def check_values(file: LoRAFile, key: str) -> None:
    """Refuse what no layer can be changed by: other things than numbers, and numbers that are none."""
    dtype = file[key].dtype
    if dtype not in _NUMBERS and (dtype not in _COUNTS or file[key].ndim > 1):
        raise Broken(f"holds {named_type(dtype)} values in '{key}', where factors in floating point belong (a "
                     "quantized file?). Use another version")
    if not math.isfinite(file.peak(key)):
        raise Broken(f"holds values that are not numbers (NaN or infinite), in '{key}' for one. Its training went "
                     "wrong or the file is damaged: use another version")


def check_alpha(key: str, alpha: Tensor | None) -> None:
    """Refuse an alpha that is not one number."""
    if alpha is not None and (alpha.numel() != 1 or alpha.is_complex()):
        raise Broken(f"is damaged: '{key}' holds {alpha.numel()} values of type "
                     f"{named_type(alpha.dtype)}, and alpha is one number. Use another version")


def scales(patch) -> bool:
    """Whether a patch of the host's goes by its alpha. A LoKr of two whole matrices does not: ai-toolkit writes 1e10
    there, which is infinite in fp16."""
    return not isinstance(patch, tuple) and (patch.name != "lokr" or any(half is None for half in patch.weights[:2]))


def check_result(patch, shape: Shape, span: Span, peaks: Iterable[float]) -> None:
    """Refuse finite values whose product is not, or is more than any weight can take. `peaks`: of the tensors."""
    if math.prod(max(1.0, peak) for peak in peaks) < SUSPICIOUS:
        return
    ones = torch.ones(narrowed(shape, span))
    changed = comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], ones, "a layer of ones").abs().max()
    if not changed <= LARGEST:
        raise Broken(f"holds values so large that a layer would change by {float(changed):.1e}, more than weights can "
                     "hold. The file is damaged: use another version")


def plain_magnitude(magnitude: Tensor, shape: Shape) -> Tensor:
    """DoRA's magnitudes with as many dimensions as the weight, one entry per output or per input.

    Some tools write them as a plain list, one per output. The host's arithmetic lays that list along the last
    dimension: on a square layer each input is scaled by the magnitude of the output of the same number, which no
    training meant, and on others its loader leaves the layer out.
    """
    if magnitude.ndim and len(shape) > 1:
        dim = 0 if magnitude.shape[0] == shape[0] else 1
        if magnitude.numel() == shape[dim] == magnitude.shape[dim if magnitude.ndim > 1 else 0]:
            return magnitude.reshape([-1 if k == dim else 1 for k in range(len(shape))])
    return magnitude


def enlarged_shape(patch, shape: Shape) -> Shape | None:
    """The shape that a patch brings a weight of `shape` to; None where it says nothing of shapes. Raises Broken for one
    that a weight cannot be enlarged to."""
    sizes = reshape_of(patch)
    if sizes is None:
        return None
    if len(sizes) != len(shape) or any(type(n) is not int or n < at for n, at in zip(sizes, shape, strict=True)):
        raise Broken(f"is damaged, or made for another model: its reshape_weight would bring a layer of {named(shape)} "
                     f"to {sizes}, and it can only enlarge. Use another version")
    return tuple(sizes)


def reshape_of(patch) -> list | None:
    """The sizes that a patch of the host's, also one of another node's, asks of its weight; None for most."""
    if isinstance(patch, tuple):
        padded = len(patch) == 2 and patch[0] == "diff" and len(patch[1]) > 1 and patch[1][1].get("pad_weight")
        return list(patch[1][0].shape) if padded else None
    sizes = (*patch.weights, None)[5] if getattr(patch, "name", None) == "lora" else None
    return sizes if sizes is None or isinstance(sizes, list) else [sizes]


def narrowed(shape: Shape, span: Span) -> Shape:
    """The shape of the slice of a weight that `span` names."""
    return shape if span is None else (*shape[:span[0]], span[2], *shape[span[0] + 1:])


def named(shape: Sequence[int]) -> str:
    """A shape as messages write it."""
    return "x".join(map(str, shape)) or "one number"


def named_type(dtype: torch.dtype) -> str:
    """A dtype as messages write it."""
    return str(dtype).removeprefix("torch.")


def is_old_glora(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor, shape: Shape) -> bool | None:
    """Whether a GLoRA is of the first LyCORIS releases, whose factors stand the other way round; None: neither."""
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if new:
        return old and a2.shape[0] == shape[0] == shape[1]
    return old or None


# --- the kinds ------------------------------------------------------------------------------------------------------


def _lora(values, shape: Shape) -> None:
    up, down, alpha, mid, magnitude = values[:5]
    if down.ndim < 2 or up.ndim < 2:
        problem = f"the factors are of {named(up.shape)} and {named(down.shape)}"
        raise _stops(problem) if mid is not None or (down.ndim == 0 and alpha is not None) else Torn(problem)
    rank, width = down.shape[0], down[0].numel() if down.shape[0] else math.prod(down.shape[1:])
    if mid is not None:
        if mid.ndim != 4 or tuple(mid.shape[:2]) != (rank, rank) or width != down.shape[1]:
            raise _stops(f"a core of {named(mid.shape)} between factors of {named(up.shape)} and {named(down.shape)}")
        width *= mid.shape[2:].numel()
    if up.shape[1:].numel() != rank:
        raise Torn(f"lora_up is of rank {up.shape[1:].numel()}, lora_down of rank {rank}")
    if up.shape[0] != shape[0] or up.shape[0] * width != math.prod(shape):
        raise Misfit(f"the file's delta is of {up.shape[0]}x{width}, the layer's weight of {named(shape)}")
    if rank == 0 and magnitude is not None and alpha is not None:
        raise _stops("DoRA of rank 0")
    _magnitude(magnitude, shape)


def _matrix(a: Tensor | None, b: Tensor | None, core: Tensor | None, what: str) -> Shape:
    """The shape of a @ b, or of what is rebuilt from Tucker factors."""
    if a is None or b is None:
        raise _stops(f"one of {what}_a and {what}_b is missing")
    if a.ndim != 2 or b.ndim != 2:
        raise _stops(f"{what} is made of factors of {named(a.shape)} and {named(b.shape)}")
    if core is None:
        if a.shape[1] != b.shape[0]:
            raise _stops(f"{what}_a is of rank {a.shape[1]}, {what}_b of rank {b.shape[0]}")
        return (a.shape[0], b.shape[1])
    if core.ndim != 4 or tuple(core.shape[:2]) != (a.shape[0], b.shape[0]):
        raise _stops(f"{what} has a core of {named(core.shape)} between factors of {named(a.shape)} and "
                     f"{named(b.shape)}")
    return (a.shape[1], b.shape[1], *core.shape[2:])


def _loha(values, shape: Shape) -> None:
    w1_a, w1_b, alpha, w2_a, w2_b, t1, t2, magnitude = values
    first, second = _matrix(w1_a, w1_b, t1, "hada_w1"), _matrix(w2_a, w2_b, t2, "hada_w2")
    _rank(alpha, w1_b.shape[0])
    if first != second:
        raise Torn(f"the halves of a LoHa are of {named(first)} and {named(second)}")
    _entries(math.prod(first), shape)
    _magnitude(magnitude, shape)


def _lokr(values, shape: Shape) -> None:
    w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, magnitude = values
    small = _matrix(w1_a, w1_b, None, "lokr_w1") if w1 is None else tuple(w1.shape)
    large = _matrix(w2_a, w2_b, t2, "lokr_w2") if w2 is None else tuple(w2.shape)
    if len(small) != 2 or len(large) < 2:
        raise _stops(f"the factors of a LoKr are of {named(small)} and {named(large)}")
    if len(large) not in (2, 4, len(shape)):
        raise Torn(f"the factors of a LoKr are of {named(small)} and {named(large)}")
    _rank(alpha, *([w1_b.shape[0]] if w1 is None else []), *([w2_b.shape[0]] if w2 is None else []))
    _entries(math.prod(small) * math.prod(large), shape)
    _magnitude(magnitude, shape)


def _glora(values, shape: Shape) -> None:
    a1, a2, b1, b2, alpha, magnitude = values
    if min(t.ndim for t in (a1, a2, b1, b2)) < 2 or len(shape) < 2:
        raise _stops("the factors of a GLoRA are no matrices")
    torn = f"the factors of a GLoRA are of {', '.join(named(t.shape) for t in (a1, a2, b1, b2))}"
    old = is_old_glora(a1, a2, b1, b2, shape)
    if old is None:
        raise Torn(torn) if alpha is None else _stops(torn)
    _rank(alpha, a1.shape[0] if old else a2.shape[0])
    a1, a2, b1, b2 = (t.flatten(1).shape for t in (a1, a2, b1, b2))
    tall, low, up, down = (a2, a1, b2, b1) if old else (a1, a2, b1, b2)
    inputs = math.prod(shape[1:]) if old else shape[1]
    if tall[1] != low[0] or up[1] != down[0]:
        raise Torn(torn)
    if tall[0] != inputs or low[1] != inputs or up[0] != shape[0] or up[0] * down[1] != math.prod(shape):
        raise Misfit(f"{torn}, the layer's weight of {named(shape)}")
    _magnitude(magnitude, shape)


def _oft(values, shape: Shape) -> None:
    blocks = values[0]
    _square(blocks)
    if blocks.shape[0] * blocks.shape[-1] != shape[0]:
        raise Misfit(f"rotations of {blocks.shape[0] * blocks.shape[-1]} channels for {shape[0]}")
    _magnitude(values[3], shape)


def _boft(values, shape: Shape) -> None:
    blocks, rescale, alpha, magnitude = values
    stages, count, size = blocks.shape[:3]
    _square(blocks)
    if alpha is None:
        raise Torn("a BOFT without alpha")
    if count * size != shape[0]:
        raise Misfit(f"rotations of {count * size} channels for {shape[0]}")
    if size < 2 or shape[0] % (2**stages * (size // 2)):
        raise Misfit(f"{stages} stages of rotations of {size} channels for {shape[0]}")
    if rescale is not None and tuple(rescale.shape) != (shape[0], *[1] * (len(shape) - 1)):
        raise Misfit(f"a rescale of {named(rescale.shape)} for a weight of {named(shape)}")
    _magnitude(magnitude, shape)


def _diff(values, shape: Shape) -> None:
    if tuple(values[0].shape) != tuple(shape):
        raise Misfit(f"a difference of shape {tuple(values[0].shape)} for a weight of shape {tuple(shape)}")


def _set(values, shape: Shape) -> None:
    given = tuple(values[0].shape)
    if given != tuple(shape)[len(shape) - len(given):] or values[0].numel() != math.prod(shape):
        raise Broken(f"does not fit this model: it replaces a weight of {named(shape)} by one of "
                     f"{named(given)}. Use it with the model that it was made for")


_CHECKS = {"lora": _lora, "loha": _loha, "lokr": _lokr, "glora": _glora, "oft": _oft, "boft": _boft, "diff": _diff,
           "set": _set}


def _stops(reason: str) -> Broken:
    """What the host's loader stops at."""
    return Broken(f"is damaged: {reason}. Use another version")


def _rank(alpha: float | None, *ranks: int) -> None:
    if alpha is not None and 0 in ranks:
        raise _stops("a layer of rank 0")


def _entries(count: int, shape: Shape) -> None:
    if count != math.prod(shape):
        raise Misfit(f"the file's delta has {count} entries, the layer's weight {named(shape)}")


def _square(blocks: Tensor) -> None:
    if blocks.shape[-1] != blocks.shape[-2]:
        raise Torn(f"rotations of {named(blocks.shape)} that are not square")


def _magnitude(magnitude: Tensor | None, shape: Shape) -> None:
    """One per output, one per input or one for all; what else the host's arithmetic would spread over the weight."""
    if magnitude is None:
        return
    ones = [1] * (len(shape) - 1)
    allowed = [(shape[0], *ones)] if len(shape) == 1 else [(shape[0], *ones), (1, shape[1], *ones[1:])]
    if tuple(magnitude.shape) in allowed or (len(shape) > 1 and magnitude.ndim > 0 and magnitude.numel() == 1):
        return
    raise Torn(f"a dora_scale of {named(magnitude.shape)} for a weight of {named(shape)}")
