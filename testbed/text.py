"""Prompts: the words for a scene, a tokenizer that tells the senses of a colour apart, and a small text encoder.

A colour is the only kind of word that several categories share. Which of them it speaks of is grammar, not something
that a small model should spend its training on: the tokenizer gives "red robe" and "red sash" tokens of their own.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from .scene import ATTRIBUTES, CATEGORIES, COLOURS, CONCEPTS

LENGTH = 32
PAD, UNKNOWN = 0, 1
NOUNS = {"character": "creature", "clothing": None, "object": None, "background": "backdrop", "style": "finish"}
# What a word that belongs to one category only says of a colour before it: it is that category's, or its mark's.
SENSE: dict[str, str] = {}
for _category, _noun in NOUNS.items():
    _mark, _own = f"{_category}.mark_colour", f"{_category}.colour"
    _own = _own if _own in ATTRIBUTES else _mark
    SENSE |= dict.fromkeys(ATTRIBUTES[f"{_category}.mark"], _mark)
    SENSE |= dict.fromkeys((*ATTRIBUTES[f"{_category}.kind"], *([_noun] if _noun else [])), _own)
_WORDS = sorted({*SENSE, *COLOURS, *ATTRIBUTES["side"]})
_COLOURED = sorted(f"{colour} {sense}" for colour in COLOURS for sense in set(SENSE.values()))
VOCABULARY = ("<pad>", "<unknown>", *_WORDS, *_COLOURED, *(concept.name for concept in CONCEPTS))
_INDEX = {word: i for i, word in enumerate(VOCABULARY)}


def caption(words: dict[str, str], triggers: dict[str, str] | None = None) -> str:
    """A prompt that says the given attributes, e.g. "vexa red pointed creature cyan band left, blue robe, ...".
    `triggers` maps category to a concept's rare word. Of a plain style there is no mark to speak of."""
    said = []
    for category in CATEGORIES:
        side = words.get("side") if category == "character" else None
        said.append(clause(category, words, (triggers or {}).get(category), side))
    return ", ".join(part for part in said if part)


def clause(category: str, words: dict[str, str], trigger: str | None, side: str | None, part: str = "") -> str:
    """What a caption says of one category, whose attributes have the prefix `part` where that is another name."""
    colour, kind, mark, mark_colour = (words.get(f"{part or category}.{key}") for key in
                                       ("colour", "kind", "mark", "mark_colour"))
    if kind == "plain":
        mark = mark_colour = None
    noun = NOUNS[category] if colour or kind or mark or mark_colour else None
    return " ".join(word for word in (trigger, colour, kind, noun, mark_colour, mark, side) if word)


def senses(prompt: str) -> list[str]:
    """The words of a prompt, a colour with what it colours: that is said by the next word of the same clause that only
    one category has ("red pointed creature cyan band"); without one the colour stays a mere word."""
    out: list[str] = []
    for clause in prompt.lower().split(","):
        sense, words = None, []
        for word in reversed(clause.split()):
            sense = SENSE.get(word, sense)
            words.append(f"{word} {sense}" if word in COLOURS and sense else word)
        out += reversed(words)
    return out


def tokenize(prompts: Iterable[str]) -> Tensor:
    """int64 [n, LENGTH]; unknown words become UNKNOWN, longer prompts are cut."""
    rows = [[_INDEX.get(w, UNKNOWN) for w in senses(prompt)][:LENGTH] for prompt in prompts]
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

    def __init__(self, width: int = 96, layers: int = 1, heads: int = 4):
        super().__init__()
        self.tokens = nn.Embedding(len(VOCABULARY), width)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True,
                                           norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, more: Tensor | float = 0.0) -> Tensor:
        """`more` is added to what was learned of each token."""
        return self.norm(self.layers(self.tokens(tokens) + more))
