"""A picture that is sampled in several runs, as by two KSampler (Advanced): time goes on in the second, and what was
found in the first is known."""

from __future__ import annotations

from dataclasses import replace

import comfy.sample
import pytest
import torch
from lora_ensemble.host.compose import earlier, wrappers
from lora_ensemble.host.compose.apply import with_cache
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.guidance import apply as guided
from lora_ensemble.host.guidance.apply import apply_guidance, guidance_record_of
from lora_ensemble.host.guidance.calibrate import calibrate
from lora_ensemble.host.guidance.options import GuidanceOptions, guidance_of
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.guidance.adaptive import AdaptiveGuidance
from lora_ensemble.methods.guidance.extrapolated import Extrapolation
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.schedule import Uniform
from lora_ensemble.methods.switch import Switch
from lora_ensemble.nodes.klora import LoRAEnsembleKLoRA
from torch import Tensor

from .builders import method, same, three
from .guidance_tools import extrapolated
from .models import FAMILIES, base, build, patcher, randomize
from .test_calibration import guide, paths
from .test_routed import prompt, routed, specs

STEPS = 8
ROUNDING = 1e-4  # a latent is scaled out of one run and into the next


@pytest.fixture(autouse=True)
def fresh(monkeypatch) -> earlier.Runs:
    runs = earlier.Runs()
    monkeypatch.setattr(wrappers, "RUNS", runs)
    monkeypatch.setattr(guided, "GUIDED", earlier.Left())
    return runs


def part(model, first: int, last: int, latent: Tensor | None = None, family: str = "SD15", cfg: float = 3.0,
         noisy: bool = False, positive: list | None = None, scheduler: str = "simple") -> Tensor:
    """What KSampler (Advanced) does from step to step."""
    kind = FAMILIES[family]
    start = kind.noise(1, 8, 1)
    latent = torch.zeros_like(start) if latent is None else latent
    noise = start if first == 0 or noisy else torch.zeros_like(start)
    with torch.inference_mode():
        return comfy.sample.sample(model, noise, STEPS, cfg, "euler", scheduler, positive or kind.cond(11),
                                   kind.cond(12), latent, disable_noise=first > 0 and not noisy, start_step=first,
                                   last_step=last, force_full_denoise=last == STEPS, disable_pbar=True, seed=1)


def k_lora(model, loras):
    ensemble = three(model, loras, (0.8, 0.5, 0.6))[:2]
    options = {each.id: each.default for each in LoRAEnsembleKLoRA.define_schema().inputs if hasattr(each, "default")}
    return LoRAEnsembleKLoRA.execute(model=model, ensemble=ensemble, **options).args[0]


MAKES = {
    "Switch": lambda strengths: Switch(strengths, 1),
    "Switch, turns": lambda strengths: Switch(strengths, order=(2, 0, 1), late=True),
    "CMLoRA": lambda strengths: CMLoRA(strengths, (True, False, True), caching=False, decay="halving"),
    # The first step of all has no measurement before it and is the high class's; all others are the low one's.
    "CMLoRA online": lambda strengths: CMLoRA(strengths, (True, False, True), "online", threshold=0.99, caching=False),
    "CMLoRA async": lambda strengths: CMLoRA(strengths, order="async", caching=False),
    "LoRAtorio": lambda strengths: LoRAtorio(strengths, kappa=0.4),
    "LoRAtorio, timesteps": lambda strengths: LoRAtorio(strengths, kappa=0.02, unit="timesteps"),
    "Composite": Composite,
}


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


# --- guidance, caches and measurements ------------------------------------------------------------------------------


def two_models():
    """Two Wan models of different weights, for high and low noise."""
    found = []
    for seed in (0, 1):
        model = build(FAMILIES["Wan"])
        randomize(model, seed)
        found.append(patcher(model))
    return found


def adaptive(model, **policy):
    return apply_guidance(model, guidance_of(GuidanceOptions("threshold", AdaptiveGuidance(**policy))))


def negatives(model) -> list[int]:
    return [step.negative for step in guidance_record_of(model).steps]


@pytest.mark.parametrize("cut", [2, 5])
@pytest.mark.parametrize("policy", [dict(threshold=-1.0, min_steps=4, ramp_steps=2), dict(threshold=-1.0),
                                    dict(threshold=2.0)], ids=["fading", "at once", "never"])
