"""What is said of windows in time: in the record, in errors and on the layer map."""

from __future__ import annotations

import pytest
from lora_ensemble.host.compose.apply import apply_method, bake
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.compose.placing import Placing
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.look.layermap import layer_map
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.routed import Routing
from lora_ensemble.methods.switch import Switch

from .builders import file_of, merge, method, plain, same, sample, schedule, stock, three
from .models import base
from .test_apply import old_glora_on_kernels
from .test_routed import prompt, specs
from .test_selection import klora, pair
from .test_windows import STEPS, at, ours


@pytest.mark.parametrize("make", [Merge, Switch, Composite, CMLoRA, LoRAtorio])
def test_a_window_between_two_steps_is_named(make, loras):
    model = base("SD15")
    first, second, _ = three(model, loras)
    composed = method(model, [first, at(second, 0.05, 0.15)], make)
    sample(composed, steps=STEPS)
    (line,) = record_of(composed).problems
    assert second.name in line and "window from 0.05 to 0.15" in line and f"any of the {STEPS} steps" in line
    sample(composed, steps=40)
    assert record_of(composed).problems == []


def test_baked_says_that_it_cannot(loras):
    model = base("SD15")
    first, second, _ = three(model, loras)
    with pytest.raises(ValueError, match=f"'{second.name}' has a window in time.*runtime"):
        bake(model, None, (first, at(second, 0, 0.5)), "Merge LoRAs")
    bake(model, None, (first, LoRASpec(second.name, 0, 0, start=0.5)), "Merge LoRAs")


def test_what_only_weights_can_take_is_left_out_of_a_window(loras):
    """Merge puts it into the weights, where it would act in the whole run."""
    model, spec = base("SD15"), old_glora_on_kernels(loras)
    found = [merge(model, (each,), rest_on_weights=True) for each in (spec, at(spec, 0, 0.5))]
    assert found[0].patches and not found[1].patches
    rest = LoRASpec(loras({key: value for key, value in file_of(spec).items() if "in_layers" not in key}), 0.7, 0)
    sigmas = schedule(model, 4)[:3]
    same(ours(found[1], sigmas), ours(stock(model, (rest,)), sigmas), ours(model, sigmas))
    (problem,) = record_of(found[1]).problems
    assert spec.name in problem and "left out, since it could not follow this LoRA's window" in problem


def test_the_layer_map_shows_windows(loras):
    model = base("SD15")
    subject, style = pair(model, loras)
    found = layer_map(klora(model, [at(subject, 0.25, 0.75), at(style, 0, 0.5)]), points=100)
    assert set(found.acting[:, :25].flatten()) == {1} and set(found.acting[:, 51:75].flatten()) == {0}
    assert set(found.acting[:, 76:].flatten()) == {-1} and "null" in found.as_json()


def test_routing_of_a_method_and_windows(loras):
    """Both at once: place words and a window, on the method that mixes predictions."""
    model = base("SD15")
    first, second = specs(model, loras)
    composed = apply_method(model, None, (first, at(second, 0.5, 1)), plain(Composite), "LoRAs",
                            placing=Placing("words", Routing()))[0]
    sample(composed, positive=prompt(), steps=STEPS)
    rows = [step.rows for step in record_of(composed).steps]
    assert rows[1:] == [4] * (STEPS // 2 - 1) + [6] * (STEPS // 2) and record_of(composed).problems == []
