"""Adaptive Guidance under every guider of the host, and with the pack's own methods."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from lora_ensemble.host.compose.composition import KEY as COMPOSITION
from lora_ensemble.host.guidance.apply import Guidance, apply_guidance, guidance_record_of
from lora_ensemble.methods.guidance.linear import LinearAG, LinearSession

from .builders import composite, guided, schedule, three
from .guidance_tools import (
    SD15,
    ag,
    basic,
    dual,
    dual_model,
    extrapolated,
    gammas,
    middle,
    perp_neg,
    reference,
    same,
    sample,
)
from .models import base


def nested(model):
    return dual(model, nested=True)


GUIDERS = pytest.mark.parametrize("make", [basic, dual, perp_neg, dual_model])


@GUIDERS
def test_guiders_above_one(make):
    sigmas = schedule(base("SD15"), 3)
    ours = guided(make(ag(base("SD15"), 1.5)), sigmas, batch=2)
    assert torch.equal(ours, guided(make(base("SD15")), sigmas, batch=2))


@GUIDERS
@pytest.mark.parametrize("min_steps", [0, 1])
def test_guiders_after_the_switch(make, min_steps, spied):
    """Whatever a guider does with its negatives, without them it is conditional; PerpNeg's own formula is 0 / 0."""
    sigmas = schedule(base("SD15"), 4)
    out = guided(make(ag(spied.model, -1.0, min_steps=min_steps)), sigmas, batch=2)
    assert out.isfinite().all()
    plain = guided(make(base("SD15")), sigmas, batch=2)
    negatives = 2 * (min_steps + 1)
    if make is not basic:
        assert spied.rows(SD15.cond(12)) in (negatives, 0 if make is dual_model else negatives)
        if make in (dual, perp_neg):
            assert spied.rows(SD15.cond(13)) == negatives
    assert spied.rows(SD15.cond(11)) == 8
    if make is basic:
        assert torch.equal(out, plain)
    elif not min_steps:
        same(out, guided(basic(base("SD15")), sigmas, batch=2), plain)
    else:
        assert not torch.equal(out, plain)


def test_per_picture_under_perp_neg(spied):
    """Rows that are done get the conditional prediction, the others the guider's."""
    sigmas = schedule(base("SD15"), 5)
    watched = ag(base("SD15"), 1.5)
    guided(perp_neg(watched), sigmas, batch=3)
    threshold = middle([step.gamma for step in guidance_record_of(watched).steps])
    out = guided(perp_neg(ag(spied.model, threshold)), sigmas, batch=3)
    assert out.isfinite().all() and 0 < spied.rows(SD15.cond(12)) < 15


class Unnamed(comfy.samplers.CFGGuider):
    """Two prompts, neither of which is called the positive one."""

    def set_conds(self, *conds):
        self.inner_set_conds(dict(zip(("one", "other"), conds, strict=True)))

    def predict_noise(self, x, timestep, model_options={}, seed=None):  # noqa: B006  (as the host's)
        one, other = comfy.samplers.calc_cond_batch(self.inner_model, list(self.conds.values()), x, timestep,
                                                    model_options)
        return torch.lerp(one, other, 2.0)


def linear_ag(model):
    policy = LinearAG(((0.0,) * 9,) * 4, (0, 1, 2, 3))
    return apply_guidance(model, Guidance("test", lambda model, context, tell: LinearSession(policy, tell)))


@pytest.mark.parametrize("rule", [lambda model: ag(model, -1.0), extrapolated, linear_ag])
def test_a_guider_without_a_positive_is_as_without_guidance(rule):
    """Guard: LinearAG ended there in an error without words, half-way."""
    sigmas, pictures, ours = schedule(base("SD15"), 4), [], rule(base("SD15"))
    for model in (ours, base("SD15")):
        guider = Unnamed(model)
        guider.set_conds(SD15.cond(11), SD15.cond(12))
        pictures.append(guided(guider, sigmas))
    assert torch.equal(*pictures)
    problems = guidance_record_of(ours).problems
    assert "Adaptive Guidance: Unnamed has no positive prompt, so nothing is saved" in problems
    assert not any("no negative is evaluated" in problem for problem in problems)


# --- composition ---


@pytest.mark.parametrize("first", ["composition", "guidance"])
def test_decisions_are_taken_on_mixed_predictions(first, loras):
    """With Composite, whatever the order of the nodes; a skipped negative skips all of its branches."""
    model, options = base("SD15"), dict(steps=6, batch=2)
    ensemble = three(model, loras)
    plain = composite(model, ensemble)
    threshold = middle(gammas(plain, **options))
    ours = ag(plain, threshold) if first == "composition" else composite(ag(model, threshold), ensemble)
    out = sample(ours, **options)
    negative = [step.negative for step in guidance_record_of(ours).steps]
    assert 2 < sum(negative) < 12
    assert [step.rows for step in ours.get_attachment(COMPOSITION).record.steps] == [3 * (2 + n) for n in negative]
    same(out, sample(reference(plain, threshold), **options), sample(plain, **options))




# --- what nodes add behind guidance ---


def added(model, scale: float = 0.5):
    """A further pass, as STG's, PAG's and others' are, with what it is taken from."""
    def post(args):
        (other,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"] * 0.9, args["sigma"],
                                                  args["model_options"])
        return args["denoised"] + (args["cond_denoised"] - other) * scale

    model = model.clone()
    model.set_model_sampler_post_cfg_function(post)
    return model


@pytest.mark.parametrize("make", [perp_neg, nested, dual_model])
def test_what_nodes_add_is_added_in_the_step_of_the_switch_too(make):
    """A formula of the guider's own, and all pictures are done with their negative in the first step: they are what the
    prompt alone is drawn to with that node."""
    model, sigmas = added(base("SD15")), schedule(base("SD15"), 4)
    out = guided(make(ag(model, -1.0)), sigmas, batch=2)
    same(out, guided(basic(model), sigmas, batch=2), guided(basic(base("SD15")), sigmas, batch=2))


@pytest.mark.parametrize("make", [perp_neg, dual_model])
def test_what_nodes_add_does_not_fade(make):
    models, sigmas = (base("SD15"), added(base("SD15"))), schedule(base("SD15"), 4)[:2]
    without, found = (guided(make(ag(each, -1.0, ramp_steps=2)), sigmas) for each in models)
    alone, more = (guided(basic(each), sigmas) for each in models)
    same(found - without, more - alone, torch.zeros_like(found))
