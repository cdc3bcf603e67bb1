"""The texts of the nodes in the languages of the front end: complete, of today's English, and found by the host."""

from __future__ import annotations

import asyncio
import json
import re

import lora_ensemble
import pytest
from lora_ensemble.host.look.panel import SAID
from lora_ensemble.nodes import menu
from lora_ensemble.nodes.border import FILES
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
def test_tooltips_call_other_inputs_as_the_node_shows_them(language):
    """A name that is a choice as well, and the alpha of a file, are no names of inputs."""
    texts = read(language)
    for schema in SCHEMAS:
        entry = texts[schema.node_id]
        other = {key for key, words in entry["inputs"].items() if words.get("name", key) != key}
        other -= {"alpha", *(str(option) for part in schema.inputs for option in getattr(part, "options", None) or ())}
        for key, words in (*entry["inputs"].items(), *entry["outputs"].items()):
            found = other & set(re.findall(r"[a-z_]+", words.get("tooltip", "")))
            assert not found, f"{language}: {schema.node_id}.{key} says {found}"


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


HELP, ENGLISH = (sorted((FOLDER.parent / "web" / "docs").glob(pages)) for pages in ("*/*.md", "*.md"))


each_help_page = pytest.mark.parametrize("page", HELP, ids=lambda page: f"{page.parent.name}-{page.stem}")


@each_help_page
def test_translated_help_pages_name_every_input(page):
    """They stand where the front end looks for them, under the name that the node has in their language, and call each
    input as the node shows it, with the name that workflows and messages have for it."""
    node, language, text = page.parent.name, page.stem, page.read_text(encoding="utf-8")
    assert language in LANGUAGES and text.startswith(f"# {read(language)[node]['display_name']}\n")
    _, _, table = text.partition("| --- | --- |\n")
    rows = re.findall(r"^\| (.+?) \|", table.partition("\n\n")[0], flags=re.MULTILINE)
    assert rows == [key if key == words["name"] else f"{words['name']}（{key}）"
                    for key, words in read(language)[node]["inputs"].items() if "name" in words]


@pytest.mark.parametrize("page", [*HELP, *ENGLISH], ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_help_pages_name_every_choice(page):
    """In the row of the input, but for lists of files and of the host's samplers."""
    node, text = page.parent.name if page in HELP else page.stem, page.read_text(encoding="utf-8").replace("\\*", "*")
    for part in next(schema for schema in SCHEMAS if schema.node_id == node).inputs:
        options = [option for option in getattr(part, "options", None) or () if isinstance(option, str)]
        if part.id in (*FILES, "sampler_name", "scheduler") or not options:
            continue
        (row,) = re.findall(rf"^\| (?:[^|]+（)?{part.id}(?:）)? \|.*", text, flags=re.MULTILINE)
        assert [option for option in options if option not in row] == []


@each_help_page
def test_translated_help_pages_call_nodes_by_their_names(page):
    """Those of the language; a name may be without what it has in parentheses."""
    theirs, text = read(page.stem), page.read_text(encoding="utf-8")
    for node, words in NEW.items():
        if f"**{words['display_name']}**" in text:
            assert words["display_name"] == theirs[node]["display_name"].partition("（")[0]


@each_help_page
def test_translated_help_pages_have_the_pictures_of_the_english_one(page):
    pictures = [re.findall(r"!\[.+\]\((.+)\)", path.read_text(encoding="utf-8"))
                for path in (page, FOLDER.parent / "web" / "docs" / f"{page.parent.name}.md")]
    assert pictures[0] == pictures[1]


@each_help_page
def test_emphasis_of_translated_help_pages_is_seen_as_such(page):
    """Markdown does not end it between a full-width mark and a letter: a blank has to stand there."""
    text = re.sub(r"`[^`\n]*`", "x", page.read_text(encoding="utf-8"))
    for found in re.finditer(r"(\*{1,2})([^*\s][^*\n]*)\1", text):
        inner, before, after = found[2], text[found.start() - 1], text[found.end()]
        assert inner[0].isalnum() or not before.isalnum(), found[0]
        assert inner[-1].isalnum() or not after.isalnum(), found[0]


@each_help_page
def test_rows_of_numbers_are_those_of_the_english_page(page):
    """Steps, thresholds and strengths that were measured again are in all languages."""
    def rows(text: str) -> set[str]:
        return {",".join(re.findall(r"[\d.]+", row)) for row in re.findall(
            r"\d[\d.]*(?:(?:, and |, | and |、|，| 和 )\d[\d.]*){3,}", text)}

    english_page = FOLDER.parent / "web" / "docs" / f"{page.parent.name}.md"
    assert rows(page.read_text(encoding="utf-8")) <= rows(english_page.read_text(encoding="utf-8"))


@each_language
def test_marks_are_those_of_the_language(language):
    """Full-width ones beside its letters, as in ComfyUI's own texts."""
    pages = [page.read_text(encoding="utf-8") for page in HELP if page.stem == language]
    files = [path.read_text(encoding="utf-8") for path in (FOLDER / language).glob("*.json")]
    text = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)", "", "\n".join(pages + files), flags=re.DOTALL)
    marks = "(:;!?" + ("," if language == "zh" else "")
    assert re.findall(rf".*(?:[\u3040-\u9fff][{re.escape(marks)}]|[:;)][\u3040-\u9fff]).*", text) == []


@each_language
def test_every_node_has_a_help_page(language):
    assert {page.parent.name for page in HELP if page.stem == language} == set(NEW)


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
