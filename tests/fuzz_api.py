"""Workflows in API format with every kind of damage, made from seeds, on a real server, and what must become of each.

    COMFYUI_UNDER_TEST=PATH python run.py _with - lora_ensemble.tests.fuzz_api --count 700

A shared workflow may hold anything: numbers where a MODEL belongs, NaN over links, files that are not there, wires to
nodes of another kind. Either it runs, or it is refused: by ComfyUI before the run, or by a ValueError of ours that says
which input is wrong. No exception of another class comes out of this pack's code, no text is too long to be read, no
number takes time without an end, and the next prompt is drawn as if nothing had been.

What fails in ComfyUI's own sampling or encoding without a step of ours going wrong is the host's, and counted as such.
"""

from __future__ import annotations

import copy
import io
import os
import random
import re
import sys
import tempfile
import time
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ..testbed.model import UNet
from ..tools.results import Found, Results, options, seeds
from .server import PACK, PromptRefused, Server, ServerError
from .workflows import ON_TESTBED, ROOT, TESTBED, Prompt, load, on_testbed

DEPENDS = ("fuzz_api.py", "server.py", "workflows.py", "comfy_testbed/*.py")
NAMES = ("one.safetensors", "two.safetensors", "three.safetensors")
STEPS = 3
PATIENCE = 20.0
"""Seconds that a prompt may run; then it is interrupted."""
LONGEST = 1200
"""Characters of a message that somebody is to read."""
VALUES = (float("nan"), float("inf"), -float("inf"), 0, -1, 1, 2, 3, 0.5, 1.5, 1e308, -1e308, 1e-308, 2**31, 2**63,
          2**64, 10**400, -2**70, True, False, None, "", "5", "nan", "auto", "a" * 5000, "9" * 5000,
          "../../etc/passwd", "C:\\x|y", "\0", "\ud7ff", "ä€😀", "<lora:one:0.5>", "<lora:gone>", "[1: x",
          "((" * 200, "2,1", "1,1", "0.9-0.1", "'\"/&<b>", {}, {"a": 1}, {"__value__": [1, 2]}, {"__value__": None},
          {"samples": 1}, [], [1], ["a", "b", "c"], [[1, 2]])
LINKED = ("NaN", "Infinity", "-1", "0", "1e308", "null", "true", '"text"', '"one.safetensors"', "[]", "{}", "[1, 2]",
          "5", "0.5", '[["one.safetensors", 1, 1]]', '[["one.safetensors", 1e30, 1]]', '[["gone", 1, 1]]',
          '[[1, 2, 3]]', '"baked"', "empty", "nan", "number", "picture", "no pixel", "nan picture", "latent",
          "no latent", "flat latent", "condition", "no condition")


def small_lora(seed: int) -> dict[str, Tensor]:
    """A LoRA on the testbed's attentions."""
    rand, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in UNet().named_modules():
        if "attn" in name and isinstance(module, torch.nn.Linear):
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(4, module.in_features, generator=rand) / 4
            tensors[f"{key}.lora_up.weight"] = torch.randn(module.out_features, 4, generator=rand) / 16
    return tensors


def workflows() -> dict[str, Prompt]:
    """The examples on the testbed's model, and its own."""
    found = {path.stem: on_testbed(load(path), NAMES, steps=STEPS) for path in ON_TESTBED}
    found |= {f"testbed {path.stem}": load(path) for path in TESTBED}
    for prompt in found.values():
        for node in prompt.values():
            for name in ("lora_name", "first", "second"):
                if name in node["inputs"]:
                    node["inputs"][name] = NAMES[0] if name != "second" else NAMES[1]
    return found


# --- damage ---------------------------------------------------------------------------------------------------------


def ours(prompt: Prompt) -> list[str]:
    return [key for key, node in prompt.items() if node["class_type"].startswith("LoRAEnsemble")
            and "Testbed" not in node["class_type"]]


