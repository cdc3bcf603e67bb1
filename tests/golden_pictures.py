"""What the workflows of an earlier version draw: its own nodes on the testbed, over HTTP.

    COMFYUI_UNDER_TEST=PATH python run.py _with - lora_ensemble.tests.golden_pictures CHECKOUT

CHECKOUT is a checkout of that version in a folder called lora-ensemble. Writes tests/golden/VERSION/pictures/NAME.png
for each of its workflows in API format: the pictures that it saves, one below the other.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from ..testbed import demo
from ..testbed.scene import CONCEPTS
from ..testbed.weights import lora_path
from .server import ROOT, Server
from .workflows import find, load, on_testbed

VERSION = "0.1.0"
FOLDER = ROOT / "tests" / "golden" / VERSION
GRAPHS = sorted(FOLDER.glob("*.json"))
PROMPTS = sorted((FOLDER / "api").glob("*.json"))
TASK = next(task for task in demo.chosen_sets() if len(task.loras) == 3)
FILES = [lora_path(demo.REGIME, CONCEPTS[lora]) for lora in TASK.loras]
SIDE, STEPS = 32, 6
"""Of a picture of the testbed; of each run."""


def give_files(server: Server) -> None:
    """Puts the LoRAs where a server looks for them."""
    server.give_loras(FILES)


def drawn(server: Server, path: Path) -> np.ndarray | None:
    """The pictures that a workflow saves, uint8 [n * 32, w, 3]; None where it saves figures."""
    prompt = on_testbed(load(path), [file.name for file in FILES], text=TASK.prompt(), steps=STEPS)
    entry = server.run(prompt)
    files = [file for node in find(prompt, "SaveImage") for file in server.images(entry, node)]
    found = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    return np.concatenate(found) if all(len(picture) == SIDE for picture in found) else None


def main(checkout: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, Server(
            Path(os.environ["COMFYUI_UNDER_TEST"]), Path(folder),
            [checkout.resolve(), ROOT / "tests" / "comfy_testbed"]) as server:
        give_files(server)
        for path in PROMPTS:
            pixels = drawn(server, path)
            if pixels is not None:
                Image.fromarray(pixels).save(FOLDER / "pictures" / f"{path.stem}.png", optimize=True)
            sys.stdout.write(f"{path.stem}: {'figures' if pixels is None else len(pixels) // SIDE}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