def test_guidance_goes_on_with_the_same_model(policy, cut, loras):
    """What had ended stays so, also halfway through its fading; with LoRAs and without."""
    plain = base("SD15")
    for model in (plain, method(plain, three(plain, loras), MAKES["Switch"])):
        ours = adaptive(model, **policy)
        whole = part(ours, 0, STEPS)
        evaluated = negatives(ours)
        half = part(ours, 0, cut)
        first = negatives(ours)
        same(part(ours, cut, STEPS, half), whole, torch.zeros_like(whole), ROUNDING)
        assert first + negatives(ours) == evaluated
    part(ours, 0, STEPS)
    assert negatives(ours) == evaluated  # a run that begins a picture knows of no other


def test_guidance_looks_anew_at_another_model():
    """One negative tells it that the sides are alike; the steps that are guided in any case are over. The line says
    so, and not that the threshold was wrong."""
    high, low = (adaptive(model, threshold=-1.0, min_steps=2) for model in two_models())
    half = part(high, 0, 4, family="Wan")
    assert negatives(high) == [1, 1, 1, 0]
    part(low, 4, STEPS, half, "Wan")
    assert negatives(low) == [1, 0, 0, 0]
    (line,) = guidance_record_of(low).problems
    assert "another model" in line and "looks anew" in line
    part(low, 4, STEPS, half + 0.1, "Wan")  # a picture of which nothing is known
    assert negatives(low) == [1, 1, 1, 0]


GOES_ON = ["Extrapolated guidance: the term goes on along the line of the earlier run"]


@pytest.mark.parametrize("cut", [1, 4])
@pytest.mark.parametrize("policy", [dict(saving=0.3), dict(saving=0.5, first=3), dict(tolerance=0.5)], ids=str)
def test_an_extrapolated_term_goes_on_with_the_same_model(policy, cut, loras):
    """Turns are those of the whole picture, and so is the line: with LoRAs and without, wherever the first run ends."""
    plain = base("SD15")
    for model in (plain, method(plain, three(plain, loras), MAKES["Switch"])):
        ours = extrapolated(model, **policy)
        whole = part(ours, 0, STEPS, cfg=12.0)
        evaluated = negatives(ours)
        assert 0 in evaluated and guidance_record_of(ours).carried == []
        half = part(ours, 0, cut, cfg=12.0)
        first = negatives(ours)
        same(part(ours, cut, STEPS, half, cfg=12.0), whole, torch.zeros_like(whole), ROUNDING)
        assert first + negatives(ours) == evaluated and guidance_record_of(ours).carried == GOES_ON
        assert not any("anew" in line for line in guidance_record_of(ours).problems)


def test_three_runs_of_a_term(loras):
    ours = extrapolated(base("SD15"), saving=0.5)
    whole, evaluated = part(ours, 0, STEPS, cfg=12.0), negatives(ours)
    found, latent = [], None
    for first, last in ((0, 3), (3, 5), (5, STEPS)):
        latent = part(ours, first, last, latent, cfg=12.0)
        found += negatives(ours)
    same(latent, whole, torch.zeros_like(whole), ROUNDING)
    assert found == evaluated


def other_prompt(ours, half):
    return part(ours, 4, STEPS, half, cfg=12.0, positive=FAMILIES["SD15"].cond(13))


def other_level(ours, half):
    return part(ours, 5, STEPS, half, cfg=12.0)


def other_loras(ours, half):
    return part(ours, 4, STEPS, half, cfg=12.0)


@pytest.mark.parametrize("go_on, why", [(other_prompt, "the prompts are others"), (other_loras, "other LoRAs"),
                                        (other_level, "does not begin at the noise level of its end")])
def test_a_term_of_something_else_is_not_taken(go_on, why, loras):
    """Two steps in full, as at any beginning, and a line that says why."""
    model = base("SD15")
    ours = extrapolated(model, saving=0.5)
    half = part(ours, 0, 4, cfg=12.0)
    if go_on is other_loras:
        ours = extrapolated(method(model, three(model, loras), MAKES["Switch"]), saving=0.5)
    go_on(ours, half)
    assert negatives(ours)[:2] == [1, 1] and guidance_record_of(ours).carried == []
    assert [line for line in guidance_record_of(ours).problems if why in line and "begins anew" in line]


