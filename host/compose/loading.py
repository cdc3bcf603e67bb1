"""The files of an ensemble, read and checked for one MODEL and CLIP, before anything of them is applied.

What cannot be used is refused with a ValueError that names the file, what it is, and what to do. What the host's own
loader would leave out of a file is left out as well, and named in one line per kind of trouble.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

import comfy.lora
import comfy.model_management
from torch import nn

from ...methods.counted import counted, verb
from ..files.ensemble import ALWAYS, Ensemble, LoRASpec
from ..files.files import LoRAFile, fingerprint, path_of, read
from ..files.fit import Broken, Misfit, Shape, Torn, named, reshape_of
from ..files.formats import host_names, lora_format, other_kind
from ..files.metadata import header_of
from ..files.parse import PREFIX, ParsedLoRA, parse
from ..files.patches import Patches, load, shape_of
from .banks import layers_of
from .composition import KEY

TEXT_ENCODER = ("lora_te", "lora_prior_te_", "text_encoder", "clip_")  # how keys of text encoders begin


def changes_text(name: str) -> bool:
    """Whether a LoRA file has a part for a text encoder; only its header is read. Raises ValueError for a name that is
    in none of the `loras` folders."""
    header = header_of(path_of(name))
    return isinstance(header, dict) and any(key.startswith(TEXT_ENCODER) for key in header)


class LoadedLoRA(NamedTuple):
    """One LoRA that changes the diffusion model.

    patches   the host's patches, for its weights
    parsed    the same as ops; of what no forward can express, why
    """

    spec: LoRASpec
    patches: Patches
    parsed: ParsedLoRA


class LoadedEnsemble(NamedTuple):
    """What an ensemble's files do to a MODEL and a CLIP.

    loras      the LoRAs that change the diffusion model, as the user listed them
    texts      (LoRA, what it does to the text encoder), for those with a strength there
    problems   what is left out of a file, whatever the method
    """

    loras: list[LoadedLoRA]
    texts: list[tuple[LoRASpec, Patches]]
    problems: list[str]


def load_ensemble(model, clip, ensemble: Ensemble, node: str, on_weights: bool) -> LoadedEnsemble:
    """Read all files of an ensemble for a MODEL and a CLIP or None.

    node         display name of the node, for messages
    on_weights   whether what no forward can express goes into the weights, in the order of the ensemble: a LoRA that
                 enlarges a layer does so for the LoRAs behind it. Of LoRAs that are always on it does in any case
    Raises ValueError for an empty ensemble and for files that cannot be used with this model. The user can interrupt it
    between files.
    """
    check_some(ensemble, node)
    base = model.model
    model_keys = host_names(base)
    clip_keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}) if clip is not None else {}
    enlarged, found, texts, problems = dict(_enlarged_before(model)), [], [], []
    for spec in ensemble:
        if not spec.acts:
            continue
        comfy.model_management.throw_exception_if_processing_interrupted()
        file = read(spec.name, base)
        try:
            patches = load(file, model_keys, base, enlarged, spec.strength_model != 0)
            text = Patches() if clip is None else load(file, clip_keys, clip.cond_stage_model, {},
                                                       spec.strength_clip != 0)
            lasting = on_its_weights(spec, on_weights)
            _check_enlarged(model, patches, text, lasting)
        except Broken as reason:
            raise ValueError(f"{node}: LoRA '{spec.name}' {reason}, or remove it from the ensemble.") from None
        unused = _unused(file, patches, text, clip is not None)
        wrong = _wrong_kind(file, patches, text, unused, base, clip is not None)
        if wrong:
            raise ValueError(f"{node}: LoRA '{spec.name}' {wrong}, or remove it from the ensemble.")
        if spec.strength_model != 0 and patches.found:
            found.append((spec, patches))
            if lasting:
                enlarged |= patches.enlarged
        if spec.strength_clip != 0:
            texts.append((spec, text))
        applied = [part for part, strength in ((patches, spec.strength_model), (text, spec.strength_clip)) if strength]
        if clip is None and spec.strength_clip != 0:
            problems += _without_clip(spec, [key for key in file if key not in patches.used])
        problems += _problems(spec, [misfit for part in applied for misfit in part.misfits], unused, len(file))
        problems += _lines(spec, [(key, "zeros alone, as where a download was cut short") for part in applied
                                  for key in part.hollow], "they do nothing")
    loras = [LoadedLoRA(spec, patches, parse(patches, base, enlarged)) for spec, patches in found]
    return LoadedEnsemble(loras, texts, problems)


def on_its_weights(spec: LoRASpec, on_weights: bool) -> bool:
    """Whether what no forward can express of a LoRA goes into the weights, which follow no window in time."""
    return (on_weights or spec.role == ALWAYS) and spec.window.whole


def check_some(ensemble: Ensemble, node: str) -> None:
    """Raises ValueError for an empty ensemble."""
    if not ensemble:
        raise ValueError(f"{node}: the ensemble is empty. Connect at least one 'LoRA (Ensemble)' node to it, or switch "
                         "on a LoRA of the stack that it comes from. The node 'LoRA Ensemble' takes an empty stack, "
                         "too, and hands the model on as it is.")


def facts_of(model, clip, specs: Sequence[LoRASpec], on_weights: bool) -> Hashable:
    """What `load_ensemble` goes by besides the layers of the model: equal facts, equal reading."""
    files = tuple((spec.name, fingerprint(spec.name), spec.strength_model != 0, spec.strength_clip != 0,
                   on_its_weights(spec, on_weights)) for spec in specs)
    routed = frozenset(_FIRST_LAYERS) & _routed(model)
    return (files, None if clip is None else layers_of(clip.cond_stage_model), on_weights,
            frozenset(_enlarged_before(model).items()), routed)


def without_effect(loaded: LoadedEnsemble, ensemble: Ensemble, merged: bool) -> list[str]:
    """A line for each LoRA that was to act on the model and changes the text encoder alone, where that is less than was
    asked for: where it has no strength there either, or the method does more than merge."""
    out = []
    for spec in ensemble:
        if spec.strength_model == 0 or any(spec is lora.spec for lora in loaded.loras):
            continue
        if spec.strength_clip == 0:
            out.append(f"LoRA '{spec.called}' does nothing: it changes the text encoder alone, and its strength there "
                       "is 0")
        elif not (merged or spec.role == ALWAYS):
            out.append(f"LoRA '{spec.called}' changes the text encoder alone: it acts there on every prompt, and takes "
                       "no part in the composition")
    return out


def left_out(lora: LoadedLoRA, on_weights: bool) -> list[str]:
    """One line per reason for what no forward can express of a LoRA, with what is done instead."""
    if on_weights:
        done = "merged into the weight instead"
    elif lora.spec.window.whole:
        done = "left out (Merge in mode 'baked' can apply it)"
    else:
        done = "left out, since it could not follow this LoRA's window in time"
    return _lines(lora.spec, lora.parsed.left_out, done)


def otherwise(lora: LoadedLoRA, baked: bool = False) -> list[str]:
    """One line per reason for what a LoRA does otherwise than by ComfyUI's loader; `baked`: than as it was trained."""
    done = "baked in as the loader has them (mode 'runtime' has them as trained)" if baked else "applied as trained"
    return _lines(lora.spec, lora.parsed.otherwise, done)


