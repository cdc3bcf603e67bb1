"""Refresh schedules against their definition, and the store of features."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import torch
from lora_ensemble.engine.cache import FeatureCache
from lora_ensemble.kernels.branch import Step
from lora_ensemble.methods.schedule import NonUniform, Uniform


def refreshed(schedule, total: int) -> list[int]:
    return [j for j in range(total) if schedule.refreshes(Step(j, total, 1.0))]


@pytest.mark.parametrize("interval", [1, 2, 3, 7])
def test_uniform(interval):
    assert refreshed(Uniform(interval), 20) == list(range(0, 20, interval))
    assert Uniform(interval).max_age == interval


def test_non_uniform_as_printed():
    """R = {0, 2, .. < 0.375 T} u {0.375 T, +3, .. < 0.875 T} u {0.875 T, +2, .. < T} at T = 200: 85 steps."""
    found = refreshed(NonUniform(), 200)
    assert found == [*range(0, 75, 2), *range(75, 175, 3), *range(175, 200, 2)] and len(found) == 85


@pytest.mark.parametrize("total", [*range(1, 41), 50, 97, 1000])
def test_non_uniform_for_any_number_of_steps(total):
    """Walked in exact fractions; the age bound holds."""
    expected, last = [], None
    for j in range(total):
        part = [bound for bound in (0, Fraction(3, 8) * total, Fraction(7, 8) * total) if bound <= j][-1]
        start = next(i for i in range(total) if i >= part)
        if (j - start) % (3 if Fraction(3, 8) <= Fraction(part) / total < Fraction(7, 8) else 2) == 0:
            expected.append(j)
        last = expected[-1]
        assert j - last < NonUniform().max_age
    assert refreshed(NonUniform(), total) == expected


@pytest.mark.parametrize("make", [lambda: Uniform(0), lambda: NonUniform(0)])
def test_schedules_that_make_no_sense(make):
    with pytest.raises(ValueError, match="at least 1"):
        make()


def test_the_store_forgets_what_is_too_old():
    store, value = FeatureCache(max_age=3), {"h": torch.ones(2, 5)}
    store.put("a", 4, value)
    assert [store.get("a", step) is not None for step in range(1, 9)] == [False, True, True, True, True, True, False,
                                                                          False]
    assert store.get("b", 4) is None and store.age("b", 4) is None and store.age("a", 6) == 2


def test_the_store_counts_its_bytes():
    store = FeatureCache(max_age=2)
    assert store.put("a", 0, {"h": torch.ones(10)}) and store.put("b", 0, {"h": torch.ones(5), "g": torch.ones(5)})
    assert store.bytes == store.peak == 80
    assert store.put("a", 1, {"h": torch.ones(1)}) and (store.bytes, store.peak) == (44, 80)
    assert not store.put("c", 1, {"h": torch.ones(10)}, limit=80) and store.bytes == 44
    assert store.get("b", 1) is not None
    assert store.put("b", 1, {"h": torch.ones(19)}, limit=80) and store.bytes == 80, "a replaced entry makes room"
    assert not store.put("b", 2, {"h": torch.ones(20)}, limit=80) and store.get("b", 2) is None
    assert store.put("d", 3, {"h": torch.ones(2)}) and store.bytes == 8, "what is too old for any use makes room"
    store.clear()
    assert store.bytes == 0 and store.get("a", 1) is None


def test_threads_share_the_store():
    """Guards: one device's thread ages features while another's keeps some."""
    store, value = FeatureCache(max_age=2), {"h": torch.ones(3)}
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            done = [pool.submit(lambda n: [store.put((n, i % 7), i, value) for i in range(400)], n) for n in range(4)]
            assert all(all(each.result()) for each in done)
    finally:
        sys.setswitchinterval(before)
    assert store.bytes == 12 * len(store._entries)
