"""The panel on a method's node in the real front end (web/panel.js): inside subgraphs, and in the page's language."""

from __future__ import annotations

import json
from itertools import cycle

import pytest
from lora_ensemble.tests.front_end import RUN, SETTLED, FrontEnd
from lora_ensemble.tests.workflows import opened_on_small
from safetensors.torch import load_file, save_file

from .test_front_end import FAMILY, LORAS, page, routed  # noqa: F401  (fixtures)

WRAP = """(() => {
  let inner = app.graph._nodes.filter(node => node.type.startsWith('LoRAEnsemble') && node.type.match(/LoRA$|Routed/))
  for (let depth = 0; depth < %d; depth++) inner = [app.graph.convertToSubgraph(new Set(inner)).node]
  return app.graph._nodes.length
})()"""
STEP_IN = """(() => {
  const node = app.canvas.graph._nodes.find(node => node.isSubgraphNode?.())
  if (node) app.canvas.openSubgraph(node.subgraph, node)
  return !!node
})()"""
STEP_OUT = "(app.canvas.setGraph(app.rootGraph), true)"
SHOWN = """JSON.stringify([...document.querySelectorAll('.lora-ensemble-panel')]
  .filter(panel => panel.checkVisibility()).map(panel => panel.innerText))"""
SAVED = """JSON.stringify((app.graph.serialize().definitions?.subgraphs ?? []).flatMap(graph => graph.nodes)
  .filter(node => node.type.startsWith('LoRAEnsemble'))
  .map(node => [node.id, [...node.size].map(Math.round), node.widgets_values, node.properties]))"""
COMMAND = "app.extensionManager.command.execute(%s).then(() => true)"
TEXT_OF = """JSON.stringify(app.graph._nodes.filter(node => node.type === '%s').flatMap(node => node.widgets ?? [])
  .filter(widget => widget.name.includes('text-preview')).map(widget => widget.value))"""
TEXT = TEXT_OF % "LoRAEnsembleRouted"
GIVEN = """(async () => {  // as the server says it of a node whose output it has from before
  const { api } = await import('/scripts/api.js')
  const node = String(app.graph._nodes.find(node => node.type === 'LoRAEnsembleRouted').id)
  api.dispatchCustomEvent('executed', {node, display_node: node, output: {text: ['Routed']}, prompt_id: 'of before'})
  return true
})()"""
CUT = """JSON.stringify([...document.querySelectorAll('.lora-ensemble-panel, .lora-ensemble-panel p')]
  .filter(e => e.checkVisibility() && (e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1))
  .map(e => e.innerText))"""
NARROWED = """(() => {
  const node = app.graph._nodes.find(node => node.widgets?.some(widget => widget.name === 'lora_ensemble_panel'))
  node.setSize([node.size[0] - 60, node.size[1]])
  return true
})()"""
WHOLE = """[...document.querySelectorAll('.lora-ensemble-panel ul')].every(
  list => list.clientHeight === list.scrollHeight)"""
MANY = """(async () => {  // a step of a run with 40 LoRAs
  const { api } = await import('/scripts/api.js')
  const node = String(app.graph._nodes.find(node => node.type === 'LoRAEnsembleRouted').id)
  const of = k => ({name: `<b>${k}</b>`, part: k / 40, strength: 1, light: '', dark: ''})
  const rows = Array.from({length: 40}, (_, k) => of(k))
  const panels = [{node, rows, head: [], foot: [], notes: [], more: []}]
  api.dispatchCustomEvent('lora_ensemble.run', {workflow: app.rootGraph.id, panels})
  return true
})()"""
LIST = """(() => {
  const list = document.querySelector('.lora-ensemble-panel ul'), {x, y, width, height} = list.getBoundingClientRect()
  return [x + width / 2, y + height / 2, list.clientHeight, list.scrollTop, list.innerText.startsWith('<b>0</b>')]
})()"""
RENAMED = "(app.graph._nodes.find(node => node.type === 'LoRAEnsembleRouted').title = 'mine', true)"


def panels(page: FrontEnd) -> list[str]:  # noqa: F811
    """What is written on the panels in sight."""
    page.browser.evaluate(SETTLED)
    return json.loads(page.browser.evaluate(SHOWN))