_FIRST_LAYERS: dict[str, tuple[int, ...] | None] = {
    "diffusion_model.img_in.weight": (2, 6),  # Flux: a picture, or a picture and its mask in full resolution
    "diffusion_model.img_in.proj.weight": None,  # HunyuanVideo
    "diffusion_model.patch_embedding.weight": None,  # Wan
}
"""Weights by whose inputs the host's models see what to give them -> how many times as many they may get; None: any."""


def _check_enlarged(model, patches: Patches, text: Patches, on_weights: bool) -> None:
    """Refuse what would enlarge a layer that then gets inputs of the old size."""
    for key, shape in text.enlarged.items():
        raise Broken(f"would enlarge {key} of the text encoder to {named(shape)}, which nothing can use")
    routed = _routed(model)
    for key, shape in patches.enlarged.items():
        old, times = shape_of(model.model, key), _FIRST_LAYERS.get(key, ())
        inputs_alone = shape[:1] == old[:1] and shape[2:] == old[2:]
        if not inputs_alone or (times is not None and shape[1] not in [n * old[1] for n in times]):
            raise Broken(f"would enlarge {key} from {named(old)} to {named(shape)}, for which this model has no input. "
                         "Use it with the model that it was made for")
        if on_weights and key in routed:
            raise Broken(f"enlarges {key}, on which LoRAs of a node before this one act beside the weight. Move it to "
                         "the first of these nodes")


def _routed(model) -> set[str]:
    """Weights beside which LoRAs of earlier nodes act."""
    banks = [patcher.model for patcher in model.get_additional_models_with_key(KEY)]
    return {f"{PREFIX}{layer}.weight" for bank in banks for layer in bank.sites}


def _enlarged_before(model) -> dict[str, Shape]:
    """Shapes of the weights that patches of earlier nodes have enlarged."""
    return {key: tuple(sizes) for key, entries in model.patches.items() for _, patch, _, span, _ in entries
            if span is None and (sizes := reshape_of(patch)) is not None}


