"""Which words are where in a conditioning: changing a word must change exactly the positions that are named for it."""

from __future__ import annotations

from collections import Counter
from itertools import takewhile

import pytest
import torch
from lora_ensemble.host.words.marked import PROMPT, marked

from .text_encoders import ENCODERS, clip, encoded

OTHERS = ("blue", "cat", "house", "corgi", "sushi", "kimono", "graffiti", "ninja", "pikachu", "raccoon", "samurai", "picasso",
          "norfolk", "minnesota",
          *(start + end for start in ("", "blue", "tree", "night") for end in ("z", "x", "zq", "jx", "xkj", "jxv", "wvq",
                                                                              "zkqj", "vzkx", "qjxvz")))
SIGNS = (":", ";", "?", "!", "-", "+")
TEXT = "the red woman (with hair:1.2), ohwx dog, one red house"

made: dict[str, object] = {}


@pytest.fixture
def small_clip(request):
    """One text encoder, kept for the tests of its module that follow on each other."""
    name = request.param
    if name not in made:
        made.clear()
        made[name] = clip(name)
    return made[name]


each = pytest.mark.parametrize("small_clip", ENCODERS, indirect=True)


def tensors(entry: list) -> dict:
    """The conditioning and what goes beside it, [tokens, channels]."""
    out = {None: entry[0][0].flatten(1)}
    for key, value in entry[1].items():
        if torch.is_tensor(value) and key.startswith("conditioning"):
            out[key] = value.movedim(-2, 0).flatten(1)
        elif key in ("t5xxl_ids", "text_input_ids"):
            out[key] = value.flatten()[:, None]
    return out


def changed(entry: list, other: list) -> dict | None:
    """Positions that differ, by tensor; None where the number of tokens does."""
    one, two = tensors(entry), tensors(other)
    if any(one[key].shape != two[key].shape for key in one):
        return None
    return {key: set((one[key] != two[key]).any(1).nonzero()[:, 0].tolist()) for key in one}


def named(prompt, start: int, end: int) -> dict:
    found = {None: set(prompt.tokens(start, end))}
    return found | {key: set(beside.tokens(start, end)) for key, beside in prompt.beside}


def make(tokens) -> list:
    """How many tokens there are in each section, and how many of them are padding: alike at either end, or most."""
    numbers = [[entry[0] if isinstance(entry[0], int) else None for entry in section] for section in sections(tokens)]
    return [(len(section), len(list(takewhile(section[0].__eq__, section))),
             len(list(takewhile(section[-1].__eq__, reversed(section)))), Counter(section).most_common(1)[0][1])
            for section in numbers]


def complete(seen: dict, own: dict) -> bool:
    return seen == dict.fromkeys(seen, set()) | own


def sections(tokens) -> list:
    return [section for key in tokens for section in tokens[key]] if isinstance(tokens, dict) else tokens


def check(small_clip, text: str, **arguments) -> int:
    """How many words were tried. Every change must be within what is named, and make up all of it taken together."""
    entry = encoded(marked(small_clip), text, **arguments)
    prompt = entry[1][PROMPT]
    assert prompt.text == text and not prompt.reason, prompt.reason
    assert prompt.length == entry[0].shape[1]
    before = make(small_clip.tokenize(text, **arguments))
    tried = 0
    for start, end, _ in prompt.words:
        own = named(prompt, start, end)
        seen: dict = {}
        others = [other for other in (text[:start] + other + text[end:] for other in (OTHERS if text[start].isalnum() else SIGNS))
                  if make(small_clip.tokenize(other, **arguments)) == before]
        for other in others[:40]:
            for key, positions in changed(entry, encoded(small_clip, other, **arguments)).items():
                assert positions <= own.get(key, set()), (text[start:end], other, key)
                seen[key] = seen.get(key, set()) | positions
            if complete(seen, own):
                break
        tried += bool(others)
        # A sign may have a blank before it that is a token: no other sign changes it.
        assert not others or complete(seen, own) or not text[start].isalnum() and any(seen.values()), (
            text[start:end], seen, own, others[:40])
    return tried


@each
def test_a_word_is_where_it_is_said_to_be(small_clip):
    assert check(small_clip, TEXT) >= 8
