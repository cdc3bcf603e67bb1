"""Deep features that move on between whole passes, on real ComfyUI."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.compose.apply import with_cache
from lora_ensemble.host.compose.cache import FEWEST, CacheSpec
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.guidance.apply import guidance_record_of
from lora_ensemble.methods.schedule import Uniform
from lora_ensemble.nodes.cache import LoRAEnsembleBranchCache

from .builders import composite, merge, sample, three
from .caches import Watch, cached, cmlora, in_turn, steps_of
from .guidance_tools import extrapolated
from .models import FAMILIES, base


def forecast(model, interval: int = 3, depth: int = 1):
    return with_cache(model, CacheSpec(Uniform(interval, first=2), depth=depth, forecast=True))


class WatchLine(Watch):
    """Checks at every reuse that a row gets the point of this noise level, on the line through what that row's branch
    and cond caught in the last two whole steps, s / (1 + s / 2) of its lengths on for s. Where there is one such step
    alone, or the line would have to be believed farther than `reach` times its length, what was caught last."""

    def __init__(self, monkeypatch, flow: bool, reach: float = float("inf")):
        super().__init__(monkeypatch)
        self.flow, self.reach, self.lines, self.held = flow, reach, 0, 0

    def time(self, options: dict) -> float:
        sigma = float(options["sigmas"].flatten()[0])
        return sigma if self.flow else sigma / (1 + sigma)

    def note(self, place: tuple, options: dict, caught: dict, k: int, count: int) -> None:
        self.caught.setdefault(place, []).append((self.time(options), caught, k, count))

    def check(self, place: tuple, options: dict, features: dict) -> None:
        t, ((t0, first, i, n), (t1, second, k, m)) = self.time(options), (self.caught[place] * 2)[-2:]
        line = t0 != t1 and (t - t1) / (t1 - t0) <= self.reach
        for name, value in features.items():
            if not line:
                assert torch.equal(value, second[name].chunk(m)[k])
                self.held += 1
                continue
            y0, y1 = first[name].chunk(n)[i].double(), second[name].chunk(m)[k].double()
            share = (t - t1) / (t1 - t0)
            wanted = y1 + (y1 - y0) / (1 / share + 1 / 2)
            assert (value.double() - wanted).abs().max() <= 1e-4 * wanted.abs().max()
            assert (value.double() - y1).norm() > 1e-3 * (y1 - y0).norm()
            self.lines += 1


@pytest.mark.parametrize("family", ["SD15", "SDXL", "Flux"])
def test_every_row_is_on_its_own_line(family, loras, monkeypatch):
    watch = WatchLine(monkeypatch, flow=family == "Flux")
    model = forecast(composite(base(family), three(base(family), loras)))
    sample(model, family, steps=8, batch=2)
    steps = steps_of(model)
    assert [bool(step["reused"]) for step in steps] == [i not in (0, 1, 3, 6) for i in range(8)] and watch.lines
    assert steps[1]["bytes"] == steps[7]["bytes"] == 2 * steps[0]["bytes"], "both are in the books"
    assert record_of(model).problems == []


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_branches_that_run_whole_in_turn_have_lines_of_their_own(family, loras, monkeypatch):
    """A method's own schedule: each branch's line is between the steps in which that branch was whole."""
    watch = WatchLine(monkeypatch, family == "Flux", reach=4)
    sample(in_turn(base(family), three(base(family), loras), forecast=True), family, steps=9)
    assert watch.lines > watch.held > 0


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_cmlora_holds_as_the_paper_does_and_forecasts_where_asked(family, loras, monkeypatch):
    """The one difference is `features`: the same LoRAs are whole at the same steps."""
    model = base(family)
    ensemble = three(model, loras)
    saved, held, line = (cmlora(model, ensemble, 1, **later) for later in (
        {}, {"features": "held", "cache_age": 3}, {"features": "forecast", "cache_age": 3}))
    assert saved.get_attachment("lora_ensemble").cache == CacheSpec(max_age=9, depth=1, whose="The cache of CMLoRA")
    with monkeypatch.context() as patch:
        watch = Watch(patch)  # every row gets what it caught last
        out = {"held": sample(held, family, steps=12)}
        assert watch.reused
    watch = WatchLine(monkeypatch, family == "Flux", reach=3)
    out["line"] = sample(line, family, steps=12)
    assert watch.lines > watch.held > 0
    assert [step["ages"] for step in steps_of(line)] == [step["ages"] for step in steps_of(held)]
    assert max(step["bytes"] for step in steps_of(line)) == 2 * max(step["bytes"] for step in steps_of(held))
    assert torch.isfinite(out["line"]).all() and not torch.equal(out["line"], out["held"])
    assert record_of(line).problems == record_of(held).problems == []


@pytest.mark.parametrize("family", FAMILIES)
def test_interval_1_is_no_cache_bit_for_bit(family, loras):
    model = merge(base(family), three(base(family), loras))
    assert torch.equal(sample(forecast(model, 1), family, steps=6), sample(model, family, steps=6))


def test_a_run_that_is_too_short_runs_whole(loras):
    model = composite(base("SD15"), three(base("SD15"), loras))
    ours = forecast(model)
    assert torch.equal(sample(ours, steps=FEWEST - 1), sample(model, steps=FEWEST - 1))
    assert any("too short" in problem for problem in record_of(ours).problems)
    sample(ours, steps=FEWEST)
    assert sum(step["reused"] for step in steps_of(ours)) and record_of(ours).problems == []


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_sde", "dpm_2", "euler_ancestral"])
def test_samplers_with_several_calls_per_step(sampler, loras):
    model = base("Flux")
    ours = composite(model, three(model, loras))
    plain, reusing = sample(ours, "Flux", steps=9, sampler=sampler), forecast(ours)
    out = sample(reusing, "Flux", steps=9, sampler=sampler)
    assert torch.isfinite(out).all() and ((out - plain).norm() / plain.norm()).item() < 1
    by_index: dict[int, set] = {}
    for step in record_of(reusing).steps:
        by_index.setdefault(step.index, set()).add(step.notes["cache"]["reused"] == 0)
    assert by_index == {i: {i < 2 or i % 3 == 0} for i in range(9)}


@pytest.mark.parametrize(("cache", "interval", "turns"), [
    (forecast, 3, [0, 1, 3, 6, 9, 12, 15, 18, 19]), (cached, 3, [0, 1, 3, 6, 9, 12, 15, 18, 19]),
    (lambda model: forecast(model, 4), 4, [0, 1, 3, 4, 8, 12, 16, 19]),
    (lambda model: LoRAEnsembleBranchCache.execute(model, "forecast", 0, 2, 0.05).args[0], 5,
     [0, 1, 3, 5, 7, 10, 12, 15, 17, 19])], ids=["forecast", "held", "longer", "budget"])
def test_with_extrapolated_guidance(cache, interval, turns, loras):
    """The negative is evaluated where all runs whole anyway, or so soon after that its features are young enough: they
    have a line of their own, and no branch runs whole for its sake. A budget has chosen when that is planned."""
    model = composite(base("SD15"), three(base("SD15"), loras))
    ours = extrapolated(cache(model))
    out, plain = sample(ours, steps=20, cfg=3.0), sample(model, steps=20, cfg=3.0)
    assert ((out - plain).norm() / plain.norm()).item() < 0.5
    steps = steps_of(ours)
    assert [step.index for step in guidance_record_of(ours).steps if step.negative] == turns
    whole = [i for i, step in enumerate(steps) if not step["reused"]]
    assert whole == [i for i in range(20) if i % interval == 0 or (i == 1 and cache is not cached)]
    assert max(age for step in steps for age in step["ages"]) < interval


def test_saved_workflows_go_on_holding(loras):
    """The schedules that 0.1.0 had."""
    model = composite(base("SD15"), three(base("SD15"), loras))
    ours = cached(model)
    sample(ours, steps=7)
    steps = steps_of(ours)
    assert [bool(step["reused"]) for step in steps] == [i % 3 > 0 for i in range(7)]
    assert len({step["bytes"] for step in steps}) == 1
