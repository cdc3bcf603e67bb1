"""The branch cache in real runs: what is reused, that it is the right thing, and that nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from lora_ensemble.host.compose.apply import with_cache
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.kernels.branch import Step
from lora_ensemble.methods.schedule import NonUniform, Uniform

from .builders import composite, lora, merge, method, same, sample, shapes, three
from .caches import InTurn, InTurnSession, Watch, cached, in_turn, steps_of
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
