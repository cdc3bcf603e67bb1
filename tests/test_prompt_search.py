"""Where a prompt parts into clauses, and where one LoRA's end and another's begin."""

from __future__ import annotations

import pytest
from lora_ensemble.methods.prompt import LoRAWords, PromptTokens, find_clauses, stand_in

from .test_prompt import A, B, loras_of, prompt_of

# (prompt, words of the LoRAs, clauses of each LoRA, clauses of none)
CASES = [
    # boundaries
    ("ohwx woman—sks dog", (A, B), [["ohwx woman"], ["sks dog"]], []),
    ("ohwx woman with built-in wings, sks", (A, B), [["ohwx woman with built-in wings"], ["sks"]], []),
    ("ohwx woman in  front\nof a sks house", (A, B), [["ohwx woman"], ["a sks house"]], []),
    # the last "and" between two LoRAs' words
    ("ohwx woman and very big brown shaggy sks dog", (A, B), [["ohwx woman"], ["very big brown shaggy sks dog"]], []),
    ("ohwx cat and woman and very big sks dog", (A, B), [["ohwx cat and woman"], ["very big sks dog"]], []),
    ("ohwx woman & very big brown shaggy sks dog", (A, B), [["ohwx woman"], ["very big brown shaggy sks dog"]], []),
    # else the last article, else the middle
    ("ohwx woman holding a cup the sks dog", (A, B), [["ohwx woman holding a cup"], ["the sks dog"]], []),
    ("ohwx woman very big brown sks dog", (A, B), [["ohwx woman very"], ["big brown sks dog"]], []),
    # marks are theirs to the letter, and what is around them is nobody's
    ("very tall [1: woman] smiling", (A,), [["woman"]], ["very tall", "smiling"]),
    ("[1: big [2: red] dog] asleep", (A, B), [["big red dog"], ["red"]], ["asleep"]),
    ("[1: [2: red] dog] asleep", (A, B), [["red dog"], ["red"]], ["asleep"]),
    ("ohwx woman very big [2: dog]", (A, B), [["ohwx woman very big"], ["dog"]], []),
    # only whole words are links, and a side says something by itself
    ('"and then" sky, "so and"', (A,), [[]], ['"and then" sky', '"so and"']),
    ("ohwx woman, left, sks", (A, B), [["ohwx woman"], ["sks"]], ["left"]),
    # a tag's parentheses are part of it
    ("sks \\(dog\\)", ("sks dog",), [[]], ["sks (dog)"]),
    # words that begin or end with a sign, or with a letter of a script without spaces, may touch any letters
    ("red@ohwx, 1", ("@ohwx",), [["red@ohwx"]], ["1"]), ("ohwx!red, 1", ("ohwx!",), [["ohwx!red"]], ["1"]),
    ("big狗, 1", ("狗",), [["big狗"]], ["1"]), ("狗big, 1", ("狗",), [["狗big"]], ["1"]),
]


@pytest.mark.parametrize(("text", "words", "own", "others"), CASES)
def test_clauses(text, words, own, others):
    found = find_clauses(prompt_of(text), loras_of(words))
    assert [[clause.text for clause in lora.clauses] for lora in found.loras] == own
    assert [clause.text for clause in found.others] == others


def test_longer_words_come_first():
    """Whoever's they are."""
    for words in (("red hair", "woman with red hair"), ("woman with red hair", "red hair")):
        found = find_clauses(prompt_of("a woman with red hair"), loras_of(words))
        whole, part = sorted(found.loras, key=lambda lora: not lora.clauses)
        assert whole.clauses[0].text == "a woman with red hair" and not part.clauses
        assert f'"red hair" belong to {whole.name}' in part.reason


@pytest.mark.parametrize(("rows", "tokens"), [((), ((0, 1), (2,))), (((5, 8, 2),), ((0,), (1, 2)))])
def test_a_token_of_two_loras_words_is_one_loras(rows, tokens):
    """The marked one's, else the first one's."""
    prompt = PromptTokens("ohwx sks", 3, ((0, 4, (0, 1)), (5, 8, (1, 2))), rows)
    found = find_clauses(prompt, loras_of((A, B)))
    assert tuple(lora.tokens for lora in found.loras) == tokens
    one = PromptTokens("ohwx sks", 3, ((0, 4, (0,)), (5, 8, (0,))), rows)
    found = find_clauses(one, loras_of((A, B)))
    assert "share their tokens" in found.loras[0 if rows else 1].reason


def test_words_that_the_encoder_does_not_read_are_not_said_to_be_anothers():
    """Least of all by a LoRA of which two phrases meet."""
    prompt = PromptTokens("a cat, ohwx woman", 2, ((0, 1, (0,)), (2, 5, (1,)), (7, 11, ()), (12, 17, ())))
    (lora,) = find_clauses(prompt, loras_of(("ohwx woman, ohwx",))).loras
    assert not lora.clauses and lora.reason == "the text encoder does not read as far as its words"


def test_a_token_of_a_loras_words_is_no_other_clauses():
    prompt = PromptTokens("ohwx, dog", 2, ((0, 4, (0,)), (6, 9, (0, 1))))
    assert [clause.tokens for clause in find_clauses(prompt, loras_of((A,))).others] == [(1,)]


@pytest.mark.parametrize(("text", "typed", "instead"), [
    ("[1: cat], a cat", "cat = tiger", "tiger, a cat"),  # the other one is nobody's
    ("ohwx woman, dog", "ohwx = cat, ohwx woman = girl", "girl, dog"),
    ("ohwx woman, dog", "ohwx woman = girl, ohwx = cat", "girl, dog"),
    ("ohwx woman red", "ohwx woman = girl, woman red = boy", "ohwx boy")])
def test_what_stands_in_for_which_words(text, typed, instead):
    assert stand_in(prompt_of(text), [LoRAWords("x", typed)])[0] == instead


def test_nothing_stands_in_for_words_that_are_not_there():
    (lora,) = find_clauses(prompt_of("a dog"), [LoRAWords("x", "", (A,), "cat")]).loras
    assert lora.instead == ()


def test_clauses_of_a_text_with_stand_ins_are_in_its_order_and_each_is_known_once():
    loras = [LoRAWords("x", f"{A} = cat"), LoRAWords("y", B)]
    assert stand_in(prompt_of("sks dog, ohwx"), loras) == ("sks dog, cat", ((0, 7, 2), (9, 12, 1)))
    assert find_clauses(prompt_of("[1: [2: cat]], dog"), loras).spans == ((0, 3), (5, 8))
