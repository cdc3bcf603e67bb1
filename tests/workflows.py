"""API-format workflows for the tests: read from files, pointed at the testbed's model and LoRAs."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "example_workflows" / "api").glob("*.json"))
TESTBED = sorted((ROOT / "tests" / "host" / "workflows").glob("*.json"))
SMALL = {"sdxl_routed": "SDXL", "sdxl_routed_masks": "SDXL", "flux_routed": "Flux", "qwen_image_routed": "Qwen-Image",
         "z_image_turbo_routed": "Z-Image", "krea2_routed": "Krea 2", "wan22_routed": "Wan",
         "sdxl_lightning_routed": "SDXL", "qwen_image_lightning_routed": "Qwen-Image", "flux2_klein_routed": "Flux.2",
         "wan22_lightx2v_routed": "Wan", "ltx23_distilled_routed": "LTX-2",
         "minimax_h3_turbo_merge": "MiniMax H3", "sdxl_four_loras": "SDXL", "sdxl_three_loras.app": "SDXL",
         "sdxl_lora_info": "SDXL"}
"""Examples that are about words in the host's own text encoders: the family whose small model stands for theirs."""
ON_TESTBED = [path for path in EXAMPLES if path.stem not in SMALL]
LOADERS = {"CheckpointLoaderSimple": None, "UNETLoader": 0, "CLIPLoader": 1, "DualCLIPLoader": 1, "VAELoader": 2,
           "LTXAVTextEncoderLoader": 1, "LTXVAudioVAELoader": 3}
"""Nodes that load files -> which output of MODEL, CLIP, VAE, VAE for sound they have; None: all of them."""
NEWER = {"EmptyFlux2LatentImage", "LTXAVTextEncoderLoader", "EmptyMiniMaxH3LatentAV"}
"""Nodes of the host that older releases lack, one for each family of examples that they cannot open."""
LATENTS = ("EmptyLatentImage", "EmptySD3LatentImage")
# Nodes with a number of steps.
SAMPLERS = ("KSampler", "BasicScheduler", "LoRAEnsembleKSampler", "LoRAEnsembleCalibrateGuidance",
            "LoRAEnsembleSpectrum", "LoRAEnsembleLeaveOneOut")
Prompt = dict[str, dict[str, Any]]


def load(path: Path) -> Prompt:
    return json.loads(path.read_text(encoding="utf-8"))


def on_testbed(workflow: Prompt, loras: Sequence[str], text: str | None = None, steps: int | None = None) -> Prompt:
    """An example workflow with its checkpoint and vision model replaced by the testbed's, its LoRAs, in order, by
    `loras`.

    text    replaces the prompt that feeds a sampler's `positive`, directly or through one more node
    """
    prompt, names = copy.deepcopy(workflow), iter(loras)
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "CheckpointLoaderSimple":
            node["class_type"], node["inputs"] = "LoRAEnsembleTestbedLoader", {}
        elif kind == "CLIPVisionLoader":
            node["class_type"], node["inputs"] = "LoRAEnsembleTestbedVision", {}
        elif kind in LATENTS:
            node["class_type"] = "LoRAEnsembleTestbedLatent"
            inputs.update(width=32, height=32)
        elif kind == "LoRAEnsembleLoRA":
            inputs["lora_name"] = next(names)
        elif kind in SAMPLERS:
            inputs["steps"] = steps or inputs["steps"]
            if text is not None and "positive" in inputs:
                source = prompt[inputs["positive"][0]]
                source = prompt[source["inputs"]["conditioning"][0]] if "conditioning" in source["inputs"] else source
                source["inputs"]["text"] = text
    return prompt


def opened_on_small(graph: dict[str, Any], family: str, loras: Iterable[str], steps: int) -> dict[str, Any]:
    """An example workflow in the front end's format with the small model of a family in place of its checkpoint, at 64
    by 64 pixels, its LoRAs, in order, by `loras`."""
    graph, names = copy.deepcopy(graph), iter(loras)
    for node in graph["nodes"]:
        if node["type"] == "CheckpointLoaderSimple":
            node.update(type="LoRAEnsembleTestbedCheckpoint", widgets_values=[family], properties={})
        elif node["type"] == "CLIPVisionLoader":
            node.update(type="LoRAEnsembleTestbedVision", widgets_values=[], properties={})
        elif node["type"] in LATENTS:
            node["widgets_values"][:2] = [64, 64]
        elif node["type"] == "LoRAEnsembleLoRA":
            node["widgets_values"][0] = next(names)
        elif node["type"] == "KSampler":
            node["widgets_values"][2] = steps
    return graph