def _unused(file: LoRAFile, patches: Patches, text: Patches, has_clip: bool) -> list[str]:
    """File keys that neither the diffusion model nor the text encoder has a place for."""
    elsewhere = () if has_clip else TEXT_ENCODER
    return [key for key in file if key not in patches.used and key not in text.used and not key.startswith(elsewhere)]


def _without_clip(spec: LoRASpec, keys: Sequence[str]) -> list[str]:
    """A line for a LoRA that changes the text encoder too, where none is connected."""
    count = sum(key.startswith(TEXT_ENCODER) for key in keys)
    return [f"LoRA '{spec.name}': {counted(count, 'key')} for the text encoder {verb(count, 'have')} no effect, since "
            "no clip is connected. Connect it, or set the LoRA's strength for it to 0"] if count else []


def _wrong_kind(file: LoRAFile, patches: Patches, text: Patches, unused: Sequence[str], base: nn.Module,
                has_clip: bool) -> str | None:
    """Why a file cannot be meant for this model, and what to do; None for all that acts and fits.

    Stable Diffusion 1.5 and SDXL share the names of many layers: there a file for the other one is known by layers of
    another shape, with less than half of it in its place.
    """
    kind = type(getattr(base, "model_config", base)).__name__
    misfits, count = patches.misfits, len(patches.misfits) + len(patches.found)
    if misfits and (1 - len(misfits) / count) * (1 - len(unused) / len(file)) < 0.5:
        key, reason = misfits[0]
        if all(isinstance(why, Torn) for _, why in misfits):
            return (f"is damaged in {len(misfits)} of its {counted(count, 'layer')}, such as {key}: {reason}. Use "
                    "another version")
        return (f"does not fit this model ({kind}): {len(misfits)} of its layers "
                f"{verb(len(misfits), 'have')} another shape here, such as "
                f"{key}: {reason}; {len(unused)} of its {counted(len(file), 'key')} {verb(len(unused), 'have')} no "
                "place. It was made for another architecture; use it with a checkpoint of that kind")
    if patches.found or text.found:
        return None
    if not has_clip and all(key.startswith(TEXT_ENCODER) for key in file) and other_kind(file) is None:
        return "changes the text encoder alone, and none is connected. Connect a CLIP if the node takes one"
    return _unknown(file, kind, patches.unread or text.unread)


def _unknown(keys: Collection[str], kind: str, unread: str) -> str:
    """What a file is of which no key is known, and what to do with it. `unread`: a key of a layer that is known."""
    example = f"none of its {counted(len(keys), 'key')}, '{next(iter(keys))}' for one"
    other = other_kind(keys)
    if other is not None:
        return f"is {other.what} and no LoRA for this model ({kind}): {example}, can be used. {_capital(other.remedy)}"
    form = lora_format(keys)
    if unread:
        what = "" if form is None else f"{form[0]} with the prefix {form[1]}, "
        return (f"is {what}for layers of this model ({kind}), but what it holds for them, '{unread}' for one, is of a "
                "kind or named in a way that ComfyUI cannot load. Use another version, or convert it")
    if form is None:
        return (f"matches no layer of this model ({kind}): {example}, is in a format that is known here. If it is for "
                "this kind of model, convert it to ComfyUI's or kohya's names")
    what, prefix = form
    return (f"matches no layer of this model ({kind}): it is {what} with the prefix {prefix}, and {example}, is here. "
            "It was made for another architecture, or by a tool that names layers in its own way; use it with a "
            "checkpoint of its kind, convert it to ComfyUI's or kohya's names")


def _problems(spec: LoRASpec, misfits: Sequence[tuple[object, Misfit]], unused: Sequence[str],
              total: int) -> list[str]:
    """One line per kind of trouble, with a count and an example. `total`: how many keys the file has."""
    out = _lines(spec, [(key, str(reason)) for key, reason in misfits], "left out")
    if unused:
        other = other_kind(unused)
        note = f" (as in {other.what}: {other.remedy})" if other is not None else ""
        out.append(f"LoRA '{spec.name}': {len(unused)} of its {counted(total, 'key')} {verb(len(unused), 'have')} no "
                   f"place in this model{note}, '{unused[0]}' for one")
    return out


def _lines(spec: LoRASpec, reasons: Sequence[tuple[object, str]], done: str) -> list[str]:
    by_reason: dict[str, list] = {}
    for key, reason in reasons:
        by_reason.setdefault(reason, []).append(key)
    return [f"LoRA '{spec.name}': {counted(len(keys), 'key')} such as {keys[0]}: {reason}; {done}"
            for reason, keys in by_reason.items()]


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
