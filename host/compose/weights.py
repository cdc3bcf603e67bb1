"""Weights that are read, scaled or trained after a method was put on a MODEL: merges, differences, saves.

A method's LoRAs act beside the weights, where nothing that reads these finds them. Those of a plain merge can be told
from the outside: they are put into the weights of the copy that is read, as ComfyUI's own loader would have done. Those
of other methods are in no weights at all, which is said: by an error where a file or another model would lack them, by
a line in the run's record where they act on at full strength beside weights that were scaled.

ComfyUI asks a MODEL for its weights by methods of its class, which may be another pack's: a MODEL with methods on it,
and its copies, are of a class below that one.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

import comfy.model_management
from torch import nn

from ...methods.merge import Merge
from ..files.called import file_of
from ..files.ensemble import LoRASpec
from .applied import Applied
from .composition import KEY, Composition
from .loading import load_ensemble

log = logging.getLogger("lora_ensemble")
SCALED = ("the weights were merged with another model's or scaled behind this method: its LoRAs act at full strength "
          "beside them. Merge the models first, and put the LoRAs on the result")


def follow_weights(model) -> None:
    """Have a MODEL with methods on it, and its copies, tell the truth about their weights."""
    if not isinstance(model, _Followed):
        model.__class__ = _followed(type(model))


@functools.cache
def _followed(kind: type) -> type:
    saving = _Saved if hasattr(kind, "state_dict_for_saving") else _LoadedToSave
    return type(kind.__name__, (saving, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


class _Followed:
    """What a ModelPatcher answers when others take its weights."""

    def clone(self, *arguments, **named):
        copy = super().clone(*arguments, **named)
        if copy.get_attachment(KEY) is not None:
            follow_weights(copy)  # classes of other packs set that of their copies
        return copy

    def get_key_patches(self, filter_prefix=None):
        """What other models are merged with."""
        whole = _whole(self)
        return super().get_key_patches(filter_prefix) if whole is self else whole.get_key_patches(filter_prefix)

    def add_patches(self, patches, strength_patch=1.0, strength_model=1.0):
        """Another model's weights, or a scale on those that are there, also concern the LoRAs before them. A difference
        of models is made for its weights alone: to extract a LoRA, or to add it to a third one."""
        models = _composes(self) and any(map(_is_a_models, patches.values()))
        if models and strength_patch == -strength_model:
            _all_into_weights(self)
        elif models or (_composes(self) and strength_model != 1.0):
            put_into_weights(self)
            composition = self.get_attachment(KEY)
            if composition is not None and composition.applied and SCALED not in composition.applied[-1].problems:
                last = composition.applied[-1]
                log.warning("%s: %s", _named([last]), SCALED)
                said = replace(last, problems=(*last.problems, SCALED))
                self.set_attachments(KEY, Composition((*composition.applied[:-1], said), composition.cache))
        return super().add_patches(patches, strength_patch, strength_model)

    def add_weight_wrapper(self, name, function):
        """What is to be trained (Train LoRA) learns beside what is in the weights: torch takes no gradients through
        tensors that nodes have made, nor does the host's gradient checkpointing know of a run that is over."""
        if self.get_attachment(KEY) is not None and _learns(function):
            put_into_weights(self)
            if (left := self.get_attachment(KEY)) is not None:
                raise ValueError(f"{_named(left.applied) or 'Branch Cache'}: nothing can be trained through it (Train "
                                 "LoRA). Connect the MODEL from before that node, or use Merge LoRAs without masks.")
        return super().add_weight_wrapper(name, function)


class _Saved(_Followed):
    """One that makes the tensors of a file itself."""

    def state_dict_for_saving(self, *parts, **named):
        whole = _whole(self)
        if whole is self:
            return super().state_dict_for_saving(*parts, **named)
        comfy.model_management.load_models_gpu([whole])
        return whole.state_dict_for_saving(*parts, **named)


class _LoadedToSave(_Followed):
    """ComfyUI 0.3.64 reads what it saves from the module itself, after it has loaded the weights with all patches."""

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        if force_patch_weights and _composes(self):
            raise ValueError(f"{_named(self.get_attachment(KEY).applied)}: this version of ComfyUI would save or "
                             "extract the weights without the LoRAs, which act beside them. Use Merge LoRAs in mode "
                             "'baked', or a newer ComfyUI.")
        return super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights)


def _is_a_models(patch: object) -> bool:
    """Whether a patch is what `get_key_patches` gives: a weight with its converter, and the patches on it."""
    return isinstance(patch, list) and bool(patch) and isinstance(patch[0], tuple) and len(patch[0]) == 2


def _learns(function) -> bool:
    """Whether a weight's wrapper is trained; others change weights for a while."""
    return isinstance(function, nn.Module) and any(each.requires_grad for each in function.parameters())


def _composes(model) -> bool:
    """Whether there are LoRAs beside the weights. Not while a run of them samples: then it is the host that asks, for
    the hooks of its own on this run's model."""
    composition = model.get_attachment(KEY)
    return composition is not None and bool(composition.applied) and not composition.runs


def _whole(model):
    """A MODEL whose weights hold all that acts; the MODEL itself where nothing acts beside them. Raises ValueError."""
    if not _composes(model):
        return model
    whole = model.clone()
    _all_into_weights(whole)
    return whole


def _all_into_weights(model) -> None:
    """`put_into_weights`, where then nothing acts beside them. Raises ValueError where something does."""
    put_into_weights(model)
    composition = model.get_attachment(KEY)
    if composition is not None and composition.applied:
        raise ValueError(f"{_named(composition.applied)}: its LoRAs change from step to step or from place to place, "
                         "so no weights hold what they do: a merge, a difference or a file made of this MODEL would be "
                         "without them. Connect the MODEL from before that node, or use Merge LoRAs without masks.")


def put_into_weights(model) -> None:
    """In place: the LoRAs of plain merges go from beside the weights into them, as patches of the host.

    Raises ValueError where their files can no longer be read.
    """
    composition = model.get_attachment(KEY)
    plain = [each for each in composition.applied if _is_plain(each)]
    if not plain:
        return
    bare = model.clone()
    bare.set_additional_models(KEY, [])
    for each in plain:
        specs = tuple(LoRASpec(file_of(name), strength, 0.0)
                      for name, strength in zip(each.names, each.method.strengths, strict=True) if strength) \
            if each.names else ()
        for lora in load_ensemble(bare, None, specs, "Merge LoRAs", on_weights=True).loras if specs else ():
            already = {key for key, _ in lora.parsed.left_out}  # no forward can express them: they are there
            found = {key: patch for key, patch in lora.patches.found.items() if key not in already}
            model.add_patches(found, lora.spec.strength_model)
    rest = tuple(each for each in composition.applied if not _is_plain(each))
    if rest or composition.cache is not None:
        model.set_attachments(KEY, Composition(rest, composition.cache))
    else:
        model.remove_attachments(KEY)
    if not rest:
        model.set_additional_models(KEY, [])
    log.info("Merge LoRAs: put into the weights, which another node reads: %s",
             ", ".join(name for each in plain for name in each.names))


def _is_plain(each: Applied) -> bool:
    """Whether its LoRAs act alike at all steps and places; so do none."""
    return not each.names or isinstance(each.method, Merge) and each.routed is None and not each.windows \
        and all(mask is None for mask in each.masks)


def _named(applied) -> str:
    return ", ".join(each.title for each in applied)
