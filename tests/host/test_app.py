"""The example of ComfyUI's app mode in the real front end: opened as an app, filled in and run from its own button."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from comfy_api.latest import io
from lora_ensemble.tests.browser import Browser
from lora_ensemble.tests.front_end import FrontEnd
from lora_ensemble.tests.server import PACK, ROOT, Server
from lora_ensemble.tests.workflows import EXAMPLES, load

if not hasattr(io, "DynamicCombo"):
    pytest.skip("this release cannot show rows", allow_module_level=True)

from .test_server_stack import FILES, STACK, lora_files  # noqa: E402, F401  (a fixture)

NAME = "sdxl_three_loras.app"
ROWS = "[...document.querySelectorAll('[data-testid=linear-widgets] [data-testid=app-mode-widget-item]')]"
BUTTON = "document.querySelector('[data-testid=linear-run-button-icon]').closest('button')"
MADE = "document.querySelector('[data-testid=linear-image-output]')?.naturalWidth"


@pytest.fixture(scope="module")
def page(browser: Browser, server: Server) -> FrontEnd:
    page = FrontEnd(browser, server, nodes_2=False)
    if not browser.evaluate("!!app.extensionManager.command.commands.find(c => c.id === 'Comfy.ToggleLinear')"):
        pytest.skip("this front end has no app mode")
    return page


def graph(server: Server) -> dict[str, Any]:
    return server.json(f"/api/workflow_templates/{PACK}/{NAME}.json")


def opened(page: FrontEnd, workflow: dict[str, Any]) -> list[str]:
    """Opens a workflow as the template browser does; what the app asks for."""
    page.browser.evaluate(f"app.loadGraphData({json.dumps(workflow)}, true, true, '{NAME}', "
                          "{openSource: 'template'}).then(() => true)")
    page.browser.wait_for(f"{ROWS}.length > 0")
    return page.browser.evaluate(f"{ROWS}.map(row => row.innerText.split('\\n')[0])")


def test_it_opens_as_an_app_that_asks_for_what_it_needs(page: FrontEnd, server: Server):
    said = len(page.complaints())
    rows = [f"{name}_{number}" for number in (1, 2, 3) for name in ("lora", "strength")]
    assert opened(page, graph(server)) == ["Prompt", "Checkpoint", *rows, "method", "Seed"]
    assert page.browser.evaluate("app.graph._nodes.every(node => node.type in LiteGraph.registered_node_types)")
    assert page.complaints()[said:] == []


def test_it_sends_what_its_twin_holds(page: FrontEnd, server: Server):
    opened(page, graph(server))
    sent = json.loads(page.browser.evaluate("app.graphToPrompt().then(prompt => JSON.stringify(prompt.output))"))
    assert sent == load(next(path for path in EXAMPLES if path.stem == NAME))


def test_its_button_makes_the_picture(page: FrontEnd, server: Server):
    """On the small SDXL, with files that are there."""
    workflow, names = graph(server), iter(FILES.values())
    for node in workflow["nodes"]:
        values = node.get("widgets_values")
        if node["type"] == "CheckpointLoaderSimple":
            node |= {"type": "LoRAEnsembleTestbedCheckpoint", "widgets_values": ["SDXL"], "inputs": []}
        elif node["type"] == "EmptyLatentImage":
            values[:2] = [64, 64]
        elif node["type"] == "KSampler":
            values[2] = 2
        elif node["type"] == "LoRAEnsembleStack":
            values[:] = [next(names) if str(value).endswith(".safetensors") else value for value in values]
    assert opened(page, workflow)[1] == "lora_1"  # the file of a model is no longer asked for
    page.browser.evaluate(f"{BUTTON}.click()")
    assert page.browser.wait_for(MADE, seconds=120) == 64


def test_the_address_in_readme_opens_its_example(page: FrontEnd, server: Server):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (name,) = re.findall(rf"http://127\.0\.0\.1:8188/\?template=(\w+)&source={PACK}\n", text)
    page.browser.open(f"http://127.0.0.1:{server.port}/?template={name}&source={PACK}")
    page.browser.wait_for(f"window.app?.extensionManager?.workflow?.activeWorkflow?.filename === '{name}'", seconds=120)
    assert page.browser.evaluate(f"app.graph._nodes.some(node => node.type === '{STACK}')")
