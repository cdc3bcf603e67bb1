"""Refresh schedules against their definition, and the store of features."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
import torch
from lora_ensemble.engine.cache import FeatureCache
from lora_ensemble.kernels.branch import Step
from lora_ensemble.methods.schedule import BySteps, NonUniform, Uniform, schedules, within
from lora_ensemble.tests.operations import Operations

CPU, META = torch.device("cpu"), torch.device("meta")
ROOMY = [(CPU, float("inf"))]


def refreshed(schedule, total: int) -> list[int]:
    return [j for j in range(total) if schedule.refreshes(Step(j, total, 1.0))]


@pytest.mark.parametrize("interval", [1, 2, 3, 7])
def test_uniform(interval):
    assert refreshed(Uniform(interval), 20) == list(range(0, 20, interval))
    assert Uniform(interval).max_age == interval
    assert refreshed(Uniform(interval, first=2), 20) == sorted({1, *range(0, 20, interval)})


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


# --- a budget ---


def spent(schedule, total: int, rest: float) -> float:
    """Step by step, a whole one costs 1."""
    return sum(1.0 if schedule.refreshes(Step(j, total, 1.0)) else rest for j in range(total)) / total


RESTS = {1: 0.08, 2: 0.22, 3: 0.38, 4: 0.47, 5: 0.56}
"""Those of Stable Diffusion 1.5."""


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("total", [10, 20, 50])
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.4, 0.5, 0.6, 0.75, 0.95])
def test_a_budget_takes_the_shortest_interval_and_then_the_deepest_cut(budget, total, first):
    found = within(budget, total, RESTS, schedules(BySteps(True, first)))
    costs = {(k, depth): spent(Uniform(k, first), total, rest) for k in (2, 3, 4, 5) for depth, rest in RESTS.items()}
    fitting = [pair for pair, cost in costs.items() if cost <= budget]
    k = min((k for k, _ in fitting), default=None)
    wanted = (k, max(depth for other, depth in fitting if other == k)) if fitting else min(costs, key=costs.get)
    assert (found.schedule, found.depth) == (Uniform(wanted[0], first), wanted[1])
    assert found.share == pytest.approx(costs[wanted]) and found.rest == RESTS[found.depth]
    assert found.whole == len(refreshed(found.schedule, total))


def test_a_budget_with_the_papers_schedule_is_one_of_depth():
    found = within(0.7, 20, RESTS, schedules(BySteps(False)))
    assert found.schedule == NonUniform() and found.depth == max(
        depth for depth, rest in RESTS.items() if spent(NonUniform(), 20, rest) <= 0.7)
    with pytest.raises(ValueError, match="nothing to choose"):
        within(0.5, 20, {}, schedules(BySteps()))


@pytest.mark.parametrize("make", [lambda: Uniform(0), lambda: Uniform(3, 0), lambda: NonUniform(0)])
def test_schedules_that_make_no_sense(make):
    with pytest.raises(ValueError, match="at least 1"):
        make()


def test_the_store_forgets_what_is_too_old():
    store, value = FeatureCache(max_age=3), {"h": torch.ones(2, 5)}
    store.put("a", 4, value, ROOMY)
    assert [store.get("a", step) is not None for step in range(1, 9)] == [False, True, True, True, True, True, False,
                                                                          False]
    assert store.get("b", 4) is None and store.age("b", 4) is None and store.age("a", 6) == 2


def test_the_store_counts_its_bytes():
    store = FeatureCache(max_age=2)
    assert store.put("a", 0, {"h": torch.ones(10)}, ROOMY) == CPU
    assert store.put("b", 0, {"h": torch.ones(5), "g": torch.ones(5)}, ROOMY) == CPU
    assert store.bytes == store.peak == 80
    assert store.put("a", 1, {"h": torch.ones(1)}, ROOMY) and (store.bytes, store.peak) == (44, 80)
    assert store.put("c", 1, {"h": torch.ones(10)}, [(CPU, 80)]) is None and store.bytes == 44
    assert store.get("b", 1) is not None
    assert store.put("b", 1, {"h": torch.ones(19)}, [(CPU, 80)]) and store.bytes == 80, "a replaced entry makes room"
    assert store.put("b", 2, {"h": torch.ones(20)}, [(CPU, 80)]) is None and store.get("b", 2) is None
    assert store.put("d", 3, {"h": torch.ones(2)}, ROOMY) and store.bytes == 8, "what is too old for use makes room"
    store.clear()
    assert store.bytes == 0 and store.get("a", 1) is None


def test_each_home_holds_its_share():
    """What one has no room for goes to the next, and a place that is given up can be taken again."""
    store, homes, one = FeatureCache(max_age=2), [(META, 100), (CPU, 50)], {"h": torch.ones(10)}
    assert [store.put(key, 0, one, homes) for key in "abcd"] == [META, META, CPU, None]
    assert store.bytes == 120 and store.get("a", 0)["h"].device == META and store.get("c", 0)["h"].device == CPU
    assert store.put("a", 1, {"h": torch.ones(1)}, homes) == META
    assert store.put("b", 1, {"h": torch.ones(24)}, homes) == META, "the room of the replaced ones"
    store.clear()
    assert [store.put(key, 5, one, homes) for key in "abcd"] == [META, META, CPU, None]


def test_what_is_kept_is_a_copy():
    store, batch = FeatureCache(max_age=2), torch.zeros(4, 3)
    store.put("a", 0, {"h": batch.chunk(4)[1]}, ROOMY)
    batch.fill_(1)
    kept = store.get("a", 0)["h"]
    assert not kept.any() and kept.untyped_storage().nbytes() == 12, "the row alone, not the batch that it came from"


# --- forecasts ---


def test_a_forecast_is_on_the_line_through_the_last_two():
    """Of two steps, the less far along it the farther it reaches; from one alone, back in time, or farther than the
    reach, the last is held."""
    store = FeatureCache(max_age=3, forecast=True)
    values = {step: torch.randn(2, 4, generator=torch.Generator().manual_seed(step)) for step in range(9)}

    def put(step: int, time: float, value: torch.Tensor | None = None) -> None:
        assert store.put("a", step, {"h": values[step] if value is None else value}, ROOMY, time) == CPU

    def at(step: int, time: float) -> torch.Tensor:
        return store.at("a", step, time, CPU)["h"]

    def line(first: torch.Tensor, last: torch.Tensor, t0: float, t1: float, time: float) -> torch.Tensor:
        share = (time - t1) / (t1 - t0)
        return last + 2 * share / (2 + share) * (last - first)

    put(0, 1.0)
    assert torch.equal(at(1, 0.9), values[0])
    put(1, 0.9)
    for time in (0.8, 0.65):
        assert torch.allclose(at(2, time), line(values[0], values[1], 1.0, 0.9, time), atol=1e-5)
    assert torch.allclose(at(2, 0.8) - values[1], (values[1] - values[0]) * 2 / 3, atol=1e-5), "by two thirds of itself"
    assert torch.equal(at(2, 0.9), values[1]) and torch.equal(at(2, 0.95), values[1])
    assert torch.equal(at(3, 0.5), values[1]), "four times the length of the line"
    put(1, 0.85, values[7])  # a second call of the same step: the line still begins at the step before
    assert torch.allclose(at(2, 0.7), line(values[0], values[7], 1.0, 0.85, 0.7), atol=1e-5)
    put(5, 0.5)
    assert torch.allclose(at(6, 0.4), line(values[7], values[5], 0.85, 0.5, 0.4), atol=1e-5)
    assert store.at("a", 8, 0.1, CPU) is None and store.at("b", 6, 0.4, CPU) is None
    store.put("a", 6, {"h": torch.ones(3, 4)}, ROOMY, 0.4)
    assert torch.equal(at(7, 0.3), torch.ones(3, 4)), "of another shape"


def test_both_are_in_the_books():
    store, one = FeatureCache(max_age=2, forecast=True), {"h": torch.ones(10)}
    for step, held in enumerate([40, 80, 80, 80]):
        assert store.put("a", step, one, ROOMY, 1 - step / 4) == CPU and store.bytes == held
    homes = [(META, 40), (CPU, 80)]
    store.clear()
    assert [store.put("a", step, one, homes, 1 - step / 4) for step in range(2)] == [META, CPU]
    assert store.bytes == 80
    assert store.put("b", 1, {"h": torch.ones(11)}, homes) is None and store.bytes == 80
    assert store.put("a", 2, {"h": torch.ones(100)}, homes) is None and store.bytes == 0
    assert store.put("a", 3, one, homes, 0.1) == META and store.bytes == 40
    assert store.put("a", 4, one, [(CPU, 0)]) is None and store.bytes == 0


def test_others_keep_what_a_line_begins_with():
    """A row that is put first must not take what the next row's line begins with for too old."""
    store = FeatureCache(max_age=3, forecast=True)
    for step, time in ((0, 1.0), (3, 0.7)):
        for key in "ab":
            store.put(key, step, {"h": torch.full((1,), time)}, ROOMY, time)
    assert [store.at(key, 4, 0.6, CPU)["h"].item() for key in "ab"] == pytest.approx([0.7 - 0.3 * 2 / 7] * 2)
    store.put("c", 9, {"h": torch.ones(1)}, ROOMY, 0.1)
    assert store.bytes == 4, "what is too old for that makes room"


