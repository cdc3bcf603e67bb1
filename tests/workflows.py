"""API-format workflows for the tests: read from files, pointed at the testbed's model and LoRAs."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "example_workflows" / "api").glob("*.json"))
TESTBED = sorted((ROOT / "tests" / "host" / "workflows").glob("*.json"))
LATENTS = ("EmptyLatentImage", "EmptySD3LatentImage")
Prompt = dict[str, dict[str, Any]]


def load(path: Path) -> Prompt:
    return json.loads(path.read_text(encoding="utf-8"))


def on_testbed(workflow: Prompt, loras: Sequence[str], text: str | None = None, steps: int | None = None) -> Prompt:
    """An example workflow with its checkpoint replaced by the testbed's model and its LoRAs, in order, by `loras`.

    text    replaces the prompt that feeds a sampler's `positive`, directly or through one more node
    """
    prompt, names = copy.deepcopy(workflow), iter(loras)
    for node in prompt.values():
        kind, inputs = node["class_type"], node["inputs"]
        if kind == "CheckpointLoaderSimple":
            node["class_type"], node["inputs"] = "LoRAEnsembleTestbedLoader", {}
        elif kind in LATENTS:
            node["class_type"] = "LoRAEnsembleTestbedLatent"
            inputs.update(width=32, height=32)
        elif kind == "LoRAEnsembleLoRA":
            inputs["lora_name"] = next(names)
        elif kind == "KSampler":
            inputs["steps"] = steps or inputs["steps"]
            if text is not None:
                source = prompt[inputs["positive"][0]]
                source = prompt[source["inputs"]["conditioning"][0]] if "conditioning" in source["inputs"] else source
                source["inputs"]["text"] = text
    return prompt


def find(prompt: Prompt, class_type: str) -> list[str]:
    """The ids of the nodes of one class, in the workflow's order."""
    return [key for key, node in prompt.items() if node["class_type"] == class_type]
