"""What auto takes, by what is known of the LoRAs."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.compose.auto import best_method
from lora_ensemble.host.files.ensemble import LoRASpec, Mask


def specs(names, words=(), masks=(), strengths=None, roles=None) -> tuple[LoRASpec, ...]:
    return tuple(LoRASpec(name, strength, strength, role, Mask(torch.ones(1, 2, 2)) if k in masks else None,
                          "ohwx" if k in words else "")
                 for k, (name, strength, role) in enumerate(zip(names, strengths or [1.0] * 9, roles or ["auto"] * 9,
                                                                strict=False)))


@pytest.mark.parametrize(("options", "clip", "method", "why"), [
    ({"words": (0, 1)}, True, "Routed", "2 of 3 LoRAs have words"),
    ({"words": (0,), "masks": (1,)}, True, "Routed", "1 of 3 LoRAs has words and 1 a mask"),
    ({"words": (0, 1)}, False, "Merge", "no clip is connected"),
    ({"words": (0,)}, True, "Merge", "1 of 3 LoRAs has known words: type"),
    ({}, True, "Merge", "none of 3 LoRAs has known words: type"),
    ({}, False, "Merge", "none of 3 LoRAs has known words: type"),
    ({"masks": (0, 1)}, True, "Merge", "2 of 3 LoRAs have a mask"),
    ({"masks": (0,)}, False, "Merge", "1 of 3 LoRAs has a mask"),
    ({"masks": (0,), "words": (0,)}, True, "Merge", "1 of 3 LoRAs has a mask"),
    ({"words": (0, 1), "strengths": (1.0, 0.0, 1.0)}, True, "Merge", "1 of 2 LoRAs has"),
    ({"words": (0, 1), "roles": ("auto", "always", "auto")}, True, "Merge", "1 of 2 LoRAs has"),
    ({"words": (0, 1), "strengths": (1.0, -0.5, 0.0)}, True, "Routed", "2 of 2 LoRAs have words"),
    ({"words": (0, 1, 2), "strengths": (1.0, 0.0, 0.0)}, True, "Merge", "one LoRA has nobody"),
    ({"roles": ("always",) * 3}, True, "Merge", "no LoRA takes turns"),
])  # fmt: skip
def test_what_auto_takes(loras, options, clip, method, why):
    names = [loras({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, f"{k}.safetensors") for k in range(3)]
    choice = best_method(specs(names, **options), clip)
    assert choice.method == method and choice.reason.startswith(why)


def test_auto_knows_the_trigger_words_of_files(loras):
    file = {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}
    names = [loras(file, f"{k}.safetensors", metadata={"modelspec.trigger_phrase": "ohwx"}) for k in range(2)]
    assert best_method(specs(names), True).method == "Routed"
    assert best_method(specs(names), False).method == "Merge"
