"""The bank of an ensemble's LoRAs: read and built once, for all nodes with the same files."""

from __future__ import annotations

from dataclasses import replace

from ...engine.bank import Bank
from ...engine.yielding import yield_to
from ..files.ensemble import Ensemble, LoRASpec, index_of
from ..files.patches import Patches
from .banks import Patcher, compute_dtype, shared_bank
from .loading import LoadedEnsemble, LoadedLoRA, check_some, facts_of, load_ensemble


def ensemble_bank(model, clip, ensemble: Ensemble, node: str, on_weights: bool, yields: bool
                  ) -> tuple[LoadedEnsemble, Patcher]:
    """(what the ensemble's files do, the bank as a model of its own): as `load_ensemble` and a new bank would give
    them, but read and built only where no node has done so. What is kept of the files has no tensors but those that the
    bank lacks. `yields`: styles yield to backgrounds."""
    check_some(ensemble, node)  # here too: what is kept of an ensemble without effect is kept of none
    used = [spec for spec in ensemble if spec.acts]

    def make() -> tuple[Bank, LoadedEnsemble, int]:
        loaded = load_ensemble(model, clip, ensemble, node, on_weights)
        names = tuple(lora.spec.name for lora in loaded.loras)
        bank = Bank(_yielding(loaded) if yields else [lora.parsed.layers for lora in loaded.loras], names,
                    compute_dtype(model))
        notes = LoadedEnsemble([LoadedLoRA(index_of(used, lora.spec), _rest(lora), replace(lora.parsed, layers={}))
                                for lora in loaded.loras],
                               [(index_of(used, spec), text) for spec, text in loaded.texts], loaded.problems)
        tensors = [lora.patches for lora in notes.loras] + [text for _, text in notes.texts]
        return bank, notes, sum(patches.nbytes for patches in tensors)

    facts = facts_of(model, clip, used, on_weights), yields and tuple(_side(spec) for spec in used)
    shared, kept = shared_bank(model, facts, compute_dtype(model), make)
    loaded = LoadedEnsemble([lora._replace(spec=used[lora.spec]) for lora in kept.loras],
                            [(used[k], text) for k, text in kept.texts], kept.problems)
    return loaded, shared


def _side(spec: LoRASpec) -> str:
    """Whether a LoRA yields to others, is yielded to, or neither."""
    return spec.role if spec.role in ("background", "style") else ""


def _yielding(loaded: LoadedEnsemble) -> list[dict]:
    """What the LoRAs do to each layer, styles without their part in the directions of backgrounds."""
    who, to = ([k for k, lora in enumerate(loaded.loras) if lora.spec.role == role]
               for role in ("style", "background"))
    layers, changed = yield_to([lora.parsed.layers for lora in loaded.loras], who, to)
    if who and to and not changed:
        style, ground = (loaded.loras[each[0]].spec.name for each in (who, to))
        loaded.problems.append(f"LoRA '{style}' cannot yield to LoRA '{ground}': no layer has plain low-rank changes "
                               "of both; the style acts as its file has it")
    return layers


def _rest(lora: LoadedLoRA) -> Patches:
    """The patches that only the weights can take."""
    return Patches(found={key: lora.patches.found[key] for key, _ in lora.parsed.left_out})
