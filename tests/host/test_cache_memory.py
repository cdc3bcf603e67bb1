"""What the branch cache draws does not depend on the memory that happens to be free."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.engine.cache import FeatureCache
from lora_ensemble.host.compose import wrappers
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.tests.accelerator import DEVICE

from .builders import composite, same, sample, three
from .caches import cached, steps_of
from .models import FAMILIES, base
from .test_accelerator import on_device, transfers  # noqa: F401  (a fixture)

SD15 = FAMILIES["SD15"]


@pytest.fixture
def ours(loras):
    return composite(base("SD15"), three(base("SD15"), loras))


def free(monkeypatch, *values: float) -> list[torch.device]:
    """What a device says it has left, one value after the other, the last one from then on; who was asked."""
    asked: list[torch.device] = []

    def left(device: torch.device) -> float:
        asked.append(device)
        return values[min(len(asked), len(values)) - 1]

    monkeypatch.setattr(wrappers, "free_of", lambda patcher: left)
    return asked


def test_without_room_the_picture_is_that_without_a_cache(ours, monkeypatch):
    """Not that of some branches on old features, as many as happen to fit; and the record says so, once."""
    sample(roomy := cached(ours), steps=4)
    one = steps_of(roomy)[0]["bytes"] // 6
    free(monkeypatch, 2 * 5 * one)  # five of six rows would fit
    tight = cached(ours)
    assert torch.equal(sample(tight, steps=4), sample(ours, steps=4))
    assert [step.calls for step in record_of(ours).steps] == [1] * 4, "the branches share a batch"
    assert [step["reused"] for step in steps_of(tight)] == [0] * 4
    assert [step["bytes"] for step in steps_of(tight)][1:] == [0] * 3, "what was kept is given back"
    (problem,) = record_of(tight).problems
    assert "half of the free memory" in problem and "the picture would be another one" in problem


def test_the_room_is_decided_once(ours, monkeypatch):
    """Free memory that comes and goes within a run changes nothing, in either direction."""
    roomy = sample(cached(ours), steps=6)
    asked = free(monkeypatch, 1e12, 0)
    model = cached(ours)
    assert torch.equal(sample(model, steps=6), roomy) and len(asked) == 1
    assert not record_of(model).problems
    asked = free(monkeypatch, 0, 1e12)
    model = cached(ours)
    assert torch.equal(sample(model, steps=6), sample(ours, steps=6)) and len(asked) == 1
    assert len(record_of(model).problems) == 1


def test_a_run_that_outgrows_its_room_goes_on_whole(ours, monkeypatch):
    """A prompt that begins later brings further features: from the next step on nothing is reused, and the step that
    found out is as it would have been."""
    positive = [*SD15.cond(21), *SD15.cond(22, start_percent=0.4)]
    sample(roomy := cached(ours), "SD15", positive, steps=6)
    rows = [step["rows"] for step in steps_of(roomy)]
    start = rows.index(9)
    assert rows[:start] == [6] * start and 0 < start < 5
    free(monkeypatch, 2 * 6 * (steps_of(roomy)[0]["bytes"] // 6))
    tight = cached(ours)
    out = sample(tight, "SD15", positive, steps=6)
    reused = [step["reused"] for step in steps_of(tight)]
    assert reused[:start] == [step["reused"] for step in steps_of(roomy)][:start] and any(reused[:start])
    assert not any(reused[start:]) and torch.isfinite(out).all()
    (problem,) = record_of(tight).problems
    assert f"from step {start + 1} on" in problem


@pytest.mark.parametrize("fits", [1, 2])
def test_what_shares_a_batch_does_not_matter(fits, ours, monkeypatch):
    """The host splits a batch by its free memory. A prompt without features must not make others run whole or not, as
    it shares a batch with them or not."""
    positive = [*SD15.cond(21), *SD15.cond(22, start_percent=0.4)]
    together = cached(ours)
    whole, plain = sample(together, "SD15", positive, steps=6), sample(base("SD15"), "SD15", positive, steps=6)
    assert any(step["reused"] for step in steps_of(together))
    monkeypatch.setattr(base("SD15").model, "memory_required", lambda shape, **_: 0 if shape[0] <= fits else 1e30)
    apart = cached(ours)
    same(sample(apart, "SD15", positive, steps=6), whole, plain, 1e-4)
    assert [step["reused"] for step in steps_of(apart)] == [step["reused"] for step in steps_of(together)]


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_what_the_device_cannot_hold_is_kept_in_main_memory(family, transfers, loras, monkeypatch):  # noqa: F811
    """The same picture to the last bit, whatever part of the features has room on the device."""
    model = on_device(family)
    ours = composite(model, three(model, loras))
    roomy = cached(ours)
    wanted = sample(roomy, family, steps=4)
    one = steps_of(roomy)[0]["bytes"] // 6
    put, homes = FeatureCache.put, []

    def watched(store, *arguments):
        homes.append(put(store, *arguments))
        return homes[-1]

    monkeypatch.setattr(FeatureCache, "put", watched)
    for rows in (0, 2):
        homes.clear()
        free(monkeypatch, 2 * rows * one)
        tight = cached(ours)
        assert torch.equal(sample(tight, family, steps=4), wanted)
        assert homes[:6] == [DEVICE] * rows + [torch.device("cpu")] * (6 - rows)
        assert steps_of(tight)[1]["reused"] == 6 and not record_of(tight).problems
