"""What ComfyUI's own loader makes of a LoRA file for one model, layer by layer, and whether that fits.

The loader maps file keys to weights for every model family and file format it knows.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import comfy.lora
from torch import Tensor, nn

from ...engine.adapters import Span
from ...engine.geometry import geometry_of, layer_of
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
    narrowed,
    plain_magnitude,
    scales,
)
from .formats import HEAD, with_aliases


@dataclass
class Patches:
    """What a file does to one model, as the host's own loader reads it.

    found     loader key -> the loader's patch, for all that it applies without an error
    misfits   (loader key, why) for what it leaves out with a line in its log
    used      keys of the file that stand for one of these
    unread    a key of a layer of the model of whose tensors the loader makes nothing; empty: there is none
    enlarged  loader key -> the shape of a weight that becomes larger
    hollow    loader keys of adapters of which every number is 0
    """

    found: dict = field(default_factory=dict)
    misfits: list[tuple[object, Misfit]] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    unread: str = ""
    enlarged: dict[str, Shape] = field(default_factory=dict)
    hollow: list = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Of the tensors of all patches."""
        return sum(tensor.nbytes for patch in self.found.values() for tensor in _values(patch))


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
                if acts and _hollow(file, used, patch):
                    patches.hollow.append(place)
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


def _hollow(file: LoRAFile, used: Collection[str], patch) -> bool:
    """Whether an adapter holds zeros alone. An untrained one has other numbers in one of its factors; a difference of 0
    is what it is."""
    return not isinstance(patch, tuple) and not any(file.peak(key) for key in used if not key.endswith(".alpha"))


def _values(patch) -> Iterator[Tensor]:
    values = patch[1] if isinstance(patch, tuple) else patch.weights
    return (value for value in values if isinstance(value, Tensor))


def shape_of(root: nn.Module, key: str) -> Shape | None:
    """The shape of a model's weight; None where the model has no weight of this name."""
    layer, _, leaf = key.rpartition(".")
    module = layer_of(root, layer)
    tensor = getattr(module, leaf, None)
    if tensor is None:
        return None
    # By the layer's own description where there is one: the tensor may be packed.
    return weight_shape(module) if leaf == "weight" and geometry_of(module) else tuple(tensor.shape)


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of a layer's weight by the layer's own description: the tensor may be packed or elsewhere."""
    if hasattr(module, "in_features"):
        return (module.out_features, module.in_features)
    if hasattr(module, "kernel_size"):
        return (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    return (module.num_channels,) if hasattr(module, "num_channels") else tuple(module.normalized_shape)
