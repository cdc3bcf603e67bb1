"""One bank for all nodes that put the same LoRA files on the same kind of model.

A bank knows nothing of strengths: those are the gains of branches. So it is made once for the files, the layers that
they meet and the dtype, and a node that runs again with another strength, or another node with the same files, takes
the one that there is. What the files had to say when they were read is kept with it.

It lives as long as a MODEL uses it. ComfyUI drops a node's old output before the node runs again, so for each base
model the banks used last are held on to, until the base model itself is gone.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary, WeakValueDictionary

import comfy.model_patcher
import torch
from torch import nn

from ...engine.bank import Bank

KEPT = 2
"""Banks that are held for a base model though no MODEL may use them."""
KEPT_BYTES = 2**30
"""Of them together with their notes; the last one is held whatever its size."""
NOTES = "lora_ensemble_notes"

Patcher = comfy.model_patcher.ModelPatcher
_known: WeakValueDictionary[Hashable, Patcher] = WeakValueDictionary()
_recent: WeakKeyDictionary[nn.Module, OrderedDict[Hashable, Patcher]] = WeakKeyDictionary()
_converted: WeakKeyDictionary[nn.Module, dict[torch.dtype, Patcher]] = WeakKeyDictionary()


def shared_bank(model: Patcher, facts: Hashable, dtype: torch.dtype, make: Callable[[], tuple[Bank, object, int]]
                ) -> tuple[Patcher, object]:
    """The bank of `facts` (what was read, and how) over the layers of a MODEL, as a model of its own, and the notes
    that were made with it.

    make   () -> (bank, notes, bytes of tensors in the notes), called where there is none yet. Notes must hold nothing
           that leads to the MODEL
    The patcher belongs to all who ask for it: put a clone of it on a MODEL. Clones are one model to the host, which
    loads and counts it once.
    """
    devices = model.load_device, model.offload_device
    key = facts, layers_of(model.model), dtype, devices
    patcher = _known.get(key)
    if patcher is None:
        bank, *notes = make()
        patcher = _known[key] = bank_patcher(bank, *devices)
        patcher.set_attachments(NOTES, notes)
    _hold(model.model, key, patcher)
    return patcher, patcher.get_attachment(NOTES)[0]


def layers_of(model: nn.Module) -> Hashable:
    """What decides how a LoRA file fits a model: its kind, and name, class and sizes of all its layers. Values of
    weights are not looked at."""
    return tuple([_described(name, module) for name, module in model.named_modules()])


_SIZES = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation",
          "groups", "transposed", "padding_mode", "num_channels", "num_groups", "normalized_shape")


def _described(name: str, module: nn.Module) -> tuple:
    """Classes by their names: the host makes some anew for every model."""
    kind, own = type(module), vars(module)
    sizes = tuple([own[size] for size in _SIZES if size in own])
    leaves = tuple([leaf for leaf, value in module._parameters.items() if value is not None])
    return name, kind.__module__, kind.__qualname__, sizes, leaves


def forget() -> None:
    """Hold on to no bank; those that a MODEL uses stay known to no one but it."""
    _known.clear()
    _recent.clear()


def _hold(base: nn.Module, key: Hashable, patcher: Patcher) -> None:
    recent = _recent.setdefault(base, OrderedDict())
    recent[key] = patcher
    recent.move_to_end(key)
    while len(recent) > 1 and (len(recent) > KEPT or sum(map(_nbytes, recent.values())) > KEPT_BYTES):
        recent.popitem(last=False)


def kept_bytes() -> int:
    """Of the banks and their notes that are held though no MODEL may use them."""
    held = {id(patcher): patcher for recent in _recent.values() for patcher in recent.values()}
    return sum(map(_nbytes, held.values()))


def _nbytes(patcher: Patcher) -> int:
    others = sum(other.model.nbytes() for other in _converted.get(patcher.model, {}).values())
    return patcher.model.nbytes() + others + patcher.get_attachment(NOTES)[1]


def compute_dtype(model: Patcher) -> torch.dtype:
    """The dtype that a MODEL's layers compute in, as nodes before have set it."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


@contextmanager
def as_computed(model: Patcher, key: str) -> Iterator[None]:
    """While open, the banks below a key of a MODEL are in the dtype that it computes in, for the host to load and
    count: a node behind the methods may have set another one, and the copies that a run makes for itself are in no
    books. Made once, and kept for as long as the bank."""
    own, dtype = list(model.get_additional_models_with_key(key)), compute_dtype(model)
    if not own or model.get_additional_models_with_key("multigpu"):  # whose cards have copies of these
        yield
        return
    model.set_additional_models(key, [_in_dtype(patcher, dtype) for patcher in own])
    try:
        yield
    finally:
        model.set_additional_models(key, own)


def _in_dtype(patcher: Patcher, dtype: torch.dtype) -> Patcher:
    bank = patcher.model
    if bank.dtype in (None, dtype):
        return patcher
    known = _converted.setdefault(bank, {})
    if dtype not in known:
        devices = patcher.load_device, patcher.offload_device
        known[dtype] = bank_patcher(bank.in_dtype(dtype, patcher.offload_device), *devices)
    return known[dtype].clone()


def bank_patcher(bank: Bank, load_device, offload_device, disable_dynamic: bool = False) -> Patcher:
    """The bank as a model of its own, so that the host loads it beside the base, counts it and frees it.

    `cached_patcher_init` lets the host make the copies that it keeps on further devices.
    """
    kind = Patcher
    if not disable_dynamic:
        kind = getattr(comfy.model_patcher, "CoreModelPatcher", kind)
    # Never of size 0: the host's dynamic memory cannot reserve nothing, and a bank may hold no LoRA that acts.
    patcher = kind(bank, load_device=load_device, offload_device=offload_device, size=max(bank.nbytes(), 1))
    patcher.cached_patcher_init = (_copied_bank_patcher, (bank, load_device, offload_device))
    return patcher


def _copied_bank_patcher(bank: Bank, load_device, offload_device, disable_dynamic: bool = False) -> Patcher:
    return bank_patcher(copy.deepcopy(bank), load_device, offload_device, disable_dynamic)
