"""Adaptive Guidance on real ComfyUI: what is evaluated, what comes out, under every guider."""

from __future__ import annotations

import json
from collections import Counter

import comfy.samplers
import comfy_extras.nodes_custom_sampler as extras
import comfy_extras.nodes_perpneg as nodes_perpneg
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from lora_ensemble.engine.guidance import AdaptiveState, ReadBack
from lora_ensemble.host.composition import KEY as COMPOSITION
from lora_ensemble.host.guidance import KEY, Guidance, apply_guidance, guidance_record_of
from lora_ensemble.methods.guidance import AdaptiveGuidance
from torch import Tensor

from .builders import composite, guided, schedule, three
from .builders import sample as sample_at
from .models import FAMILIES, base

SD15 = FAMILIES["SD15"]


def sample(model, family: str = "SD15", cfg: float = 12.0, **options) -> Tensor:
    """With a cfg at which the negative matters in these small models."""
    return sample_at(model, family, cfg=cfg, **options)


def same(ours: Tensor, wanted: Tensor, plain: Tensor, tolerance: float = 2e-3) -> None:
    """Off by no more than a small part of what guidance changes at all."""
    effect = (wanted - plain).abs().max()
    assert effect > 1e-3 * plain.abs().max(), "nothing to compare"
    assert (ours - wanted).abs().max() <= tolerance * effect


def ag(model, threshold: float = 0.9, exact: bool = True, **options):
    policy = AdaptiveGuidance(threshold, **options)
    return apply_guidance(model, Guidance("test", lambda info: (AdaptiveState(policy, exact), None)))


class Spy:
    """Rows that the diffusion model evaluates, by the token that its cond carries."""

    def __init__(self, model):
        self.model = model.clone()
        self.calls: list[Counter] = []
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "spy", self.apply)

    def apply(self, executor, x, t, c_concat=None, c_crossattn=None, *args, **kwargs):
        self.calls.append(Counter(tokens.sum().item() for tokens in c_crossattn.float().cpu()))
        return executor(x, t, c_concat, c_crossattn, *args, **kwargs)

    def __deepcopy__(self, memo):
        return self

    def rows(self, cond: list) -> int:
        """How many rows had this CONDITIONING's text."""
        wanted = cond[0][0].sum().item()
        return sum(count for call in self.calls for token, count in call.items() if abs(token - wanted) < 1e-3)


@pytest.fixture
def spied():
    return Spy(base("SD15"))


def reference(model, threshold: float, space: str = "noise", per_sample: bool = True, min_steps: int = 0,
              sigmas: list[float] | None = None):
    """Adaptive Guidance written down again, on the host's cfg function: both sides are always evaluated, in float64.
    `sigmas`: the schedule, for samplers that call several times per step; decisions are taken when a new one begins."""
    model, state = model.clone(), {"done": None, "step": -1}

    def step_of(sigma: float) -> int:
        return max((i for i, level in enumerate(sigmas) if level >= sigma * (1 - 1e-4)), default=0)

    def cfg(args):
        c, u, x = (args[name].double() for name in ("cond_denoised", "uncond_denoised", "input"))
        a, b = (c, u) if space == "x0" else (x - c, x - u)
        gamma = (a * b).flatten(1).sum(1) / (a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1))
        done = state["done"] if state["done"] is not None else torch.zeros(len(gamma), dtype=torch.bool)
        step = state["step"] + 1 if sigmas is None else step_of(float(args["sigma"][0]))
        if step != state["step"] and step >= min_steps:
            done = done | ((gamma if per_sample else gamma.min().expand_as(gamma)) >= threshold)
        state.update(done=done, step=step)
        denoised = torch.where(done.view(-1, 1, 1, 1), c, u + args["cond_scale"] * (c - u))
        return (x - denoised).to(args["input"])

    model.set_model_sampler_cfg_function(cfg)
    return model


