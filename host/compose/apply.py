"""Apply an ensemble to a MODEL and a CLIP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ...engine.bank import Bank
from ...methods import Method
from ...methods.merge import Merge
from ...methods.windows import Window
from ..files.called import file_of
from ..files.ensemble import ALWAYS, Ensemble, LoRASpec, index_of, told_apart
from ..files.header_alphas import passed_over
from ..files.injected import as_in_files
from ..files.metadata import is_proposed, unread_beside
from ..words.known import lora_words
from ..words.marked import marked
from ..words.own import OwnDelta, add_patches
from .applied import Applied
from .cache import CacheSpec
from .composition import KEY, Composition
from .ensemble_bank import ensemble_bank
from .loading import LoadedEnsemble, LoadedLoRA, left_out, load_ensemble, on_its_weights, otherwise, without_effect
from .placing import Placing, Routed
from .prompts import Asked
from .watch import node_on_page
from .weights import follow_weights
from .wrappers import install_wrappers

log = logging.getLogger("lora_ensemble")
BAKED = "lora_ensemble_baked"
"""The attachment of a MODEL with the names of the LoRAs that `bake` has put into its weights."""
BAKED_BEFORE = "in the weights, where Merge LoRAs in mode 'baked' before has put them"


@dataclass(frozen=True)
class Active:
    """The LoRAs that take part in a composition, those with a model strength and a change of the model: what a method
    is made from.

    specs      as the user listed them
    bank       what each of them does to each layer, in the same order
    model      the MODEL they act on
    problems   what cannot be done as asked; a method may add to it, each line is logged and recorded once
    first      how many adapters of the bank come before theirs: LoRAs that are always on
    """

    specs: tuple[LoRASpec, ...]
    bank: Bank
    model: object
    problems: list[str] = field(default_factory=list)
    first: int = 0

    @property
    def strengths(self) -> tuple[float, ...]:
        return tuple(spec.strength_model for spec in self.specs)

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(spec.role for spec in self.specs)


def apply_method(model, clip, ensemble: Ensemble, make: Callable[[Active], Method], node: str,
                 rest_on_weights: bool = False, placing: Placing | None = None):
    """A MODEL that composes the ensemble's LoRAs as a method says, and a CLIP with their text-encoder deltas merged.

    make              builds the method for the LoRAs that take part
    node              display name of the node, for messages
    rest_on_weights   what no forward can express goes into the weights through the host's own patches; right only for
                      a method whose single branch never changes
    placing           where the LoRAs act; None: in their masks

    LoRAs of role ALWAYS are merged beneath the method, which does not know of them: they act in all of its branches,
    the base model's included, on both sides of guidance and at all places. They are the first of the one bank of all
    the LoRAs, so that a layer's products serve them and the method's together.
    Raises ValueError for an empty ensemble and for files that cannot be used with this model.
    """
    ensemble = told_apart(ensemble)
    rest = [spec for spec in ensemble if spec.role != ALWAYS]
    ordered = (*(spec for spec in ensemble if spec.role == ALWAYS), *rest)
    placing = placing or Placing()
    with as_in_files(model):
        loaded, shared = ensemble_bank(model, clip, ordered, node, rest_on_weights, placing.routing.yields)
    bank, problems = shared.model, list(loaded.problems)
    if not loaded.loras:
        problems.append("no LoRA acts on the model: each has strength_model 0 or changes the text encoder alone")
    lasting, active = ([lora.spec for lora in loaded.loras if (lora.spec.role == ALWAYS) is one]
                       for one in (True, False))
    first, before = len(lasting), model.get_attachment(KEY)
    model = _on_weights(model, loaded.loras[:first], rest_on_weights, problems)
    new_model = _on_weights(model, loaded.loras[first:], rest_on_weights, problems)
    place = _with_bank(new_model, shared)
    called = tuple(lora.spec.called for lora in loaded.loras)
    problems += _again(called, model)
    method, routed, asked = Merge(tuple(spec.strength_model for spec in lasting)), None, None
    applied = [Applied(method, called[:first], (), (None,) * first, place, windows=_windows(lasting), always=True,
                       node=node_on_page())] if lasting or not rest else []
    if rest:
        method = make(Active(tuple(active), bank, model, problems, first))
        masks, routed = _placed(ensemble, active, method, placing, problems)
        asked = Asked(lora_words(ensemble), _numbers(ensemble, active)) if getattr(method, "by_prompt", False) else None
        if routed is not None or asked is not None:
            problems += [f"LoRA '{spec.called}': {line}" for spec in active
                         if not spec.words and (line := unread_beside(spec.name))]
        applied.append(Applied(method, called[first:], (), masks, place, routed, _windows(active), asked=asked,
                               node=node_on_page(), first=first))
    new_clip, texts = merge_clip(clip, loaded)
    own = _own_words(ensemble, texts, routed, problems) if placing.own_words and routed is not None else ()
    problems += _told(ensemble, loaded, active, method, routed)
    for problem in problems:
        log.warning("%s: %s", node, problem)
    applied[-1] = replace(applied[-1], problems=tuple(problems))
    new_model.set_attachments(KEY, Composition((*(before.applied if before is not None else ()), *applied),
                                               before.cache if before is not None else None))
    install_wrappers(new_model)
    follow_weights(new_model)
    if (routed or asked) is not None and new_clip is not None:
        contrast = asked is not None or placing.routing.mode == "contrast"
        new_clip = marked(new_clip, (routed or asked).words, contrast, own)
    return new_model, new_clip


def _again(called: Sequence[str], model) -> list[str]:
    """What there is to say of LoRAs that a node of this pack before this one has put on a MODEL, too."""
    before: Composition | None = model.get_attachment(KEY)
    routed = [name for applied in (before.applied if before is not None else ()) for name in applied.names]
    out = []
    for names, where in ((routed, "in the method before"), (model.get_attachment(BAKED) or (), BAKED_BEFORE)):
        there = set(map(file_of, names))
        if twice := ", ".join(f"'{name}'" for name in called if file_of(name) in there):
            out.append(f"acting twice, here and {where}: {twice}. Give each method LoRAs of its own, or connect this "
                       "one to the model's loader")
    return out


def _on_weights(model, loras: list[LoadedLoRA], rest_on_weights: bool, problems: list[str]):
    """A copy of a MODEL, with what no forward can express of these LoRAs on its weights where it may be there."""
    new_model = model.clone()
    for lora in loras:
        on_weights = on_its_weights(lora.spec, rest_on_weights)
        problems += left_out(lora, on_weights) + otherwise(lora)
        if on_weights and lora.parsed.left_out:
            rest = {key: lora.patches.found[key] for key, _ in lora.parsed.left_out}
            new_model.add_patches(rest, lora.spec.strength_model)
    return new_model


def _told(ensemble: Ensemble, loaded: LoadedEnsemble, active: Sequence[LoRASpec], method: Method,
          routed: Routed | None) -> list[str]:
    """What there is to say of an ensemble's LoRAs beside such a method."""
    merged = isinstance(method, Merge)
    out = without_effect(loaded, ensemble, merged)
    if not merged or routed is not None:
        out += [f"LoRA '{spec.called}' looks like one for few steps: with the role '{ALWAYS}' it would be part of the "
                "model; now it is composed as the others are" for spec in active if is_proposed(spec.name, spec.role)]
    return out + _without_alphas(ensemble)


