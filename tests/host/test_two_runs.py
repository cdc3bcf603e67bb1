"""A picture that is sampled in several runs, as by two KSampler (Advanced): time goes on in the second, and what was
found in the first is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comfy.samplers import CFGGuider, sampler_object
from lora_ensemble.host.compose import earlier, wrappers
from lora_ensemble.host.compose.apply import with_cache
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.guidance.apply import guidance_record_of
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.schedule import Uniform

from .builders import method, same, schedule, three
from .caches import cmlora
from .guidance_tools import SD15, extrapolated
from .models import base
from .runs import MAKES, ROUNDING, STEPS, k_lora, no_runs, part, two_models
from .test_routed import prompt, routed, specs


@pytest.fixture(autouse=True)
def fresh(monkeypatch) -> earlier.Runs:
    return no_runs(monkeypatch)


@pytest.mark.parametrize("cut", [2, 5])
@pytest.mark.parametrize("name", MAKES)
def test_two_runs_are_one(name, cut, loras):
    """Turns, leaders, classes and temperatures go on where they were."""
    model = base("SD15")
    ours, plain = method(model, three(model, loras), MAKES[name]), part(model, 0, STEPS)
    whole = part(ours, 0, STEPS)
    assert record_of(ours).whole == 0
    half = part(ours, 0, cut)
    assert (record_of(ours).before, record_of(ours).whole) == (0, STEPS)
    same(part(ours, cut, STEPS, half), whole, plain, ROUNDING)
    assert (record_of(ours).before, record_of(ours).whole) == (cut, STEPS)
    # Another object with the same LoRAs, as a second method node makes it.
    same(part(method(model, three(model, loras), MAKES[name]), cut, STEPS, half), whole, plain, ROUNDING)


@pytest.mark.parametrize("name", ["Switch", "CMLoRA", "LoRAtorio"])
def test_by_the_noise_level_where_the_first_run_is_not_known(name, fresh, loras):
    """The first half was another model's, or its latent has passed through nodes that changed it."""
    model = base("SD15")
    ours, plain = method(model, three(model, loras), MAKES[name]), part(model, 0, STEPS)
    half, whole = part(ours, 0, 3), part(ours, 0, STEPS)
    fresh._runs.clear()
    same(part(ours, 3, STEPS, half), whole, plain, ROUNDING)
    assert (record_of(ours).before, record_of(ours).whole) == (3, STEPS)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", ["Switch", "CMLoRA", "Composite"])
def test_windows_in_time_hold_over_both_runs(name, known, fresh, loras):
    """From 0.25 to 0.75, and from the middle on: wherever the first run ends."""
    model = base("SD15")
    first, second, third = three(model, loras)
    ensemble = (replace(first, start=0.25, end=0.75), second, replace(third, start=0.5, fade=0.25))
    ours, plain = method(model, ensemble, MAKES[name]), part(model, 0, STEPS)
    whole = part(ours, 0, STEPS)
    for cut in (1, 3, 6):
        half = part(ours, 0, cut)
        if not known:
            fresh._runs.clear()
        same(part(ours, cut, STEPS, half), whole, plain, ROUNDING)
    assert [line for line in record_of(ours).problems if "none of them is in its window from 0.25 to 0.75" in line]


@pytest.mark.parametrize("name", ["LoRAtorio, timesteps", "Switch"])
def test_the_first_runs_may_be_of_a_model_without_loras(name, fresh, loras):
    """As Wan's model for high noise with a Branch Cache alone: their steps and times are known to the last run, as they
    are of a MODEL whose LoRAs are off."""
    model = base("SD15")
    ours, cached = method(model, three(model, loras), MAKES[name]), with_cache(model, CacheSpec(Uniform(1)))
    off = method(model, tuple(replace(spec, strength_model=0.0) for spec in three(model, loras)), MAKES[name])
    found = []
    for first in (cached, off):
        fresh._runs.clear()
        found.append(part(ours, 4, STEPS, part(first, 2, 4, part(first, 0, 2))))
        assert (record_of(ours).before, record_of(ours).whole) == (4, STEPS)
        assert "not known" not in record_of(ours).carried[0]
    same(*found, part(model, 4, STEPS, part(model, 0, 4)), ROUNDING)


def test_three_runs(loras):
    model = base("SD15")
    ours = method(model, three(model, loras), MAKES["LoRAtorio, timesteps"])
    middle = part(ours, 2, 6, part(ours, 0, 2))
    assert (record_of(ours).before, record_of(ours).whole) == (2, STEPS)
    same(part(ours, 6, STEPS, middle), part(ours, 0, STEPS), part(model, 0, STEPS), ROUNDING)


