"""A picture that is sampled in several runs: what guidance has found in the first holds in the second."""

from __future__ import annotations

import gc
from copy import deepcopy
from types import SimpleNamespace
from weakref import ref

import pytest
import torch
from comfy.controlnet import ControlNet
from lora_ensemble.host.compose import earlier
from lora_ensemble.host.guidance import apply as guided
from lora_ensemble.host.guidance import left
from lora_ensemble.host.guidance.apply import apply_guidance, guidance_record_of
from lora_ensemble.host.guidance.calibrate import calibrate
from lora_ensemble.host.guidance.options import GuidanceOptions, guidance_of
from lora_ensemble.methods.counted import counted
from lora_ensemble.methods.guidance.adaptive import AdaptiveGuidance
from lora_ensemble.methods.guidance.extrapolated import Extrapolation

from .builders import method, same, three
from .guidance_tools import extrapolated
from .models import FAMILIES, base, build, patcher
from .runs import MAKES, ROUNDING, STEPS, no_runs, part, two_models
from .test_calibration import guide, paths
from .test_scenarios import control_model  # noqa: F401  (a fixture)


@pytest.fixture(autouse=True)
def fresh(monkeypatch) -> earlier.Runs:
    return no_runs(monkeypatch)


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


@pytest.mark.parametrize("first", [6, STEPS])
def test_steps_that_are_guided_in_any_case_are_those_of_the_picture(first):
    """A first run that is guided throughout has done as asked: it is said where the whole picture leaves none."""
    ours = adaptive(base("SD15"), threshold=-1.0, min_steps=first)
    half = part(ours, 0, 5)
    assert guidance_record_of(ours).problems == []
    part(ours, 5, STEPS, half)
    assert any("which leaves none" in line for line in guidance_record_of(ours).problems) == (first == STEPS)


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


def test_a_term_under_another_control_net_is_not_taken(control_model):  # noqa: F811
    """Guard: two ControlNets on one prompt were taken for one, and the second run went on along the line of the first,
    another picture than one that looks at its own negative."""
    ours, kind = extrapolated(base("SD15"), saving=0.5), FAMILIES["SD15"]
    hints = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3)).split(1)
    twin = deepcopy(control_model)

    def under(net=control_model, hint=hints[0], strength=0.8, span=(0.0, 1.0), before=None, **options) -> list:
        made = ControlNet(net, load_device=torch.device("cpu")).set_cond_hint(hint, strength, span)
        if before is not None:
            made.set_previous_controlnet(ControlNet(before, load_device=torch.device("cpu")).set_cond_hint(hints[1]))
        return kind.cond(11, control=made, control_apply_to_uncond=False, **options)

    half = part(ours, 0, 4, cfg=12.0, positive=under())
    part(ours, 4, STEPS, half, cfg=12.0, positive=under())
    assert guidance_record_of(ours).carried == GOES_ON
    for change in ({"hint": hints[1]}, {"strength": 0.3}, {"span": (0.0, 0.6)}, {"net": twin}, {"before": twin},
                   {"concat_latent_image": torch.ones(1, 4, 8, 8)}, {"reference_latents": [torch.ones(1, 4, 8, 8)]},
                   {"guidance": 3.0}, {"clip_vision_output": SimpleNamespace(image_embeds=torch.ones(1, 4))}):
        part(ours, 4, STEPS, half, cfg=12.0, positive=under(**change))
        assert negatives(ours)[:2] == [1, 1] and guidance_record_of(ours).carried == [], change
        assert [line for line in guidance_record_of(ours).problems if "the prompts are others" in line], change


def test_a_term_of_another_model_or_rule_is_not_taken():
    high, low = (extrapolated(model, saving=0.5) for model in two_models())
    half = part(high, 0, 4, family="Wan")
    assert negatives(high) == [1, 1, 0, 1] == [int(k in Extrapolation(0.5).steps(STEPS)) for k in range(4)]
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
        f"LinearAG: the predictions of {counted(cut, 'call')} of the earlier run are known"]


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


# --- what stays in main memory --------------------------------------------------------------------------------------


def term(model, latent_seed: int, saving: float = 0.5) -> tuple:
    """The model with extrapolated guidance, and what half of a picture of its own leaves."""
    ours = extrapolated(model, saving=saving)
    latent = torch.randn(FAMILIES["SD15"].noise(1, 8, 1).shape, generator=torch.Generator().manual_seed(latent_seed))
    return ours, part(ours, 0, 4, latent, cfg=12.0)


def test_older_runs_give_up_what_takes_too_much(monkeypatch):
    """The last run keeps its tensors whatever they take. Of the others, from the last one on, those that fit beside it;
    a run that goes on with a given up one says so, and begins anew."""
    model = base("SD15")
    sizes = []
    for bound, kept in ((0, [True, False, False]), (2.5, [True, True, False]), (3, [True, True, True])):
        monkeypatch.setattr(guided, "GUIDED", left.GuidedRuns())
        monkeypatch.setattr(left, "HELD", int(bound * sizes[0]) if sizes else 0)
        pictures = [term(model, seed) for seed in range(3)]
        runs = guided.GUIDED.values()
        assert [run.left is not None for run in runs] == kept == [not run.given_up for run in runs]
        sizes.append(left.nbytes(runs[0].left))
    assert sizes[0] == sizes[1] == sizes[2] >= pictures[0][1].nbytes > 0
    monkeypatch.setattr(left, "HELD", 0)
    term(model, 3)
    ours, half = pictures[2]
    part(ours, 4, STEPS, half, cfg=12.0)
    assert negatives(ours)[:2] == [1, 1] and guidance_record_of(ours).carried == []
    assert [line for line in guidance_record_of(ours).problems if "begins anew" in line and left.GIVEN_UP in line]


def test_what_a_model_left_goes_with_it():
    """And nothing of another one's does."""
    ours, _ = term(patcher(build(FAMILIES["SD15"])), 0)
    mine, other = guided.GUIDED.values()[0], term(base("SD15"), 1)
    held = ref(next(iter(mine.left[0].values())).d1)
    assert mine.left is not None and held() is not None
    del ours
    gc.collect()
    assert mine.model() is None and mine.left is None and mine.given_up and held() is None
    assert guided.GUIDED.values()[0].left is not None and other


def test_a_run_that_left_nothing_has_given_nothing_up(monkeypatch):
    """At cfg 1 no negative is seen: what goes on with that picture begins, and not anew."""
    monkeypatch.setattr(left, "HELD", 0)
    ours = extrapolated(base("SD15"), saving=0.5)
    half = part(ours, 0, 4, cfg=1.0)
    term(base("SD15"), 1)
    assert [run.left is None for run in guided.GUIDED.values()] == [False, True]
    part(ours, 4, STEPS, half, cfg=12.0)
    assert not any("anew" in line for line in guidance_record_of(ours).problems)


def test_what_a_view_keeps_counts():
    view = torch.zeros(100)[:1]
    assert left.nbytes(view) == 400 and left.nbytes(({"negative": [view, torch.zeros(3)]}, 7, None)) == 412
