"""Apply an ensemble to a MODEL and a CLIP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import comfy.lora
import torch

from ..engine.bank import Bank
from ..methods import Method
from .banks import layers_of, shared_bank
from .cache import CacheSpec
from .composition import KEY, Applied, Composition
from .ensemble import Ensemble, LoRASpec
from .files import LoRAFileError, fingerprint, read
from .parse import ParsedLoRA, parse
from .wrappers import install_wrappers

TEXT_ENCODER = ("lora_te", "text_encoder", "clip_")  # how keys of text encoders begin
log = logging.getLogger("lora_ensemble")


@dataclass(frozen=True)
class Active:
    """The LoRAs that take part in a composition, those with a model strength and a change of the model: what a method
    is made from.

    specs      as the user listed them
    bank       what each of them does to each layer, in the same order
    model      the MODEL they act on
    problems   what cannot be done as asked; a method may add to it, each line is logged and recorded once
    """

    specs: tuple[LoRASpec, ...]
    bank: Bank
    model: object
    problems: list[str] = field(default_factory=list)

    @property
    def strengths(self) -> tuple[float, ...]:
        return tuple(spec.strength_model for spec in self.specs)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(spec.role for spec in self.specs)


def apply_method(model, clip, ensemble: Ensemble, make: Callable[[Active], Method], node: str,
                 rest_on_weights: bool = False):
    """A MODEL that composes the ensemble's LoRAs as a method says, and a CLIP with their text-encoder deltas merged.

    make              builds the method for the LoRAs that take part
    node              display name of the node, for messages
    rest_on_weights   what no forward can express goes into the weights through the host's own patches; right only for
                      a method whose single branch never changes
    Raises ValueError for an empty ensemble and LoRAFileError for files that cannot be used with this model.
    """
    active, parsed, shared = _shared(model, clip, ensemble, node)
    _say_without_effect(active, ensemble, node)
    new_model, bank, problems = model.clone(), shared.model, []
    for spec, lora in zip(active, parsed, strict=True):
        rest = {key: lora.patches[key] for key, _ in lora.left_out} if rest_on_weights else {}
        problems += _problems(spec, lora, new_model.add_patches(rest, spec.strength_model) if rest else [])
    method = make(Active(tuple(active), bank, model, problems))
    masked = [spec.name for spec in active if spec.mask is not None]
    if masked and not getattr(method, "uses_masks", False):
        problems.append(f"the mask of LoRA '{masked[0]}' is not used: this method cannot confine a LoRA to a region")
    for problem in problems:
        log.warning("%s: %s", node, problem)
    before = model.get_attachment(KEY)
    masks = tuple(spec.mask.tensor if spec.mask is not None else None for spec in active)
    # Methods in a row may have one bank: it is on the MODEL once, or the host would load and count it twice.
    banks = list(new_model.get_additional_models_with_key(KEY))
    place = next((k for k, other in enumerate(banks) if other.model is bank), len(banks))
    new_model.set_additional_models(KEY, banks if place < len(banks) else [*banks, shared.clone()])
    applied = (*(before.applied if before is not None else ()),
               Applied(method, bank.names, tuple(problems), masks, place))
    new_model.set_attachments(KEY, Composition(applied, before.cache if before is not None else None))
    install_wrappers(new_model)
    return new_model, merge_clip(clip, ensemble)


def bake(model, clip, ensemble: Ensemble, node: str):
    """The ordinary merge through the host's own weight patches: what a chain of its LoRA loaders does."""
    _some(ensemble, node)
    active, parsed = _parse_all(model, clip, ensemble, node)
    _say_without_effect(active, ensemble, node)
    new_model = model.clone()
    for spec, lora in zip(active, parsed, strict=True):
        new_model.add_patches(lora.patches, spec.strength_model)
    return new_model, merge_clip(clip, ensemble)


def with_cache(model, spec: CacheSpec):
    """A MODEL whose branches reuse deep features as `spec` says, in place of what it said before; with or without
    methods on it."""
    before = model.get_attachment(KEY)
    new_model = model.clone()
    new_model.set_attachments(KEY, Composition(before.applied if before is not None else (), spec))
    install_wrappers(new_model)
    return new_model


def merge_clip(clip, ensemble: Ensemble):
    """The CLIP with every LoRA's text-encoder delta at its clip strength; None stays None."""
    if clip is None:
        return None
    key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    new_clip = clip.clone()
    for spec in ensemble:
        if spec.strength_clip != 0:
            new_clip.add_patches(comfy.lora.load_lora(read(spec.name), key_map, log_missing=False), spec.strength_clip)
    return new_clip


def compute_dtype(model) -> torch.dtype:
    """The dtype that a MODEL's layers compute in, as nodes before have set it."""
    return model.get_model_object("manual_cast_dtype") or model.model.get_dtype()


