"""LoRA Ensemble and LoRA Info on a real server: their examples on the small SDXL, the former against the chain of
single nodes; wrong rows, chains with a muted node."""

from __future__ import annotations

import copy
import io as files_io
import json

import numpy as np
import pytest
from comfy_api.latest import io
from lora_ensemble.tests.server import PromptFailed, PromptRefused, Server
from lora_ensemble.tests.workflows import EXAMPLES, Prompt, find, load, on_small
from PIL import Image
from safetensors.torch import save_file

from .builders import lora, shapes
from .small_checkpoints import lack_of, model

if not hasattr(io, "DynamicCombo"):
    pytest.skip("this release cannot show rows", allow_module_level=True)

FILES = {"ohwx": "one.safetensors", "sks": "two.safetensors", "zwx": "three.safetensors", "": "four.safetensors"}
"""Trigger words -> the file that names them."""
ROLES = ("auto", "auto", "auto", "style")
STRENGTHS = (1.0, 1.0, 1.0, 0.8)
STACK = "LoRAEnsembleStack"


@pytest.fixture(scope="module", autouse=True)
def lora_files(server: Server):
    if reason := lack_of("SDXL"):
        pytest.skip(reason)
    layers = shapes(model("SDXL"), lambda layer: True)
    for seed, (words, name) in enumerate(FILES.items()):
        save_file({key: value.contiguous() for key, value in lora(layers, seed).items()},
                  server.base / "models" / "loras" / name, {"modelspec.trigger_phrase": words} if words else None)


def example(method: str) -> Prompt:
    prompt = on_small(load(next(path for path in EXAMPLES if path.stem == "sdxl_four_loras")), "SDXL",
                      list(FILES.values()))
    prompt[find(prompt, STACK)[0]]["inputs"]["method"] = method
    prompt[find(prompt, "KSampler")[0]]["inputs"]["steps"] = 6
    return prompt


def as_chain(prompt: Prompt, kind: str, options: dict) -> Prompt:
    """The same by a chain of single nodes and the node of a method."""
    prompt = copy.deepcopy(prompt)
    (own,) = find(prompt, STACK)
    for number, (name, role, strength) in enumerate(zip(FILES.values(), ROLES, STRENGTHS, strict=True)):
        prompt[f"lora{number}"] = {"class_type": "LoRAEnsembleLoRA", "inputs": {
            "lora_name": name, "strength_model": strength, "strength_clip": strength, "role": role,
            **({"ensemble": [f"lora{number - 1}", 0]} if number else {})}}
    links = {name: prompt[own]["inputs"][name] for name in ("model", "clip")}
    prompt[own] = {"class_type": kind, "inputs": {**links, "ensemble": ["lora3", 0], **options}}
    return prompt


def picture(server: Server, prompt: Prompt) -> np.ndarray:
    (file,) = server.images(server.run(prompt), find(prompt, "SaveImage")[0])
    return np.asarray(Image.open(files_io.BytesIO(file)).convert("RGB"))


