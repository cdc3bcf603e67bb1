"""Prompts: the words for a scene, a word tokenizer with a fixed vocabulary, and a small text encoder."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .scene import ATTRIBUTES, CATEGORIES, CONCEPTS, Scenes

LENGTH = 20
PAD, UNKNOWN = 0, 1
NOUNS = {"character": "creature", "clothing": None, "object": None, "background": "backdrop", "style": "finish"}
_WORDS = sorted({w for a, words in ATTRIBUTES.items() if a == "side" or a.endswith((".colour", ".kind")) for w in words}
                | {noun for noun in NOUNS.values() if noun})
VOCABULARY = ("<pad>", "<unknown>", *_WORDS, *(concept.name for concept in CONCEPTS))
_INDEX = {word: i for i, word in enumerate(VOCABULARY)}
TRIGGERS = tuple(_INDEX[concept.name] for concept in CONCEPTS)


def caption(words: dict[str, str], triggers: dict[str, str] | None = None,
            parts: Iterable[str] = ("side", *CATEGORIES)) -> str:
    """The prompt of a scene, e.g. "vexa red pointed creature left, blue robe, yellow ball, ...". `triggers` maps
    category to a concept's rare word; `parts` names what is said at all."""
    parts, said = set(parts), []
    for category in CATEGORIES:
        part = []
        if category in parts:
            keys = (f"{category}.colour", f"{category}.kind")
            part = [(triggers or {}).get(category), *(words.get(key) for key in keys), NOUNS[category]]
        if category == "character" and "side" in parts:
            part.append(words["side"])
        said.append(" ".join(word for word in part if word))
    return ", ".join(part for part in said if part)


def tokenize(prompts: Iterable[str]) -> Tensor:
    """int64 [n, LENGTH]; commas are dropped, unknown words become UNKNOWN, longer prompts are cut."""
    rows = [[_INDEX.get(w, UNKNOWN) for w in prompt.lower().replace(",", " ").split()][:LENGTH] for prompt in prompts]
    return torch.tensor([row + [PAD] * (LENGTH - len(row)) for row in rows], dtype=torch.int64)


def captions(scenes: Scenes) -> list[str]:
    return [caption(scenes.words(row)) for row in range(len(scenes))]


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
