"""Routed LoRAs, films with sound and the report of a run on a real server: the example workflows on small models of
their own families, with the host's text encoders, tokenizers and ordinary prompt nodes."""

from __future__ import annotations

import copy
import io
import json
import shutil
from typing import Any

import av
import numpy as np
import pytest
from lora_ensemble.tests.server import Server
from lora_ensemble.tests.workflows import EXAMPLES, SMALL, Prompt, find, load, on_small
from PIL import Image
from safetensors.torch import save_file

from .builders import lora, shapes
from .small_checkpoints import lack_of, model, text_encoder

HER, HIM = "ohwx woman with long red hair", "sks man with a grey beard"
# name -> (the words of the LoRAs in the order of the ensemble, samples that the model evaluates in each step)
EXPECTED = {
    "sdxl_routed": ([[HER], [HIM], ["watercolor painting"]], [3] + [2] * 29),
    "sdxl_routed_masks": ([[HER], [HIM], ["watercolor painting"]], [3] + [2] * 29),
    "flux_routed": ([[f"An {HER}"], ["a fluffy sks dog"], ["watercolor painting"]], [2] + [1] * 19),
    "qwen_image_routed": ([["An ohwx woman with long red hair in a green coat"],
                           ["A sks man with a grey beard and round glasses"], []], [3] + [2] * 19),
    "z_image_turbo_routed": ([[f"{HER} and a yellow umbrella"], [f"{HIM} and a dark coat"], []], [2] + [1] * 7),
    "krea2_routed": ([[f"An {HER} sits"], ["a sks dog with a blue collar"], []], [2] + [1] * 7),
    "wan22_routed": ([[HER], [HIM]], [2] * 10),  # places are known from the first model's run
    "sdxl_lightning_routed": ([[HER], [HIM], ["watercolor painting"]], [2] + [1] * 7),
    "qwen_image_lightning_routed": ([["An ohwx woman with long red hair in a green coat"],
                                     ["A sks man with a grey beard and round glasses"]], [2] + [1] * 7),
    "flux2_klein_routed": ([[f"An {HER} sits"], ["a sks dog with a blue collar"], []], [2] + [1] * 3),
    "wan22_lightx2v_routed": ([[HER], [HIM]], [1] * 2),
    "ltx23_distilled_routed": ([[HER], [HIM]], [2] + [1] * 7),
}
NAMES = tuple("abcd")
WITHOUT_PLACE = ("txtfusion", "connector", "token_refiner", "condition_proj")
"""Parts of the names of layers that see text alone, before it meets the picture."""


@pytest.fixture(scope="module")
def files(server: Server):
    """`files(family)` -> names of LoRAs for its small model, where the server looks for them.

    They change what has a place: the layers in which Krea 2, LTX-2 and MiniMax H3 prepare their text have none, which
    is said.
    """
    made: dict[str, list[str]] = {}

    def write(family: str) -> list[str]:
        if reason := lack_of(family):
            pytest.skip(reason)
        if family not in made:
            layers = shapes(model(family), lambda layer: not any(part in layer for part in WITHOUT_PLACE))
            made[family] = [f"{family}_{name}.safetensors" for name in NAMES]
            for seed, name in enumerate(made[family]):
                save_file({key: value.contiguous() for key, value in lora(layers, seed).items()},
                          server.base / "models" / "loras" / name)
        return made[family]

    return write


def example(name: str, files) -> Prompt:
    return on_small(load(next(path for path in EXAMPLES if path.stem == name)), SMALL[name], files(SMALL[name]))


def file(server: Server, shown: dict[str, Any]) -> io.BytesIO:
    """What a node has saved."""
    return io.BytesIO(server.get("/view", **{key: shown[key] for key in ("filename", "subfolder", "type")}))


def run(server: Server, prompt: Prompt) -> tuple[dict, np.ndarray, dict[str, Any]]:
    """(the report's text, its picture, what all nodes put out)"""
    outputs = server.run(prompt)["outputs"]
    report, = find(prompt, "LoRAEnsembleReport")
    text, = (node for node in find(prompt, "PreviewAny") if prompt[node]["inputs"]["source"][0] == report)
    (preview,) = find(prompt, "PreviewImage")
    (shown,) = outputs[preview]["images"]
    return json.loads(*outputs[text]["text"]), np.asarray(Image.open(file(server, shown)).convert("RGB")), outputs


