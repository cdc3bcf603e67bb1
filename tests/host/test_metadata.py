"""Trigger words and tags of LoRA files, and the junk that stands in their place."""

from __future__ import annotations

import json

import pytest
from lora_ensemble.host.files.metadata import LETTERS, TAGS, WORDS, Wording, wording, wording_of
from lora_ensemble.host.words.known import USUAL, usual


def header(metadata: object) -> bytes:
    text = json.dumps({"__metadata__": metadata, "a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    return len(text).to_bytes(8, "little") + text


def test_the_words_of_a_file(raw):
    tags = {"10_ohwx": {"ohwx woman": 20, "red hair ": 12, "smile": 3}, "5_reg": {"red hair": 20, "night": 1}}
    name = raw(header({"modelspec.trigger_phrase": "ohwx woman, ", "ss_tag_frequency": json.dumps(tags),
                       "ss_trigger_words": json.dumps(["ohwx", "red\n hair"])}))
    assert wording(name) == Wording(("ohwx woman", "ohwx", "red hair"), ("red hair", "ohwx woman", "smile", "night"),
                                    (), ("red hair",))


@pytest.mark.parametrize(("counts", "trigger", "words"), [
    ({"ohwx": 20, "1girl": 20, "red hair": 16, "smile": 15}, "ohwx", "1girl red hair"),
    ({"ohwx": 20, "1girl": 10}, "ohwx", ""),
    ({"OHWX ": 20, "cat": 20}, "ohwx, sks", "cat"),
    ({f"tag {at}": 9 for at in range(20)}, "ohwx", " ".join(f"tag {at}" for at in range(USUAL))),
    ({}, "ohwx", ""),
])
def test_what_nearly_all_pictures_show_is_usual(counts, trigger, words):
    assert usual(wording_of({"modelspec.trigger_phrase": trigger,
                             "ss_tag_frequency": json.dumps({"a": counts})})) == words


def test_a_file_that_is_replaced_is_read_again(raw):
    name = raw(header({"ss_trigger_words": "one"}))
    assert wording(name).trigger == ("one",)
    raw(header({"ss_trigger_words": "another"}))
    assert wording(name).trigger == ("another",)


@pytest.mark.parametrize("content", [
    b"", b"x", b"\xff" * 8, (2**40).to_bytes(8, "little"), (4).to_bytes(8, "little") + b"null",
    (9).to_bytes(8, "little") + b"[[[[[[[[[", (100_000).to_bytes(8, "little") + b"[" * 100_000,
    (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
    header(None), header(3), header([]), header({}), header("text"),
])
def test_no_file_is_too_strange(raw, content):
    assert wording(raw(content)) == Wording()


@pytest.mark.parametrize("value", [
    None, 3, [], {}, "", " , ", "none", "[", "[3, null, {}]", '"', "x" * (LETTERS + 1), "a\x00b", "{", "[" * 100_000,
    ["x", 3][1:], True, float("nan"),
])
def test_no_entry_is_too_strange(value):
    assert wording_of({"modelspec.trigger_phrase": value}) in (Wording(), Wording(("[",)), Wording(("{",)),
                                                               Wording(('"',)))
    assert wording_of({"ss_tag_frequency": value}) == Wording()


@pytest.mark.parametrize("tables", [
    {"a": 3}, {"a": {"tag": "many"}}, {"a": {"tag": -1}}, {"a": {"tag": None}}, [{"tag": 3}], {"a": ["tag"]},
    {"a": {"": 3, "\n": 3}},
])
def test_no_table_of_tags_is_too_strange(tables):
    assert wording_of({"ss_tag_frequency": json.dumps(tables)}) == Wording()


def test_sizes_are_bounded():
    many = [f"word {at}" for at in range(1000)]
    found = wording_of({"ss_trigger_words": many, "ss_tag_frequency": json.dumps({"a": dict.fromkeys(many, 2**80)})})
    assert len(found.trigger) == WORDS and len(found.tags) == TAGS


def test_a_name_that_is_nowhere_is_an_error(lora_folder):
    with pytest.raises(ValueError, match="not in any of the 'loras' folders"):
        wording("nowhere.safetensors")
