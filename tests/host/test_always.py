"""LoRAs that are always on: part of the model, in every branch, on both sides, at every place, in every step."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from lora_ensemble.engine import products
from lora_ensemble.host.compose.apply import apply_method, bake
from lora_ensemble.host.compose.composition import KEY, places_of, record_of
from lora_ensemble.host.compose.placing import Placing
from lora_ensemble.host.compose.weights import put_into_weights
from lora_ensemble.host.files.ensemble import ALWAYS, LoRASpec, Mask
from lora_ensemble.host.files.metadata import for_few_steps
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.routed import Routing
from lora_ensemble.methods.switch import Switch
from lora_ensemble.nodes.cmlora import LoRAEnsembleCMLoRA
from lora_ensemble.tests.test_engine_cost import DEAR, Spy

from .builders import lora, plain, same, sample, shapes, stock
from .caches import cached, cmlora
from .guidance_tools import ag, extrapolated
from .kinds import bias_difference, dora, lokr, low_rank, oft
from .models import base
from .test_kinds import LINEAR, file_of, weights
from .test_routed import HALF, bare, prompt, specs
from .test_selection import est, klora, method_of, pair

PRODUCTS = ("linear", "mm", "addmm", "bmm", "baddbmm", "conv2d", "convolution", "mul")
METHODS = [Merge, Switch, Composite, LoRAtorio, CMLoRA]
each = pytest.mark.parametrize("make", METHODS, ids=lambda make: make.__name__)


def turbo(model, loras, **options) -> LoRASpec:
    return LoRASpec(loras(lora(shapes(model), 9, 8)), 0.5, 0, ALWAYS, **options)


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


# --- one bank and one program for both ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Merge, Composite, LoRAtorio], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("family", "options"), [("SD15", {}), ("Flux", {}), ("Flux", {"mask": Mask(HALF)})],
                         ids=["SD15", "Flux", "Flux, masks"])
def test_a_layer_s_products_serve_it_and_the_method(family, options, make, loras, monkeypatch):
    """Where starting an operation is dear it takes none more: a shrink and an expand of their own for each adapted
    layer before, twice what a method takes. All weights there are once, too."""
    monkeypatch.setitem(products.RATES, "cpu", DEAR)
    model = base(family)
    ensemble = [replace(spec, **options) for spec in bare(specs(model, loras))]
    without, ours = (composed(model, listed, make) for listed in (ensemble, [*ensemble, turbo(model, loras)]))

    def counted(model) -> int:
        with Spy() as spy:
            sample(model, family, steps=1)
        return sum(spy.ops[name] for name in PRODUCTS)

    counted(ours)  # the noise levels of a first run are placed in time, which takes operations of the host's
    assert counted(ours) == counted(without) > counted(model)
    (bank,), (own,) = ([each.model for each in made.get_additional_models_with_key(KEY)] for made in (ours, without))
    assert bank.nbytes() == own.nbytes() + bank_bytes(model, turbo(model, loras))


def bank_bytes(model, spec: LoRASpec) -> int:
    return composed(model, [spec], Merge).get_additional_models_with_key(KEY)[0].model.nbytes()


@pytest.mark.parametrize("make", [klora, est], ids=["K-LoRA", "EST-LoRA"])
def test_a_choice_per_layer_is_between_the_others(make, loras):
    """Of other layers than it has: neither their sizes nor the layers that are compared are its own."""
    model = base("SD15")
    ensemble = specs(model, loras, wanted=lambda name: "attn" in name or "input_blocks" in name)
    always = LoRASpec(loras(lora(shapes(model, lambda name: "input_blocks" not in name), 9, 4)), 0.5, 0, ALWAYS)
    ours, behind = make(model, [*bare(ensemble), always]), make(stock(model, [always]), bare(ensemble))
    found, want = (dict(zip(each.layers, each.ratios, strict=True))
                   for each in (method_of(ours).contest, method_of(behind).contest))
    assert found == pytest.approx(want) and len(want) < len(shapes(model))
    same(sample(ours, steps=3), sample(behind, steps=3), sample(model, steps=3), 1e-4)
    (name,) = record_of(behind).methods
    chosen, want = ([step.notes[name] for step in record_of(each).steps] for each in (ours, behind))
    assert chosen == want and record_of(ours).problems == []


@pytest.mark.parametrize("make", [Merge, Composite], ids=lambda make: make.__name__)
@pytest.mark.parametrize(("beneath", "above"), [
    (low_rank, dora), (low_rank, partial(dora, on_output=False)), (lokr, low_rank), (dora, low_rank), (low_rank, oft),
    (bias_difference, oft)], ids=["LoRA, DoRA", "LoRA, DoRA inputs", "LoKr, LoRA", "DoRA, LoRA", "LoRA, OFT",
                                  "bias, OFT"])
def test_of_any_kind(beneath, above, make, loras):
    """DoRA's magnitude counts the weight with it, as it does where the loader was there before."""
    model, layers = base("SD15"), weights(LINEAR)
    always = LoRASpec(loras(file_of(layers, beneath, 9)), 0.5, 0, ALWAYS)
    ensemble = [LoRASpec(loras(file_of(layers, kind, seed)), 0.8, 0) for seed, kind in ((1, above), (2, low_rank))]
    ours, behind = composed(model, [always, *ensemble], make), composed(stock(model, [always]), ensemble, make)
    same(sample(ours, steps=1), sample(behind, steps=1), sample(model, steps=1), 1e-4)