def test_all_routed_examples_are_expected():
    assert set(EXPECTED) == {path.stem for path in EXAMPLES if "routed" in path.stem}
    assert set(EXPECTED) == {name for name in SMALL if "routed" in name}


@pytest.mark.parametrize("name", EXPECTED)
def test_words_reach_the_sampler(server: Server, files, name: str):
    """Through the ordinary CLIP Text Encode; evaluated once more than a merge, for the prompt alone, where no mask says
    where the LoRAs act."""
    prompt = example(name, files)
    words, rows = EXPECTED[name]
    found, picture, outputs = run(server, prompt)
    assert found["problems"] == [] and found["finished"] is True
    assert [each["words"] for each in found["words"][0]] == words
    assert [step["rows"] for step in found["steps"]] == rows
    assert picture.shape[1] == 1024 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    (places,) = (notes["places"] for notes in found["steps"][-1]["notes"].values() if "places" in notes)
    assert all(0 < share < 1 for share in places[:2]) and places[2:] == [1] * len(places[2:])
    saved = next(outputs[node] for kind in ("SaveImage", "SaveWEBM", "SaveVideo") for node in find(prompt, kind))
    assert saved["images"]


@pytest.mark.parametrize("name, rate", {"ltx23_distilled_routed": 25, "minimax_h3_turbo_merge": 24}.items())
def test_films_with_sound(server: Server, files, name: str, rate: int):
    """Film and sound of one run are in one file; the distillation LoRA is part of the model."""
    prompt = example(name, files)
    found, picture, outputs = run(server, prompt)
    assert found["problems"] == [] and found["finished"] is True and len(found["steps"]) == 8
    loras = files(SMALL[name])
    assert found["adapters"] == [loras[:1], loras[1:3]]
    (saved,) = find(prompt, "SaveVideo")
    (shown,) = outputs[saved]["images"]
    with av.open(file(server, shown)) as film:
        pictures = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
        assert film.streams.video[0].average_rate == rate and len({each.tobytes() for each in pictures}) > 1
    with av.open(file(server, shown)) as film:
        heard = np.concatenate([frame.to_ndarray() for frame in film.decode(audio=0)], axis=-1)
    assert heard.std() > 1e-3 and picture.shape[1] == 1024


def test_two_noise_levels(server: Server, files):
    """One file of each pair in the chain, the other found; the second model goes on where the first has stopped."""
    for name, level in ((name, level) for name in files("Wan")[:3] for level in ("high", "low")):
        folder = server.base / "models" / "loras"
        shutil.copy(folder / name, folder / f"{level}_noise_{name}")
    names = [f"high_noise_{name}" for name in files("Wan")]
    prompt = on_small(load(next(path for path in EXAMPLES if path.stem == "wan22_lightx2v_routed")), "Wan", names)
    (levels,) = find(prompt, "LoRAEnsembleNoiseLevels")
    prompt["pairs"] = {"class_type": "PreviewAny", "inputs": {"source": [levels, 2]}}
    found, _, outputs = run(server, prompt)
    assert outputs["pairs"]["text"][0].splitlines() == [
        f"'{name}' and '{name.replace('high', 'low')}': a pair, the second found in the folder" for name in names[:3]]
    low = [name.replace("high", "low") for name in names[:3]]
    assert found["adapters"] == [low[:1], low[1:]]
    assert (found["before"], found["whole"]) == (2, 4) and found["problems"] == []


def test_it_evaluates_what_a_merge_does(server: Server, files):
    """The same graph with Merge in its place: as many samples in as many calls but for one, and another picture."""
    routed = example("sdxl_routed", files)
    merged = copy.deepcopy(routed)
    (method,), (sampler,) = find(routed, "LoRAEnsembleRouted"), find(routed, "KSampler")
    links = {name: value for name, value in merged[method]["inputs"].items() if isinstance(value, list)}
    merged[method] = {"class_type": "LoRAEnsembleMerge", "inputs": {**links, "mode": "runtime", "place": "everywhere"}}
    for prompt in (routed, merged):
        prompt[sampler]["inputs"]["seed"] = 31
    (ours, _, one), (theirs, sheet, other) = (run(server, prompt) for prompt in (routed, merged))
    for count in ("calls", "rows"):
        first, *rest = ([step[count] for step in found["steps"]] for found in (ours, theirs))
        assert [first[0] - 1, *first[1:]] == rest[0]
    assert theirs["words"] == [] and np.ptp(sheet, axis=-1).max() < 8  # grey text on white and no map
    assert all(outputs[node]["images"] for outputs in (one, other) for node in find(routed, "SaveImage"))


