"""Where a prompt parts into clauses, and where one LoRA's end and another's begin."""

from __future__ import annotations

import pytest
from lora_ensemble.methods.prompt import find_clauses

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
