"""The branch cache in real runs: what is reused, that it is the right thing, and that nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from lora_ensemble.host import cache, seams
from lora_ensemble.host.apply import with_cache
from lora_ensemble.host.cache import CacheSpec
from lora_ensemble.host.composition import KEY
from lora_ensemble.host.ensemble import LoRASpec
from lora_ensemble.kernels.branch import Step, one_hot
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.schedule import NonUniform, Uniform
from lora_ensemble.methods.session import PlainSession
from lora_ensemble.methods.switch import Switch
from lora_ensemble.nodes.cache import LoRAEnsembleBranchCache
from lora_ensemble.nodes.cmlora import LoRAEnsembleCMLoRA

from .builders import composite, lora, merge, method, same, sample, shapes, three
from .models import base

FAMILIES = ("SD15", "SDXL", "SD3", "Flux", "Wan")


def cached(model, interval: int = 3, depth: int = 1):
    return with_cache(model, CacheSpec(Uniform(interval), depth=depth))


def steps_of(model) -> list[dict]:
    """Per step of the last run: what the cache noted, with the rows of the step."""
    return [{**step.notes["cache"], "rows": step.rows, "calls": step.calls} for step in record(model).steps]


def record(model):
    return model.get_attachment(KEY).record


@dataclass(frozen=True)
class Always(Uniform):
    """Catches features at every step and never uses them."""

    max_age: int = 3

    def refreshes(self, step: Step) -> bool:
        return True


@pytest.fixture
def ours(loras):
    return composite(base("SD15"), three(base("SD15"), loras))


# --- nothing reused, nothing changed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_interval_1_is_no_cache_bit_for_bit(family, loras):
    model = composite(base(family), three(base(family), loras))
    plain = sample(model, family, steps=3)
    assert torch.equal(sample(cached(model, 1), family, steps=3), plain)
    catching = with_cache(model, CacheSpec(Always(), depth=1))
    assert torch.equal(sample(catching, family, steps=3), plain), "catching features must not disturb the model"
    assert not any(step["reused"] for step in steps_of(catching))


@pytest.mark.parametrize("family", ["SD15", "SDXL", "Flux"])
def test_reuse_is_near_and_not_the_same(family, loras):
    model = composite(base(family), three(base(family), loras))
    plain, out = sample(model, family, steps=6), sample(reusing := cached(model), family, steps=6)
    assert 1e-4 < ((out - plain).norm() / plain.norm()).item() < 0.5
    assert [step["reused"] for step in steps_of(reusing)] == [0, 6, 6, 0, 6, 6]
    assert [step["ages"] for step in steps_of(reusing)] == [[0] * 3, [1] * 3, [2] * 3] * 2
    assert all(step["bytes"] > 0 and step["rows"] == 6 and step["calls"] == 1 for step in steps_of(reusing))
    assert not record(reusing).problems


def test_the_non_uniform_schedule(ours):
    model = with_cache(ours, CacheSpec(NonUniform(), depth=1))
    sample(model, steps=16)
    whole = [i for i, step in enumerate(steps_of(model)) if not step["reused"]]
    assert whole == [0, 2, 4, 6, 9, 12, 14]


# --- the right features ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InTurn:
    """Composite whose branches run whole one after the other, the rest reuses: CMLoRA's pattern."""

    strengths: tuple[float, ...]

    def begin(self, facts):
        return InTurnSession(self)

    def branches(self, step):
        return tuple(one_hot(self.strengths, i) for i in range(len(self.strengths)))

    def mix(self, step, predictions):
        return predictions.mean(dim=0)


class InTurnSession(PlainSession):
    def refresh(self, step):
        return tuple(step.index % 3 == i for i in range(len(self.method.strengths)))


def in_turn(model, ensemble, max_age: int = 4):
    return with_cache(method(model, ensemble, InTurn), CacheSpec(max_age=max_age, depth=1))


