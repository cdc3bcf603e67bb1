"""LoRAs that are always on: part of the model, in every branch, on both sides, at every place, in every step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lora_ensemble.host.compose.apply import apply_method, bake
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.compose.routes import Placing
from lora_ensemble.host.files.ensemble import ALWAYS, LoRASpec
from lora_ensemble.host.files.metadata import for_few_steps
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.routed import Routing
from lora_ensemble.methods.switch import Switch

from .builders import lora, plain, same, sample, shapes, stock
from .caches import cached, cmlora
from .guidance_tools import ag, extrapolated
from .models import base
from .test_routed import bare, prompt, specs
from .test_selection import est, klora, pair

METHODS = [Merge, Switch, Composite, LoRAtorio, CMLoRA]
each = pytest.mark.parametrize("make", METHODS, ids=lambda make: make.__name__)


def turbo(model, loras, **options) -> LoRASpec:
    return LoRASpec(loras(lora(shapes(model), 9, 4)), 0.5, 0, ALWAYS, **options)


def composed(model, ensemble, make, **options):
    return apply_method(model, None, tuple(ensemble), plain(make), "LoRAs", **options)[0]


@each
@pytest.mark.parametrize("family", ["SD15", "Flux"])
@pytest.mark.parametrize("place", [0, 2], ids=["first", "last"])
def test_the_method_composes_on_a_model_that_has_it(family, make, place, loras):
    """The same as with the stock loader before: in the base row of LoRAtorio, in every branch, on both sides."""
    model = base(family)
    ensemble, always = bare(specs(model, loras)), turbo(model, loras)
    listed = [*ensemble[:place], always, *ensemble[place:]]
    ours = composed(model, listed, make)
    behind = composed(stock(model, [always]), ensemble, make)
    same(sample(ours, family, steps=3), sample(behind, family, steps=3), sample(model, family, steps=3), 1e-4)
    assert record_of(ours).problems == [] and always.name not in record_of(ours).adapters[-1]
    assert [step.rows for step in record_of(ours).steps] == [step.rows for step in record_of(behind).steps]


@pytest.mark.parametrize("options", [{"mode": "every step"}, {"mode": "once", "start": 0.34}])
@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_routed_on_a_model_that_has_it(family, options, loras):
    """It acts before the start as well, and where words are looked for."""
    model = base(family)
    ensemble, always = specs(model, loras), turbo(model, loras)
    placing = Placing("words", Routing(**options))
    ours = composed(model, [always, *ensemble], Merge, placing=placing)
    behind = composed(stock(model, [always]), ensemble, Merge, placing=placing)
    found, want = (sample(each, family, prompt(family), steps=3) for each in (ours, behind))
    same(found, want, sample(model, family, prompt(family), steps=3), 1e-4)
    assert torch.allclose(places_of(ours)[-1].maps, places_of(behind)[-1].maps, atol=1e-3)
    assert record_of(ours).problems == []


FURTHER = {
    "K-LoRA": klora,
    "EST-LoRA": est,
    "a pool": lambda model, ensemble: composed(model, ensemble, partial(LoRAtorio, top_k=1)),
    "Switch-A": lambda model, ensemble: composed(model, ensemble, partial(CMLoRA, order="switch-a")),
    "CMLoRA, cached": lambda model, ensemble: cmlora(model, ensemble, 1),
    "Composite, cached": lambda model, ensemble: cached(composed(model, ensemble, Composite), 2),
    "Composite, guided": lambda model, ensemble: ag(composed(model, ensemble, Composite), -1.0, min_steps=2),
    "LoRAtorio, extrapolated": lambda model, ensemble: extrapolated(composed(model, ensemble, LoRAtorio), 0.5),
}


@pytest.mark.parametrize("name", FURTHER)
def test_choices_caches_and_guidance_on_a_model_that_has_it(name, loras):
    """It is none of those that compete, is not measured, and what is cached or extrapolated has it in."""
    model = base("SD15")
    always, ensemble = turbo(model, loras), pair(model, loras)
    ours = FURTHER[name](model, (always, *ensemble))
    behind = FURTHER[name](stock(model, [always]), ensemble)
    found, want = (sample(each, steps=6, cfg=7.0) for each in (ours, behind))
    same(found, want, sample(model, steps=6, cfg=7.0), 1e-4)
    assert [step.rows for step in record_of(ours).steps] == [step.rows for step in record_of(behind).steps]
    assert record_of(ours).adapters[-1] == [spec.name for spec in ensemble]


def test_alone_it_is_merged(loras):
    model = base("SD15")
    always = turbo(model, loras)
    same(sample(composed(model, [always], Composite)), sample(stock(model, [always])), sample(model), 1e-4)
    baked = bake(model, None, (always, *bare(specs(model, loras))), "Merge LoRAs")[0]
    same(sample(baked), sample(stock(model, [always, *bare(specs(model, loras))])), sample(model), 1e-4)


def test_a_mask_does_not_confine_it(loras):
    from lora_ensemble.host.files.ensemble import Mask

    model = base("SD15")
    masked = turbo(model, loras, mask=Mask(torch.zeros(1, 8, 8)))
    same(sample(composed(model, [masked], Merge)), sample(stock(model, bare([masked]))), sample(model), 1e-4)


@pytest.mark.parametrize(("name", "is_one"), [
    ("Qwen-Image-Lightning-8steps-V1.0.safetensors", True), ("wan/lightx2v_T2V_14B_cfg_step_distill.safetensors", True),
    ("lcm_lora_sdxl.safetensors", True), ("Hyper-SD15-8steps-lora.safetensors", True), ("sdxl_turbo.safetensors", True),
    ("CausVid_bidirect2.safetensors", True), ("hyperrealism.safetensors", False), ("distillery.safetensors", False),
    ("welcome.safetensors", False), ("12steps_of_light.safetensors", False), ("a_cat.safetensors", False)])
def test_files_that_look_like_it(name, is_one, loras, monkeypatch):
    from lora_ensemble.host.files import metadata

    monkeypatch.setattr(metadata, "wording", lambda name: metadata.Wording())
    assert for_few_steps(name) is is_one


def test_it_is_proposed_and_not_done(loras):
    """By what a file calls itself: a line in the record, and the picture is the one that was asked for."""
    model = base("SD15")
    tensors = lora(shapes(model), 9, 4)
    named = LoRASpec(loras(tensors, metadata={"modelspec.title": "SD15 Lightning 4step"}), 0.5, 0)
    ours = composed(model, [named, *bare(specs(model, loras))], Composite)
    sample(ours)
    (line,) = record_of(ours).problems
    assert named.name in line and "always" in line
    merged = composed(model, [named, *bare(specs(model, loras))], Merge)
    sample(merged)
    assert record_of(merged).problems == []


def test_loras_without_a_turn_are_named(loras):
    """Three LoRAs and two steps."""
    model = base("SD15")
    ensemble = [*bare(specs(model, loras)), LoRASpec(loras(lora(shapes(model), 5, 4)), 0.5, 0)]
    ours = composed(model, ensemble, Switch)
    sample(ours, steps=2)
    (line,) = record_of(ours).problems
    assert ensemble[2].name in line and "any of the 2 steps" in line
    sample(ours, steps=3)
    assert record_of(ours).problems == []