def defaults(server: Server, kind: str) -> dict:
    """The default of every widget of a node."""
    found = {}
    for group in ("required", "optional"):
        for name, spec in server.json(f"/object_info/{kind}")[kind]["input"].get(group, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            if "default" in options:
                found[name] = options["default"]
    return found


@pytest.mark.parametrize(("method", "kind"), [("Routed", "LoRAEnsembleRouted"), ("CMLoRA", "LoRAEnsembleCMLoRA")])
def test_four_loras_in_one_node_are_the_chain(server: Server, method: str, kind: str):
    """Six nodes and as many wires more, and the same picture."""
    prompt = example(method)
    chain = as_chain(prompt, kind, defaults(server, kind))
    assert (picture(server, prompt) == picture(server, chain)).all()
    assert (picture(server, prompt) != picture(server, example("Merge"))).any()


def test_it_says_what_it_took_and_did(server: Server):
    prompt = example("auto")
    (own,) = find(prompt, STACK)
    (text,) = server.run(prompt)["outputs"][own]["text"]
    assert text.splitlines() == ["auto: Routed, 3 of 4 LoRAs have words, so each can act where it belongs",
                                 "1  one.safetensors: 1, trigger words of its file: ohwx",
                                 "2  two.safetensors: 1, trigger words of its file: sks",
                                 "3  three.safetensors: 1, trigger words of its file: zwx",
                                 "4  four.safetensors: 0.8, style"]


def test_lora_info_in_words_and_as_a_picture(server: Server):
    """Nothing is sampled; the second file says no trigger words."""
    prompt = on_small(load(next(path for path in EXAMPLES if path.stem == "sdxl_lora_info")), "SDXL",
                      [FILES["ohwx"], FILES[""]])
    outputs = server.run(prompt)["outputs"]
    (own,), (text,), (preview,) = (find(prompt, kind) for kind in ("LoRAEnsembleInfo", "PreviewAny", "PreviewImage"))
    (words,) = outputs[own]["text"]
    assert outputs[text]["text"] == [words] and words.startswith("On this model (SDXL):")
    assert "trigger words: ohwx\n" in words and "trigger words: not said in the file" in words
    assert words.count("LoRA of rank 4, on ") == 2 and "does nothing" not in words and "left out" not in words
    (shown,) = outputs[preview]["images"]
    file = server.get("/view", **{key: shown[key] for key in ("filename", "subfolder", "type")})
    picture = np.asarray(Image.open(files_io.BytesIO(file)).convert("RGB"))
    assert picture.shape[1] == 1024 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_its_stack_and_ensemble_go_on(server: Server):
    """A LORA_STACK of it is an ensemble again, and an ensemble comes before the rows."""
    prompt = example("Merge")
    (own,) = find(prompt, STACK)
    inputs = prompt[own]["inputs"]
    prompt["again"] = {"class_type": STACK, "inputs": {
        "model": inputs["model"], "clip": inputs["clip"], "method": "Merge", "lora_stack": [own, 3], "on_1": False,
        "lora_1": "gone.safetensors"}}
    for name in find(prompt, "CLIPTextEncode"):
        prompt[name]["inputs"]["clip"] = ["again", 1]
    prompt[find(prompt, "KSampler")[0]]["inputs"]["model"] = ["again", 0]
    assert (picture(server, prompt) == picture(server, example("Merge"))).all()


@pytest.mark.parametrize(("inputs", "words"), [
    ({"row_2.lora_2": "gone.safetensors"}, "row 2: LoRA “gone.safetensors” is not in any"),
    ({"row_2.strength_2": 1000}, "row 2: strength_2 is 1000"),
    ({"method": "Blend"}, "method is “Blend”"),
])  # fmt: skip
def test_a_wrong_row_is_refused_before_the_run(server: Server, inputs: dict, words: str):
    prompt = example("Merge")
    prompt[find(prompt, STACK)[0]]["inputs"].update(inputs)
    with pytest.raises(PromptRefused) as refused:
        server.run(prompt)
    assert words in str(refused.value)


def test_a_row_that_is_no_choice_is_refused(server: Server):
    """The host drops it with all that it holds, and would go on with what is left."""
    prompt = example("Merge")
    prompt[find(prompt, STACK)[0]]["inputs"]["row_2.row_3"] = "perhaps"
    with pytest.raises(PromptFailed, match="row_3 is 'perhaps'. It must be 'yes' or 'no'"):
        server.run(prompt)


def test_a_muted_node_in_a_chain_stops_the_run(server: Server):
    """The front end leaves it out of the prompt with all before it; the workflow it sends along has them."""
    chain = as_chain(example("Merge"), "LoRAEnsembleMerge", defaults(server, "LoRAEnsembleMerge"))
    ids = {"lora0": 20, "lora1": 21, "lora2": 22, "lora3": 23}
    for name, number in ids.items():
        chain[str(number)] = chain.pop(name)
        if name != "lora0":
            chain[str(number)]["inputs"]["ensemble"] = [str(number - 1), 0]
    (method,) = find(chain, "LoRAEnsembleMerge")
    chain[method]["inputs"]["ensemble"] = ["23", 0]
    workflow = {"nodes": [{"id": number, "type": "LoRAEnsembleLoRA", "mode": 2 if number == 21 else 0, "inputs": [
        {"name": "ensemble", "type": "LORA_ENSEMBLE", "link": number if number > 20 else None}]}
        for number in ids.values()], "links": [[k, k - 1, 0, k, 0, "LORA_ENSEMBLE"] for k in (21, 22, 23)]}
    whole = picture(server, chain)
    for gone in ("20", "21"):
        del chain[gone]
    del chain["22"]["inputs"]["ensemble"]
    with pytest.raises(PromptFailed, match="is muted, and with it all that comes before it is lost") as failed:
        server.run(chain, workflow=json.loads(json.dumps(workflow)))
    assert "(node 20)" in str(failed.value) and whole.any()
