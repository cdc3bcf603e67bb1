"""Routed LoRAs beside what else a run may have: caches, guidance, other methods, areas, regional prompts, samplers."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.compose.apply import apply_method
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.guidance.apply import Guidance, apply_guidance, guidance_record_of
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.guidance.adaptive import AdaptiveGuidance, AdaptiveSession
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.switch import Switch

from .builders import plain, same, sample, schedule
from .caches import cached
from .guidance_tools import ag
from .models import FAMILIES, base
from .test_routed import MARKS, prompt, rests, routed, specs


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_branch_cache(family, loras):
    """Places are taken from steps that ran whole alone, for the steps behind them."""
    model = base(family)
    ours = cached(routed(model, specs(model, loras)), interval=2)
    found = sample(ours, family, prompt(family), steps=5)
    notes = [step.notes for step in record_of(ours).steps]
    assert record_of(ours).problems == [] and torch.isfinite(found).all()
    assert [note["cache"]["reused"] for note in notes] == [0, 2, 0, 2, 0]
    places = [tuple(note["Merge"]["places"]) for note in notes]
    assert places[0] != places[1] == places[2] != places[3] == places[4]


def test_adaptive_guidance(loras):
    """The negative is left out once it no longer matters; the positive goes on saying where words are."""
    model = base("SD15")
    ours = ag(routed(model, specs(model, loras)), threshold=-1.0)
    sample(ours, "SD15", prompt(), steps=5, cfg=3.0)
    record = record_of(ours)
    assert record.problems == [] and guidance_record_of(ours) is not None
    assert [step.rows for step in record.steps][-1] == 1
    assert len({tuple(step.notes["Merge"]["places"]) for step in record.steps}) == 5


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("key", ["without", "probe"])
def test_guidance_counts_the_guiders_own_conds(key, ours_first, loras):
    """Not what a prompt brings for its places to be found: LinearAG took it for further negatives and stopped, and what
    was saved was told as more."""
    model, contexts = base("SD15"), []

    def begin(model, context, tell) -> AdaptiveSession:
        contexts.append(context)
        return AdaptiveSession(AdaptiveGuidance(-2.0, min_steps=1), tell=tell)

    ours = apply_guidance(model, Guidance("", begin)) if not ours_first else model
    ours = routed(ours, specs(model, loras), mode="contrast" if key == "without" else "every step")
    ours = apply_guidance(ours, Guidance("", begin)) if ours_first else ours
    others = [prompt("SD15", None, 20 + k)[0] for k in range(3)]
    more = {"lora_ensemble_without": rests(MARKS, others)} if key == "without" else \
        {"lora_ensemble_probe": [others[0][0], {"lora_ensemble_prompt": MARKS}]}
    sample(ours, "SD15", prompt(**more), steps=4, cfg=3.0)
    record = guidance_record_of(ours)
    assert contexts[0].negatives == 1 and record.full == 8 and record.evaluations == 6


def test_pictures_that_are_guided_one_by_one_come_all_together(loras):
    """Places are those of a batch's pictures: a call that brought some of them would mix them up."""
    model = base("SD15")
    ours = ag(routed(model, specs(model, loras)), threshold=0.9)
    found = sample(ours, "SD15", prompt(), steps=4, batch=3)
    assert torch.isfinite(found).all() and places_of(ours)[0].maps.shape[0] == 3


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_beside_another_method(order, loras):
    """Routed LoRAs and others that take turns, in either order: one evaluation each, each with places of its own."""
    model = base("SD15")
    ensemble = specs(model, loras)
    first, second = (lambda m: routed(m, ensemble)), (lambda m: apply_method(m, None, tuple(ensemble), plain(Switch),
                                                                             "Switch LoRAs")[0])
    if order == "outside":
        first, second = second, first
    ours = second(first(model))
    found = sample(ours, "SD15", prompt(), steps=3)
    (both,) = record_of(ours).problems
    assert torch.isfinite(found).all() and both.startswith("acting twice")
    assert [step.rows for step in record_of(ours).steps] == [3, 2, 2] and len(places_of(ours)) == 1


