"""Problems are told once."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor

from lora_ensemble.engine.tell import Once, into


def test_the_same_words_are_said_once():
    said = []
    tell = Once(lambda *words: said.append(words))
    for words in (("a", "b"), ("a", "b"), ("a", "c"), ("a",), ("a", "c")):
        tell(*words)
    assert said == [("a", "b"), ("a", "c"), ("a",)]


def test_what_is_about_the_same_is_said_once():
    """In other words too: a number in a sentence may change from call to call."""
    said = []
    tell = Once(said.append)
    for count in range(3):
        tell(f"{count} rows", about=("layer", 1))
    tell("2 rows", about=("layer", 2))
    assert said == ["0 rows", "2 rows"]


class Slow(str):
    """Words that leave another thread the time to tell them as well."""

    def __hash__(self) -> int:
        time.sleep(0.02)
        return super().__hash__()


def test_two_devices_meet_the_same_at_once():
    said, words = [], Slow("no room")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(Once(said.append), [words] * 4))
    assert said == ["no room"]


def test_problems_of_a_run(caplog):
    problems = ["known"]
    tell = into(problems)
    with caplog.at_level(logging.WARNING, logger="lora_ensemble"):
        for problem in ("one", "two", "one"):
            tell(problem)
    assert problems == ["known", "one", "two"] and caplog.messages == ["one", "two"]
