"""The rows of *LoRA Ensemble* in the real front end: changed, saved, reloaded, muted and bypassed."""

from __future__ import annotations

import json

from lora_ensemble.tests.front_end import SETTLED, FrontEnd

from .test_front_end import page  # noqa: F401  (a fixture)

STACK = "app.graph._nodes.find(node => node.type === 'LoRAEnsembleStack')"
WIDGET = f"{STACK}.widgets.find(widget => widget.name.split('.').at(-1) === %s)"
SET = f"(() => {{ const w = {WIDGET}; w.value = %s; w.callback?.(w.value); return true }})()"
RELOAD = f"(async () => {{ await app.loadGraphData(app.graph.serialize(), true, true, 'again'); return {SETTLED} }})()"
CHANGED = {"row_5": "yes", "on_2": False, "strength_3": 0.55}


def sent(page: FrontEnd) -> dict:  # noqa: F811
    """The prompt that the button would send."""
    return json.loads(page.browser.evaluate("app.graphToPrompt().then(prompt => JSON.stringify(prompt.output))"))


def test_rows_are_saved_reloaded_muted_and_bypassed_whole(page: FrontEnd):  # noqa: F811
    page.open_template("sdxl_four_loras")
    for name, value in CHANGED.items():
        page.browser.evaluate(SET % (json.dumps(name), json.dumps(value)))
    page.browser.evaluate(SETTLED)
    first = sent(page)
    (key,) = [key for key, node in first.items() if node["class_type"] == "LoRAEnsembleStack"]
    inputs = first[key]["inputs"]
    short = {name.rpartition(".")[2]: value for name, value in inputs.items()}
    assert short | CHANGED == short and {"lora_5", "strength_5", "row_6"} <= set(short)
    (loader,) = [key for key, node in first.items() if node["class_type"] == "CheckpointLoaderSimple"]
    page.browser.evaluate(RELOAD)
    assert sent(page) == first
    page.browser.evaluate(f"({STACK}.mode = 4, true)")
    bypassed = sent(page)
    assert key not in bypassed
    assert [node["inputs"]["model"] for node in bypassed.values() if node["class_type"] == "KSampler"] == [[loader, 0]]
    page.browser.evaluate(f"({STACK}.mode = 2, true)")
    assert key not in sent(page)
    page.browser.evaluate(RELOAD)
    page.browser.evaluate(f"({STACK}.mode = 0, true)")
    assert sent(page) == first


FILES = f"""Object.fromEntries({STACK}.widgets.map(widget => [widget.name.split('.').at(-1), widget])
    .filter(([name]) => name.startsWith('lora_'))
    .map(([name, {{ options }}]) => [name, options.values.includes(%s)]))"""


def test_a_refresh_renews_the_files_of_all_rows(page: FrontEnd):  # noqa: F811
    """Guard: the host renewed those of the first row alone. Of rows that are opened later, too."""
    page.open_template("sdxl_four_loras")
    path = page.server.base / "models" / "loras" / f"new_{page.nodes_2}.safetensors"
    there = FILES % json.dumps(path.name)
    path.write_bytes(b"{}")
    try:
        assert not any(page.browser.evaluate(there).values())
        page.browser.evaluate("app.refreshComboInNodes().then(() => true)")
        page.browser.evaluate(SET % (json.dumps("row_5"), json.dumps("yes")))
        page.browser.evaluate(SETTLED)
        assert page.browser.evaluate(there) == {f"lora_{number}": True for number in range(1, 6)}
    finally:
        path.unlink()


def test_a_node_of_many_rows_is_no_wider(page: FrontEnd):  # noqa: F811
    """Its inputs are named by the whole way to them, and stand on the node by the last part, also once it is loaded
    from a file that has the whole names alone."""
    page.open_template("sdxl_four_loras")
    width = f"{STACK}.size[0]"
    before = page.browser.evaluate(width)
    for number in range(5, 21):
        page.browser.evaluate(SET % (json.dumps(f"row_{number}"), json.dumps("yes")))
    page.browser.evaluate(SETTLED)
    assert page.browser.evaluate(width) == before
    page.browser.evaluate(f"({STACK}.inputs.forEach(input => delete input.label), true)")
    page.browser.evaluate(RELOAD)
    assert page.browser.evaluate(width) == before
    last = f"{STACK}.inputs.find(input => input.name.endsWith('lora_20'))"
    assert page.browser.evaluate(f"{last}.label") == "lora_20"