def test_two_routed_methods(loras):
    """Two groups of LoRAs that do not compete with each other: one reading serves both."""
    model = base("SD15")
    one, two = specs(model, loras)
    ours = routed(routed(model, [one]), [two])
    sample(ours, "SD15", prompt(), steps=2)
    assert record_of(ours).problems == [] and len(places_of(ours)) == 2
    assert [step.rows for step in record_of(ours).steps] == [3, 2]
    for group, placed in ((one, places_of(ours)[0]), (two, places_of(ours)[1])):
        assert placed.names == (group.name,) and placed.maps.min() < 1


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2s_ancestral", "uni_pc", "dpmpp_sde"])
def test_samplers_that_call_more_than_once(sampler, loras):
    model = base("SD15")
    ours = routed(model, specs(model, loras))
    found = sample(ours, "SD15", prompt(), steps=3, sampler=sampler)
    assert torch.isfinite(found).all() and record_of(ours).problems == []
    assert record_of(ours).steps[0].rows % 2 == 1  # one more, to find places


@pytest.mark.parametrize("make", [Merge, Composite])
def test_a_further_pass_has_the_places_of_its_evaluation(make, loras):
    """Perturbed attention and skipped layers are compared with the prediction that they go with: places must be the
    same. The pass that is compared here leaves nothing out."""
    import comfy.samplers

    model, gaps = base("SD15"), []
    ours = routed(model, specs(model, loras), make)

    def again(args):
        (other,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"],
                                                  args["model_options"])
        gaps.append(float((other - args["cond_denoised"]).abs().max() / other.std()))
        return args["denoised"]

    want = sample(ours, "SD15", prompt(), steps=4)
    watched = ours.clone()
    watched.set_model_sampler_post_cfg_function(again)
    assert torch.equal(sample(watched, "SD15", prompt(), steps=4), want)
    assert len(gaps) == 4 and max(gaps) < 1e-4 and record_of(watched).problems == []


def test_positive_and_negative_may_be_called_apart(loras):
    """A sampler that asks for the negative alone first finds no places, and none are needed before the positive."""
    import comfy.samplers

    model = base("SD15")
    ours = routed(model, specs(model, loras))

    class Apart(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006  (as the host has it)
            (negative,) = comfy.samplers.calc_cond_batch(self.inner_model, [self.conds["negative"]], x, timestep,
                                                         model_options)
            (positive,) = comfy.samplers.calc_cond_batch(self.inner_model, [self.conds["positive"]], x, timestep,
                                                         model_options)
            return negative + 3.0 * (positive - negative)

    guider = Apart(ours)
    guider.set_conds(prompt(), FAMILIES["SD15"].cond(12))
    noise = FAMILIES["SD15"].noise(1, seed=1)
    with torch.inference_mode():
        found = guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"),
                              schedule(ours, 3), disable_pbar=True, seed=1)
    assert torch.isfinite(found).all() and record_of(ours).problems == []
    assert 0 < places_of(ours)[0].maps.mean() < 1


def test_the_same_seed_gives_the_same_picture_and_runs_leave_nothing(loras):
    model = base("SD15")
    ours = routed(model, specs(model, loras))
    first = sample(ours, "SD15", prompt(), steps=3)
    bare = sample(model, "SD15", prompt(), steps=3)
    assert torch.equal(sample(ours, "SD15", prompt(), steps=3), first)
    assert torch.equal(sample(model, "SD15", prompt(), steps=3), bare)
    assert "optimized_attention_override" not in ours.model_options["transformer_options"]
    merged = apply_method(model, None, tuple(specs(model, loras)), plain(Merge), "Merge LoRAs")[0]
    assert not torch.allclose(sample(merged, "SD15", prompt(), steps=3), first, atol=1e-3)


def test_an_interrupted_run_is_clean(loras):
    model = base("SD15")
    ours = routed(model, specs(model, loras))
    want = sample(ours, "SD15", prompt(), steps=3)

    def stop(step, x0, x, total):
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(ours, "SD15", prompt(), steps=3, callback=stop)
    assert not record_of(ours).finished and not ours.get_attachment("lora_ensemble").runs
    same(sample(ours, "SD15", prompt(), steps=3), want, sample(model, "SD15", prompt(), steps=3), 1e-6)