def on_small(workflow: Prompt, family: str, loras: Sequence[str]) -> Prompt:
    """An example workflow with the small model of a family, its text encoder and a VAE in place of all files, at 64 by
    64 pixels, its LoRAs, in order, by `loras`. Its prompts and steps stay as they are."""
    prompt, names = {}, iter(loras)
    slots = {key: 3 if "audio" in node["inputs"].get("vae_name", "") else LOADERS[node["class_type"]]
             for key, node in workflow.items() if node["class_type"] in LOADERS}
    for key, node in copy.deepcopy(workflow).items():
        inputs = node["inputs"]
        if node["class_type"] in LOADERS:
            continue
        for name, value in inputs.items():
            if isinstance(value, list) and value[0] in slots:
                inputs[name] = ["small", value[1] if slots[value[0]] is None else slots[value[0]]]
        small = {"width": 64, "height": 64, "length": 9, "frames_number": 9}
        if "batch_size" in inputs or "length" in inputs:
            inputs.update({name: value for name, value in small.items() if name in inputs})
        if node["class_type"] == "LoRAEnsembleLoRA":
            inputs["lora_name"] = next(names)
        for row in rows_of(node):
            inputs[row] = next(names)
        prompt[key] = node
    prompt["small"] = {"class_type": "LoRAEnsembleTestbedCheckpoint", "inputs": {"family": family}}
    return prompt


def rows_of(node: dict[str, Any]) -> list[str]:
    """The inputs of a LoRA Ensemble that name files."""
    return [name for name in node["inputs"] if name.rpartition(".")[2].startswith("lora_") and name[-1].isdigit()]


def newer(prompt: Prompt, known: Collection[str]) -> list[str]:
    """Why a release that knows these nodes cannot open an example: those of its nodes that came later."""
    return sorted(NEWER & {node["class_type"] for node in prompt.values()} - set(known))


def find(prompt: Prompt, class_type: str) -> list[str]:
    """The ids of the nodes of one class, in the workflow's order."""
    return [key for key, node in prompt.items() if node["class_type"] == class_type]


def widgets(node_info: dict[str, Any]) -> dict[str, Any]:
    """The default of every required widget of a node, from its entry of /object_info."""
    defaults = {}
    for name, (kind, *options) in node_info["input"]["required"].items():
        values = kind if isinstance(kind, list) else (options[0].get("options") if options else None)
        if options and "default" in options[0]:
            defaults[name] = options[0]["default"]
        elif values:
            defaults[name] = values[0]
    return defaults


def compose(
    method: str, options: dict[str, Any], loras: Sequence[str], roles: Sequence[str], text: str, seed: int, steps: int,
    cfg: float, words: Sequence[str] = ()
) -> Prompt:
    """A testbed workflow: `loras` at strength 1 through the node `method` with `options`, sampled along the flow;
    `words` typed on each."""
    prompt = load(ROOT / "tests" / "host" / "workflows" / "merge.json")
    first, second = prompt.pop("lora1"), prompt.pop("lora2")
    for i, (name, role) in enumerate(zip(loras, roles, strict=True)):
        node = copy.deepcopy(second if i else first)
        node["inputs"] |= {"lora_name": name, "role": role} | ({"ensemble": [f"lora{i}", 0]} if i else {})
        prompt[f"lora{i + 1}"] = node
    for i, typed in enumerate(words):
        prompt[f"lora{i + 1}"]["inputs"]["words"] = typed
    prompt["method"]["class_type"] = method
    links = {name: value for name, value in prompt["method"]["inputs"].items() if isinstance(value, list)}
    prompt["method"]["inputs"] = links | {"ensemble": [f"lora{len(loras)}", 0]} | options
    prompt["positive"]["inputs"]["text"] = text
    prompt["sampler"]["inputs"].update(seed=seed, steps=steps, cfg=cfg)
    return prompt