def _shared(model, clip, ensemble: Ensemble, node: str) -> tuple[list[LoRASpec], tuple[ParsedLoRA, ...], object]:
    """(the LoRAs that take part, what was made of their files, the bank as a model of its own): as `_parse_all` and a
    new bank would give them, but read and built only where no node has done so. What is kept of the files has no
    tensors but those that the bank lacks."""
    _some(ensemble, node)
    used = [spec for spec in ensemble if spec.strength_model != 0 or spec.strength_clip != 0]

    def make() -> tuple[Bank, tuple]:
        active, parsed = _parse_all(model, clip, ensemble, node)
        bank = Bank([lora.layers for lora in parsed], tuple(spec.name for spec in active), compute_dtype(model))
        places = tuple(k for k, spec in enumerate(used) if any(spec is one for one in active))
        return bank, (places, tuple(
            replace(lora, layers={}, patches={key: lora.patches[key] for key, _ in lora.left_out}) for lora in parsed))

    shared, (places, parsed) = shared_bank(model, _facts(clip, used), compute_dtype(model), make)
    return [used[k] for k in places], parsed, shared


def _facts(clip, used: list[LoRASpec]) -> Hashable:
    """What `_parse_all` goes by besides the model: the files, whether a LoRA is to act on the model at all, and what
    the text encoder has a place for."""
    files = tuple((spec.name, fingerprint(spec.name), spec.strength_model != 0) for spec in used)
    return files, None if clip is None else layers_of(clip.cond_stage_model)


def _some(ensemble: Ensemble, node: str) -> None:
    if not ensemble:
        raise ValueError(f"{node}: the ensemble is empty. Connect at least one 'LoRA (Ensemble)' node to it.")


def _say_without_effect(active: list[LoRASpec], ensemble: Ensemble, node: str) -> None:
    for spec in ensemble:
        if spec.strength_model != 0 and not any(spec is one for one in active):
            log.info("%s: LoRA '%s' changes the text encoder alone, so it takes no part in the composition", node,
                     spec.name)


def _parse_all(model, clip, ensemble: Ensemble, node: str) -> tuple[list[LoRASpec], list[ParsedLoRA]]:
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    clip_keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}) if clip is not None else {}
    active, parsed = [], []
    for spec in ensemble:
        if spec.strength_model == 0 and spec.strength_clip == 0:
            continue
        tensors = read(spec.name)
        lora = parse(tensors, key_map, model.model)
        lora.unused = _unplaced(lora, clip_keys, clip is not None)
        wrong = _wrong_kind(lora, tensors, clip_keys, clip is not None)
        if wrong:
            raise LoRAFileError(f"{node}: LoRA '{spec.name}' {wrong}, or remove it from the ensemble. The model is of "
                                f"the kind {type(model.model).__name__}.")
        if spec.strength_model != 0 and lora.patches:
            active.append(spec)
            parsed.append(lora)
    return active, parsed


def _unplaced(lora: ParsedLoRA, clip_keys: dict, has_clip: bool) -> list[str]:
    """File keys that neither the diffusion model nor the text encoder has a place for."""
    text_encoder = tuple(clip_keys) if has_clip else TEXT_ENCODER
    return [key for key in lora.unused if not key.startswith(text_encoder)]


def _wrong_kind(lora: ParsedLoRA, tensors: dict, clip_keys: dict, has_clip: bool) -> str | None:
    """Why a file cannot be meant for this model, and what to do; None for all that acts at all.

    Stable Diffusion 1.5 and SDXL share the names of many layers: there a file for the other one is known by layers of
    another shape, with less than half of it in its place.
    """
    other = "It was made for another architecture; use it with a checkpoint of that kind"
    if lora.patches:
        in_place = (1 - len(lora.misfits) / len(lora.patches)) * (1 - len(lora.unused) / len(tensors))
        if not lora.misfits or in_place >= 0.5:
            return None
        key, reason = lora.misfits[0]
        return (f"does not fit this model: {len(lora.misfits)} of its layers have another shape here, such as {key}: "
                f"{reason}; {len(lora.unused)} of its {len(tensors)} keys have no place. {other}")
    if clip_keys and comfy.lora.load_lora(tensors, clip_keys, log_missing=False):
        return None
    if not has_clip and all(key.startswith(TEXT_ENCODER) for key in tensors):
        return "changes the text encoder alone, and none is connected. Connect a CLIP if the node takes one"
    return (f"matches no layer of this model: none of its {len(tensors)} keys, '{next(iter(tensors))}' for one. "
            f"{other}")


def _problems(spec: LoRASpec, lora: ParsedLoRA, on_weights: list) -> list[str]:
    """One line per kind of trouble, with a count, an example and what was done; `on_weights` are the keys that went
    into the weights."""
    out = []
    by_reason: dict[str, list] = {}
    for key, reason in lora.left_out:
        done = "left out (Merge in mode 'baked' can apply it)"
        if key in on_weights:
            done = "merged into the weight instead"
        by_reason.setdefault(f"{reason}; {done}", []).append(key)
    for key, reason in lora.misfits:
        by_reason.setdefault(f"{reason}; left out", []).append(key)
    for reason, keys in by_reason.items():
        out.append(f"LoRA '{spec.name}': {len(keys)} keys such as {keys[0]}: {reason}")
    if lora.unused:
        out.append(f"LoRA '{spec.name}': {len(lora.unused)} keys have no place in this model, '{lora.unused[0]}' for "
                   "one")
    return out
