"""The example workflows in the real front end, in a headless Chromium, in the classic canvas and in Nodes 2.0."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
from lora_ensemble.tests.browser import Browser
from lora_ensemble.tests.front_end import FrontEnd, Shown
from lora_ensemble.tests.server import Server
from lora_ensemble.tests.workflows import opened_on_small
from lora_ensemble.tools.thumbnails import SIDE
from PIL import Image
from safetensors.torch import save_file

from .builders import lora, shapes
from .small_checkpoints import lack_of, model

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
TITLE = 30  # the title bar lies above a node's position
LEGIBLE = 0.572  # where the classic canvas begins to draw text
SMALLER = {"sd15_methods_grid": 0.53}
"""Workflows that are too large for that: five samplers side by side."""
PICTURES = os.environ.get("FRONT_END_PICTURES")
"""A folder for what the pages look like; the tests on GitHub keep it as an artefact."""
if PICTURES:
    Path(PICTURES).mkdir(parents=True, exist_ok=True)

each_template = pytest.mark.parametrize("name", TEMPLATES)


@pytest.fixture(scope="module", params=["classic", "nodes_2"])
def page(request: pytest.FixtureRequest, browser: Browser, server: Server) -> FrontEnd:
    return FrontEnd(browser, server, nodes_2=request.param == "nodes_2")


def overlaps(nodes: list[Shown]) -> list[tuple[str, str]]:
    return [(a.title, b.title) for i, a in enumerate(nodes) for b in nodes[:i]
            if a.x < b.x + b.width and b.x < a.x + a.width
            and a.y - TITLE < b.y + b.height + b.footer and b.y - TITLE < a.y + a.height + a.footer]


def sticking_out(nodes: list[Shown], groups: list[tuple[str, float, float, float, float]]) -> list[tuple[str, str]]:
    """Nodes that begin in a group and end outside of it."""
    return [(node.title, title) for node in nodes for title, x, y, width, height in groups
            if x <= node.x < x + width and y <= node.y < y + height
            and (node.x + node.width > x + width or node.y + node.height > y + height)]


def cut_off(node: Shown) -> list[str]:
    """What of a node's texts does not fit."""
    return node.squeezed + ["a name on the canvas"] * bool(node.short) + ["lines"] * bool(node.hidden)


@each_template
def test_templates_open_tidy(page: FrontEnd, name: str):
    """Every node is known and has its place, all of it can be read, and the console says nothing of ours."""
    said = len(page.complaints())
    page.open_template(name)
    if PICTURES:
        page.browser.picture(Path(PICTURES, f"{name}-{'nodes_2' if page.nodes_2 else 'classic'}.png"))
    nodes = page.nodes()
    assert [node.kind for node in nodes if not node.known] == []
    assert overlaps(nodes) == []
    assert sticking_out(nodes, page.groups()) == []
    assert {node.title: cut_off(node) for node in nodes if cut_off(node)} == {}
    assert page.zoom() >= SMALLER.get(name, LEGIBLE)
    assert page.complaints()[said:] == []


@pytest.mark.parametrize("word", ["lora", "compare", "cfg", "skip", "style", "region", "multi"])
def test_the_search_for_nodes_shows_ours_among_the_first(page: FrontEnd, word: str):
    """It finds by aliases, but puts names with the word first, then what the front end has counted most, which is
    the host's alone: names of ours have the words."""
    assert any(is_ours(kind) for kind, _ in page.search(word)[:5])


@pytest.mark.parametrize("word", ["multi lora", "multiple loras", "mix loras", "routed", "skip cfg", "regional lora",
                                  "lora stack", "trigger words"])
def test_the_search_for_nodes_finds_ours_by_what_they_do(page: FrontEnd, word: str):
    assert is_ours(page.search(word)[0][0])


FAMILY, LORAS = "SDXL", ("her.safetensors", "him.safetensors", "paint.safetensors")

TOLD = ("KSampler", "LoRAEnsembleRouted")
"""The nodes that tell the story of a run."""


@pytest.fixture
def routed(server: Server) -> Iterator[dict]:
    """`sdxl_routed` in the front end's format on a small model, with files for its LoRAs."""
    if reason := lack_of(FAMILY):
        pytest.skip(reason)
    files = [server.base / "models" / "loras" / name for name in LORAS]
    for seed, file in enumerate(files):
        save_file({key: value.contiguous() for key, value in lora(shapes(model(FAMILY)), seed).items()}, file)
    graph = server.json("/api/workflow_templates/lora-ensemble/sdxl_routed.json")
    yield opened_on_small(graph, FAMILY, LORAS, steps=6)
    for file in files:
        file.unlink()