WIRE = f"""(() => {{
  const node = {STACK}
  for (const name of ['strength_1', 'strength_2', 'strength_3', 'strength_4']) {{
    const number = LiteGraph.createNode('PrimitiveFloat')
    app.graph.add(number)
    number.connect(0, node, node.inputs.findIndex(input => input.name.split('.').at(-1) === name))
  }}
  return true
}})()"""
PROMOTE = f"""(() => {{
  const {{ node: outer, subgraph }} = app.graph.convertToSubgraph(new Set([{STACK}]))
  const node = subgraph.nodes.find(node => node.type === 'LoRAEnsembleStack')
  for (const input of node.inputs.filter(input => input.name.split('.').at(-1).startsWith('strength_')))
    subgraph.inputNode.emptySlot.connect(input, node)
  outer.widgets.forEach((widget, number) => {{ widget.value = number / 10 }})
  return outer.widgets.length
}})()"""


def test_the_wires_of_all_rows_are_there_where_a_workflow_is_opened_again(page: FrontEnd):  # noqa: F811
    """A field may be a wire in row 3 and after, too; those of a row that was closed are gone."""
    page.open_template("sdxl_four_loras")
    page.browser.evaluate(WIRE)
    first = sent(page)
    (node,) = [node for node in first.values() if node["class_type"] == "LoRAEnsembleStack"]
    wired = [name for name, value in node["inputs"].items() if "strength_" in name and isinstance(value, list)]
    assert len(wired) == 4
    page.browser.evaluate(RELOAD)
    assert sent(page) == first
    page.browser.evaluate(SET % ('"row_4"', '"no"'))
    page.browser.evaluate(SETTLED)
    closed = sent(page)
    page.browser.evaluate(RELOAD)
    assert sent(page) == closed and len(closed) == len(first)


def test_the_wires_of_all_rows_go_into_a_subgraph_and_come_out_of_it(page: FrontEnd):  # noqa: F811
    def strengths() -> list:
        (node,) = [node for node in sent(page).values() if node["class_type"] == "LoRAEnsembleStack"]
        return [value for name, value in node["inputs"].items() if "strength_" in name]

    page.open_template("sdxl_four_loras")
    page.browser.evaluate(WIRE)
    first = strengths()
    page.browser.evaluate(f"(app.graph.convertToSubgraph(new Set([{STACK}])), true)")
    assert strengths() == first and all(isinstance(value, list) for value in first)
    page.browser.evaluate(RELOAD)
    assert strengths() == first
    page.browser.evaluate("(app.graph.unpackSubgraph(app.graph._nodes.find(node => node.isSubgraphNode?.())), true)")
    assert strengths() == first


def test_fields_of_all_rows_stay_inputs_of_their_subgraph(page: FrontEnd):  # noqa: F811
    page.open_template("sdxl_four_loras")
    assert page.browser.evaluate(PROMOTE) == 4
    first = sent(page)
    (node,) = [node for node in first.values() if node["class_type"] == "LoRAEnsembleStack"]
    assert sorted(value for name, value in node["inputs"].items() if "strength_" in name) == [0, 0.1, 0.2, 0.3]
    page.browser.evaluate(RELOAD)
    assert sent(page) == first


SHOWN, SHOW = "[data-testid=properties-panel]", '[aria-label="Toggle properties panel"]'
PARAMETERS, RESET = "[data-testid=panel-tab-parameters]", '[aria-label="Reset all parameters"]'
MIDDLE = """(() => {
  const box = document.querySelector('%s')?.getBoundingClientRect()
  return box?.width && [box.x + box.width / 2, box.y + box.height / 2]
})()"""
TITLE = f"""(() => {{
  const {{ scale, offset }} = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect(), [x, y] = {STACK}.pos
  return [box.x + (x + 60 + offset[0]) * scale, box.y + (y - 12 + offset[1]) * scale]
}})()"""


def test_the_panel_of_properties_resets_the_rows(page: FrontEnd):  # noqa: F811
    page.open_template("sdxl_four_loras")
    page.browser.click(*page.browser.evaluate(TITLE))
    page.browser.evaluate(SETTLED)
    shown = page.browser.evaluate(f"!!document.querySelector('{SHOWN}')")
    for button in (*([] if shown else [SHOW]), PARAMETERS, RESET):
        page.browser.click(*page.browser.wait_for(MIDDLE % button))
        page.browser.evaluate(SETTLED)
    (node,) = [node for node in sent(page).values() if node["class_type"] == "LoRAEnsembleStack"]
    values = {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}
    assert values == {"method": "auto", "on_1": True, "lora_1": "None", "strength_1": 1, "more_1": "no", "row_2": "no"}
