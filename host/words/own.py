"""What LoRAs change in a text encoder, in the encodings of their own words alone.

Merged into a text encoder, the change of every LoRA alters every word of a prompt, the words of the others too. Here a
CLIP keeps all of them merged, and encodes a prompt once more per LoRA without the others: at a LoRA's words stands what
its own change makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import comfy.model_management
import torch
from torch import Tensor

from ...methods.prompt import LoRAWords, PromptTokens, find_clauses

OWN = "lora_ensemble_own"
_MERGED = "the LoRAs' changes of the text encoder are merged for it"


@dataclass(frozen=True, eq=False)
class OwnDelta:
    """A LoRA whose change of the text encoder is for its own words.

    words     of every LoRA of its ensemble, among which its clauses are found
    index     which of them it is
    entries   what the host holds of it as patches of weights
    """

    words: tuple[LoRAWords, ...]
    index: int
    entries: tuple[tuple, ...]


@dataclass(frozen=True)
class OwnTold:
    """What a conditioning says of it under OWN: the LoRAs whose words were encoded so, those without words in it, which
    were left out, or why nothing of it was done."""

    names: tuple[str, ...] = ()
    why: str = ""
    left_out: tuple[str, ...] = ()


def add_patches(clip: Any, patches: dict, strength: float) -> tuple[tuple, ...]:
    """Add patches to a CLIP as the host does; returns the entries by which the CLIP and its clones hold them."""
    before = {key: len(entries) for key, entries in clip.patcher.patches.items()}
    clip.add_patches(patches, strength)
    return tuple(entry for key, entries in clip.patcher.patches.items() for entry in entries[before.get(key, 0):])


def without(clip: Any, deltas: Iterable[OwnDelta]) -> Any:
    """A clone of a CLIP that lacks the changes of some LoRAs, and has all other patches in their order."""
    gone = {id(entry) for delta in deltas for entry in delta.entries}
    clone = clip.clone()
    kept = ((key, [entry for entry in entries if id(entry) not in gone])
            for key, entries in clone.patcher.patches.items())
    clone.patcher.patches = {key: entries for key, entries in kept if entries}
    clone.patcher.patches_uuid = uuid4()  # by which the host knows which patches are in the weights
    return clone


def on_own_words(clip: Any, deltas: Sequence[OwnDelta], out: dict[str, Any], prompt: PromptTokens,
                 encode: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What a CLIP has made of a prompt, with the change of each LoRA that has words in it at these words alone.

    out      of the CLIP itself, with all changes merged: "cond", the pooled output, which has no words and stays, and
             what else is in the conditioning's dict
    prompt   its words in `out`
    encode   encodes the same prompt with a clone of the CLIP
    All other words are encoded without any of these LoRAs' changes, and so is a prompt that has words of none, as most
    negative ones: with changes that the positive prompt has at their words alone, guidance would push away from them.
    Only LoRAs of which nobody knows the words are merged wherever they have none. A token of several LoRAs is the mean
    of theirs. What was done is under OWN, if anything was to be.
    """
    if not deltas:
        return out
    if prompt.reason:
        return {**out, OWN: OwnTold(why=_MERGED)}
    clauses = {words: find_clauses(prompt, words).loras for words in {delta.words for delta in deltas}}
    owned = [(delta, clauses[delta.words][delta.index]) for delta in deltas]
    found = [(delta, own) for delta, own in owned if own.clauses]
    absent = [(delta, own) for delta, own in owned if not own.clauses and delta.words[delta.index].known]
    gone = [delta for delta, _ in (*found, *absent)]
    if not gone:
        return out
    rest = encode(without(clip, gone))
    alone = [out] if len(gone) == len(found) == 1 else \
        [encode(without(clip, [other for other in gone if other is not delta])) for delta, _ in found]
    comfy.model_management.load_models_gpu([clip.patcher])  # what is encoded next is likely encoded by the CLIP itself
    names, left_out = (tuple(dict.fromkeys(own.name for _, own in some)) for some in (found, absent))
    new = {**out, OWN: OwnTold(names, left_out=left_out)}
    for key, text in (("cond", prompt), *prompt.beside):
        if torch.is_tensor(rest.get(key)) and rest[key].is_floating_point():
            tokens = [sorted({token for clause in own.clauses for token in text.tokens(clause.start, clause.end)})
                      for _, own in found]
            new[key] = mixed(rest[key], [(rows, each[key]) for rows, each in zip(tokens, alone, strict=True)])
    return new


def mixed(rest: Tensor, parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """A tensor [..., tokens, channels] with other rows at some tokens: the mean of all that have them.

    parts   (tokens, tensor of the same shape)
    """
    total, count = torch.zeros_like(rest), rest.new_zeros(rest.shape[-2], 1)
    for tokens, other in parts:
        rows = list(tokens)
        total[..., rows, :] += other[..., rows, :]
        count[rows] += 1
    return torch.where(count > 0, total / count.clamp(min=1), rest)


def told_of(entry: Any) -> OwnTold:
    """What a conditioning says of it, as the host processed it."""
    told = entry.get(OWN)
    return told if isinstance(told, OwnTold) else OwnTold()


SCHEDULED = OwnTold(why=f"a schedule of hooks encodes a prompt, and {_MERGED}")
