"""A run begins fresh and leaves nothing behind, however it ends and whatever else uses the same model."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from lora_ensemble.host.compose import composition, run, wrappers
from lora_ensemble.host.compose.apply import with_cache
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.host.files.ensemble import Mask
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.schedule import Uniform
from lora_ensemble.methods.session import PlainSession
from lora_ensemble.methods.switch import Switch

from .builders import composite, guided, merge, method, same, sample, schedule, stock, three
from .guidance_tools import ag
from .models import FAMILIES, base, build, patcher, randomize


def forwards(model) -> list[str]:
    return [name for name, module in model.model.named_modules() if "forward" in module.__dict__]


def clean(model) -> bool:
    return not forwards(model) and not model.get_attachment(KEY).runs


@pytest.fixture
def ours(loras):
    return composite(base("SD15"), three(base("SD15"), loras))


@pytest.mark.parametrize("banks", [1, 2])
def test_forwards_are_there_during_a_run_and_gone_after(banks, loras):
    """Those of two methods in a row lie around each other."""
    during, model, (first, *others) = [], base("SD15"), three(base("SD15"), loras)
    ours = composite(merge(model, (first,)) if banks == 2 else model, others)
    sample(ours, callback=lambda *_: during.append(len(forwards(ours))))
    assert len(ours.get_additional_models_with_key(KEY)) == banks
    assert min(during) > 20 and clean(ours) and ours.get_attachment(KEY).record.finished


def test_two_runs_in_a_row_are_identical(ours):
    first = sample(ours)
    record = ours.get_attachment(KEY).record
    assert torch.equal(sample(ours), first)
    assert ours.get_attachment(KEY).record is not record, "each run has a record of its own"
    assert len(ours.get_attachment(KEY).record.steps) == len(record.steps) == 2


@pytest.mark.parametrize("kind", ["merge", "composite", "cached", "loratorio", "cmlora", "guided",
                                  "guided and cached"])
def test_a_model_goes_with_its_last_user(kind, loras):
    """Not only once Python looks for circles: then the host finds weights without the MODEL that it loaded them for,
    and warns of a leak in every later run."""
    plain = base("SD15")
    gc.collect()
    gc.disable()
    try:
        makes = {"merge": Merge, "loratorio": LoRAtorio, "cmlora": CMLoRA}
        model = method(plain, three(plain, loras), makes.get(kind, Composite))
        if "cached" in kind or kind == "cmlora":
            model = with_cache(model, CacheSpec(Uniform(2), depth=1))
        if "guided" in kind:
            model = ag(model, 0.9)
        sample(model, steps=3)
        left = weakref.ref(model)
        del model
        assert left() is None
        assert all(loaded.model is not None for loaded in comfy.model_management.current_loaded_models)
    finally:
        gc.enable()


class Trouble(Exception):
    pass


@pytest.mark.parametrize("error", [Trouble, comfy.model_management.InterruptProcessingException, KeyboardInterrupt])
def test_an_exception_from_the_callback(ours, error):
    """Interrupting a run raises from its callback."""
    whole = sample(ours)

    def stop(*_):
        raise error()

    with pytest.raises(error):
        sample(ours, callback=stop)
    assert clean(ours) and not ours.get_attachment(KEY).record.finished
    assert torch.equal(sample(ours), whole) and clean(ours)


@pytest.mark.parametrize("call", [1, 2])
def test_an_exception_inside_the_model(ours, call):
    """Before and after the forwards were first used."""
    whole, calls = sample(ours), []

    def fail(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise Trouble
        return executor(*args, **kwargs)

    broken = ours.clone()
    broken.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "trouble", fail)
    with pytest.raises(Trouble):
        sample(broken)
    assert clean(ours) and ours.get_attachment(KEY).record.problems == []
    assert torch.equal(sample(ours), whole)


@pytest.mark.parametrize("asked", ["watching", "is_flow"])
def test_what_fails_before_the_host_samples(asked, ours, monkeypatch):
    """Whoever is told of runs, say, of a release that is not known here: no run stays open."""
    def fail(*_):
        raise RuntimeError("before the run")

    ours = with_cache(ours, CacheSpec(Uniform(2), depth=1))
    monkeypatch.setattr(wrappers, asked, fail)
    with pytest.raises(RuntimeError, match="before the run"):
        sample(ours)
    assert ours.get_attachment(KEY).runs == []


def test_a_failing_layer(ours):
    """An exception inside a routed layer, as out-of-memory would be."""
    layer = ours.model.diffusion_model.middle_block[1].proj_in

    def fail(x):
        raise Trouble

    whole = sample(ours)
    layer.forward = fail
    with pytest.raises(Trouble):
        sample(ours)
    assert forwards(ours) == ["diffusion_model.middle_block.1.proj_in"] and layer.forward is fail
    del layer.forward
    assert torch.equal(sample(ours), whole)


def test_numbers_that_cannot_be_read(ours, monkeypatch):
    """An accelerator that has failed raises wherever a value is read, the record's included: a meta tensor, too."""
    whole = sample(ours)
    with monkeypatch.context() as patched:
        patched.setattr(PlainSession, "notes", lambda session: {"lost": torch.empty(1, device="meta")})
        with pytest.raises(NotImplementedError):
            sample(ours)
    assert clean(ours)
    assert torch.equal(sample(ours), whole)