@pytest.mark.parametrize("make", [Merge, Switch], ids=lambda make: make.__name__)
@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_masks_confine_the_others_alone(family, make, loras):
    model = base(family)
    ensemble = [replace(spec, mask=Mask(mask)) for spec, mask
                in zip(bare(specs(model, loras)), (HALF, 1 - HALF), strict=True)]
    always = turbo(model, loras)
    ours, behind = composed(model, [always, *ensemble], make), composed(stock(model, [always]), ensemble, make)
    same(sample(ours, family), sample(behind, family), sample(model, family), 1e-4)


def test_compiled_it_is_in_the_graphs_of_the_others(loras):
    """As gains of further ranks: no operator of its own, and no graph more when another LoRA has its turn."""
    from .compiled import compiled

    graphs = []

    def counted(graph, example):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model = base("Flux")
    ensemble, always = bare(specs(model, loras)), turbo(model, loras)
    ours = composed(compiled(model, counted), [always, *ensemble], Switch)
    first = sample(ours, "Flux", steps=1)
    alone = len(graphs)
    behind = composed(stock(model, [always]), ensemble, Switch)
    for steps, found in ((1, first), (2, sample(ours, "Flux"))):
        same(found, sample(behind, "Flux", steps=steps), sample(model, "Flux", steps=steps), 1e-4)
    assert len(graphs) == alone > 0
    assert not [node for graph in graphs for node in graph.graph.nodes if "route_" in str(node.target)]


@pytest.mark.parametrize("make", [Merge, Composite], ids=lambda make: make.__name__)
def test_one_of_both_may_go_into_the_weights(make, loras):
    """Another node reads these: a LoRA with a window stays beside them with its place in the bank, and so does a
    method."""
    model, late = base("SD15"), make is Merge
    always = turbo(model, loras, start=0.5 if late else 0.0)
    ours = composed(model, [always, *bare(specs(model, loras))], make)
    want = sample(ours, steps=4)
    put_into_weights(ours)
    assert [each.always for each in ours.get_attachment(KEY).applied] == [late]
    same(sample(ours, steps=4), want, sample(model, steps=4), 1e-4)


def test_alone_it_is_merged(loras):
    model = base("SD15")
    always = turbo(model, loras)
    same(sample(composed(model, [always], Composite)), sample(stock(model, [always])), sample(model), 1e-4)
    baked = bake(model, None, (always, *bare(specs(model, loras))), "Merge LoRAs")[0]
    same(sample(baked), sample(stock(model, [always, *bare(specs(model, loras))])), sample(model), 1e-4)


def test_alone_it_is_computed_whole_behind_cmlora(loras):
    """Whose cache is for LoRAs that do not lead, and there are none. Guard: `Applied.always` in nodes/cmlora.py."""
    model = base("SD15")
    always = turbo(model, loras)
    options = {part.id: part.default for part in LoRAEnsembleCMLoRA.define_schema().inputs if hasattr(part, "default")}
    ours = LoRAEnsembleCMLoRA.execute(model=model, ensemble=(always,), **options).args[0]
    same(sample(ours, steps=20), sample(stock(model, [always]), steps=20), sample(model, steps=20), 1e-3)
    assert "cache" not in record_of(ours).steps[-1].notes


def test_a_mask_does_not_confine_it(loras):
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
