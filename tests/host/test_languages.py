"""The texts of the nodes in the languages of the front end: complete, of today's English, and found by the host."""

from __future__ import annotations

import asyncio
import json
import re

import lora_ensemble
import pytest
from lora_ensemble.host.look.panel import SAID
from lora_ensemble.nodes import menu
from lora_ensemble.tests.server import Server
from lora_ensemble.tools.languages import FOLDER, LANGUAGES, english, flat, nested, read, translated

NODES = asyncio.run(asyncio.run(lora_ensemble.comfy_entrypoint()).get_node_list())
SCHEMAS = [node.GET_SCHEMA() for node in NODES]
NEW = english(SCHEMAS)
each_language = pytest.mark.parametrize("language", LANGUAGES)


def test_english_is_that_of_the_schemas():
    """`run.py _with - lora_ensemble.tools.languages` writes it anew."""
    assert read("en") == NEW


@each_language
def test_every_text_of_every_node_is_translated(language):
    """The command lists what is missing."""
    texts = flat(read(language))
    assert [path for path in flat(NEW) if not texts.get(path)] == []
    assert [path for path in texts if path not in flat(NEW)] == []


@each_language
def test_sentences_are_not_left_in_english(language):
    texts = flat(read(language))
    assert [path for path, text in texts.items() if path[-1] in ("description", "tooltip") and text.isascii()] == []


@each_language
def test_one_text_has_one_translation(language):
    """Sockets that several nodes share say the same on each; a name of one word may be two things."""
    texts, found = flat(read(language)), {}
    for path, text in flat(NEW).items():
        if path[-1] != "name":
            assert found.setdefault(text, texts.get(path)) == texts.get(path), text


@each_language
def test_choices_and_names_of_other_inputs_are_those_of_the_node(language):
    """A sentence explains choices by the names that they have on the widget, which are not translated."""
    texts = flat(read(language))
    for schema in SCHEMAS:
        for part in schema.inputs:
            options = [option for option in getattr(part, "options", None) or () if isinstance(option, str)]
            for option in options:
                if f"{option}:" in (part.tooltip or ""):
                    text = texts.get((schema.node_id, "inputs", part.id, "tooltip"), "")
                    assert option in text, f"{language}: {schema.node_id}.{part.id} does not explain {option}"


@each_language
def test_the_shelves_of_the_menu_are_translated(language):
    """All of them and none that is gone, in words of the language; `LoRA` is a name."""
    found = json.loads((FOLDER / language / "main.json").read_text(encoding="utf-8"))
    assert set(found["nodeCategories"]) == {menu.ROOT, *menu.SHELVES}
    assert not any(text.isascii() for text in found["nodeCategories"].values())
    assert {part for schema in SCHEMAS for part in schema.category.split("/")} == set(found["nodeCategories"])


@each_language
def test_the_panel_speaks_the_language(language):
    """All that it is sent and all that it says by itself, with the same {places}; and its setting has a name."""
    script = (FOLDER.parent / "web" / "panel.js").read_text(encoding="utf-8")
    own = re.findall(r"\bsay\(\s*'([^']+)'", script) + re.findall(r"^const JOINED = '(.+)'$", script, re.MULTILINE)
    assert len(own) == 5
    main, settings = (json.loads((FOLDER / language / f"{name}.json").read_text(encoding="utf-8"))
                      for name in ("main", "settings"))
    words = main["loraEnsemble"]
    assert set(words) == {*SAID, *own} and not any(text.isascii() for text in words.values())
    assert all(sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", words[text])) for text in words)
    (setting,) = re.findall(r"^const SETTING = '(.+)'$", script, re.MULTILINE)
    assert set(settings) == {setting.replace(".", "_")} and not settings[setting.replace(".", "_")]["name"].isascii()


def test_the_host_serves_them(server: Server):
    served = server.json("/i18n")
    for language in ("en", *LANGUAGES):
        assert {name: served[language]["nodeDefs"][name] for name in NEW} == read(language)
    assert served["ja"]["nodeCategories"]["compose"] == "組み合わせ"
    assert served["ja"]["loraEnsemble"]["whole run"] == "全ステップ"
    assert served["ja"]["settings"]["LoRAEnsemble_Panel"]["name"]


HELP = sorted((FOLDER.parent / "web" / "docs").glob("*/*.md"))


@pytest.mark.parametrize("page", HELP, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_translated_help_pages_name_every_input(page):
    """They stand where the front end looks for them, under the name that the node has in their language."""
    node, language, text = page.parent.name, page.stem, page.read_text(encoding="utf-8")
    assert language in LANGUAGES and text.startswith(f"# {read(language)[node]['display_name']}\n")
    _, _, table = text.partition("| --- | --- |\n")
    rows = re.findall(r"^\| (\w+) \|", table.partition("\n\n")[0], flags=re.MULTILINE)
    assert rows == [part.id for part in next(schema for schema in SCHEMAS if schema.node_id == node).inputs]


def test_every_node_has_a_help_page_in_japanese():
    assert {page.parent.name for page in HELP if page.stem == "ja"} == set(NEW)


def test_no_language_is_left_over():
    assert {path.name for path in FOLDER.iterdir()} == {"en", *LANGUAGES}


def test_a_text_that_changes_loses_its_translation_and_one_that_comes_again_has_it():
    old = {"A": {"display_name": "one", "description": "two"}}
    before = {"A": {"display_name": "eins", "description": "zwei"}}
    new = {"A": {"display_name": "one", "description": "three"}, "B": {"description": "two", "display_name": "four"}}
    entries, missing = translated(new, old, before)
    assert entries == {"A": {"display_name": "eins"}, "B": {"description": "zwei"}} and missing == ["three", "four"]
    entries, missing = translated(new, old, before, {"three": "drei", "four": "vier"})
    assert missing == [] and entries["A"]["description"] == "drei" and entries["B"]["display_name"] == "vier"


def test_flat_and_nested_are_opposites():
    assert nested(flat(NEW)) == NEW
    assert json.loads(json.dumps(NEW)) == NEW