def test_k_lora_ramps_on(loras):
    """Its progress goes by the noise level, which these steps divide into equal parts."""
    model, equal = base("SD15"), {"scheduler": "normal"}
    ours = k_lora(model, loras)
    same(part(ours, 3, STEPS, part(ours, 0, 3, **equal), **equal), part(ours, 0, STEPS, **equal),
         part(model, 0, STEPS, **equal), ROUNDING)


@pytest.mark.parametrize("scheduler", ["simple", "sgm_uniform", "karras"])
def test_the_last_run_ramps_as_one_run_does(scheduler, loras):
    """It knows how many steps there were before it, and so is no more bound to the noise level."""
    ours = k_lora(base("SD15"), loras)
    part(ours, 0, STEPS, scheduler=scheduler)
    whole = [step.branches for step in record_of(ours).steps]
    for cut in (2, 5):
        part(ours, cut, STEPS, part(ours, 0, cut, scheduler=scheduler), scheduler=scheduler)
        assert [step.branches for step in record_of(ours).steps] == whole[cut:]


def test_a_run_that_adds_noise_begins_anew(loras):
    """A second pass over a finished picture, at low denoise, is a picture of its own: as in all earlier versions."""
    model = base("SD15")
    ours = method(model, three(model, loras), MAKES["Switch"])
    part(ours, 4, STEPS, part(ours, 0, STEPS), noisy=True)
    record = record_of(ours)
    assert (record.before, record.whole) == (0, 0)
    assert [step.branches[0][0].index(0.8) for step in record.steps[::3]] == [0, 0]


@pytest.mark.parametrize("name", ["Switch", "K-LoRA"])
def test_a_way_back_to_noise_is_no_beginning(name, fresh, loras):
    """A picture is sampled backwards (FlipSigmas), and anew from the noise that it came to."""
    model = base("SD15")
    ours = k_lora(model, loras) if name == "K-LoRA" else method(model, three(model, loras), MAKES[name])
    ours = extrapolated(ours)
    back = schedule(model, STEPS).flip(0).clamp_min(1e-3)
    conds = SD15.cond(11), SD15.cond(12)

    def run(sigmas, latent):
        guider = CFGGuider(ours)
        guider.set_conds(*conds)
        guider.set_cfg(3.0)
        with torch.inference_mode():
            return guider.sample(torch.zeros_like(latent), latent, sampler_object("euler"), sigmas, disable_pbar=True)

    noise = run(back, SD15.noise(seed=4))
    again = run(back.flip(0), noise)
    record, guidance = record_of(ours), guidance_record_of(ours)
    assert (record.before, record.whole) == (0, 0) and not record.carried
    assert [step.index for step in guidance.steps] == list(range(STEPS)) and not guidance.carried
    fresh._runs.clear()
    assert torch.equal(run(back.flip(0), noise), again)


def test_which_lora_had_no_turn_in_which_part(loras):
    model = base("SD15")
    ours = method(model, three(model, loras), MAKES["Switch"])
    part(ours, 2, STEPS, part(ours, 0, 2))
    assert record_of(ours).problems == []
    part(ours, 0, 2)
    assert len([line for line in record_of(ours).problems if "in any of the 2 steps that this model takes of 8" in line]
               ) == 1


@pytest.mark.parametrize("family", ["SD15", "Flux", "Wan"])
@pytest.mark.parametrize("mode", ["once", "every step"])
def test_places_are_known_in_the_second_run(family, mode, loras):
    """Another model goes on with the picture: it looks at its own attention no more than it has to."""
    model, text = base(family), prompt(family)
    ensemble = specs(model, loras)
    first, second = (routed(model, ensemble, mode=mode) for _ in range(2))
    whole = part(first, 0, STEPS, family=family, cfg=1.0, positive=text)
    maps = places_of(first)[0].maps
    half = part(first, 0, 3, family=family, cfg=1.0, positive=text)
    found = part(second, 3, STEPS, half, family, 1.0, positive=text)
    assert [step.rows for step in record_of(second).steps] == [1] * (STEPS - 3)
    same(found, whole, part(model, 0, STEPS, family=family, cfg=1.0, positive=text), ROUNDING)
    torch.testing.assert_close(places_of(second)[0].maps, maps)


def test_places_of_another_prompt_or_picture_are_not_taken(fresh, loras):
    model, text = base("Flux"), prompt("Flux")
    first, second = (routed(model, specs(model, loras), mode="once") for _ in range(2))
    half = part(first, 0, 3, family="Flux", cfg=1.0, positive=text)
    part(second, 3, STEPS, half + 0.1, "Flux", 1.0, positive=text)
    assert record_of(second).steps[0].rows == 2
    other = routed(model, specs(model, loras, words=("sks", "ohwx")), mode="once")  # their words the other way round
    part(other, 3, STEPS, half, "Flux", 1.0, positive=text)
    assert record_of(other).steps[0].rows == 1
    torch.testing.assert_close(places_of(other)[0].maps, places_of(first)[0].maps.flip(1))
    third = routed(model, specs(model, loras, words=("field", "ohwx")), mode="once")
    part(third, 3, STEPS, half, "Flux", 1.0, positive=text)
    assert record_of(third).steps[0].rows == 2