def test_a_template_that_is_queued_tells_its_story(page: FrontEnd, routed: dict):
    """Text on the nodes that compose and sample, the panel, the report; and the workflow is saved as it was."""
    said = len(page.complaints())
    page.open_graph(routed, "queued")
    before = page.saved()
    seen = page.run()
    assert seen["over"] == "success"
    if PICTURES:
        page.browser.picture(Path(PICTURES, f"queued-{'nodes_2' if page.nodes_2 else 'classic'}.png"))
    for kind in TOLD:
        texts = seen["texts"][kind]
        assert len(texts) > 1 and "of 6 steps: Routed" in texts[0] and "6 of 6 steps in" in texts[-1]
    first, last = seen["panels"][0], seen["panels"][-1]
    assert all(name.removesuffix(".safetensors") in first for name in LORAS)
    assert "of 6 steps" in first and "6 of 6 steps" in last and "picture" in last and last.count("%") == 3
    assert page.shows_a_picture("PreviewImage") and page.shows_a_picture("SaveImage")
    (file,) = sorted((page.server.base / "output").rglob("*.png"), key=lambda path: path.stat().st_mtime)[-1:]
    info = Image.open(file).info
    kinds = {node["type"] for node in routed["nodes"]}
    assert {node["type"] for node in json.loads(info["workflow"])["nodes"]} == kinds
    assert {node["class_type"] for node in json.loads(info["prompt"]).values()} == kinds - {"MarkdownNote"}
    nodes = page.nodes()
    assert overlaps(nodes) == []
    assert [node.hidden for node in nodes if node.kind in TOLD] == [0, 0]
    assert page.saved() == before
    assert page.complaints()[said:] == []


@pytest.mark.usefixtures("routed")
@pytest.mark.parametrize("name", ["sdxl_prompt", "sdxl_lora_info", "sd15_methods_grid", "sd15_spectrum",
                                  "sdxl_est_lora_measured", "sdxl_lightning_routed"])
def test_what_nodes_show_of_a_run_has_its_room_in_the_template(page: FrontEnd, server: Server, name: str):
    """A node grows with its text, its panel, its picture."""
    graph = server.json(f"/api/workflow_templates/lora-ensemble/{name}.json")
    page.open_graph(opened_on_small(graph, FAMILY, cycle(LORAS), steps=16), name)  # Switch gives each a turn
    assert page.run()["over"] == "success"
    nodes = page.nodes()
    assert overlaps(nodes) == []
    assert sticking_out(nodes, page.groups()) == []


def is_ours(name: str) -> bool:
    return name.startswith("LoRAEnsemble")


CARD = "document.querySelector('[role=dialog] [data-testid=template-workflow-%s]')"


def test_the_template_browser_shows_the_thumbnails(page: FrontEnd):
    """As one finds them: by the pack's shelf, with the picture that is beside each workflow."""
    name, labels = "sdxl_four_loras", "[...document.querySelectorAll('[role=dialog] *')].filter(e => " \
                                      "['lora-ensemble', 'LoRA Ensemble'].includes(e.textContent.trim()))"
    page.browser.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates').then(() => true)")
    try:
        page.browser.wait_for(f"{labels}.length > 0")
        page.browser.evaluate(f"{labels}.pop().click()")
        assert page.browser.wait_for(f"{CARD % name}?.querySelector('img')?.naturalWidth") == SIDE
    finally:
        page.browser.press("Escape")


def test_a_workflow_that_is_not_tidy_is_noticed(page: FrontEnd, server: Server):
    """One node over another, a prompt that does not fit, a node of a type that there is not."""
    graph = server.json("/api/workflow_templates/lora-ensemble/flux_merge.json")
    first, second = [node for node in graph["nodes"] if node["type"] == "LoRAEnsembleLoRA"][:2]
    second["pos"] = [first["pos"][0], first["pos"][1] + 100]
    prompt = next(node for node in graph["nodes"] if node["type"] == "CLIPTextEncode")
    prompt["widgets_values"], prompt["size"] = ["a line\n" * 40], [prompt["size"][0], 60]
    page.open_graph(graph, "untidy")
    nodes = page.nodes()
    assert (second["title"], first["title"]) in overlaps(nodes)
    assert "lines" in cut_off(next(node for node in nodes if node.id == prompt["id"]))
    page.browser.evaluate("console.error('LoRAEnsemble: wrong')")
    page.browser.wait_for("true")
    assert page.complaints()[-1] == "LoRAEnsemble: wrong"
    graph["nodes"][-1]["type"] = "NoSuchNode"
    page.open_graph(graph, "unknown")
    assert [node.kind for node in page.nodes() if not node.known] == ["NoSuchNode"]


@pytest.mark.parametrize("page", ["classic"], indirect=True)
def test_without_the_panel_all_else_works(page: FrontEnd, routed: dict):
    """A front end that cannot load it says so, and has text and pictures as before."""
    page.browser.call("Network.enable")
    page.browser.call("Network.setBlockedURLs", urls=["*/lora-ensemble/panel.js*"])
    try:
        page.load()
        said = len(page.complaints())
        page.open_graph(routed, "without")
        seen = page.run()
        assert seen["over"] == "success" and seen["panels"] == []
        assert "6 of 6 steps in" in seen["texts"]["LoRAEnsembleRouted"][-1]
        assert page.complaints()[said:] == []
    finally:
        page.browser.call("Network.setBlockedURLs", urls=[])  # for the page that is loaded next: this test is the last
