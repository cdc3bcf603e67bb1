"""Which method suits an ensemble best: what LoRA Ensemble takes where the user leaves the choice to it.

By what the testbed shows (testbed/README.md): Routed keeps several LoRAs apart where it can know their places, at the
price of a merge; no other method shows more than Merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...methods.counted import counted, verb
from ..files.ensemble import Ensemble
from ..words.known import lora_words


class Choice(NamedTuple):
    """The name of a method, and why, as a clause that goes on after a comma or a colon."""

    method: str
    reason: str


def best_method(ensemble: Ensemble, has_clip: bool) -> Choice:
    """Routed, where at least two of the LoRAs that take part have a place of their own, a mask or known words, and some
    of it has to be found by words; else Merge, which keeps LoRAs in their masks too.

    has_clip   whether prompts can be encoded with a CLIP that says where their words are
    Raises ValueError for a name that is in none of the `loras` folders.
    """
    acting = [(lora, words) for lora, words in zip(ensemble, lora_words(ensemble), strict=True) if lora.composed]
    if len(acting) < 2:
        return Choice("Merge", "one LoRA has nobody to be kept apart from" if acting else "no LoRA takes turns")
    masked = [lora.name for lora, _ in acting if lora.mask is not None]
    worded = [lora.name for lora, words in acting if lora.mask is None and words.known]
    if has_clip and worded and len(worded) + len(masked) > 1:
        places = " and ".join([f"{_of(worded, acting)} words", *([f"{len(masked)} a mask"] if masked else [])])
        return Choice("Routed", f"{places}, so each can act where it belongs")
    if masked:
        kept = "it" if len(masked) == 1 else "them"
        return Choice("Merge", f"{_of(masked, acting)} a mask, in which it keeps {kept}")
    if worded and not has_clip:
        return Choice("Merge", "no clip is connected, so the places of the LoRAs' words cannot be found")
    return Choice("Merge", f"{_of(worded, acting)} known words: type those of at least two, and each acts where its "
                           "own are")


def _of(some: Sequence, everyone: Sequence) -> str:
    """`2 of 3 LoRAs have`, `1 of 3 LoRAs has`, `none of 3 LoRAs has`."""
    return f"{len(some) or 'none'} of {counted(len(everyone), 'LoRA')} {verb(max(len(some), 1), 'have')}"