def gammas(model, **options) -> list[list[float]]:
    """Similarities of each step under full guidance."""
    watched = ag(model, 1.5)
    sample(watched, **options)
    return [step.gamma for step in guidance_record_of(watched).steps]


def middle(curve: list[list[float]], share: float = 0.5) -> float:
    """A threshold between two similarities that were seen."""
    seen = sorted(g for step in curve for g in step)
    k = int(share * len(seen))
    return (seen[k - 1] + seen[k]) / 2


# --- invariants ---


def test_above_one_is_plain_cfg_bit_for_bit(spied):
    plain = sample(base("SD15"), steps=4, batch=2)
    assert torch.equal(sample(ag(spied.model, 1.5), steps=4, batch=2), plain)
    assert spied.rows(SD15.cond(12)) == 8


@pytest.mark.parametrize("min_steps", [0, 2])
def test_minus_one_is_conditional(spied, min_steps):
    model = ag(spied.model, -1.0, min_steps=min_steps)
    out = sample(model, steps=4)
    assert spied.rows(SD15.cond(12)) == min_steps + 1 and spied.rows(SD15.cond(11)) == 4
    record = guidance_record_of(model)
    assert record.evaluations == 4 + min_steps + 1 and record.full == 8 and record.finished
    if not min_steps:
        same(out, sample(base("SD15"), steps=4, cfg=1.0), sample(base("SD15"), steps=4))


@pytest.mark.parametrize("threshold", [-1.0, 0.5, 1.5])
def test_at_cfg_one_there_is_nothing_to_skip(spied, threshold):
    out = sample(ag(spied.model, threshold), steps=3, cfg=1.0)
    assert torch.equal(out, sample(base("SD15"), steps=3, cfg=1.0)) and not spied.rows(SD15.cond(12))


def test_equal_prompts_need_no_guidance(spied):
    cond = SD15.cond(11)
    model = ag(spied.model, 0.999)
    plain = sample(base("SD15"), steps=4)
    same(sample(model, negative=cond, steps=4), sample(base("SD15"), negative=cond, steps=4), plain)
    assert guidance_record_of(model).evaluations == 5


@pytest.mark.parametrize("space", ["noise", "x0"])
@pytest.mark.parametrize("per_sample", [True, False])
def test_the_decision_is_the_paper_s(spied, space, per_sample):
    """Against the formula written down again; the negative is evaluated for as many rows as it says."""
    options = dict(steps=6, batch=3)
    watched = ag(base("SD15"), 1.5, space=space)
    sample(watched, **options)
    curve = [step.gamma for step in guidance_record_of(watched).steps]
    threshold = middle(curve)
    model = ag(spied.model, threshold, space=space, per_sample=per_sample)
    out = sample(model, **options)
    wanted = sample(reference(base("SD15"), threshold, space, per_sample), **options)
    same(out, wanted, sample(base("SD15"), **options))
    record = guidance_record_of(model)
    open_rows = [3]
    crossed = set()
    for step in curve[:-1]:
        reached = {row for row, g in enumerate(step) if g >= threshold}
        crossed |= reached if per_sample else (set(range(3)) if len(reached) == 3 else set())
        open_rows.append(3 - len(crossed))
    assert [step.negative for step in record.steps] == open_rows and 3 < sum(open_rows) < 18
    assert spied.rows(SD15.cond(12)) == sum(open_rows) and spied.rows(SD15.cond(11)) == 18
    assert record.evaluations == 18 + sum(open_rows) and record.full == 36


def test_number_of_evaluations(spied):
    """NFE = 2 n_cfg + (T - n_cfg)."""
    curve = gammas(base("SD15"), steps=6)
    model = ag(spied.model, middle(curve))
    sample(model, steps=6)
    record = guidance_record_of(model)
    guided_steps = sum(step.negative > 0 for step in record.steps)
    assert 0 < guided_steps < 6 and record.evaluations == 2 * guided_steps + 6 - guided_steps
    assert sum(sum(call.values()) for call in spied.calls) == record.evaluations
    after = [call for call in spied.calls if abs(next(iter(call)) - SD15.cond(12)[0][0].sum().item()) < 1e-3]
    assert len(after) <= guided_steps


