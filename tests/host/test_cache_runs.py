"""The branch cache from run to run: nothing is shared, nothing is left, and what cannot be cached is said once."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import KEY, record_of
from lora_ensemble.methods.schedule import Uniform

from .builders import composite, sample, three
from .caches import cached, steps_of
from .models import base


@pytest.fixture
def ours(loras):
    return composite(base("SD15"), three(base("SD15"), loras))


def test_runs_share_nothing(ours):
    """Another size between two equal runs, and the same run twice."""
    model = cached(ours)
    first, larger = sample(model, steps=4), sample(model, steps=4, size=12)
    assert larger.shape[-1] == 12 and not steps_of(model)[0]["reused"]
    assert torch.equal(sample(model, steps=4), first)


class Trouble(Exception):
    pass


@pytest.mark.parametrize("error", [Trouble, comfy.model_management.InterruptProcessingException])
@pytest.mark.parametrize("step", [1, 2])
def test_nothing_is_left_after_an_interruption(ours, error, step):
    model, run = cached(ours), []
    whole = sample(model, steps=4)

    def stop(index, *_):
        run.append(model.get_attachment(KEY).run)
        if index == step:
            raise error()

    with pytest.raises(error):
        sample(model, steps=4, callback=stop)
    assert run[0].cache.store.bytes == 0 and run[0].cache.store.peak > 0
    assert not model.get_attachment(KEY).runs and not record_of(model).finished
    assert torch.equal(sample(model, steps=4), whole)


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_an_exception_inside_the_shallow_pass(family, loras):
    """An exception while deep layers are switched off puts them back. (The fixture `nothing_left` looks as well.)"""
    model = cached(composite(base(family), three(base(family), loras)))
    root, calls = model.model.diffusion_model, []
    layer = root.output_blocks[-1][0] if family == "SD15" else root.single_blocks[-1]

    def fail(*_):
        calls.append(1)
        if len(calls) == 2:
            raise Trouble

    handle = layer.register_forward_pre_hook(fail)
    try:
        with pytest.raises(Trouble):
            sample(model, family, steps=4)
    finally:
        handle.remove()
    assert not [name for name, module in root.named_modules() if "forward" in module.__dict__]


def test_a_finished_run_holds_no_features(ours):
    model, run = cached(ours), []
    sample(model, steps=3, callback=lambda *_: run.append(model.get_attachment(KEY).run))
    assert run[0].cache.store.bytes == 0 and max(step["bytes"] for step in steps_of(model)) == run[0].cache.store.peak


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_sde", "dpm_2", "euler_ancestral"])
def test_samplers_with_several_calls_per_step(sampler, loras):
    """What a step does depends on its noise level: both calls of Heun at a level refresh, or both reuse."""
    model = base("Flux")
    ours = composite(model, three(model, loras))
    plain = sample(ours, "Flux", steps=6, sampler=sampler)
    assert torch.equal(sample(cached(ours, 1), "Flux", steps=6, sampler=sampler), plain)
    reusing = cached(ours)
    out = sample(reusing, "Flux", steps=6, sampler=sampler)
    assert torch.isfinite(out).all() and ((out - plain).norm() / plain.norm()).item() < 1
    steps = record_of(reusing).steps
    assert sum(step.rows for step in steps) == sum(step.rows for step in record_of(ours).steps)
    by_index: dict[int, set] = {}
    for step in steps:
        by_index.setdefault(step.index, set()).add(step.notes["cache"]["reused"] == 0)
    assert by_index == {i: {i % 3 == 0} for i in range(6)}


# --- what cannot be cached -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "depth"), [("SD15", 9), ("Flux", 2), ("Wan", 1), ("SD3", 1)])
def test_a_depth_that_leaves_nothing_to_cache(family, depth, loras, caplog):
    model = composite(base(family), three(base(family), loras))
    ours = cached(model, depth=depth)
    assert torch.equal(sample(ours, family, steps=3), sample(model, family, steps=3))
    assert len(record_of(ours).problems) == 1 and f"depth {depth}" in record_of(ours).problems[0]
    assert caplog.text.count("Branch Cache:") == 1
    assert not any(step["reused"] for step in steps_of(ours))


@pytest.mark.parametrize(("options", "word"), [(dict(), "max_age"), (dict(max_age=3, depth=0), "depth")])
def test_specs_that_make_no_sense(options, word):
    with pytest.raises(ValueError, match=word):
        CacheSpec(**options)


def test_wrappers_are_added_once(ours):
    model = cached(cached(ours))
    assert all(len(model.get_wrappers(kind, KEY)) == 1 for kind in (
        WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL))
    assert model.get_attachment(KEY).cache == CacheSpec(Uniform(3), depth=1)
