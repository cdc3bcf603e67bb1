"""The branch cache with every method, before and after it; CMLoRA's own schedule."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import KEY, record_of
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.schedule import NonUniform, Uniform
from lora_ensemble.methods.switch import Switch
from lora_ensemble.nodes.cache import LoRAEnsembleBranchCache

from .builders import composite, merge, method, sample, three
from .caches import cached, cmlora, steps_of
from .models import base


@pytest.mark.parametrize("make", [lambda model, ensemble: model, merge, composite,
                                  lambda model, ensemble: method(model, ensemble, lambda s: Switch(s, 5)),
                                  lambda model, ensemble: composite(merge(model, ensemble[:1]), ensemble[1:])],
                         ids=["no method", "Merge", "Composite", "Switch", "Merge, Composite"])
def test_after_every_method(make, loras):
    model = base("SD15")
    plain = make(model, three(model, loras))
    ours = cached(plain)
    found, expected = sample(ours, steps=4), sample(plain, steps=4)
    assert [step["reused"] for step in steps_of(ours)] == [0, *[record_of(ours).steps[0].rows] * 2, 0]
    assert 0 < ((found - expected).norm() / expected.norm()).item() < 0.5


def test_a_method_after_the_cache(loras):
    """The cache is the MODEL's, wherever the method is added."""
    model = base("SD15")
    ensemble = three(model, loras)
    before, after = composite(cached(model), ensemble), cached(composite(model, ensemble))
    assert torch.equal(sample(before, steps=4), sample(after, steps=4))


def test_a_switch_reuses_only_its_own_lora(loras):
    model = base("SD15")
    ours = cached(method(model, three(model, loras), lambda s: Switch(s, 2)), 4)
    sample(ours, steps=8)
    assert [step["reused"] for step in steps_of(ours)] == [0, 2] * 4, "another LoRA's features are of no use"


def test_cmlora_without_its_cache_is_composite_bit_for_bit(loras):
    model = base("SD15")
    ensemble = three(model, loras)
    assert torch.equal(sample(cmlora(model, ensemble, 0, 1.0), steps=4), sample(composite(model, ensemble), steps=4))


@pytest.mark.parametrize("full", ["every_step", "on_refresh"])
@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_cmlora_brings_its_schedule(full, family, loras):
    """Age 0 where it says that a LoRA runs whole; nothing older than N times the larger interval."""
    model = base(family)
    ensemble = three(model, loras)
    ours = cmlora(model, ensemble, 1, full=full)
    out, plain = (sample(made, family, steps=12) for made in (ours, cmlora(model, ensemble, 0, full=full)))
    assert 0 < ((out - plain).norm() / plain.norm()).item() < 0.5
    steps = record_of(ours).steps
    whole = [[i for i, age in enumerate(step.notes["cache"]["ages"]) if age == 0] for step in steps]
    assert whole == [step.notes["CMLoRA"]["whole"] for step in steps] and whole[0] == [0, 1, 2]
    assert [step.notes["cache"]["reused"] for step in steps] == [6 - 2 * len(found) for found in whole]
    assert [step.calls for step in steps] == [1 + (family == "Flux" and 0 < len(found) < 3) for found in whole]
    assert 1 <= max(age for step in steps for age in step.notes["cache"]["ages"]) < 9
    assert sum(map(len, whole)) < 3 * len(steps) / 2


def test_switch_a_has_nothing_to_cache(loras):
    assert cmlora(base("SD15"), three(base("SD15"), loras), 2, order="Switch-A").get_attachment(KEY).cache is None


def test_what_is_said_of_a_cache_names_the_node_that_brings_it(loras):
    model = base("Flux")
    deepest = len(model.model.diffusion_model.double_blocks) + len(model.model.diffusion_model.single_blocks)
    own = cmlora(model, three(model, loras), deepest)
    node = LoRAEnsembleBranchCache.execute(own, "uniform", 4, deepest).args[0]
    for whose, ours in {"The cache of CMLoRA": own, "Branch Cache": node}.items():
        sample(ours, "Flux", steps=4)
        [said] = [line for line in record_of(ours).problems if "computes them all" in line]
        assert said.startswith(f"{whose}: Flux: the model has 1 block at either end, ")


def test_a_branch_cache_behind_cmlora_replaces_its_schedule(loras):
    model = base("SD15")
    ours = LoRAEnsembleBranchCache.execute(cmlora(model, three(model, loras), 3), "uniform", 4, 1).args[0]
    sample(ours, steps=8)
    assert [step["reused"] for step in steps_of(ours)] == [0, 6, 6, 6] * 2


@pytest.mark.parametrize("options", [{}, {"top_k": 1}], ids=["static", "top 1"])
def test_loratorio(options, loras):
    """The base is a branch like any other; re-centred guidance sees what the branches gave."""
    model = base("SD15")
    ours = method(model, three(model, loras), lambda strengths: LoRAtorio(strengths, **options))
    plain, reusing = sample(ours, steps=4), cached(ours)
    out = sample(reusing, steps=4)
    assert 0 < ((out - plain).norm() / plain.norm()).item() < 0.5
    rows = [step.rows for step in record_of(ours).steps]
    assert [step["reused"] for step in steps_of(reusing)] == [0, rows[1], rows[2], 0]


@pytest.mark.parametrize(("options", "spec"), [
    (("forecast", 4, 2), CacheSpec(Uniform(4, first=2), depth=2, forecast=True)),
    (("uniform", 3, 2), CacheSpec(Uniform(3), depth=2)), (("CMLoRA", 3, 1), CacheSpec(NonUniform(), depth=1))])
def test_the_node_hands_its_widgets_over(options, spec):
    made = LoRAEnsembleBranchCache.execute(base("SD15"), *options).args[0]
    assert made.get_attachment(KEY).cache == spec and base("SD15").get_attachment(KEY) is None
    with pytest.raises(ValueError, match="Branch Cache: schedule is 'never'"):
        LoRAEnsembleBranchCache.execute(base("SD15"), "never", 3, 2)