def test_identical_until_the_switch():
    """Every latent up to the step that crosses, bit for bit."""
    curve = gammas(base("SD15"), steps=6)
    threshold = middle(curve)
    crossing = next(i for i, step in enumerate(curve) if step[0] >= threshold)
    seen, plain = [], []
    sample(ag(base("SD15"), threshold), steps=6, callback=lambda i, x0, x, n: seen.append(x.clone()))
    sample(base("SD15"), steps=6, callback=lambda i, x0, x, n: plain.append(x.clone()))
    assert 0 < crossing < 5
    assert all(torch.equal(a, b) for a, b in zip(seen[:crossing + 1], plain, strict=False))
    assert not torch.equal(seen[-1], plain[-1])


def test_a_ramp_fades(spied):
    """R steps of falling guidance between full and none: weights R/(R+1) .. 1/(R+1) from the crossing step on."""
    scales, model = [], base("SD15").clone()

    def cfg(args):
        u, c = args["uncond_denoised"], args["cond_denoised"]
        scales.append((u - c).norm().item())
        return args["input"] - (u + args["cond_scale"] * (c - u))

    model.set_model_sampler_cfg_function(cfg)
    ramped = ag(model, -1.0, ramp_steps=3, min_steps=1)
    sample(ramped, steps=8)
    record = guidance_record_of(ramped)
    assert [step.negative for step in record.steps] == [1, 1, 1, 1, 1, 0, 0, 0]
    assert scales[0] > 0 and all(scale > 0 for scale in scales[:4]) and scales[4] < 1e-6 * scales[0]


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_sde", "euler_ancestral", "dpmpp_2m", "uni_pc"])
def test_samplers_decide_once_per_step(sampler):
    """Defect of gating per call: a Heun step half guided."""
    options = dict(family="Flux", steps=5, sampler=sampler)
    model = base("Flux")
    watched = ag(model, 1.5)
    plain = sample(watched, **options)
    record = guidance_record_of(watched)
    curve = [step.gamma for step in record.steps]
    threshold = middle(curve)
    sigmas = [step.sigma for step in record.steps]
    ours = ag(model, threshold)
    out = sample(ours, **options)
    same(out, sample(reference(model, threshold, sigmas=sigmas), **options), plain)
    sides = [step.negative for step in guidance_record_of(ours).steps]
    assert 0 < sum(side > 0 for side in sides) < 5


# --- state ---


def test_runs_start_fresh():
    """A guider is cached between prompts; a later run that starts at a lower noise level decides for itself."""
    model, calls = base("SD15"), schedule(base("SD15"), 6)
    curve = gammas(model, steps=6)
    ours = ag(model, middle(curve))
    guider = comfy.samplers.CFGGuider(ours)
    guider.set_conds(SD15.cond(11), SD15.cond(12))
    guider.set_cfg(12.0)
    whole = guided(guider, calls)
    latent = SD15.noise(seed=4)
    second = guided(guider, calls[3:], latent=latent)
    fresh = comfy.samplers.CFGGuider(ag(model, middle(curve)))
    fresh.set_conds(SD15.cond(11), SD15.cond(12))
    fresh.set_cfg(12.0)
    assert torch.equal(second, guided(fresh, calls[3:], latent=latent))
    assert guidance_record_of(ours).steps[0].negative == 1
    assert torch.equal(guided(guider, calls), whole)
    assert not ours.get_attachment(KEY).runs


def test_an_interrupted_run_leaves_nothing():
    model = ag(base("SD15"), 0.9)
    whole = sample(model, steps=3)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, steps=3, callback=stop)
    assert not model.get_attachment(KEY).runs and not guidance_record_of(model).finished
    assert torch.equal(sample(model, steps=3), whole)