@pytest.mark.parametrize(("page", "depth"), [("classic", 2), ("nodes_2", 1)], indirect=["page"], scope="module")
def test_the_panel_is_on_the_node_inside_its_subgraph(page: FrontEnd, routed: dict, depth: int):  # noqa: F811
    """A run is queued from outside; whoever steps in sees the panel, and it goes on while one is inside. Nothing of it
    is outside, or in the saved workflow."""
    said = len(page.complaints())
    page.open_graph(routed, "inside")
    page.browser.evaluate(WRAP % depth)
    before = page.browser.evaluate(SAVED)
    assert page.run()["over"] == "success"
    assert panels(page) == []
    for _ in range(depth):
        assert page.browser.evaluate(STEP_IN)
    (text,) = panels(page)
    assert "6 of 6 steps" in text and text.count("%") == 3
    seen = page.run()
    assert seen["over"] == "success" and any("1 of 6 steps" in each for each in seen["panels"])
    (text,) = panels(page)
    assert "6 of 6 steps" in text
    page.browser.evaluate(STEP_OUT)
    assert panels(page) == []
    assert page.browser.evaluate(SAVED) == before
    assert page.complaints()[said:] == []


def test_what_could_not_be_done_stays_on_the_node(page: FrontEnd, routed: dict):  # noqa: F811
    """The text of a run takes the place of what the node said before it; the panel has the reasons, in sight."""
    for node in routed["nodes"]:
        if node.get("title") == "Positive prompt":
            node["widgets_values"] = ["a street with shop windows"]
    page.open_graph(routed, "noted")
    assert page.run()["over"] == "success"
    (text,) = panels(page)
    assert all(f"LoRA '{name}.safetensors'" in text for name in ("her", "him")) and "everywhere" in text
    assert json.loads(page.browser.evaluate(CUT)) == []


@pytest.mark.usefixtures("routed")
@pytest.mark.parametrize(("name", "words"), [
    ("sd15_cache", "on cached features"), ("sd15_adaptive_guidance", "Calibrate Guidance finds it"),
    ("sdxl_loratorio_masks", "averaged over the picture, whole run")])
def test_nothing_on_the_panel_is_cut(page: FrontEnd, name: str, words: str):  # noqa: F811
    """Neither a long head or foot nor what a note says to do; nor the list where the node is made narrower, by which it
    is saved no higher."""
    graph = page.server.json(f"/api/workflow_templates/lora-ensemble/{name}.json")
    page.open_graph(opened_on_small(graph, FAMILY, cycle(LORAS), steps=6), name)
    assert page.run()["over"] == "success"
    (text,) = panels(page)
    assert words in text and json.loads(page.browser.evaluate(CUT)) == []
    before = page.saved()
    page.browser.evaluate(NARROWED)
    page.browser.evaluate(SETTLED)
    assert page.browser.evaluate(WHOLE) and (after := page.saved()) != before
    if not page.nodes_2:  # which makes room by itself, for lines of all widgets
        assert [size[1] for _, size, _ in after] == [size[1] for _, size, _ in before]


def command(page: FrontEnd, name: str) -> None:  # noqa: F811
    page.browser.evaluate(COMMAND % json.dumps(name))
    page.browser.evaluate(SETTLED)


def test_a_long_list_is_scrolled_and_stays_where_it_is(page: FrontEnd, routed: dict):  # noqa: F811
    """Guard: in Nodes 2.0 all of it stood on the node, and each step of a run began it anew at its top."""
    page.open_graph(routed, "many")
    for step in range(2):
        page.browser.evaluate(MANY)
        page.browser.evaluate(SETTLED)
        x, y, height, place, plain = page.browser.evaluate(LIST)
        assert height == 200 and place == 60 * step and plain
        if not step:
            page.browser.click(x, y)
            page.browser.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=60)
            page.browser.wait_for("document.querySelector('.lora-ensemble-panel ul').scrollTop === 60")
    assert page.browser.evaluate("document.activeElement.tagName") == "UL"


