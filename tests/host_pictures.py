"""The pictures of figures in the help pages, made by the example workflows on the testbed, over HTTP.

    COMFYUI_UNDER_TEST=PATH python run.py _with - lora_ensemble.tests.host_pictures [NAME ...]

Writes web/docs/NAME.png, all of PICTURES or those that are named.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image

from ..testbed import demo
from ..testbed.scene import CONCEPTS
from ..testbed.weights import lora_path
from .server import ROOT, Server
from .workflows import EXAMPLES, Prompt, find, load, on_testbed

PICTURES = {"leave_one_out": ("sd15_leave_one_out", "LoRAEnsembleLeaveOneOut", 0),
            "spectrum": ("sd15_spectrum", "LoRAEnsembleSpectrum", 0),
            "layer_map": ("sdxl_k_lora", "LoRAEnsembleLayerMap", 0),
            "report": ("sdxl_cmlora", "LoRAEnsembleReport", 1)}
"""Name -> (example workflow, the node that draws it, which of its outputs). A workflow without it gets a report."""
COLOURS = 256


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


def main(names: list[str], comfyui: Path) -> None:
    task = next(task for task in demo.chosen_sets() if len(task.loras) == 3)
    files = [lora_path(demo.REGIME, CONCEPTS[lora]) for lora in task.loras]
    workflows = {path.stem: path for path in EXAMPLES}
    with tempfile.TemporaryDirectory() as folder, \
            Server(comfyui, Path(folder), [ROOT, ROOT / "tests" / "comfy_testbed"]) as server:
        server.give_loras(files)
        for name in names or PICTURES:
            workflow, node, output = PICTURES[name]
            prompt = on_testbed(load(workflows[workflow]), [file.name for file in files], text=task.prompt())
            path = ROOT / "web" / "docs" / f"{name}.png"
            small(drawn(server, prompt, node, output)).save(path, optimize=True)
            sys.stdout.write(f"{path.relative_to(ROOT)}: {path.stat().st_size >> 10} kB\n")


if __name__ == "__main__":
    main(sys.argv[1:], Path(os.environ["COMFYUI_UNDER_TEST"]))