class Watch:
    """Checks at every reuse that a row gets what that row's branch, cond and window caught last."""

    def __init__(self, monkeypatch):
        self.caught: dict[tuple, dict] = {}
        self.reused = 0
        for kind in (seams.UNetSeam, seams.BlockSeam):
            monkeypatch.setattr(kind, "capture", self.capture(kind.capture))
            monkeypatch.setattr(kind, "reuse", self.reuse(kind.reuse))

    def places(self, options: dict) -> list[tuple]:
        window = options.get("context_window")
        attention = tuple(options.get("patches_replace", {}).get("attn1", {}))
        return [(uuid, tuple(window.index_list) if window else (), attention) for uuid in options["uuids"]]

    def capture(self, original):
        def capture(seam, options, caught):
            for k, place in enumerate(self.places(options)):
                self.caught[place] = (caught, k, len(options["uuids"]))
            return original(seam, options, caught)

        return capture

    def reuse(self, original):
        def reuse(seam, features, control, options):
            places = self.places(options)
            for k, place in enumerate(places):
                caught, i, count = self.caught[place]
                for name, value in features.items():
                    assert torch.equal(value.chunk(len(places))[k], caught[name].chunk(count)[i])
                    self.reused += 1
            return original(seam, features, control, options)

        return reuse


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_each_branch_and_cond_has_its_own(family, loras, monkeypatch):
    watch = Watch(monkeypatch)
    model = cached(composite(base(family), three(base(family), loras)))
    sample(model, family, steps=6, batch=2)
    assert watch.reused == 4 * 6 and len(watch.caught) == 6
    first = [next(iter(caught.values())).chunk(count)[i] for caught, i, count in watch.caught.values()]
    assert not any(torch.equal(a, b) for k, a in enumerate(first) for b in first[:k]), "six different features"


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_rows_that_refresh_beside_rows_that_reuse(family, loras, monkeypatch):
    """Two model calls per step, one for each kind; the same as every row in a call of its own."""
    model = base(family)
    ours = in_turn(model, three(model, loras))
    out = sample(ours, family, steps=7)
    steps = steps_of(ours)
    assert [step["reused"] for step in steps] == [0] + [4] * 6
    assert [step["calls"] for step in steps] == [1] + [2] * 6
    assert [step["ages"] for step in steps] == [[0, 0, 0], [1, 0, 1], [2, 1, 0], [0, 2, 1], [1, 0, 2], [2, 1, 0],
                                                [0, 2, 1]]
    monkeypatch.setattr(model.model, "memory_required", lambda shape, **_: 0 if shape[0] <= 1 else 1e30)
    apart = in_turn(model, three(model, loras))
    same(sample(apart, family, steps=7), out, sample(model, family, steps=7), 1e-4)
    assert [step["calls"] for step in steps_of(apart)] == [6] * 7


def test_a_method_that_never_refreshes_is_bounded_in_age(loras):
    class Never(InTurnSession):
        def refresh(self, step):
            return (False,) * len(self.method.strengths)

    @dataclass(frozen=True)
    class Lazy(InTurn):
        def begin(self, facts):
            return Never(self)

    model = base("SD15")
    ours = with_cache(method(model, three(model, loras), Lazy), CacheSpec(max_age=3, depth=1))
    sample(ours, steps=7)
    assert [step["ages"][0] for step in steps_of(ours)] == [0, 1, 2, 0, 1, 2, 0]


def test_identical_loras_are_the_single_lora(loras):
    """Composite of one LoRA twice, cached, is Merge of it, cached."""
    model = base("SD15")
    file = loras(lora(shapes(model), 1, 4))
    one, other = LoRASpec(file, 0.8, 0), LoRASpec(file, 0.8, 0)
    twice = sample(cached(composite(model, (one, other))), steps=5)
    same(twice, sample(cached(merge(model, (one,))), steps=5), sample(model, steps=5), 1e-4)


@pytest.mark.parametrize("make", [lambda model, ensemble: model, merge, composite,
                                  lambda model, ensemble: method(model, ensemble, Switch),
                                  lambda model, ensemble: composite(merge(model, ensemble[:1]), ensemble[1:])],
                         ids=["no method", "Merge", "Composite", "Switch", "Merge, Composite"])
