"""One picture that two samplers draw one after the other, on a real server: Wan 2.2 with a model and a LoRA file for
each noise level, and one model under two KSampler (Advanced)."""

from __future__ import annotations

import copy
import io
import json
import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from lora_ensemble.tests.server import Server
from lora_ensemble.tests.workflows import EXAMPLES, find, load, on_small, widgets
from PIL import Image
from safetensors.torch import save_file

from .builders import lora, shapes
from .small_checkpoints import model

PROMPT = next(path for path in EXAMPLES if path.stem == "wan22_lightx2v_routed")
STEPS = 6
ROLES = ("character", "clothing", "style")
METHODS = {
    "Switch": {"steps_per_lora": 0},
    "CMLoRA": {"order": "online", "threshold": 0.99},
    "KLoRA": {},
    "LoRAtorio": {},
    "Routed": {"mode": "once"},
}


@pytest.fixture(scope="module")
def files(server: Server) -> list[str]:
    """Three pairs of files; the names of those for high noise."""
    layers, folder = shapes(model("Wan")), server.base / "models" / "loras"
    names = [f"two_runs_{name}_high_noise.safetensors" for name in ("first", "second", "third")]
    for seed, name in enumerate(names):
        save_file({key: value.contiguous() for key, value in lora(layers, seed).items()}, folder / name)
        shutil.copy(folder / name, folder / name.replace("high", "low"))
    return names


@pytest.fixture(scope="module")
def defaults(server: Server):
    known = server.json("/object_info")
    return lambda name: widgets(known[name])


@dataclass
class Told:
    """What a sampler's MODEL tells of its run."""

    record: dict[str, Any]
    picture: np.ndarray

    @property
    def branches(self) -> list:
        return [step["branches"] for step in self.record["steps"]]

    @property
    def negatives(self) -> list[int]:
        return [step["negative"] for step in self.record["guidance"]["steps"]]

    def notes(self, name: str, key: str) -> list:
        return [step["notes"].get(name, {}).get(key) for step in self.record["steps"]]


class Graph:
    """The example of Wan 2.2 with two small models, another method and, if asked for, guidance on both."""

    def __init__(self, files: list[str], defaults, method: str = "Routed", guidance: dict | None = None,
                 cfg: float = 1.0, cut: int = 3):
        self.prompt = prompt = on_small(load(PROMPT), "Wan", files)
        prompt["low"] = {"class_type": "LoRAEnsembleTestbedCheckpoint", "inputs": {"family": "Wan", "weights": 1}}
        for node, role in zip(find(prompt, "LoRAEnsembleLoRA"), ROLES, strict=True):
            prompt[node]["inputs"].update(role=role, words=prompt[node]["inputs"]["words"] or "beach at sunset")
        self.methods = find(prompt, "LoRAEnsembleRouted")
        prompt[self.methods[1]]["inputs"]["model"] = ["low", 0]
        for node in self.methods:
            links = {name: value for name, value in prompt[node]["inputs"].items() if isinstance(value, list)}
            prompt[node] = {"class_type": f"LoRAEnsemble{method}",
                            "inputs": {**defaults(f"LoRAEnsemble{method}"), **links, **METHODS.get(method, {})}}
        self.samplers = find(prompt, "KSamplerAdvanced")
        self.models = [prompt[node]["inputs"]["model"] for node in self.samplers]
        for k in range(2 if guidance is not None else 0):
            prompt[f"guided{k}"] = {"class_type": "LoRAEnsembleAdaptiveGuidance", "inputs": {
                **defaults("LoRAEnsembleAdaptiveGuidance"), **guidance, "model": self.models[k]}}
            self.models[k] = [f"guided{k}", 0]
        for node, (first, last) in zip(self.samplers, ((0, cut), (cut, STEPS)), strict=True):
            prompt[node]["inputs"].update(steps=STEPS, start_at_step=first, end_at_step=last, cfg=cfg)
        text = prompt[self.samplers[0]]["inputs"]["positive"][0]
        prompt["negative"] = copy.deepcopy(prompt[text])
        prompt["negative"]["inputs"]["text"] = "blurry"
        for node in self.samplers:
            prompt[node]["inputs"]["negative"] = ["negative", 0]

    def one_model(self) -> Graph:
        """The first model, with what is on it, for both samplers."""
        self.models[1] = self.models[0]
        return self

    def once(self) -> Graph:
        """One sampler for all steps."""
        self.prompt[self.samplers[0]]["inputs"].update(end_at_step=STEPS, return_with_leftover_noise="disable")
        (decode,) = find(self.prompt, "VAEDecode")
        self.prompt[decode]["inputs"]["samples"] = [self.samplers[0], 0]
        self.samplers = self.samplers[:1]
        return self

    def run(self, server: Server) -> list[Told]:
        """What each sampler's run tells, asked before the next one begins."""
        prompt = {key: node for key, node in self.prompt.items() if node["class_type"] not in (
            "LoRAEnsembleReport", "PreviewAny", "PreviewImage", "SaveWEBM")}
        latent = None
        for k, node in enumerate(self.samplers):
            prompt[node]["inputs"]["model"] = self.models[k]
            if latent is not None:
                prompt[node]["inputs"]["latent_image"] = latent
            prompt[f"report{k}"] = {"class_type": "LoRAEnsembleReport", "inputs": {
                "theme": "light", "model": self.models[k], "latent": [node, 0]}}
            prompt[f"text{k}"] = {"class_type": "PreviewAny", "inputs": {"source": [f"report{k}", 2]}}
            latent = [f"report{k}", 0]
        (decode,) = find(prompt, "VAEDecode")
        prompt[decode]["inputs"]["samples"] = latent
        prompt["saved"] = {"class_type": "SaveImage", "inputs": {"images": [decode, 0], "filename_prefix": "two"}}
        entry = server.run(prompt)
        pictures = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), dtype=np.float64)
                             for file in server.images(entry, "saved")])
        return [Told(json.loads(*entry["outputs"][f"text{k}"]["text"]), pictures) for k in range(len(self.samplers))]