@pytest.mark.parametrize("times", [{}, {"c": (1.0, 0.6)}, {"c": (1.0,)}, {key: (1.0,) for key in "abc"}],
                         ids=["alike", "another line", "a line and none", "no line"])
def test_several_side_by_side(times):
    """Each as it is alone, bit for bit; together three operations for each feature and not one more for each of them,
    and what is held stays."""
    store, keys = FeatureCache(max_age=9, forecast=True), "cab"
    for key in "abc":
        for step, time in enumerate(times.get(key, (1.0, 0.7))):
            value = torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * ord(key) + step))
            store.put(key, step, {"h": value, "k": 2 * value}, ROOMY, time)
    alone = [store.at(key, 2, 0.5, CPU) for key in keys]
    for _ in range(2):
        with torch.no_grad(), Operations() as asked:
            found = store.side_by_side(keys, 2, 0.5, CPU)
        assert list(found) == ["h", "k"]
        assert all(torch.equal(found[name], torch.cat([each[name] for each in alone])) for name in found)
    if not times:
        assert sorted(asked.names) == ["cat"] * 4 + ["lerp_"] * 2
    assert len(times) < 3 or asked.names == ["cat"] * 2
    assert all(torch.equal(store.at(key, 2, 0.5, CPU)["h"], each["h"]) for key, each in zip(keys, alone, strict=True))
    own, one = store.get("a", 2)["h"].clone(), store.side_by_side("a", 2, 0.5, CPU)["h"]
    one.zero_()
    assert torch.equal(store.get("a", 2)["h"], own)


def test_threads_share_the_store():
    """Guards: one device's thread ages features while another's keeps some."""
    store, value = FeatureCache(max_age=2), {"h": torch.ones(3)}
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            done = [pool.submit(lambda n: [store.put((n, i % 7), i, value, ROOMY) for i in range(400)], n)
                    for n in range(4)]
            assert all(all(each.result()) for each in done)
    finally:
        sys.setswitchinterval(before)
    assert store.bytes == 12 * len(store._entries)