def test_places_that_cannot_be_read(loras, monkeypatch):
    """Likewise where the LoRAs acted: nothing that the run has kept stays."""
    model = base("SD15")
    specs = three(model, loras)
    specs = (replace(specs[0], mask=Mask(torch.ones(1, 8, 8))), *specs[1:])
    ours, runs = with_cache(method(model, specs, Merge), CacheSpec(Uniform(2), depth=1)), []
    monkeypatch.setattr(composition, "Placed", lambda *_: torch.empty(1, device="meta").tolist())
    with pytest.raises(NotImplementedError):
        sample(ours, callback=lambda *_: runs.extend(ours.get_attachment(KEY).runs))
    assert clean(ours) and runs[0].cache.store.peak > runs[0].cache.store.bytes == 0


def test_unloaded_between_runs(ours):
    first = sample(ours)
    comfy.model_management.unload_all_models()
    assert clean(ours)
    assert torch.equal(sample(ours), first)


def test_one_base_in_several_branches_of_a_graph(loras):
    """Patched and unpatched, ours and the host's, in any order: each gives what it gives alone."""
    model = base("SD15")
    ensemble = three(model, loras)
    variants = {"base": model, "merge": merge(model, ensemble), "composite": composite(model, ensemble),
                "stock": stock(model, ensemble), "one": merge(model, ensemble[:1])}
    alone = {}
    for name, variant in variants.items():
        alone[name] = sample(variant)
        comfy.model_management.unload_all_models()
    for name in ("merge", "base", "composite", "stock", "one", "composite", "merge", "stock", "base"):
        assert torch.equal(sample(variants[name]), alone[name]), name


def test_the_base_is_never_changed(loras):
    model = base("SD15")
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    sample(merge(model, three(model, loras)))
    sample(composite(model, three(model, loras)))
    after = model.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert model.get_attachment(KEY) is None and not model.additional_models


def test_clones_downstream(ours):
    """Later nodes clone and patch; the record can be read from any clone."""
    first = sample(ours)
    clone = ours.clone().clone()
    clone.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v))
    assert torch.equal(sample(clone), first)
    assert clone.get_attachment(KEY).record is ours.get_attachment(KEY).record
    assert len(clone.get_additional_models_with_key(KEY)) == 1
    bank, again = (model.get_additional_models_with_key(KEY)[0].model for model in (ours, clone))
    assert bank is again, "clones share the adapters"