def _with_bank(model, shared) -> int:
    """Which of a MODEL's banks this one is, put on it if it is not there. Methods in a row may have one bank: it is on
    the MODEL once, or the host would load and count it twice."""
    banks = list(model.get_additional_models_with_key(KEY))
    place = next((k for k, other in enumerate(banks) if other.model is shared.model), len(banks))
    model.set_additional_models(KEY, banks if place < len(banks) else [*banks, shared.clone()])
    return place


def _windows(active: list[LoRASpec]) -> tuple[Window, ...]:
    windows = tuple(spec.window for spec in active)
    return () if all(window.whole for window in windows) else windows


def _placed(ensemble: Ensemble, active: list[LoRASpec], method: Method, placing: Placing, problems: list[str]
            ) -> tuple[tuple[Tensor | None, ...], Routed | None]:
    """(the masks of the LoRAs that take part, how their places are found by words)"""
    masks = tuple(spec.mask.tensor if spec.mask is not None else None for spec in active)
    given = [spec.called for spec in active if spec.mask is not None]
    if placing.where == "everywhere":
        problems += [f"the mask of LoRA '{name}' is not used: the LoRAs are to act everywhere" for name in given[:1]]
        return (None,) * len(active), None
    if not hasattr(method, "masks"):
        problems += [f"the mask of LoRA '{name}' is not used: this method cannot confine a LoRA to a region"
                     for name in given[:1]]
        if placing.where == "words":
            problems.append("place is 'words', and this method cannot confine LoRAs: they act everywhere")
        return masks, None
    problems += [f"the mask of LoRA '{spec.called}' is black all over: it acts at no place of the picture"
                 for spec in active if spec.mask is not None and not (spec.mask.tensor > 0).any()]
    everywhere = tuple(spec.role == "style" for spec in active)
    unasked = getattr(method, "masks", "") == "predictions" and all(  # words say where predictions count, and no more
        wide or mask is not None for wide, mask in zip(everywhere, masks, strict=True))
    if placing.where == "masks" or (active and unasked):
        return masks, None
    return masks, Routed(placing.routing, lora_words(ensemble), _numbers(ensemble, active), everywhere, placing.blocks)