def test_a_later_node_replaces_an_earlier_one(spied):
    sample(ag(ag(spied.model, -1.0), 1.5), steps=3)
    assert spied.rows(SD15.cond(12)) == 3


def test_the_base_is_left_alone():
    model = base("SD15")
    ag(model, -1.0)
    assert model.get_attachment(KEY) is None and not model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)


# --- late read-back ---


class Event:
    def synchronize(self):
        pass


def test_late_reading_changes_the_cost_alone(spied, monkeypatch):
    """As on an accelerator: the similarity is looked at two steps after it was sent."""
    threshold = middle(gammas(base("SD15"), steps=6, batch=2))
    exact = ag(base("SD15"), threshold)
    wanted = sample(exact, steps=6, batch=2)
    monkeypatch.setattr(ReadBack, "send", lambda self, index, rows, values: self._sent.append(
        (index, rows, values, Event())))
    late = ag(spied.model, threshold, exact=False)
    same(sample(late, steps=6, batch=2), wanted, sample(base("SD15"), steps=6, batch=2))
    rows = [[step.negative for step in guidance_record_of(model).steps] for model in (exact, late)]
    assert rows[1] == [2, *rows[0][:-1]]
    assert spied.rows(SD15.cond(12)) == sum(rows[1])
    again = ag(base("SD15"), threshold, exact=True)
    sample(again, steps=6, batch=2)
    assert [step.negative for step in guidance_record_of(again).steps] == rows[0]


# --- guiders ---


def basic(model):
    guider = extras.Guider_Basic(model)
    guider.set_conds(SD15.cond(11))
    return guider


def dual(model, nested=False):
    guider = extras.Guider_DualCFG(model)
    guider.set_conds(SD15.cond(11), SD15.cond(13), SD15.cond(12))
    guider.set_cfg(12.0, 2.0, nested) if nested else guider.set_cfg(12.0, 2.0)
    return guider


def perp_neg(model):
    guider = nodes_perpneg.Guider_PerpNeg(model)
    guider.set_conds(SD15.cond(11), SD15.cond(12), SD15.cond(13))
    guider.set_cfg(12.0, 1.0)
    return guider


def dual_model(model):
    if not hasattr(extras, "Guider_DualModel"):
        pytest.skip("this ComfyUI has no DualModelGuider")
    guider = extras.Guider_DualModel(model, base("SD15"))
    guider.set_conds(SD15.cond(11), SD15.cond(12))
    guider.set_cfg(12.0)
    return guider


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


# --- batches in part ---


def test_conds_of_each_picture_stay_with_it():
    """Conds with an entry per picture (texts, masks) are narrowed to the rows that still need the negative."""
    model = base("SD15")
    texts = torch.cat([SD15.cond(seed)[0][0] for seed in (21, 22, 23)])
    mask = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    negative = [[texts, {"mask": mask, "mask_strength": 1.0}], [SD15.cond(24)[0][0], {}]]
    options = dict(steps=6, batch=3, negative=negative)
    threshold = middle(gammas(model, **options), 0.4)
    ours = ag(model, threshold)
    same(sample(ours, **options), sample(reference(model, threshold), **options), sample(model, **options))
    assert any(0 < step.negative < 3 for step in guidance_record_of(ours).steps)


def test_a_threshold_passed_at_once_is_named():
    model = ag(base("SD15"), -1.0, min_steps=1)
    sample(model, steps=3)
    (problem,) = guidance_record_of(model).problems
    assert "Calibrate Guidance" in problem and "above the threshold" in problem


def test_the_record_is_plain_data():
    model = ag(base("SD15"), 0.5)
    sample(model, steps=3, batch=2)
    record = json.loads(json.dumps(guidance_record_of(model).as_dict()))
    assert [step["index"] for step in record["steps"]] == [0, 1, 2] and record["finished"]
    assert "of 12 evaluations" in guidance_record_of(model).text()