def test_a_run_inside_a_run(ours, loras):
    """A callback that samples with another model and an ensemble of its own. (The host itself cannot sample with one
    model twice at a time: the end of the inner run takes the outer one's patcher away.)"""
    other = composite(base("Flux"), three(base("Flux"), loras))
    whole, alone, inner = sample(ours), sample(other, "Flux"), []
    outer = sample(ours, callback=lambda *_: inner.append(sample(other, "Flux")))
    assert torch.equal(outer, whole) and all(torch.equal(one, alone) for one in inner) and len(inner) == 2
    assert clean(ours) and clean(other) and ours.get_attachment(KEY).record.finished


def test_the_second_model_of_a_guider_is_told_of(loras, caplog):
    """It is prepared and evaluated, and no run of it begins: its LoRAs do nothing."""
    import comfy_extras.nodes_custom_sampler as extras

    if not hasattr(extras, "Guider_DualModel"):
        pytest.skip("this ComfyUI has no DualModelGuider")
    model, kind = base("SD15"), FAMILIES["SD15"]
    second = patcher(build(kind))
    randomize(second.model, 5)

    def drawn(negative) -> torch.Tensor:
        guider = extras.Guider_DualModel(model, negative)
        guider.set_conds(kind.cond(11), kind.cond(12))
        guider.set_cfg(3.0)
        return guided(guider, schedule(model, 2))

    assert torch.equal(drawn(composite(second, three(second, loras))), drawn(second))
    assert len([record for record in caplog.records if "have no effect there" in record.getMessage()]) == 1


def test_the_record(loras):
    model = base("SD15")
    ensemble = three(model, loras)
    ours = composite(model, ensemble)
    sample(ours, steps=3, batch=2)
    record = json.loads(json.dumps(ours.get_attachment(KEY).record.as_dict()))
    assert record["methods"] == ["Composite"] and record["adapters"] == [[spec.name for spec in ensemble]]
    assert record["finished"] and record["problems"] == []
    assert [step["index"] for step in record["steps"]] == [0, 1, 2]
    sigmas = [step["sigma"] for step in record["steps"]]
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[-1] > 0
    for step in record["steps"]:
        assert step["branches"] == [[[0.8, 0.0, 0.0]], [[0.0, 0.5, 0.0]], [[0.0, 0.0, -0.6]]]
        assert (step["calls"], step["rows"]) == (1, 12), "3 branches x 2 conds x 2 pictures in one call"
        assert step["seconds"] > 0


def test_each_step_has_its_own_time(ours, monkeypatch):
    """From one step to the next, and from the last one to the end."""
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=count().__next__))
    sample(ours, steps=3)
    assert [step.seconds for step in ours.get_attachment(KEY).record.steps] == [1, 1, 1]


def test_the_record_of_a_switch(loras):
    model = base("SD15")
    ours = method(model, three(model, loras), lambda s: Switch(s, 2, (1, 0, 2)))
    sample(ours, steps=5)
    gains = [step.branches for step in ours.get_attachment(KEY).record.steps]
    assert gains == [[[[0.0, 0.5, 0.0]]]] * 2 + [[[[0.8, 0.0, 0.0]]]] * 2 + [[[[0.0, 0.0, -0.6]]]]


def test_a_lora_of_strength_zero_takes_no_part(loras):
    model = base("SD15")
    ensemble = three(model, loras, (0.8, 0.0, -0.6))
    ours = composite(model, ensemble)
    same(sample(ours), sample(composite(model, (ensemble[0], ensemble[2]))), sample(model), 1e-6)
    assert ours.get_attachment(KEY).record.adapters == [[ensemble[0].name, ensemble[2].name]]


def test_families_side_by_side(loras):
    """Two different base models with ensembles of their own, in turn."""
    made = {name: composite(base(name), three(base(name), loras)) for name in ("SD3", "Flux")}
    first = {name: sample(model, name) for name, model in made.items()}
    for name in ("Flux", "SD3", "Flux"):
        assert torch.equal(sample(made[name], name), first[name])
    assert all(FAMILIES[name].latent == out.shape[1] for name, out in first.items())
