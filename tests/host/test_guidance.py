"""Adaptive Guidance on real ComfyUI: what is evaluated, what comes out, and that nothing outlives its run."""

from __future__ import annotations

import json

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from lora_ensemble.host.guidance.apply import KEY, guidance_record_of

from .builders import guided, schedule
from .guidance_tools import SD15, ag, gammas, late, middle, reference, runs, same, sample
from .models import base

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
    assert not runs()


def test_an_interrupted_run_leaves_nothing():
    model = ag(base("SD15"), 0.9)
    whole = sample(model, steps=3)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, steps=3, callback=stop)
    assert not runs() and not guidance_record_of(model).finished
    assert torch.equal(sample(model, steps=3), whole)


def test_a_later_node_replaces_an_earlier_one(spied):
    sample(ag(ag(spied.model, -1.0), 1.5), steps=3)
    assert spied.rows(SD15.cond(12)) == 3


def test_the_base_is_left_alone():
    model = base("SD15")
    ag(model, -1.0)
    assert model.get_attachment(KEY) is None and not model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)


# --- late read-back ---


def test_late_reading_changes_the_cost_alone(spied, monkeypatch):
    """As on an accelerator: the similarity is looked at two steps after it was sent."""
    threshold = middle(gammas(base("SD15"), steps=6, batch=2))
    exact = ag(base("SD15"), threshold)
    wanted = sample(exact, steps=6, batch=2)
    late(monkeypatch)
    ours = ag(spied.model, threshold, exact=False)
    same(sample(ours, steps=6, batch=2), wanted, sample(base("SD15"), steps=6, batch=2))
    rows = [[step.negative for step in guidance_record_of(model).steps] for model in (exact, ours)]
    assert rows[1] == [2, *rows[0][:-1]]
    assert spied.rows(SD15.cond(12)) == sum(rows[1])
    again = ag(base("SD15"), threshold, exact=True)
    sample(again, steps=6, batch=2)
    assert [step.negative for step in guidance_record_of(again).steps] == rows[0]


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


@pytest.mark.parametrize("where", ["positive", "negative", "both"])
def test_regional_prompts(where):
    """Of a cond with an area the host gives the other side a copy under the same identity."""
    area = {"area": (8, 4, 0, 0), "strength": 1.0}
    left = {side: [[SD15.cond(seed)[0][0], area]] if where in (side, "both") else []
            for side, seed in (("positive", 14), ("negative", 15))}
    conds = {"positive": [*left["positive"], *SD15.cond(11)], "negative": [*left["negative"], *SD15.cond(12)]}
    ours = ag(base("SD15"), -1.0)
    same(sample(ours, steps=4, **conds), sample(base("SD15"), steps=4, cfg=1.0, **conds),
         sample(base("SD15"), steps=4, **conds))
    assert [step.negative for step in guidance_record_of(ours).steps] == [1, 0, 0, 0]


def test_a_threshold_passed_at_once_is_named():
    model = ag(base("SD15"), -1.0, min_steps=1)
    sample(model, steps=3)
    (problem,) = guidance_record_of(model).problems
    assert "Calibrate Guidance" in problem and "above the threshold" in problem


def test_a_threshold_never_reached_is_named():
    """With where it came nearest: the similarity may fall again."""
    curve = [step for (step,) in gammas(base("SD15"), steps=6)]
    step = max(range(1, 6), key=curve.__getitem__)
    model = ag(base("SD15"), (curve[step] + 1) / 2, min_steps=1)
    sample(model, steps=6)
    (problem,) = guidance_record_of(model).problems
    assert "never reached" in problem and f"step {step + 1} of 6 ({curve[step]:.6f})" in problem
    for threshold in (1.5, curve[step] - 1e-6):
        model = ag(base("SD15"), threshold, min_steps=1)
        sample(model, steps=6)
        assert not any("never" in problem for problem in guidance_record_of(model).problems)


@pytest.mark.parametrize(("options", "said"), [
    *(({"min_steps": first}, f"min_guided_steps is {first} and the picture has 3 steps, which leaves none")
      for first in (2, 3)), ({"min_steps": 1}, ""),
    ({"ramp_steps": 3}, "ramp_steps is 3, and guidance was still fading out when the run ended"),
    ({"ramp_steps": 1}, "")])
def test_settings_that_leave_nothing_to_save_are_named(options, said):
    """Guard: every step was guided, whatever the threshold, and nothing said why."""
    model = ag(base("SD15"), -1.0, **options)
    sample(model, steps=3)
    record = guidance_record_of(model)
    assert (record.evaluations == record.full) == bool(said)
    found = [line for line in record.problems if "_steps is" in line]
    assert [said in line for line in found] == [True] * bool(said)


def test_the_record_is_plain_data():
    model = ag(base("SD15"), 0.5)
    sample(model, steps=3, batch=2)
    record = json.loads(json.dumps(guidance_record_of(model).as_dict()))
    assert [step["index"] for step in record["steps"]] == [0, 1, 2] and record["finished"]
    assert "of 12 evaluations" in guidance_record_of(model).text()
