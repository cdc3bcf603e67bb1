"""Where tokens stand in a text whose tokenizer does not say it: long texts in parts, against one look at the whole."""

from __future__ import annotations

from random import Random

import pytest
from lora_ensemble.host.words import beginnings
from lora_ensemble.host.words.beginnings import spans_of_beginnings
from lora_ensemble.host.words.spelling import _Asked, _ranges, _Token
from lora_ensemble.methods.prompt_text import pieces

KNOWN = sorted(("_red", "_woman", "_dog", "_a", "_", "red", "wo", "man", "dog", ", ", "_,", "红色", "的", "狗", "红",
                "___"), key=len, reverse=True)
PARTS = ("red", " woman", " dog", " a", ",", " ", "  ", "\n", "红色", "的", "狗", "x", "woman", "é",
         "\U0001f469\u200d\U0001f469")


class Tokenizer:
    """As sentencepiece: a blank before the text, the longest word that is known, an end; `read` counts characters."""

    def __init__(self, begins: int, ends: int):
        self.begins, self.ends, self.read = begins, ends, 0

    def __call__(self, text: str) -> list[int]:
        self.read += len(text)
        text, ids = "_" + text.replace(" ", "_").replace("\n", "_") if text else "", [1] * self.begins
        while text:
            found = next((word for word in KNOWN if text.startswith(word)), text[0])
            ids.append(hash(found))
            text = text[len(found):]
        return ids + [2] * self.ends


def spans(text: str, tokenizer: Tokenizer) -> list:
    edges = sorted({end for _, end in pieces(text)})
    return spans_of_beginnings(tokenizer, text, tokenizer(text), edges)


@pytest.mark.parametrize(("begins", "ends"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_parts_say_what_the_whole_says(begins, ends, monkeypatch):
    random, tokenizer = Random(1), Tokenizer(begins, ends)
    texts = ["", " ", "red", "red woman" * 20, *("".join(random.choices(PARTS, k=60)) for _ in range(200))]
    whole = [spans(text, tokenizer) for text in texts]
    read = tokenizer.read
    monkeypatch.setattr(beginnings, "LONG", 16)
    assert [spans(text, tokenizer) for text in texts] == whole
    assert tokenizer.read - read < read / 2, "no text was read in parts"


def test_where_each_token_ends():
    """What begins every text stands before it, what ends it behind it."""
    assert spans("red woman,x", Tokenizer(1, 2)) == [(0, 0), (0, 3), (3, 9), (9, 10), (10, 11), (11, 11), (11, 11)]


class Numbered(Tokenizer):
    """What a word becomes depends on how many are before it: no part of a text says what the whole does."""

    def __call__(self, text: str) -> list[int]:
        return [hash((number, at)) for at, number in enumerate(super().__call__(text))]


def test_a_text_without_a_place_for_a_cut_is_looked_at_as_a_whole(monkeypatch):
    whole = spans("red woman, dog" * 5, Numbered(1, 1))
    monkeypatch.setattr(beginnings, "LONG", 16)
    assert spans("red woman, dog" * 5, Numbered(1, 1)) == whole


def test_a_beginning_may_have_other_tokens_than_the_text():
    """As of tokenizers that weigh a text as a whole: a token that was there is there."""
    known = {"": [], "a": [7], "ab": [1], "abc": [9], "abcd": [1, 2]}
    assert spans_of_beginnings(known.__getitem__, "abcd", [1, 2], [1, 2, 3, 4]) == [(1, 2), (3, 4)]


@pytest.mark.parametrize("text", ["a red woman, " * 1500, "红色的狗，" * 4000], ids=["words", "without blanks"])
def test_a_long_text_is_not_read_from_its_beginning_for_every_word(text):
    tokenizer = Tokenizer(1, 1)
    found = spans(text, tokenizer)
    assert len(found) == len(tokenizer(text)) and tokenizer.read < 500 * len(text)


class Counted(dict):
    """Counts how often it is asked."""

    asked = 0

    def __contains__(self, key: object) -> bool:
        self.asked += 1
        return super().__contains__(key)


def test_a_stretch_of_thousands_of_tokens_is_looked_at_once():
    text = f"red{chr(10) * 3000}dog"
    numbers = [ord(char) for char in text]
    asked = _Asked(text, 0, lambda text: {"input_ids": [ord(char) for char in text]}, numbers)
    places = Counted({(0, at): at for at in range(len(text))})
    found = dict(_ranges([[(_Token.of(number, asked, at), 1.0) for at, number in enumerate(numbers)]], places))
    assert found[0, 0] == (0, 3) and found[0, 3] == found[0, 3002] == (3, 3003) and found[0, 3005] == (3003, 3006)
    assert len(found) == len(text) == places.asked
