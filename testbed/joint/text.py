"""Prompts of the second body: the first body's words, and a tokenizer that also tells left from right.

Words of a figure end with its side ("vexa red pointed creature left, drosh blue robe left"). A token is what the first
body's tokenizer makes of a word, and what its clause is about: the figure on a side, the object, the background, the
style, or something that no word of it tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..scene import CONCEPTS
from ..text import PAD, SENSE, UNKNOWN, VOCABULARY, TextEncoder, clause, senses
from .scene import PARTS, SIDES, category_of

LENGTH = 36
TOPICS = ("", *SIDES, "object", "background", "style")
_INDEX = {word: i for i, word in enumerate(VOCABULARY)}


def caption(words: Mapping[str, str], triggers: Mapping[str, str] | None = None) -> str:
    """A prompt that says the given attributes. `triggers` maps a part of the picture to a concept's rare word. A figure
    that is there is always named, were it by no more than "creature left"."""
    triggers, said = triggers or {}, []
    figures = words.get("figures", "")
    for part in PARTS:
        side, category = part.partition(".")[0], category_of(part)
        side = side if side in SIDES else None
        if side and figures not in (side, "both"):
            continue
        text = clause(category, words, triggers.get(part), None, part)
        if not text and category == "character":
            text = "creature"
        said.append(f"{text} {side}" if text and side else text)
    return ", ".join(text for text in said if text)


def about(text: str) -> int:
    """The index in TOPICS of what a clause is about, 0 where that is not told."""
    words = text.split()
    told = [word for word in words if word in SIDES]
    told = told or [SENSE[word].partition(".")[0] for word in words if word in SENSE]
    return TOPICS.index(told[0]) if told and told[0] in TOPICS else 0


def tokens(prompt: str) -> list[int]:
    """A token per word: its index in the vocabulary, plus as many vocabularies as its clause's topic says."""
    return [_INDEX.get(word, UNKNOWN) + about(text) * len(VOCABULARY)
            for text in prompt.lower().split(",") for word in senses(text)]


def tokenize(prompts: Iterable[str]) -> Tensor:
    """int64 [n, LENGTH]; longer prompts are cut."""
    rows = [tokens(prompt)[:LENGTH] for prompt in prompts]
    return torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows], dtype=torch.int64)


def sparse_caption(rng: np.random.Generator, words: Mapping[str, str], triggers: Mapping[str, str] | None = None,
                   bare: float = 0.0, nothing: float = 0.1) -> str:
    """A caption that leaves things unsaid: any part now and then, a mark every third time, or everything. Of a part
    with a trigger the mark is never said, and with the probability `bare` colour and kind are not either."""
    triggers = triggers or {}
    if rng.random() < nothing:
        return ""
    kept = {}
    silent = {part for part in PARTS if rng.random() < (bare if part in triggers else 0.1)}
    for attribute, word in words.items():
        part, _, key = attribute.rpartition(".")
        mark = key.startswith("mark")
        if part in silent or (mark and (part in triggers or rng.random() < 0.3)):
            continue
        kept[attribute] = word
    return caption(kept, triggers)


def meaningless(rng: np.random.Generator) -> dict[str, str]:
    """A rare word somewhere in every third caption of the base's training, as the first body's."""
    if rng.random() < 0.67:
        return {}
    return {PARTS[rng.integers(len(PARTS))]: CONCEPTS[rng.integers(len(CONCEPTS))].name}


class TopicText(nn.Module):
    """tokens int64 [n, LENGTH] -> context float [n, LENGTH, width]: what was learned of a word and of a topic, added,
    and the first body's encoder over both."""

    def __init__(self, width: int = 96):
        super().__init__()
        self.words = TextEncoder(width)
        self.topics = nn.Embedding(len(TOPICS), width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.words(tokens % len(VOCABULARY), self.topics(tokens // len(VOCABULARY)))
