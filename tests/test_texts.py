"""Testbed LoRAs that change the text encoder too: whose words are encoded with which change."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from lora_ensemble.benchmarks import texts
from lora_ensemble.testbed.beds import UNET
from lora_ensemble.testbed.evaluate import RECIPES
from lora_ensemble.testbed.loras import PREFIX
from lora_ensemble.testbed.sampler import Sampler
from lora_ensemble.testbed.scene import CONCEPTS


@pytest.fixture(scope="module")
def base():
    return UNET.load_base()


@pytest.fixture(scope="module")
def files(base):
    """The testbed's LoRAs with random changes of the text encoder, of rank 2, alpha 1."""
    generator, loras = torch.Generator().manual_seed(3), UNET.load_loras("narrow")
    for file in loras:
        for name, layer in texts.text_layers(base).items():
            out, width = layer.weight.shape
            file[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(2, width, generator=generator) * 0.2
            file[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * 0.2
            file[f"{PREFIX}{name}.alpha"] = torch.tensor(1.0)
    return loras


def by_hand(base, files, loras, text: str) -> torch.Tensor:
    encoder = copy.deepcopy(base.text)
    for lora in loras:
        for name in texts.LAYERS:
            up, down = (files[lora][f"{PREFIX}text.{name}.lora_{side}.weight"] for side in "BA")
            encoder.layers.layers[0].get_submodule(name).weight.data += up @ down / 2
    return encoder(base.tokenize([text]))


@pytest.mark.parametrize("way", texts.WAYS)
@torch.inference_mode()
def test_encodings(way, base, files):
    """Clauses of this prompt are parted by commas, a word is a token."""
    task = next(task for task in UNET.all_sets(seed=101) if len(task.concepts) == 3)
    prompt = task.prompt()
    own, negative = texts.TextSampler(base, files, CONCEPTS, way).encoded(prompt, task.loras)
    merged = by_hand(base, files, task.loras, prompt)
    wanted = merged if way == "merged" else base.contexts([prompt]).clone()
    if "own" in way:
        at = 0
        for clause in prompt.split(","):
            for lora, concept in zip(task.loras, task.concepts, strict=True):
                if concept.name in clause:
                    rows = slice(at, at + len(clause.split()))
                    wanted[:, rows] = by_hand(base, files, (lora,), prompt)[:, rows]
            at += len(clause.split())
    assert torch.allclose(own, wanted, atol=1e-5)
    assert torch.allclose(own, merged, atol=1e-3) is (way == "merged")
    plain = way in ("own words", "off")
    assert torch.allclose(negative, by_hand(base, files, () if plain else task.loras, ""), atol=1e-5)


def test_without_changes_it_is_the_plain_sampler(base, files):
    sets = UNET.all_sets(seed=101)
    crowd = next(task.index for task in sets if {"style", "background"} <= {c.category for c in task.concepts})
    with texts.TextSampler(base, files, CONCEPTS, "off") as sampler:
        pictures = [RECIPES["Routed"].picture(sets[index], sampler.bank) for index in (0, crowd)]
        assert pictures[1].yields
        ours = sampler.draw(pictures, steps=2)
    with texts.TextSampler(base, files, CONCEPTS, "merged") as sampler:
        merged = sampler.draw(pictures, steps=2)
    with Sampler(base, UNET.load_loras("narrow")) as sampler:
        plain = sampler.draw(pictures, steps=2)
    assert torch.allclose(ours, plain, atol=1e-5) and not torch.allclose(merged, plain, atol=1e-2)


def test_a_line_per_method_and_way(capsys, monkeypatch):
    monkeypatch.setattr(texts, "TextSampler", Short)
    given = ["--methods", "Routed", "Merge", "--ways", "merged", "own words", "--regime", "clean"]
    assert texts.main(["--quick", *given]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["method"], line["way"]) for line in lines] == [
        (method, way) for method in ("Routed", "Merge") for way in ("merged", "own words")]
    assert all(line["sets"] == 2 and line["regime"] == "clean" and line["n = 2"] == line["shown"] for line in lines)


class Short(texts.TextSampler):
    def draw(self, pictures, steps, *more, **options):
        return super().draw(pictures, 2, *more, **options)
