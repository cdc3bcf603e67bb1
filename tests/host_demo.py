"""The demo through a real ComfyUI: the standalone demo's pictures and the example workflows, over HTTP.

    COMFYUI_UNDER_TEST=PATH python run.py _with - lora_ensemble.tests.host_demo OUT

Writes OUT/comfyui-VERSION.png, a grid in the layout of the standalone one, and OUT/comfyui-VERSION-NAME-K.png for the
pictures of each example workflow. Fails where a picture is missing, empty or not the one that the standalone sampler
draws.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..testbed import demo
from ..testbed.sampler import GUIDANCE, STEPS, Picture, Sampler
from ..testbed.scene import CONCEPTS
from ..testbed.weights import load_base, load_judge, load_loras, lora_path
from .server import ROOT, Server
from .workflows import ON_TESTBED, Prompt, compose, find, load, on_testbed, widgets

# Two programs, one formula, fp32: rounding differs and grows over the steps. A real fault changes pictures far more.
ALLOWED = 3  # of 255 grey levels, in any pixel


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def fetch(server: Server, prompt: Prompt) -> list[np.ndarray]:
    """The pictures of a prompt, uint8 [h, w, 3] each, in the order of its SaveImage nodes."""
    entry = server.run(prompt)
    files = [file for node in find(prompt, "SaveImage") for file in server.images(entry, node)]
    found = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
    for pixels in found:
        if min(pixels.shape[:2]) < 32 or pixels.std() < 5:  # plots, and several pictures in one, are larger
            raise SystemExit(f"a picture of {pixels.shape} with deviation {pixels.std():.1f} came back")
    if len(found) != len(find(prompt, "SaveImage")):
        raise SystemExit(f"{len(found)} pictures came back from {len(find(prompt, 'SaveImage'))} SaveImage nodes")
    return found


def draw(server: Server, pictures: list[Picture], files: list[str]) -> Tensor:
    """The standalone sampler's pictures, drawn by the server: float32 [n, 3, 32, 32] in [0, 1]."""
    info, drawn = server.json("/object_info"), []
    for number, picture in enumerate(pictures):
        if number % 10 == 0:
            say(f"picture {number + 1} of {len(pictures)}")
        node = f"LoRAEnsemble{type(picture.method).__name__ if picture.placed is None else 'Routed'}"
        names = [files[lora] for lora in picture.loras]
        roles = [CONCEPTS[lora].category for lora in picture.loras]
        prompt = compose(node, widgets(info[node]), names, roles, picture.prompt, picture.seed, STEPS, GUIDANCE,
                         picture.placed.words if picture.placed is not None else ())
        drawn += fetch(server, prompt)
    return torch.tensor(np.stack(drawn)).movedim(-1, 1).float() / 255


def examples(server: Server, files: list[str], out: Path, version: str) -> int:
    """Every example workflow that the testbed can stand for, with its model and LoRAs; returns their number."""
    task = next(task for task in demo.chosen_sets() if len(task.loras) == 3)
    for path in ON_TESTBED:
        say(f"example workflow {path.stem}")
        prompt = on_testbed(load(path), [files[lora] for lora in task.loras], text=task.prompt())
        for k, pixels in enumerate(fetch(server, prompt)):
            picture, scale = Image.fromarray(pixels), max(256 // pixels.shape[0], 1)
            picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
            picture.save(out / f"comfyui-{version}-{path.stem}-{k + 1}.png")
    return len(ON_TESTBED)


def main(out: Path, comfyui: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tasks, started = demo.chosen_sets(), time.monotonic()
    sampler = Sampler(load_base(), load_loras(demo.REGIME))
    rows = demo.cells(tasks, sampler.bank)
    pictures = [picture for row in rows for picture in row]
    files = [lora_path(demo.REGIME, concept) for concept in CONCEPTS]
    with tempfile.TemporaryDirectory() as folder, \
            Server(comfyui, Path(folder), [ROOT, ROOT / "tests" / "comfy_testbed"]) as server:
        server.give_loras(files)
        names = [file.name for file in files]
        version = server.json("/system_stats")["system"]["comfyui_version"]
        ready = time.monotonic()
        images = draw(server, pictures, names)
        drawn = time.monotonic()
        count = examples(server, names, out, version)
    demo.grid(tasks, rows, images, load_judge().read(images)).save(out / f"comfyui-{version}.png")
    with sampler:
        expected = (sampler.draw(pictures) * 255).round() / 255
    worst = float((images - expected).abs().max() * 255)
    say(
        f"ComfyUI {version}: server ready after {ready - started:.0f} s, {len(pictures)} pictures in "
        f"{drawn - ready:.0f} s, {count} example workflows ran\n"
        f"largest difference from the standalone sampler: {worst:.0f} of 255 grey levels (allowed: {ALLOWED})\n"
        f"comfyui-{version}.png in {out}"
    )
    if worst > ALLOWED:
        raise SystemExit("ComfyUI's pictures are not those of the standalone sampler")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(os.environ["COMFYUI_UNDER_TEST"]))
