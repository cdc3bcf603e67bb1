"""What is known of the words of an ensemble, and what was found of them in a prompt, told to the user."""

from __future__ import annotations

from collections.abc import Sequence

from ...methods.prompt import Clause, Found, LoRAWords
from ..files.ensemble import Ensemble
from ..files.metadata import wording

_SOURCES = {"marked": "marked in the prompt", "typed": "its words", "trigger": "trigger words of its file"}


def lora_words(ensemble: Ensemble) -> tuple[LoRAWords, ...]:
    """The words of each LoRA, in the order of the ensemble: those typed on it, and those that its file names.

    Raises ValueError for a name that is in none of the `loras` folders.
    """
    return tuple(LoRAWords(lora.name, lora.words, wording(lora.name).trigger) for lora in ensemble)


def report(found: Found) -> str:
    """Lines for the user: per LoRA which words are its own and how many tokens they take, or why it has none."""
    lines = []
    for row, lora in enumerate(found.loras, 1):
        if lora.clauses:
            lines.append(f"{row}  {lora.name}: {_list(lora.clauses)} ({_SOURCES[lora.source]})")
        else:
            lines.append(f"{row}  {lora.name}: none, because {lora.reason}")
    if found.others:
        lines.append(f"of no LoRA: {_list(found.others)}")
    return "\n".join([*lines, *found.notes]) or "no LoRAs: connect an ensemble, or write <lora:name:1.0> into the text"


def _list(clauses: Sequence[Clause]) -> str:
    return ", ".join(f"\"{clause.text}\" {len(clause.tokens)} token{'s' * (len(clause.tokens) != 1)}"
                     for clause in clauses)
