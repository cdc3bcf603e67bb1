"""Trigger words that other programs keep beside a LoRA file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from lora_ensemble.host.compose.apply import apply_method
from lora_ensemble.host.compose.auto import best_method
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.host.compose.placing import Placing
from lora_ensemble.host.files import beside as reader
from lora_ensemble.host.files.beside import paths_beside, read_beside
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.files.files import changes, path_of
from lora_ensemble.host.files.metadata import LETTERS, WORDS, Wording, wording
from lora_ensemble.host.look.info import infos, told
from lora_ensemble.host.words.known import lora_words, report
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.prompt import PromptTokens, find_clauses
from lora_ensemble.nodes.ensembles import LoRAEnsembleLoRA
from lora_ensemble.nodes.stack import _lines
from lora_ensemble.nodes.unused import unused
from safetensors.torch import save

from .builders import lora, plain, shapes
from .models import base

MB = 2**20
MANAGER = {"file_name": "one", "civitai": {"trainedWords": ["ohwx woman, red hair", "ohwx"], "images": [{"url": "x"}]}}
RGTHREE = {"trainedWords": [{"word": "sks", "civitai": True}, {"word": "1girl", "count": 20, "metadata": True},
                            {"word": "dog", "metadata": True, "count": 3, "user": True}, {"word": "typed"}]}
HELPER = {"id": 3, "trainedWords": ["(zwx style:1.2)"]}
WEB_UI = {"activation text": "krxn, <lora:one:0.8>, blue\nhat", "preferred weight": 0.7}
ENDS = (".metadata.json", ".safetensors.rgthree-info.json", ".civitai.info", ".json")
FOUND = {".metadata.json": ("ohwx woman", "red hair", "ohwx"),
         ".safetensors.rgthree-info.json": ("sks", "dog", "typed"), ".civitai.info": ("zwx style",),
         ".json": ("krxn", "blue", "hat")}
TABLES = dict(zip(ENDS, (MANAGER, RGTHREE, HELPER, WEB_UI), strict=True))


@pytest.fixture
def beside(raw, lora_folder: Path):
    """Writes a LoRA, or a file beside it by how its name ends."""
    (lora_folder / "sub").mkdir(exist_ok=True)
    name = raw(save({"a": torch.zeros(2)}), "sub/one.v2.safetensors")
    written: set[Path] = set()

    def write(end: str = "", content: object = None) -> str:
        if end:
            path = lora_folder / "sub" / f"one.v2{end}"
            path.unlink(missing_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
            written.add(path)
        return name

    yield write
    for path in written:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("end", ENDS)
def test_each_programs_own_file(end, beside):
    name = beside(end, TABLES[end])
    assert wording(name) == Wording(FOUND[end], where=f"one.v2{end}")


def test_the_first_that_names_words_is_asked(beside):
    """In a fixed order; what has none, or has other things, is passed over."""
    for end in reversed(ENDS):
        name = beside(end, TABLES[end])
        assert wording(name).trigger == FOUND[end]
    beside(".metadata.json", {"civitai": {"trainedWords": []}, "trainedWords": ["own"]})
    assert wording(name).trigger == ("own",)
    for table in ({"civitai": None}, {"civitai": {"trainedWords": [" ", ""]}, "trainedWords": "\n"}):
        beside(".metadata.json", table)
        assert wording(name).trigger == FOUND[ENDS[1]] and not wording(name).unread


def test_words_of_the_file_itself_win(raw, beside):
    beside(".json", WEB_UI)
    name = raw(save({"a": torch.zeros(2)}, {"modelspec.trigger_phrase": "own"}), "sub/one.v2.safetensors")
    assert wording(name) == Wording(("own",))


@pytest.mark.parametrize("table", [
    None, 3, "text", [], ["activation text"], {}, {"activation text": None}, {"activation text": 3},
    {"activation text": ["", 3, {}, None]}, {"activation text": " , \n,"}, {"activation text": {"a": "b"}},
    {"activation text": "<lora:x:1>"}, {"activation text": "\x00\x07"}])
def test_no_table_is_too_strange(table, beside):
    assert wording(beside(".json", table)) == Wording()


@pytest.mark.parametrize("table", [
    {"trainedWords": 3}, {"trainedWords": [3, None, "sks", {"word": 3}, {"word": None}, {}, {"word": ["x", 3]}]},
    {"trainedWords": {"word": "sks"}}, {"civitai": ["trainedWords"]}])
def test_no_list_is_too_strange(table, beside):
    for end in ENDS[:3]:
        found = wording(beside(end, table))
        assert found.trigger in ((), ("sks",), ("x",)) and not found.unread
        beside(end, {})


@pytest.mark.parametrize(("content", "reason"), [
    (b"{", "Expecting"), (b"", "Expecting value"), (b"\xff\xfe\x00", "codec"), (b"[" * 100_000, "recursion"),
    (b'{"activation text": "' + b"x" * MB + b'"}', "larger than 1 MB")])
def test_what_cannot_be_read_is_said_and_stops_nothing(content, reason, beside):
    name = beside(".metadata.json", content)
    found = wording(name)
    assert not found.trigger and "'one.v2.metadata.json' beside it cannot be read (" in found.unread
    assert reason in found.unread
    ensemble = LoRAEnsembleLoRA.execute(name, 1.0, 1.0, "auto").args[0]
    assert ensemble[0].name == name
    said = unused(LoRAEnsembleLoRA.define_schema(), {"lora_name": name})
    assert said == [found.unread]
    assert not unused(LoRAEnsembleLoRA.define_schema(), {"lora_name": name, "words": "typed"})
    beside(".json", WEB_UI)  # the next one is asked
    assert wording(name).trigger == FOUND[".json"] and wording(name).unread == found.unread


def test_a_file_that_nobody_may_open_is_said_and_the_next_one_is_asked(beside, monkeypatch):
    def refuse(path: str, mode: str):
        if path.endswith(".metadata.json"):
            raise PermissionError(13, "Permission denied")
        return open(path, mode)

    monkeypatch.setattr(reader, "open", refuse, raising=False)
    beside(".metadata.json", MANAGER)
    found = wording(beside(".json", WEB_UI))
    assert found.trigger == FOUND[".json"]
    assert "'one.v2.metadata.json' beside it cannot be read (" in found.unread and "Permission denied" in found.unread


def test_sizes_are_bounded(beside):
    words = [f"word {k}" for k in range(1000)]
    found = wording(beside(".metadata.json", {"trainedWords": ["y" * (LETTERS + 1), *words]}))
    assert found.trigger == tuple(words[:WORDS])
    content = json.dumps({"trainedWords": ["z"]}).encode()
    assert wording(beside(".metadata.json", content.ljust(MB))).trigger == ("z",)
    assert "larger" in wording(beside(".metadata.json", content.ljust(MB + 1))).unread


@pytest.mark.skipif(os.sep == "\\", reason="links need rights there")
def test_links(beside, lora_folder, tmp_path):
    """One to a file is that file, as it is for LoRAs; one that leads nowhere, to a folder or to itself is none."""
    name = beside(".json", WEB_UI)
    link = lora_folder / "sub" / "one.v2.civitai.info"
    (tmp_path / "elsewhere.info").write_text(json.dumps(HELPER))
    try:
        for target, words in ((tmp_path / "elsewhere.info", FOUND[".civitai.info"]), (tmp_path, FOUND[".json"]),
                              (tmp_path / "nowhere", FOUND[".json"]), (link, FOUND[".json"])):
            link.unlink(missing_ok=True)
            link.symlink_to(target)
            assert wording(name).trigger == words and not wording(name).unread
    finally:
        link.unlink()


def test_only_files_of_these_names_beside_it(beside):
    path = path_of(beside())
    assert paths_beside(path) == tuple(os.path.join(os.path.dirname(path), f"one.v2{end}") for end in ENDS)
    assert read_beside(path) == ((), "", "")


def test_a_change_of_the_words_is_noticed(beside):
    """By a node that has the name, and by one to which it comes over a link. A change that is none of words is none:
    managers write there what people do with their pages."""
    name = beside()
    seen, counted = [], []

    def look():
        wording(name)
        seen.append(LoRAEnsembleLoRA.fingerprint_inputs(lora_name=name))
        counted.append(LoRAEnsembleLoRA.fingerprint_inputs())

    look()
    look()
    assert seen[0] == seen[1] and counted[0] == counted[1] == str(changes())
    beside(".civitai.info", HELPER)
    look()
    beside(".civitai.info", {"trainedWords": ["zwx"]})
    look()
    assert len(set(seen)) == 3 and len(set(counted)) == 3
    beside(".civitai.info", {"trainedWords": ["zwx"], "favorite": True})
    look()
    assert seen[-1] == seen[-2] and counted[-1] == counted[-2]


def test_where_words_are_from_is_said(beside, loras):
    name = beside(".civitai.info", HELPER)
    words = lora_words((LoRASpec(name, 1, 1), LoRASpec(name, 1, 1, words="typed")))
    assert words[0].where == "one.v2.civitai.info" and words[0].triggers == ("zwx style",)
    prompt = PromptTokens("a zwx style, typed", 9, tuple((k, k + 1, (k,)) for k in range(18)))
    lines = report(find_clauses(prompt, words)).splitlines()
    assert "(trigger words of one.v2.civitai.info)" in lines[0] and "(its words)" in lines[1]
    other = find_clauses(PromptTokens("a cat", 2), words[:1]).loras[0]
    assert other.reason == 'the trigger words of one.v2.civitai.info, "zwx style", are not in the prompt'


def test_rows_and_auto_go_by_them(beside):
    name = beside(".civitai.info", HELPER)
    beside(".metadata.json", b"{")
    ensemble = (LoRASpec(name, 1, 1), LoRASpec(name, 0.5, 0.5, words="typed"))
    lines = _lines(ensemble, by_words=True, with_clip=True)
    assert lines[0].endswith("trigger words of one.v2.civitai.info: zwx style") and lines[1].endswith("words typed")
    assert "'one.v2.metadata.json' beside it cannot be read" in lines[0] and "cannot be read" not in lines[1]
    assert best_method(ensemble, True).method == "Routed"
    beside(".civitai.info", {})
    assert best_method(ensemble, True).method == "Merge"


def test_a_method_that_goes_by_words_says_what_it_could_not_read(loras, lora_folder):
    """One that does not says nothing of them."""
    model = base("SD15")
    name = loras(lora(shapes(model), 1), name="described.safetensors")
    note = lora_folder / "described.json"
    try:
        note.write_text("{")
        specs = (LoRASpec(name, 1, 0, words="red hat"), LoRASpec(name, 0.5, 0))
        made = [apply_method(model, None, specs, plain(Merge), "LoRAs", placing=Placing(where))[0]
                for where in ("words", "masks")]
        told = [[line for line in each.get_attachment(KEY).applied[0].problems if "described.json" in line]
                for each in made]
        assert len(told[0]) == 1 and f"'{name} (row 2)'" in told[0][0] and not told[1]
    finally:
        note.unlink()


def test_the_information_says_where_words_are_from(loras, lora_folder):
    model = base("SD15")
    name = loras(lora(shapes(model), 1), name="described.safetensors")
    note = lora_folder / "described.json"
    try:
        note.write_text(json.dumps(WEB_UI))
        assert "trigger words: krxn, blue, hat (in described.json)" in told(
            infos(model, None, (LoRASpec(name, 1, 0),), "LoRA Info"), "SD15")
        note.write_text("{")
        text = told(infos(model, None, (LoRASpec(name, 1, 0),), "LoRA Info"), "SD15")
        assert "trigger words: not said in the file" in text and "'described.json' beside it cannot be read" in text
    finally:
        note.unlink()