def test_place_words_of_another_method_is_the_same(server: Server, files):
    """Merge with place 'words' is Routed with its defaults."""
    prompt = example("sdxl_routed", files)
    (method,) = find(prompt, "LoRAEnsembleRouted")
    links = {name: value for name, value in prompt[method]["inputs"].items() if isinstance(value, list)}
    prompt[method] = {"class_type": "LoRAEnsembleMerge", "inputs": {**links, "mode": "runtime", "place": "words"}}
    found, _, _ = run(server, prompt)
    assert [each["words"] for each in found["words"][0]] == EXPECTED["sdxl_routed"][0] and found["problems"] == []
    assert [step["rows"] for step in found["steps"]] == [3] + [2] * 29


def test_text_encoder_changes_for_their_own_words(server: Server, files):
    """Two of three LoRAs change the text encoder: the report says that their words were encoded with it alone."""
    names = [f"text_{name}" for name in files("SDXL")[:3]]
    layers = {key[len("clip_l.transformer.text_model."):-len(".weight")]: value.shape
              for key, value in text_encoder("SDXL").cond_stage_model.state_dict().items()
              if key.startswith("clip_l.") and ".layers." in key and key.endswith(".weight") and value.ndim == 2}
    for seed, name in enumerate(names):
        text = lora(layers, seed, name=lambda layer: "lora_te1_text_model_" + layer.replace(".", "_"))
        file = {**lora(shapes(model("SDXL")), seed), **(text if seed < 2 else {})}
        save_file({key: value.contiguous() for key, value in file.items()}, server.base / "models" / "loras" / name)
    prompt = on_small(load(next(path for path in EXAMPLES if path.stem == "sdxl_routed")), "SDXL", names)
    for node in find(prompt, "LoRAEnsembleLoRA"):
        prompt[node]["inputs"]["strength_clip"] = 1.0
    (method,), (sampler,) = find(prompt, "LoRAEnsembleRouted"), find(prompt, "KSampler")
    prompt[method]["inputs"]["text"] = "own words"
    prompt[sampler]["inputs"]["steps"] = 2
    found, _, _ = run(server, prompt)
    assert found["problems"] == []
    assert [each.get("text_encoder") for each in found["words"][0]] == ["own words", "own words", None]


def test_prompts_of_another_clip_are_said(server: Server, files):
    """Encoded with the loader's CLIP, a prompt does not say where its words are."""
    prompt = example("sdxl_routed", files)
    for node in find(prompt, "CLIPTextEncode"):
        prompt[node]["inputs"]["clip"] = ["small", 1]
    found, _, _ = run(server, prompt)
    assert any("does not say where its words are" in problem and "Connect clip to the method node" in problem
               for problem in found["problems"])
    assert [step["notes"]["Merge"]["places"] for step in found["steps"]][-1] == [1, 1, 1]


def test_the_report_of_a_model_that_was_not_sampled(server: Server, files):
    """The loader's MODEL instead of the method's: a text and a picture say what to connect."""
    prompt = example("sdxl_routed", files)
    (report,) = find(prompt, "LoRAEnsembleReport")
    prompt[report]["inputs"]["model"] = ["small", 0]
    found, _, _ = run(server, prompt)
    assert len(found["problems"]) == 1 and "Connect the MODEL that the sampler got" in found["problems"][0]


def test_a_routed_run_whose_loras_are_all_off_is_that_of_the_base_model(server: Server, files):
    prompt = example("sdxl_routed", files)
    for node in find(prompt, "LoRAEnsembleLoRA"):
        prompt[node]["inputs"] |= {"strength_model": 0.0, "strength_clip": 0.0}
    (sampler,) = find(prompt, "KSampler")
    prompt[sampler]["inputs"]["steps"] = 2
    record, _, _ = run(server, prompt)
    assert [step["rows"] for step in record["steps"]] == [2, 2]