def test_the_panel_comes_back_with_its_tab(page: FrontEnd, routed: dict):  # noqa: F811
    """As pictures do: to the tab of its workflow, and to no other one; of a run that ends meanwhile, too. The workflow
    is saved as it is without."""
    said = len(page.complaints())
    page.open_graph(routed, "tabs")
    before = page.saved()
    assert page.run()["over"] == "success"
    (shown,), text = panels(page), json.loads(page.browser.evaluate(TEXT))
    assert len(text) == 1 and "6 of 6 steps" in shown and "6 of 6 steps in" in text[0]
    page.open_graph(routed | {"id": "00000000-0000-4000-8000-000000000001"}, "another")
    assert panels(page) == []
    command(page, "Workspace.PreviousOpenedWorkflow")
    assert panels(page) == [shown] and json.loads(page.browser.evaluate(TEXT)) == text
    page.browser.pause(0.5)
    assert page.saved() == before
    page.browser.evaluate(RUN)
    command(page, "Workspace.NextOpenedWorkflow")
    page.browser.wait_for("seen.over")
    assert panels(page) == []
    command(page, "Workspace.PreviousOpenedWorkflow")
    (again,), text = panels(page), json.loads(page.browser.evaluate(TEXT))
    assert "6 of 6 steps" in again and "6 of 6 steps in" in text[0] and page.saved() == before
    command(page, "Workspace.NextOpenedWorkflow")
    assert panels(page) == [] and page.browser.evaluate(TEXT) == "[]"
    assert page.complaints()[said:] == []


def test_what_a_node_gives_leaves_its_panel_and_its_text_with_the_tab(page: FrontEnd, routed: dict):  # noqa: F811
    """The host puts it in the place of all that it keeps of the node."""
    page.open_graph(routed, "given")
    assert page.run()["over"] == "success"
    shown, text = panels(page), page.browser.evaluate(TEXT)
    page.browser.evaluate(GIVEN)
    page.open_graph(routed | {"id": "00000000-0000-4000-8000-000000000002"}, "another")
    command(page, "Workspace.PreviousOpenedWorkflow")
    assert len(shown) == 1 and panels(page) == shown and page.browser.evaluate(TEXT) == text


TRIGGER = "in the style of <s0><s1>, _a_ *b* <i>c</i>"


@pytest.mark.parametrize(("name", "kind", "words"), [
    ("sdxl_lora_info", "LoRAEnsembleInfo", f"LoRA of rank 4|{TRIGGER}"), ("sdxl_prompt", "LoRAEnsemblePrompt", "her")])
def test_what_a_node_found_is_said_on_a_new_page_and_with_its_tab(
        page: FrontEnd, routed: dict, name: str, kind: str, words: str):  # noqa: F811
    """The server then has the node's output, and does not run it again. The page shows it as the text that it is,
    whatever it takes for HTML or Markdown."""
    file = page.server.base / "models" / "loras" / LORAS[0]
    save_file(load_file(file), file, {"modelspec.trigger_phrase": TRIGGER})
    graph, text = page.server.json(f"/api/workflow_templates/lora-ensemble/{name}.json"), TEXT_OF % kind
    shown = opened_on_small(graph, FAMILY, LORAS, steps=1)
    page.open_graph(shown, name)
    assert page.run()["over"] == "success"
    (found,) = json.loads(page.browser.evaluate(text))
    seen = page.browser.evaluate("document.body.innerText")
    assert [part for part in words.split("|") if part not in seen] == []
    page.open_graph(routed, "another")
    command(page, "Workspace.PreviousOpenedWorkflow")
    assert json.loads(page.browser.evaluate(text)) == [found]
    page.load()
    page.open_graph(shown, name)
    assert json.loads(page.browser.evaluate(text)) == []
    assert page.run()["over"] == "success"
    assert json.loads(page.browser.evaluate(text)) == [found]


def test_the_panel_stays_through_an_undo(page: FrontEnd, routed: dict):  # noqa: F811
    page.open_graph(routed, "undone")
    assert page.run()["over"] == "success"
    shown, text = panels(page), page.browser.evaluate(TEXT)
    page.browser.evaluate(f"(app.canvas.emitBeforeChange(), {RENAMED}, app.canvas.emitAfterChange(), true)")
    command(page, "Comfy.Undo")
    assert page.browser.evaluate("app.graph._nodes.every(node => node.title !== 'mine')")
    assert panels(page) == shown and page.browser.evaluate(TEXT) == text


@pytest.mark.parametrize(("page", "language", "words"), [
    ("classic", "ja", "6 ステップ中 6"), ("nodes_2", "zh", "第 6 / 6 步")], indirect=["page"], scope="module")
def test_the_panel_speaks_the_language_of_the_page(page: FrontEnd, routed: dict, language: str, words: str):  # noqa: F811
    page.set("Comfy.Locale", language)
    try:
        page.load()
        page.open_graph(routed, language)
        seen = page.run()
        assert seen["over"] == "success" and words in seen["panels"][-1] and "steps" not in seen["panels"][-1]
    finally:
        page.set("Comfy.Locale", "en")  # seen by the page that is loaded next
