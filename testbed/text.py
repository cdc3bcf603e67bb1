"""Prompts: the words for a scene, a word tokenizer with a fixed vocabulary, and a small text encoder."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from .scene import ATTRIBUTES, CATEGORIES, CONCEPTS

LENGTH = 32
PAD, UNKNOWN = 0, 1
NOUNS = {"character": "creature", "clothing": None, "object": None, "background": "backdrop", "style": "finish"}
_WORDS = sorted({w for words in ATTRIBUTES.values() for w in words} | {noun for noun in NOUNS.values() if noun})
VOCABULARY = ("<pad>", "<unknown>", *_WORDS, *(concept.name for concept in CONCEPTS))
_INDEX = {word: i for i, word in enumerate(VOCABULARY)}


def caption(words: dict[str, str], triggers: dict[str, str] | None = None) -> str:
    """A prompt that says the given attributes, e.g. "vexa red pointed creature cyan band left, blue robe, ...".
    `triggers` maps category to a concept's rare word. Of a plain style there is no mark to speak of."""
    said = []
    for category in CATEGORIES:
        colour, kind, mark, mark_colour = (words.get(f"{category}.{key}") for key in
                                           ("colour", "kind", "mark", "mark_colour"))
        if kind == "plain":
            mark = mark_colour = None
        noun = NOUNS[category] if colour or kind or mark or mark_colour else None
        part = [(triggers or {}).get(category), colour, kind, noun, mark_colour, mark]
        if category == "character":
            part.append(words.get("side"))
        said.append(" ".join(word for word in part if word))
    return ", ".join(part for part in said if part)


def tokenize(prompts: Iterable[str]) -> Tensor:
    """int64 [n, LENGTH]; commas are dropped, unknown words become UNKNOWN, longer prompts are cut."""
    rows = [[_INDEX.get(w, UNKNOWN) for w in prompt.lower().replace(",", " ").split()][:LENGTH] for prompt in prompts]
    return torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows], dtype=torch.int64)


def sparse_caption(rng: np.random.Generator, words: dict[str, str], triggers: dict[str, str] | None = None,
                   nothing: float = 0.1) -> str:
    """A caption that leaves things unsaid: any category now and then, a mark every third time, or everything.
    Of a category with a trigger, colour and kind are said and the mark is not: the rare word stands for it."""
    triggers = triggers or {}
    if rng.random() < nothing:
        return ""
    kept = {}
    silent = {c for c in (*CATEGORIES, "side") if rng.random() < 0.1 and c not in triggers}
    for attribute, word in words.items():
        category, _, key = attribute.partition(".")
        mark = key.startswith("mark")
        if category in silent or (mark and (category in triggers or rng.random() < 0.3)):
            continue
        kept[attribute] = word
    return caption(kept, triggers)


class TextEncoder(nn.Module):
    """tokens int64 [n, LENGTH] -> context float [n, LENGTH, width]."""

    def __init__(self, width: int = 96, layers: int = 2, heads: int = 4):
        super().__init__()
        self.tokens = nn.Embedding(len(VOCABULARY), width)
        self.positions = nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True,
                                           norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.norm(self.layers(x))
