"""Problems are told once."""

from __future__ import annotations

import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor

from lora_ensemble.engine.tell import Once, into
from lora_ensemble.methods.counted import any_step, counted, verb
from lora_ensemble.tests.test_architecture import ROOT


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


def test_numbers_have_their_nouns():
    assert [counted(number, "more layer") for number in (0, 1, 2, 1000)] == [
        "0 more layers", "1 more layer", "2 more layers", "1,000 more layers"]
    assert [any_step(number) for number in (1, 4)] == ["the only step", "any of the 4 steps"]
    assert [verb(number, many) for number in (1, 2) for many in ("have", "were", "are", "leave")] == [
        "has", "was", "is", "leaves", "have", "were", "are", "leave"]


SEVERAL = {"{branches} branches are evaluated", "{len(acting)} LoRAs", "{pictures} pictures", "{self.oldest} steps",
           "{CALLS:,} steps", "{CALLS:,} times"}
"""What is said of more than one alone."""


def test_no_line_counts_without_regard_to_one():
    """Guard: `1 LoRAs`."""
    nouns = "steps|LoRAs|layers|keys|paths|calls|evaluations|tokens|maps|notes|branches|pictures|runs|times|rows"
    found = [f"{path.relative_to(ROOT)}: {line.strip()}" for floor in ("host", "methods", "nodes")
             for path in sorted((ROOT / floor).rglob("*.py")) for line in path.read_text(encoding="utf-8").splitlines()
             if re.search(rf"f[\"'].*\{{[^{{}}]+\}} ({nouns})\b", line) and not any(text in line for text in SEVERAL)]
    assert not found, "\n".join(found)
