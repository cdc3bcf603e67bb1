"""README, the pages for developers and the repository's habits: links that lead somewhere, commands that there are."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOME = "https://github.com/lora-ensemble/lora-ensemble"
LEFT_OUT = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("web/docs/**/*.md"),
                *ROOT.glob("benchmarks/*.md"), *ROOT.glob("testbed/*.md")})
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def links(text: str) -> list[str]:
    """The targets of a page's links and pictures."""
    inline = re.findall(r"\]\(([^)\s]+)\)", text)
    return inline + re.findall(r"^\[[^\]]+\]: (\S+)", text, flags=re.MULTILINE)


def in_archive(path: Path) -> bool:
    """Whether the registry's archive of the pack has a file."""
    name = path.resolve().relative_to(ROOT).as_posix()
    return not any(name == entry.rstrip("/") or name.startswith(f"{entry.rstrip('/')}/") for entry in LEFT_OUT)


def folder_of(page: Path) -> Path:
    """Where a page's pictures lie: ComfyUI shows help pages of all languages as if they lay in web/docs."""
    help_pages = ROOT / "web" / "docs"
    return help_pages if help_pages in page.parents else page.parent


@each_page
def test_tables_are_whole(page):
    """A `|` in a cell, in code too, ends the cell."""
    rows = re.findall(r"^\|.*|^(?!\|)", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for above, row in pairwise(rows):
        assert not (above and row) or row.count("|") == above.count("|"), row


@each_page
def test_links_lead_somewhere_in_a_clone_and_in_an_archive(page):
    for target in links(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith(f"{HOME}/blob/main/") or path.startswith(f"{HOME}/tree/main/"):
            file = ROOT / path.split("/main/", 1)[1]
        elif re.match(r"[a-z]+:", path):
            continue
        else:
            file = folder_of(page) / path if path else page
            assert in_archive(file) or not in_archive(page), f"{target} is not in the archive"
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target


@pytest.mark.parametrize("page", [page for page in PAGES if "web" in page.parts], ids=lambda page: page.name)
def test_help_pages_have_no_link_to_each_other(page):
    """ComfyUI shows them in a panel, of which it makes no page with an address: such a link leads nowhere there."""
    targets = re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not re.match(r"https?:", target)] == []


def test_named_links_are_all_defined():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    defined = set(re.findall(r"^\[([^\]]+)\]: ", text, flags=re.MULTILINE))
    used = set(re.findall(r"\]\[([^\]]+)\]", text)) | set(re.findall(r"\[([a-z]+)\](?![\[(:])", text))
    assert used == defined


def test_the_archive_has_what_comfyui_reads():
    for name in ("__init__.py", "pyproject.toml", "README.md", "LICENSE", "nodes", "web", "example_workflows",
                 "locales", "subgraphs"):
        assert (ROOT / name).exists() and in_archive(ROOT / name)
    assert not in_archive(ROOT / "tests") and not in_archive(ROOT / "docs" / "developers.md")


def test_the_test_command_is_one():
    """What README says, what the tests on GitHub run."""
    command = "python3 run.py test"
    assert f"`{command}`" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"run: {command} " in (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")


def test_the_tests_on_github_keep_the_pictures_of_the_pages():
    """In the folder that the tests of the front end write into."""
    steps = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    (folder,) = re.findall(r"FRONT_END_PICTURES: (.+)", steps)
    (kept,) = re.findall(r"uses: actions/upload-artifact@v\d+\n +with:\n +name: pages\n +path: (.+)", steps)
    assert kept == folder


def test_commands_of_the_pages_are_there():
    text = (ROOT / "docs" / "developers.md").read_text(encoding="utf-8")
    modules = set(re.findall(r"lora_ensemble\.(tools\.\w+)", text))
    assert modules
    for module in modules:
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body), module


def test_every_paper_that_is_named_is_cited():
    """README's and the citation file's papers are the same, but for FreeFuse, whose method is not offered."""
    number = r"\d{4}\.\d{5}"
    named = set(re.findall(rf"arxiv\.org/abs/({number})", (ROOT / "README.md").read_text(encoding="utf-8")))
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert set(re.findall(rf"arXiv:({number})", cited)) == named | {"2510.23515"}
    assert re.findall(rf"arXiv:({number})", cited) == re.findall(rf"url: https://arxiv\.org/abs/({number})", cited)


def test_the_icon_of_the_registry_is_in_the_repository():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    where = re.search(r'^Icon = "https://raw\.githubusercontent\.com/lora-ensemble/lora-ensemble/main/(.+)"', project,
                      flags=re.MULTILINE)
    assert (ROOT / where[1]).is_file()


def test_the_version_is_one():
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert f"\nversion: {project}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
