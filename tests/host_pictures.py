"""The pictures in the help pages: figures, made by the example workflows on the testbed, over HTTP, the node with rows
as the real front end shows it, and README's, made by the demo.

    COMFYUI_UNDER_TEST=PATH python run.py _with - lora_ensemble.tests.host_pictures [NAME ...]

Writes web/docs/NAME.png, all of NAMES or those that are named.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image

from ..testbed import demo
from ..testbed.scene import CONCEPTS
from ..testbed.weights import load_base, load_judge, lora_path
from .browser import Browser, find_chromium
from .front_end import FrontEnd
from .server import ROOT, Server, link
from .workflows import EXAMPLES, Prompt, find, load, on_testbed, rows_of

PICTURES = {"leave_one_out": ("sd15_leave_one_out", "LoRAEnsembleLeaveOneOut", 0),
            "spectrum": ("sd15_spectrum", "LoRAEnsembleSpectrum", 0),
            "layer_map": ("sdxl_k_lora", "LoRAEnsembleLayerMap", 0),
            "report": ("sdxl_cmlora", "LoRAEnsembleReport", 1),
            "info": ("sdxl_lora_info", "LoRAEnsembleInfo", 0)}
"""Name -> (example workflow, the node that draws it, which of its outputs). A workflow without it gets a report."""
ROWS = "sdxl_four_loras"
NAMES = (*PICTURES, "routed", "stack")
"""And the demo's row, and the node with rows in Nodes 2.0."""
COLOURS = 256
CARD = """(() => {
  const node = app.graph._nodes.find(node => node.type === 'LoRAEnsembleStack')
  app.canvas.ds.scale = 1
  app.canvas.ds.offset = [400 - node.pos[0], 200 - node.pos[1]]
  app.canvas.setDirty(true, true)
  const { x, y, width, height } = document.querySelector(`[data-node-id="${node.id}"]`).getBoundingClientRect()
  return { x, y, width, height }
})()"""


def small(file: bytes) -> Image.Image:
    """A sheet with few colours: flat areas and text lose nothing by it, and a help page loads at once."""
    picture = Image.open(io.BytesIO(file)).convert("RGB")
    return picture.quantize(COLOURS, Image.Quantize.MEDIANCUT, kmeans=4, dither=Image.Dither.NONE)


def drawn(server: Server, prompt: Prompt, node: str, output: int) -> bytes:
    """What a node puts out, as a file, and nothing else of its workflow."""
    if not find(prompt, node):
        (sampler,) = find(prompt, "KSampler")
        prompt["report"] = {"class_type": node, "inputs": {"model": prompt[sampler]["inputs"]["model"],
                                                           "latent": [sampler, 0]}}
    (drawer,) = find(prompt, node)
    prompt = {key: each for key, each in prompt.items() if each["class_type"] not in ("SaveImage", "PreviewImage")}
    prompt["save"] = {"class_type": "SaveImage", "inputs": {"images": [drawer, output], "filename_prefix": "sheet"}}
    (file,) = server.images(server.run(prompt), "save")
    return file


def node_with_rows(server: Server, folder: Path, file: Path) -> bytes:
    """`LoRA Ensemble` of its example, on light ground, with a file behind each of its names."""
    for node in load(next(path for path in EXAMPLES if path.stem == ROWS)).values():
        for row in rows_of(node):
            link(file, server.base / "models" / "loras" / node["inputs"][row])
    with Browser(folder, find_chromium(), (1920, 1600)) as browser:
        page = FrontEnd(browser, server, nodes_2=True)
        page.set("Comfy.ColorPalette", "light")
        page.load()
        page.open_template(ROWS)
        browser.evaluate(CARD)
        browser.pause(1)  # the canvas follows in its own time
        box = browser.evaluate(CARD)
        return base64.b64decode(browser.call("Page.captureScreenshot", format="png", clip=box | {"scale": 1})["data"])


def main(names: list[str], comfyui: Path) -> None:
    task = next(task for task in demo.chosen_sets() if len(task.loras) == 3)
    files = [lora_path(demo.REGIME, CONCEPTS[lora]) for lora in task.loras]
    workflows = {path.stem: path for path in EXAMPLES}
    with tempfile.TemporaryDirectory() as folder, \
            Server(comfyui, Path(folder), [ROOT, ROOT / "tests" / "comfy_testbed"]) as server:
        server.give_loras(files)
        for name in names or NAMES:
            path = ROOT / "web" / "docs" / f"{name}.png"
            if name == "routed":
                row = demo.pictures(load_base(), load_judge(), demo.chosen_sets()[-1:], ("Merge", "Routed"))
                row.save(path, optimize=True)
            elif name == "stack":
                small(node_with_rows(server, Path(folder, "browser"), files[0])).save(path, optimize=True)
            else:
                workflow, node, output = PICTURES[name]
                prompt = on_testbed(load(workflows[workflow]), [file.name for file in files], text=task.prompt())
                small(drawn(server, prompt, node, output)).save(path, optimize=True)
            sys.stdout.write(f"{path.relative_to(ROOT)}: {path.stat().st_size >> 10} kB\n")


if __name__ == "__main__":
    main(sys.argv[1:], Path(os.environ["COMFYUI_UNDER_TEST"]))