def test_after_every_method(make, loras):
    model = base("SD15")
    plain = make(model, three(model, loras))
    ours = cached(plain)
    found, expected = sample(ours, steps=4), sample(plain, steps=4)
    assert [step["reused"] for step in steps_of(ours)] == [0, *[record(ours).steps[0].rows] * 2, 0]
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


def cmlora(model, ensemble, cache_depth: int, dominance: float = 0.0, full: str = "every_step", order: str = "offline"):
    return LoRAEnsembleCMLoRA.execute(model, ensemble, order, 0.6, 0.4, dominance, "none", 2, 3, full, 5,
                                      cache_depth).args[0]


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
    steps = record(ours).steps
    whole = [[i for i, age in enumerate(step.notes["cache"]["ages"]) if age == 0] for step in steps]
    assert whole == [step.notes["CMLoRA"]["whole"] for step in steps] and whole[0] == [0, 1, 2]
    assert [step.notes["cache"]["reused"] for step in steps] == [6 - 2 * len(found) for found in whole]
    assert [step.calls for step in steps] == [1 + (0 < len(found) < 3) for found in whole]
    assert 1 <= max(age for step in steps for age in step.notes["cache"]["ages"]) < 9
    assert sum(map(len, whole)) < 3 * len(steps) / 2


def test_switch_a_has_nothing_to_cache(loras):
    assert cmlora(base("SD15"), three(base("SD15"), loras), 2, order="Switch-A").get_attachment(KEY).cache is None


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
    rows = [step.rows for step in record(ours).steps]
    assert [step["reused"] for step in steps_of(reusing)] == [0, rows[1], rows[2], 0]


@pytest.mark.parametrize(("options", "spec"), [
    (("uniform", 3, 2), CacheSpec(Uniform(3), depth=2)), (("CMLoRA", 3, 1), CacheSpec(NonUniform(), depth=1))])
def test_the_node_hands_its_widgets_over(options, spec):
    made = LoRAEnsembleBranchCache.execute(base("SD15"), *options).args[0]
    assert made.get_attachment(KEY).cache == spec and base("SD15").get_attachment(KEY) is None
    with pytest.raises(ValueError, match="Branch Cache: schedule is 'never'"):
        LoRAEnsembleBranchCache.execute(base("SD15"), "never", 3, 2)


# --- runs ------------------------------------------------------------------------------------------------------------


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
    assert not model.get_attachment(KEY).runs and not record(model).finished
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
    steps = record(reusing).steps
    assert sum(step.rows for step in steps) == sum(step.rows for step in record(ours).steps)
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
    assert len(record(ours).problems) == 1 and f"depth {depth}" in record(ours).problems[0]
    assert caplog.text.count("Branch Cache:") == 1
    assert not any(step["reused"] for step in steps_of(ours))


def test_features_beyond_half_of_the_free_memory_are_not_kept(ours, monkeypatch):
    """Two of six rows fit: those are cached, the others run whole, and the pictures stay sound."""
    sample(reusing := cached(ours), steps=2)
    one = steps_of(reusing)[0]["bytes"] // 6
    monkeypatch.setattr(cache, "room", lambda device: 2 * one)
    tight = cached(ours)
    sample(tight, steps=4)
    assert [step["reused"] for step in steps_of(tight)] == [0, 2, 2, 0]
    assert max(step["bytes"] for step in steps_of(tight)) == 2 * one
    assert len(record(tight).problems) == 1 and "half of the free memory" in record(tight).problems[0]


@pytest.mark.parametrize(("options", "word"), [(dict(), "max_age"), (dict(max_age=3, depth=0), "depth")])
def test_specs_that_make_no_sense(options, word):
    with pytest.raises(ValueError, match=word):
        CacheSpec(**options)


def test_wrappers_are_added_once(ours):
    model = cached(cached(ours))
    assert all(len(model.get_wrappers(kind, KEY)) == 1 for kind in (
        WrappersMP.OUTER_SAMPLE, WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL))
    assert model.get_attachment(KEY).cache == CacheSpec(Uniform(3), depth=1)
