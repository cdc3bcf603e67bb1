"""Files of diffusers whose alpha is in the header alone: they act as ComfyUI's loaders have them, and that is said."""

from __future__ import annotations

import json

import pytest
from lora_ensemble.host.compose.apply import bake
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.files.header_alphas import DOWN, factors, passed_over
from lora_ensemble.host.look.info import infos, told
from lora_ensemble.nodes.ensembles import LoRAEnsembleLoRA
from lora_ensemble.nodes.unused import unused

from .builders import composite, lora, merge, same, sample, shapes, stock
from .models import base

PEFT = {"r": 4, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}


def header(**config) -> dict:
    return {"format": "pt", "lora_adapter_metadata": json.dumps(PEFT | config, indent=2, sort_keys=True)}


def saved(layers: dict, loras, alpha: float | None = None, **config) -> str:
    """As diffusers saves it."""
    tensors = lora(layers, 1, 4, alpha, name="diffusion_model.{}".format, down="lora_A.weight", up="lora_B.weight")
    return loras(tensors, metadata=header(**config))


@pytest.mark.parametrize(("config", "words"), [
    ({}, "strength 1 there is strength 2 here"), ({"lora_alpha": 4}, ""), ({"lora_alpha": 1}, "strength 0.25 here"),
    ({"use_rslora": True}, "strength 4 here"), ({"alpha_pattern": {"to_k": 2}}, "multiplied by 0.5 to 2"),
    ({"alpha_pattern": {"to_k": 2, "(to_q|to_v)": 1}, "lora_alpha": 4}, "multiplied by 0.5 to 1"),
    ({"lora_alpha": "8"}, ""), ({"lora_alpha": None}, ""), ({"lora_alpha": -1}, ""), ({"alpha_pattern": 3}, "2 here"),
])
def test_what_is_said_of_a_file(config, words, loras):
    layers = {f"blocks.0.{end}": (8, 8) for end in ("to_q", "to_k", "to_v")}
    said = passed_over(saved(layers, loras, **config))
    assert words in said and bool(words) == bool(said)


def test_tensors_come_first(loras):
    """Alphas that the loaders do read; files of other programs, and none at all."""
    assert passed_over(saved({"a": (8, 8)}, loras, 3.0)) == passed_over(loras(lora({"a": (8, 8)}, 1))) == ""
    assert passed_over("nowhere.safetensors") == ""


def test_parts_of_a_pipeline_have_alphas_of_their_own():
    entries = {f"{layer}.lora_A.weight": {"shape": [4, 8]} for layer in ("transformer.a", "text_encoder.b", "c")}
    both = {"transformer.lora_alpha": 8, "text_encoder.lora_alpha": 2, "text_encoder.use_rslora": True}
    assert list(factors(entries, both)) == [2.0, 1.0]
    assert list(factors(entries, {"transformer.lora_alpha": 8})) == [2.0] * 3
    assert list(factors({f"a{end}": {"shape": [4, 8]} for end in DOWN}, {"lora_alpha": 4})) == [1.0] * len(DOWN)


@pytest.mark.parametrize("entry", [None, 3, {}, {"shape": None}, {"shape": []}, {"shape": ["x"]}, {"shape": [0, 4]}])
def test_no_header_is_too_strange(entry):
    assert list(factors({"a.lora_A.weight": entry, "b": 3}, {"lora_alpha": 8, "alpha_pattern": {"x": []}})) == []


@pytest.mark.parametrize("text", ["", "[", "3", "null", "[" * 100_000, '{"lora_alpha": {}}'])
def test_no_entry_is_too_strange(text, loras):
    assert passed_over(loras(lora({"a": (8, 8)}, 1), metadata={"lora_adapter_metadata": text})) == ""


@pytest.mark.parametrize("make", [merge, composite])
def test_it_is_said_wherever_it_acts(make, loras):
    model = base("SD15")
    spec = LoRASpec(saved(shapes(model), loras), 0.7, 0)
    ours = make(model, [spec])
    same(sample(ours), sample(stock(model, [spec])), sample(model))
    for lines in (record_of(ours).problems, bake(model, None, (spec,), "Merge LoRAs")[2],
                  unused(LoRAEnsembleLoRA.define_schema(), {"lora_name": spec.name}),
                  told(infos(model, None, (spec,), "LoRA Info"), "SD15").splitlines()):
        assert len([line for line in lines if "strength 1 there is strength 2 here" in line]) == 1
    assert unused(LoRAEnsembleLoRA.define_schema(), {"lora_name": spec.name, "strength_model": 0.0,
                                                     "strength_clip": 0.0}) == [
        "both strengths are 0: this LoRA does nothing"]