def test_a_term_of_another_model_or_rule_is_not_taken():
    high, low = (extrapolated(model, saving=0.5) for model in two_models())
    half = part(high, 0, 4, family="Wan")
    assert negatives(high) == [1, 1, 1, 0] == [int(k in Extrapolation(0.5).steps(STEPS)) for k in range(4)]
    part(low, 4, STEPS, half, "Wan")
    assert negatives(low) == [1, 1, 1, 1]  # of four steps
    assert any("another model" in line and "begins anew" in line for line in guidance_record_of(low).problems)
    other = extrapolated(high, saving=0.3)
    part(other, 4, STEPS, half, "Wan")
    assert any("the rule is another one" in line for line in guidance_record_of(other).problems)


def test_without_a_negative_nothing_begins_anew():
    """At cfg 1 no rule has seen anything, and there is nothing to say of another model."""
    for make in (adaptive, extrapolated):
        high, low = (make(model) for model in two_models())
        part(low, 4, STEPS, part(high, 0, 4, family="Wan", cfg=1.0), "Wan", cfg=1.0)
        assert not any("anew" in line for line in guidance_record_of(low).problems)


@pytest.fixture(scope="module")
def coeffs():
    return calibrate(base("SD15"), paths(steps=STEPS, scheduler="simple"))


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_linear_ag_goes_on(cut, coeffs):
    """Its coefficients are those of the whole schedule; both runs go along it."""
    ours = guide(base("SD15"), coeffs)
    whole, evaluated = part(ours, 0, STEPS, cfg=12.0), negatives(ours)
    assert evaluated == [1, 0, 1, 0, 0, 0, 0, 0]
    half = part(ours, 0, cut, cfg=12.0)
    first = negatives(ours)
    same(part(ours, cut, STEPS, half, cfg=12.0), whole, torch.zeros_like(whole), ROUNDING)
    assert first + negatives(ours) == evaluated and guidance_record_of(ours).problems == []
    assert guidance_record_of(ours).carried == [
        f"LinearAG: the predictions of {cut} calls of the earlier run are known"]


@pytest.mark.parametrize("known", [True, False])
def test_linear_ag_without_the_predictions_before(known, coeffs):
    """Of another prompt, or of a run that is not known: what it would have foretold is guided in full."""
    ours = guide(base("SD15"), coeffs)
    half = part(ours, 0, 1, cfg=12.0)
    part(ours, 1, STEPS, half if known else half + 0.1, cfg=12.0, positive=FAMILIES["SD15"].cond(13))
    assert negatives(ours) == [1, 1, 1, 0, 0, 0, 0]
    (line,) = guidance_record_of(ours).problems
    assert "begins anew" in line and ("the prompts are others" if known else "is not known") in line


def test_a_calibrated_threshold_holds_for_both_runs(coeffs):
    ours = guide(base("SD15"), coeffs, "saving")
    whole, evaluated = part(ours, 0, STEPS, cfg=12.0), negatives(ours)
    half, first = part(ours, 0, 3, cfg=12.0), negatives(ours)
    same(part(ours, 3, STEPS, half, cfg=12.0), whole, torch.zeros_like(whole), ROUNDING)
    assert first + negatives(ours) == evaluated and 0 in evaluated


def test_a_part_of_another_schedule_is_refused(coeffs):
    with pytest.raises(ValueError, match="8 steps, here 4"):
        part(guide(base("SD15"), coeffs), 0, 4, cfg=12.0, scheduler="karras")


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
    assert any("features are those of one run" in line for line in record_of(ours).carried)
    assert record_of(ours).steps[0].notes["cache"]["reused"] == 0 < record_of(ours).steps[1].notes["cache"]["reused"]


def test_a_latent_in_half_precision_is_recognised(fresh, loras):
    model = base("SD15")
    ours = method(model, three(model, loras), Composite)
    half = part(ours, 0, 3)
    assert fresh.before(half.half()) is fresh.before(half.to(torch.bfloat16)) is fresh.before(half) is not None
    assert fresh.before(half * 1.1) is None and fresh.before(half[..., :4]) is None


def test_only_a_few_runs_are_remembered():
    runs, context = earlier.Runs(kept=2), wrappers.run_context(torch.tensor([2.0, 1.0]), torch.zeros(1, 4, 8, 8), None)
    latents = [torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    for latent in latents:
        runs.left(latent, context, ())
    assert [runs.before(latent) is not None for latent in latents] == [False, True, True]