@pytest.mark.parametrize("method", METHODS)
def test_two_samplers_draw_what_one_does(server: Server, files, defaults, method):
    """One model: who acts at which step, and the picture."""
    (whole,) = Graph(files, defaults, method).one_model().once().run(server)
    first, second = Graph(files, defaults, method).one_model().run(server)
    assert second.branches == whole.branches[3:]
    assert (second.record["before"], second.record["whole"]) == (3, STEPS) == (3, first.record["whole"])
    if method != "KLoRA":  # whose first run goes by the noise level: how many steps follow is not known
        assert first.branches == whole.branches[:3]
        assert np.abs(second.picture - whole.picture).max() <= 1.01 and whole.picture.std() > 1
    assert first.record["carried"] == [] == whole.record["carried"]
    assert second.record["carried"][0].startswith("3 steps of this picture were taken before: turns")


def test_maps_pass_from_the_high_noise_model_to_the_other(server: Server, files, defaults):
    """The second model is not asked where words are: it draws with the first one's places from its first step on."""
    high, low = Graph(files, defaults).run(server)
    assert [step["rows"] for step in high.record["steps"]] == [2, 1, 1]
    assert [step["rows"] for step in low.record["steps"]] == [1, 1, 1]
    for told, level in ((high, "high"), (low, "low")):
        assert told.record["adapters"] == [[name.replace("high", level) for name in files]]
        assert told.record["problems"] == []
    (places,) = {str(places) for places in (*high.notes("Merge", "places")[1:], *low.notes("Merge", "places"))}
    assert "0." in places  # the LoRAs with words have a part of the picture
    assert "places: those that words were found at are known" in low.record["carried"]


def test_places_of_other_words_are_looked_for_anew(server: Server, files, defaults):
    graph = Graph(files, defaults)
    text = graph.prompt[graph.samplers[0]]["inputs"]["positive"][0]
    graph.prompt["other"] = copy.deepcopy(graph.prompt[text])
    graph.prompt["other"]["inputs"]["text"] = "sks man on the left and ohwx woman on the right of a red boat"
    graph.prompt[graph.samplers[1]]["inputs"]["positive"] = ["other", 0]
    _, low = graph.run(server)
    assert [step["rows"] for step in low.record["steps"]] == [2, 1, 1]
    assert any("looked for anew" in line for line in low.record["carried"])


def test_classes_and_what_was_measured_pass_to_the_other_model(server: Server, files, defaults):
    """CMLoRA leads by the share of high frequencies, which is the picture's: without that of the last step before, the
    first step of any run is the high class's."""
    high, low = Graph(files, defaults, "CMLoRA").run(server)
    assert "CMLoRA: what was measured of the picture is known" in low.record["carried"]
    led = [*high.notes("CMLoRA", "led"), *low.notes("CMLoRA", "led")]
    assert led[0] != led[3] and len(led) == STEPS


@pytest.mark.parametrize("guidance", [{"mode": "extrapolate", "saving": 0.5}, {
    "mode": "threshold", "threshold": -1.0, "min_steps": 2}], ids=lambda guidance: guidance["mode"])
def test_guidance_goes_on(server: Server, files, defaults, guidance):
    """The negatives that two samplers evaluate are those that one does, and so is the picture; another model begins
    anew and says so."""
    (whole,) = Graph(files, defaults, "Switch", guidance, 5.0).one_model().once().run(server)
    first, second = Graph(files, defaults, "Switch", guidance, 5.0).one_model().run(server)
    assert first.negatives + second.negatives == whole.negatives and 0 in whole.negatives
    assert np.abs(second.picture - whole.picture).max() <= 1.01
    assert len(second.record["guidance"]["carried"]) == 1 and first.record["guidance"]["carried"] == []
    _, other = Graph(files, defaults, "Switch", guidance, 5.0).run(server)
    assert other.record["guidance"]["carried"] == [] and other.negatives[0] == 1
    assert any("the picture of another model" in line for line in other.record["guidance"]["problems"])


def test_a_second_prompt_carries_on_too(server: Server, files, defaults):
    """The second sampler is queued again, and ComfyUI has kept what the first one made."""
    graph = Graph(files, defaults, "CMLoRA")
    high, _ = graph.run(server)
    graph.prompt[graph.samplers[1]]["inputs"]["noise_seed"] = 77
    again, low = graph.run(server)
    assert again.record["steps"] == high.record["steps"]  # the seconds that they took among them
    assert (low.record["before"], low.record["whole"]) == (3, STEPS)
    assert "CMLoRA: what was measured of the picture is known" in low.record["carried"]


def test_what_the_cache_does_not_carry_is_said(server: Server, files, defaults):
    graph = Graph(files, defaults, "Composite")
    graph.prompt["cache"] = {"class_type": "LoRAEnsembleBranchCache", "inputs": {
        **defaults("LoRAEnsembleBranchCache"), "schedule": "uniform", "interval": 3, "model": graph.models[0]}}
    graph.models = [["cache", 0]] * 2
    _, second = graph.run(server)
    assert any("features are those of one run" in line for line in second.record["carried"])