def _numbers(ensemble: Ensemble, active: list[LoRASpec]) -> tuple[int, ...]:
    """Where the LoRAs that take part are in the ensemble."""
    return tuple(index_of(ensemble, spec) for spec in active)


def _without_alphas(ensemble: Ensemble) -> list[str]:
    """A line for each LoRA whose alpha the host's loader, and so every method, passes over."""
    return [f"LoRA '{spec.called}': {line}" for spec in ensemble if spec.acts and (line := passed_over(spec.name))]


def bake(model, clip, ensemble: Ensemble, node: str):
    """(MODEL, CLIP, what cannot be done as asked) of the ordinary merge through the host's own weight patches: what a
    chain of its LoRA loaders does.

    Raises ValueError where a LoRA has a window in time, besides what `apply_method` does.
    """
    ensemble = told_apart(ensemble)
    for spec in ensemble:
        if spec.strength_model != 0 and not spec.window.whole:
            raise ValueError(f"{node}: LoRA '{spec.called}' has a window in time, from {spec.start:g} to {spec.end:g}, "
                             "and what is baked into the weights acts in every step. Choose mode 'runtime', or set "
                             "its start to 0 and its end to 1.")
    new_model = model.clone()
    with as_in_files(model):
        loaded = load_ensemble(model, clip, ensemble, node, on_weights=True)
        for lora in loaded.loras:
            new_model.add_patches(lora.patches.found, lora.spec.strength_model)
    called = [lora.spec.called for lora in loaded.loras]
    new_model.set_attachments(BAKED, (*(model.get_attachment(BAKED) or ()), *called))
    problems = [*loaded.problems, *_again(called, model), *without_effect(loaded, ensemble, True),
                *_without_alphas(ensemble)]
    for lora in loaded.loras:
        problems += otherwise(lora, baked=True)
        if lora.spec.mask is not None:
            problems.append(f"the mask of LoRA '{lora.spec.called}' is not used: what is in the weights acts "
                            "everywhere")
    return new_model, merge_clip(clip, loaded)[0], problems


def with_reason(model, reason: str):
    """A MODEL whose last method was taken for a reason, which the records of its runs have."""
    before = model.get_attachment(KEY)
    new_model = model.clone()
    last = replace(before.applied[-1], reason=reason)
    new_model.set_attachments(KEY, Composition((*before.applied[:-1], last), before.cache))
    return new_model


def with_cache(model, spec: CacheSpec):
    """A MODEL whose branches reuse deep features as `spec` says, in place of what it said before; with or without
    methods on it."""
    before = model.get_attachment(KEY)
    new_model = model.clone()
    new_model.set_attachments(KEY, Composition(before.applied if before is not None else (), spec))
    install_wrappers(new_model)
    follow_weights(new_model)
    return new_model


def merge_clip(clip, loaded: LoadedEnsemble) -> tuple[object, list[tuple[LoRASpec, tuple]]]:
    """(the CLIP with every LoRA's text-encoder delta at its clip strength, (LoRA, what it holds of it) of each). None
    stays None."""
    new_clip = clip.clone() if clip is not None else None
    return new_clip, [] if clip is None else [(spec, add_patches(new_clip, patches.found, spec.strength_clip))
                                              for spec, patches in loaded.texts]


def _own_words(ensemble: Ensemble, texts: list[tuple[LoRASpec, tuple]], routed: Routed, problems: list[str]
               ) -> list[OwnDelta]:
    """The LoRAs that change the text encoder for their own words alone: all but those that are always on."""
    used = [(spec, entries) for spec, entries in texts if entries and spec.role != ALWAYS]
    if not used:
        problems.append("text is 'own words', which does nothing here: no LoRA changes the text encoder")
    numbers = _numbers(ensemble, [spec for spec, _ in used])
    return [OwnDelta(routed.words, number, entries) for number, (_, entries) in zip(numbers, used, strict=True)]