def test_late_starts_count_over_both_runs(loras):
    """`start` 0.5 of eight steps: the base model alone for four, wherever the first run ends."""
    model, text = base("SD15"), prompt("SD15")
    ours = routed(model, specs(model, loras), start=0.5)
    whole, plain = part(ours, 0, STEPS, positive=text), part(model, 0, STEPS, positive=text)
    same(part(ours, 2, STEPS, part(ours, 0, 2, positive=text), positive=text), whole, plain, ROUNDING)


def test_classes_and_measurements_go_on_with_another_model(loras):
    """The high-frequency share is the picture's, so the low class leads on."""
    high, low = (method(model, three(model, loras), MAKES["CMLoRA online"]) for model in two_models())
    half = part(high, 0, 4, family="Wan")
    part(low, 4, STEPS, half, "Wan")
    led = [[step.notes["CMLoRA"]["led"] for step in record_of(model).steps] for model in (high, low)]
    assert led == [[0, 1, 1, 1], [1, 1, 1, 1]]


def test_features_are_of_one_model(loras):
    """The second run makes its own in its first step, as one over all steps does where the first run ended."""
    model = base("SD15")
    ours = with_cache(method(model, three(model, loras), Composite), CacheSpec(Uniform(3), depth=1))
    whole, half = part(ours, 0, STEPS), part(ours, 0, 3)
    assert record_of(ours).carried == []
    same(part(ours, 3, STEPS, half), whole, part(model, 0, STEPS), ROUNDING)
    assert any(line.startswith("Branch Cache: features are those of one run") for line in record_of(ours).carried)
    assert record_of(ours).steps[0].notes["cache"]["reused"] == 0 < record_of(ours).steps[1].notes["cache"]["reused"]


def test_the_cache_of_a_method_is_called_its_own(loras):
    """No Branch Cache is in the graph."""
    model = base("SD15")
    ours = cmlora(model, three(model, loras), 1)
    part(ours, 3, STEPS, part(ours, 0, 3))
    assert any(line.startswith("The cache of CMLoRA: features are those") for line in record_of(ours).carried)


def test_a_latent_in_half_precision_is_recognised(fresh, loras):
    model = base("SD15")
    ours = method(model, three(model, loras), Composite)
    half = part(ours, 0, 3)
    assert fresh.before(half.half()) is fresh.before(half.to(torch.bfloat16)) is fresh.before(half) is not None
    assert fresh.before(half * 1.1) is None and fresh.before(half[..., :4]) is None


def marked(shape: tuple[int, ...], seed: int) -> earlier.Mark:
    """Of another latent."""
    return earlier.mark_of(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def test_a_latent_is_looked_at_once(fresh, loras, monkeypatch):
    """Whether it holds numbers, whose report is of it and which run goes on with it is one look, which waits for the
    device; a run that goes on has looked at the one it got."""
    looks, some = [], earlier._some
    monkeypatch.setattr(earlier, "_some", lambda tensor, count: looks.append(count) or some(tensor, count))
    model = base("SD15")
    half = part(method(model, three(model, loras), Composite), 0, 3)
    assert looks == [earlier.SAMPLES]
    part(method(model, three(model, loras), Composite), 3, STEPS, half)
    assert looks == [earlier.SAMPLES] * 3


def test_first_halves_of_other_graphs_are_remembered_and_what_is_not_is_said(fresh, loras):
    """ComfyUI keeps the first half of a graph that a user comes back to; its places are known for as long."""
    model, text = base("SD15"), prompt("SD15")
    ours = routed(model, specs(model, loras), mode="once")
    half = part(ours, 0, 3, positive=text)
    kept = list(fresh._runs)
    for seed in range(earlier.KEPT - 1):
        fresh.keep(marked(half.shape, seed), kept[-1][-1])
    assert earlier.KEPT > 4
    for known in (True, False):
        part(ours, 3, STEPS, half, positive=text)
        assert ("places: looked for anew, since that run is not known" in record_of(ours).carried) is not known
        assert ("places: those that words were found at are known" in record_of(ours).carried) is known
        fresh.keep(marked(half.shape, 99), kept[-1][-1])


def test_only_a_few_runs_are_remembered():
    runs, context = earlier.Runs(kept=2), wrappers.run_context(torch.tensor([2.0, 1.0]), torch.zeros(1, 4, 8, 8), None)
    latents = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for latent in latents:
        runs.left(earlier.mark_of(latent), context, ())
    assert [runs.before(latent) is not None for latent in latents] == [False, True, True]