"""What is known of the words of an ensemble, and what was found of them in a prompt, told to the user."""

from __future__ import annotations

from collections.abc import Sequence

from ...methods.counted import counted
from ...methods.prompt import Clause, Found, LoRAWords
from ..files.ensemble import Ensemble
from ..files.files import known
from ..files.metadata import Wording, wording

_SOURCES = {"marked": "marked in the prompt", "typed": "its words", "trigger": "trigger words of {where}"}

USUAL = 6  # words that stand in for a trigger: a clause, not a caption


def lora_words(ensemble: Ensemble) -> tuple[LoRAWords, ...]:
    """The words of each LoRA, in the order of the ensemble: those typed on it, and those that its file names, or one
    beside it.

    Raises ValueError for a name that is in none of the `loras` folders, unless the LoRA is off.
    """
    told = [wording(lora.name) if lora.acts or known(lora.name) else Wording() for lora in ensemble]
    return tuple(LoRAWords(lora.called, lora.words, words.trigger, usual(words), words.where)
                 for lora, words in zip(ensemble, told, strict=True))


def usual(words: Wording) -> str:
    """Ordinary words for what a LoRA depicts: the tags that nearly all pictures of its training have, without its
    trigger words; at most USUAL of them."""
    triggers = {part.strip().lower() for phrase in words.trigger for part in phrase.split(",")}
    return " ".join([tag for tag in words.usual if tag.lower() not in triggers][:USUAL])


def report(found: Found) -> str:
    """Lines for the user: per LoRA which words are its own and how many tokens they take, or why it has none."""
    lines = []
    for row, lora in enumerate(found.loras, 1):
        if lora.clauses:
            source = _SOURCES[lora.source].format(where=lora.where)
            lines.append(f"{row}  {lora.name}: {_list(lora.clauses)} ({source})")
            lines += [f"   its place is sought with \"{other}\" for \"{phrase}\""
                      for phrase, other in lora.instead if other.strip()]
        else:
            lines.append(f"{row}  {lora.name}: none, because {lora.reason}")
    if found.others:
        lines.append(f"of no LoRA: {_list(found.others)}")
    return "\n".join([*lines, *found.notes]) or "no LoRAs: connect an ensemble, or write <lora:name:1.0> into the text"


def _list(clauses: Sequence[Clause]) -> str:
    return ", ".join(f"\"{clause.text}\" {counted(len(clause.tokens), 'token')}" for clause in clauses)