def damage(dice: random.Random, prompt: Prompt, schemas: dict[str, dict[str, Any]]) -> str:
    """One damage at a node of ours, in place; returns its name."""
    key = dice.choice(ours(prompt))
    node = prompt[key]
    inputs, info = node["inputs"], schemas[node["class_type"]]["input"]
    known = {name: spec for group in ("required", "optional") for name, spec in info.get(group, {}).items()}
    name = dice.choice(sorted(known))
    what = dice.choice(["value", "value", "value", "linked", "linked", "linked", "missing", "wire", "more", "class",
                        "near", "near", "gone"])
    if what == "value":
        inputs[name] = dice.choice(VALUES)
    elif what == "linked":
        prompt["odd"] = {"class_type": "LoRAEnsembleTestbedValue", "inputs": {"text": dice.choice(LINKED)}}
        inputs[name] = ["odd", 0]
    elif what == "missing":
        inputs.pop(name, None)
    elif what == "wire":
        inputs[name] = [dice.choice([*prompt, key, "nowhere"]), dice.choice([0, 0, 0, 1, 2, 5, -1, 0.5, "0", None])]
    elif what == "more":
        inputs[dice.choice(["more", "self", "cls", "model.x", ""])] = dice.choice(VALUES)
    elif what == "class":
        node["class_type"] = dice.choice(sorted(schemas))
    elif what == "near":
        numbers = [part for part, (kind, *_) in known.items() if kind in ("INT", "FLOAT") and part != "steps"]
        if not numbers:
            return what
        name = dice.choice(numbers)
        options = known[name][1]
        inputs[name] = dice.choice([options["min"], options["max"], options["min"] - 1, options["max"] + 1,
                                    (options["min"] + options["max"]) // 2])
    else:
        del prompt[key]
    return f"{what} {name}"


# --- what must become of them ---------------------------------------------------------------------------------------


def give_loras(server: Server) -> None:
    """Writes a small LoRA for each of NAMES where a server looks for them."""
    for seed, name in enumerate(NAMES):
        save_file(small_lora(seed), server.base / "models" / "loras" / name)


class Failure(AssertionError):
    """A prompt that neither runs nor is refused as it should."""


class Fuzz:
    """Makes and judges prompts on a server that has the testbed's nodes."""

    def __init__(self, server: Server):
        self.server = server
        give_loras(server)
        self.prompts = workflows()
        self.schemas = {name: info for name, info in server.json("/object_info").items()
                        if name.startswith("LoRAEnsemble") and "Testbed" not in name}
        self.read = len(self.log())
        self.reference = self.picture()

    def log(self) -> bytes:
        return self.server.log.read_bytes()

    def picture(self) -> np.ndarray:
        """What a good prompt draws, sampled anew."""
        self.server.post("/free", free_memory=True)  # with all that the host keeps of earlier prompts
        time.sleep(0.5)
        entry = self.server.run(copy.deepcopy(self.prompts["testbed composite"]))
        cached = dict(entry["status"]["messages"])["execution_cached"]["nodes"]
        if cached:
            raise Failure(f"the good prompt was not run anew: {cached}")
        (file,) = self.server.images(entry)
        return np.asarray(Image.open(io.BytesIO(file)))

    def unharmed(self) -> None:
        """Raises Failure where the good prompt is not drawn as it was at first."""
        if not np.array_equal(self.picture(), self.reference):
            raise Failure("a good prompt is drawn differently now")

    def check(self, seed: int) -> tuple[str, str]:
        """(what was done, what became of it). Raises Failure."""
        dice = random.Random(seed)
        name = dice.choice(sorted(self.prompts))
        while not ours(self.prompts[name]):
            name = dice.choice(sorted(self.prompts))
        prompt = copy.deepcopy(self.prompts[name])
        done = []
        for _ in range(dice.choice([1, 1, 1, 2, 3])):
            if ours(prompt):
                done.append(damage(dice, prompt, self.schemas))
        became = self.judge(prompt)
        told = self.log()[self.read:].decode(errors="replace")
        self.read += len(told.encode(errors="replace"))
        for trace in re.findall(r"Traceback \(most recent call last\):\n(?: .*\n)+.*", told):
            if f"/{PACK}/" in trace and became.startswith(("refused before", "works")):
                raise Failure(f"{name}, {done}: an exception of ours in the log alone: {trace[-1500:]}")
        if "invalid value encountered in cast" in told and became == "works":
            became = "works, and the picture is not finite"
        return f"{name}: {', '.join(done)}", became

    def judge(self, prompt: Prompt) -> str:
        try:
            prompt_id = self.server.queue(prompt)
        except PromptRefused as refused:
            return self.refused(refused)
        except ServerError:
            return "the host stops at it"  # its handler ended with an exception; the log is looked at
        except urllib.error.URLError as error:
            raise Failure(f"the server is gone: {error}") from error
        entry = self.end_of(prompt_id)
        for name, details in entry["status"]["messages"]:
            if name == "execution_interrupted":
                return "takes long, and was interrupted"
            if name == "execution_error":
                return self.failed(details)
        return "works"

    def refused(self, refused: PromptRefused) -> str:
        for entry in (refused.answer.get("node_errors") or {}).values():
            for error in entry["errors"]:
                if error["type"] == "custom_validation_failed" and entry["class_type"] in self.schemas:
                    text = error["details"].partition(" - ")[2]
                    if not text or len(text) > LONGEST or set(text) & set("'\"/&<>`="):
                        raise Failure(f"{entry['class_type']}: a text that cannot be shown: {text[:300]!r}")
                if "exception" in error["type"]:
                    trace = "".join(error.get("extra_info", {}).get("traceback", ()))
                    if f"/{PACK}/" in trace:
                        raise Failure(f"{entry['class_type']}: {error['details']}\n{trace}")
        return "refused before the run"

    def end_of(self, prompt_id: str) -> dict[str, Any]:
        started, interrupted = time.monotonic(), False
        while True:
            entry = self.server.json(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return entry
            if self.server.process.poll() is not None:
                raise Failure(f"the server died\n{self.server.log_tail()}")
            if time.monotonic() - started > PATIENCE and not interrupted:
                interrupted = True
                self.server.post("/interrupt")
            if time.monotonic() - started > 2 * PATIENCE:
                raise Failure("it does not end, though it was interrupted")
            time.sleep(0.05)

    def failed(self, details: dict[str, Any]) -> str:
        kind, text = details["exception_type"], str(details["exception_message"]).strip()
        files = [re.search(r'File "([^"]+)"', frame) for frame in details["traceback"]]
        frames = [found[1] for found in files if found]
        mine = [k for k, file in enumerate(frames) if f"/{PACK}/" in file]
        if not mine:
            return "the host stops at it"
        if kind == "ValueError" and mine[-1] == len(frames) - 1:
            if len(text) > LONGEST:
                raise Failure(f"{details['node_type']}: {len(text)} characters: {text[:200]}")
            return "refused in the run"
        below = frames[mine[-1] + 1:]
        sampling = any(file.endswith(("comfy/samplers.py", "comfy/sample.py", "comfy/sd.py", "comfy/sd1_clip.py"))
                       for file in frames)
        if below and sampling and not any("site-packages" in file for file in below[:1]):
            return "the host stops at it"
        trace = "".join(details["traceback"][-6:])
        raise Failure(f"{details['node_type']}: {kind}: {text[:300]}\n{trace}")


def main() -> int:
    chosen = options(__doc__, 700).parse_args()
    packs = [ROOT, ROOT / "tests" / "comfy_testbed"]
    comfyui = Path(os.environ["COMFYUI_UNDER_TEST"])
    with tempfile.TemporaryDirectory() as folder, Server(comfyui, Path(folder), packs) as server:
        fuzz = Fuzz(server)

        def check(case: str) -> Found:
            done, became = fuzz.check(int(case))
            return became, {"done": done}

        return Results.asked("fuzz_api", DEPENDS, chosen).judge(
            seeds(chosen), check, lambda cases: fuzz.unharmed())


if __name__ == "__main__":
    sys.exit(main())
