"""The branch cache in real runs: what is reused, that it is the right thing, and that nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from lora_ensemble.host.compose.apply import with_cache
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.families.split_points import UNetSplit
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.kernels.branch import Step
from lora_ensemble.methods.schedule import NonUniform, Uniform
from lora_ensemble.tests.operations import Operations

from .builders import composite, lora, merge, method, same, sample, shapes, three
from .caches import InTurn, InTurnSession, Watch, cached, cmlora, in_turn, steps_of
from .models import base

FAMILIES = ("SD15", "SDXL", "SD3", "Flux", "Wan")


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
    assert not record_of(reusing).problems


def test_the_non_uniform_schedule(ours):
    model = with_cache(ours, CacheSpec(NonUniform(), depth=1))
    sample(model, steps=16)
    whole = [i for i, step in enumerate(steps_of(model)) if not step["reused"]]
    assert whole == [0, 2, 4, 6, 9, 12, 14]


# --- the right features ----------------------------------------------------------------------------------------------


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
    """Two model calls per step, one for each kind, and on a U-Net one for both; the same as every row in a call of its
    own."""
    model = base(family)
    ours = in_turn(model, three(model, loras))
    out = sample(ours, family, steps=7)
    steps = steps_of(ours)
    assert [step["reused"] for step in steps] == [0] + [4] * 6
    assert [step["calls"] for step in steps] == [1] + [2 if family == "Flux" else 1] * 6
    assert [step["ages"] for step in steps] == [[0, 0, 0], [1, 0, 1], [2, 1, 0], [0, 2, 1], [1, 0, 2], [2, 1, 0],
                                                [0, 2, 1]]
    monkeypatch.setattr(model.model, "memory_required", lambda shape, **_: 0 if shape[0] <= 1 else 1e30)
    apart = in_turn(model, three(model, loras))
    same(sample(apart, family, steps=7), out, sample(model, family, steps=7), 1e-4)
    assert [step["calls"] for step in steps_of(apart)] == [6] * 7


@pytest.mark.parametrize("family", ["SD15", "SDXL"])
@pytest.mark.parametrize("forecast", [False, True])
def test_both_kinds_of_rows_share_a_batch(family, forecast, loras, monkeypatch):
    """The deep layers see those rows alone that run whole, with what belongs to them; the outer ones all rows at once.
    The picture is that of a call for each kind, of pictures in a batch as well."""
    model = base(family)
    ours = in_turn(model, three(model, loras), forecast=forecast)
    root, depth, seen = model.model.diffusion_model, 1, []
    for name, block in (("outer", root.input_blocks[0]), ("deep", root.input_blocks[depth])):
        block[0].register_forward_hook(lambda *args, name=name: seen.append((name, len(args[2]))))
    out, called = sample(ours, family, steps=6, batch=2), list(seen)
    assert called[:2] == [("outer", 12), ("deep", 12)] and set(called[2:]) == {("outer", 12), ("deep", 4)}
    assert len(called) == 12 and record_of(ours).problems == []
    monkeypatch.setattr(UNetSplit, "mixes", False)
    seen.clear()
    apart = sample(in_turn(model, three(model, loras), forecast=forecast), family, steps=6, batch=2)
    assert [rows for name, rows in seen if name == "outer"] == [12] + [4, 8] * 5
    same(out, apart, sample(model, family, steps=6, batch=2), 1e-4)


def test_operations_of_a_batch_with_both_kinds_of_rows(loras, monkeypatch):
    """On a fast GPU they are what a step takes: no more than Composite's, and fewer than those of two calls."""
    model = base("SD15")
    ensemble = three(model, loras)

    def a_step(made) -> float:
        counts = []
        sample(made, steps=4)  # the model is loaded
        for steps in (4, 7):
            with torch.no_grad(), Operations() as asked:
                sample(made, steps=steps)
            counts.append(len(asked.names))
        return (counts[1] - counts[0]) / 3

    plain, mixed = a_step(composite(model, ensemble)), a_step(in_turn(model, ensemble))
    monkeypatch.setattr(UNetSplit, "mixes", False)
    two = a_step(in_turn(model, ensemble))
    assert mixed <= plain and mixed + 40 < two


@pytest.mark.parametrize("way", ["as it is", "patched", "override", "masks"])
def test_batches_are_not_shared_where_others_look_at_rows(way, loras):
    """Guard: a patch or a mask that gets rows of another number than it was told. A ControlNet: test_control.py."""
    model = base("SD15")
    ensemble = three(model, loras)
    if way == "masks":
        ensemble = (replace(ensemble[0], mask=Mask(torch.ones(1, 8, 8).triu())), *ensemble[1:])
    ours = cmlora(model, ensemble, 1)
    if way == "patched":
        ours.set_model_attn2_output_patch(lambda out, options: out)
    if way == "override":
        ours.model_options["transformer_options"]["optimized_attention_override"] = lambda of, *args, **more: of(*args,
                                                                                                                **more)
    sample(ours, steps=5)
    assert max(step["calls"] for step in steps_of(ours)) == 1 + (way != "as it is")
    assert any(0 < step["reused"] < 6 for step in steps_of(ours))


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
