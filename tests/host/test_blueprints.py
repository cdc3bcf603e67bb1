"""The subgraph blueprints in the real front end: opened, given LoRAs by their own widgets, and queued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lora_ensemble.tests.front_end import FrontEnd
from lora_ensemble.tests.server import Server

from .test_example_workflows import host_inputs, is_widget
from .test_front_end import page  # noqa: F401  (a fixture)
from .test_server import GOOD, lora_files, pictures  # noqa: F401  (a fixture)

BLUEPRINTS = sorted((Path(__file__).resolve().parents[2] / "subgraphs").glob("*.json"))
each_blueprint = pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)

COMPLETE = """(async () => {
  const blueprint = app.graph._nodes[0]
  const add = type => { const node = LiteGraph.createNode(type); app.graph.add(node); return node }
  const set = (node, values) => {
    for (const [name, value] of Object.entries(values)) node.widgets.find(w => w.name === name).value = value
  }
  const files = %s
  const rows = blueprint.widgets.filter(w => String(w.value).endsWith('.safetensors'))
  rows.forEach((widget, i) => { widget.value = files[i %% files.length] })
  const loader = add('LoRAEnsembleTestbedLoader'), latent = add('LoRAEnsembleTestbedLatent')
  const positive = add('CLIPTextEncode'), negative = add('CLIPTextEncode')
  const sampler = add('KSampler'), decode = add('VAEDecode'), save = add('SaveImage')
  loader.connect(0, blueprint, 0); loader.connect(1, blueprint, 1)
  for (const text of [positive, negative]) blueprint.connect(1, text, 0)
  set(positive, {text: 'cat beside a red dress, at night'})
  blueprint.connect(0, sampler, 0); positive.connect(0, sampler, 1); negative.connect(0, sampler, 2)
  latent.connect(0, sampler, 3)
  set(sampler, {seed: 5, steps: 2, cfg: 3, sampler_name: 'euler', scheduler: 'simple'})
  sampler.connect(0, decode, 0); loader.connect(2, decode, 1); decode.connect(0, save, 0)
  return JSON.stringify([rows.length, (await app.graphToPrompt()).output])
})()"""


def test_the_host_lists_them(server: Server):
    listed = {entry["name"] for entry in server.json("/global_subgraphs").values()
              if entry["info"]["node_pack"] == "custom_nodes.lora-ensemble"}
    assert listed == {path.stem for path in BLUEPRINTS} and len(listed) == 3


@each_blueprint
def test_blueprints_agree_with_the_schemas(path):
    """Links have both their ends, widget values are those of the nodes' widgets."""
    (subgraph,) = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    assert subgraph["name"] == path.stem and subgraph["description"]
    nodes = {node["id"]: node for node in subgraph["nodes"]}
    for link in subgraph["links"]:
        sender, receiver = nodes.get(link["origin_id"]), nodes.get(link["target_id"])
        out = sender["outputs"] if sender else subgraph["inputs"]
        into = receiver["inputs"] if receiver else subgraph["outputs"]
        source, target = out[link["origin_slot"]], into[link["target_slot"]]
        assert link["id"] in (source.get("links") or source["linkIds"]) and source["type"] == target["type"]
        assert target.get("link", link["id"]) == link["id"]
    for node in nodes.values():
        widgets = [name for name, (kind, _) in host_inputs(node["type"]).items() if is_widget(kind)]
        assert len(node["widgets_values"]) == len(widgets)
        assert {entry["name"] for entry in node["inputs"]} <= set(host_inputs(node["type"]))


@each_blueprint
def test_blueprints_are_queued_from_the_page(page: FrontEnd, server: Server, path):  # noqa: F811
    """With other files in their widgets; the picture differs from that without LoRAs."""
    said = len(page.complaints())
    page.open_graph(json.loads(path.read_text(encoding="utf-8")), path.stem)
    rows, prompt = json.loads(page.browser.evaluate(COMPLETE % json.dumps(GOOD)))
    loras = [node["inputs"]["lora_name"] for node in prompt.values() if node["class_type"] == "LoRAEnsembleLoRA"]
    assert len(loras) == rows and set(loras) <= set(GOOD)
    with_loras = pictures(server, prompt)
    for node in prompt.values():
        if node["class_type"] == "LoRAEnsembleLoRA":
            node["inputs"] |= {"strength_model": 0.0, "strength_clip": 0.0}
    assert abs(with_loras - pictures(server, prompt)).max() > 2
    assert page.complaints()[said:] == []
