"""Extrapolated guidance on real ComfyUI, against the rule written down again on the host's own predictions."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from lora_ensemble.host.compose.composition import KEY as COMPOSITION
from lora_ensemble.host.guidance.apply import guidance_record_of as record_of
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.loratorio import LoRAtorio
from torch import Tensor

from .builders import composite, guided, merge, method, schedule, three
from .caches import cached
from .guidance_tools import SD15, Spy, extrapolated, node, runs, same, sample, standing
from .models import FAMILIES, base
from .test_guidance_passes import windowed
from .test_routed_company import prompt, routed, specs

EIGHT = (0, 1, 3, 5, 7)
"""The steps of eight that evaluate the negative."""


def turns(model) -> tuple[int, ...]:
    return tuple(step.index for step in record_of(model).steps if step.negative)


def close(ours: Tensor, full: Tensor, conditional: Tensor, share: float = 0.5) -> None:
    """Nearer to full guidance than guidance is far from none."""
    assert ours.isfinite().all() and not torch.equal(ours, full)
    assert (ours - full).norm() < share * (conditional - full).norm()


# --- what is evaluated, and what comes out ---


@pytest.mark.parametrize(("family", "batch"), [("SD15", 1), ("SD15", 3), ("Flux", 2)])
def test_the_rule_written_down(family, batch):
    options = dict(family=family, steps=8, batch=batch)
    ours = extrapolated(base(family))
    out = sample(ours, **options)
    same(out, sample(standing(base(family), EIGHT, family == "Flux"), **options), sample(base(family), **options))
    record = record_of(ours)
    assert turns(ours) == EIGHT and record.full == 16 * batch and record.evaluations == 13 * batch
    assert [step.predicted for step in record.steps] == [0 if i in EIGHT else batch for i in range(8)]
    assert [len(step.missed) for step in record.steps] == [batch if i in EIGHT[2:] else 0 for i in range(8)]


def test_the_negative_costs_what_the_record_says(spied):
    sample(extrapolated(spied.model), steps=20)
    assert spied.rows(SD15.cond(11)) == 20 and spied.rows(SD15.cond(12)) == 8


@pytest.mark.parametrize(("steps", "saving"), [(8, 0.0), (5, 0.5), (2, 0.5), (1, 0.5)])
def test_where_nothing_is_saved_it_is_plain_cfg_bit_for_bit(steps, saving):
    ours = extrapolated(base("SD15"), saving)
    assert torch.equal(sample(ours, steps=steps, batch=2), sample(base("SD15"), steps=steps, batch=2))
    assert record_of(ours).evaluations == record_of(ours).full
    assert any("nothing was saved" in problem for problem in record_of(ours).problems)


def test_at_cfg_one_there_is_nothing_to_save(spied):
    ours = extrapolated(spied.model)
    assert torch.equal(sample(ours, steps=8, cfg=1.0), sample(base("SD15"), steps=8, cfg=1.0))
    assert not spied.rows(SD15.cond(12)) and any("cfg 1" in problem for problem in record_of(ours).problems)


def test_a_saving_that_is_not_reached_is_told():
    ours = extrapolated(base("SD15"), 0.45)
    sample(ours, steps=20)
    (problem,) = record_of(ours).problems
    assert "32 % were saved and not 45 %" in problem and record_of(ours).evaluations == 27
    ours = extrapolated(base("SD15"), 0.3)
    sample(ours, steps=20)
    assert record_of(ours).problems == []


def test_steps_that_have_the_negative_in_any_case():
    ours = extrapolated(base("SD15"), first=5)
    sample(ours, steps=16)
    assert turns(ours)[:5] == (0, 1, 2, 3, 4) and len(turns(ours)) < 16


# --- samplers, schedules, parts of a run ---


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "euler_ancestral", "dpmpp_2m",
                                     "uni_pc", "lcm", "res_multistep"])
def test_samplers(sampler):
    """A decision per step, whatever calls it has; every call by its own noise level."""
    options = dict(family="Flux", steps=8, sampler=sampler)
    plain, model = sample(base("Flux"), **options), extrapolated(base("Flux"))
    out, steps = sample(model, **options), record_of(model).steps
    assert turns(model) == EIGHT and all(step.negative in (0, step.calls) for step in steps)
    same(out, sample(standing(base("Flux"), EIGHT, True), **options), plain)


def test_a_sampler_that_looks_far_ahead():
    """Heun++ calls the model at the levels of two steps to come, and goes back."""
    options = dict(family="Flux", steps=20, sampler="heunpp2")
    plain, model = sample(base("Flux"), **options), extrapolated(base("Flux"))
    out, steps = sample(model, **options), record_of(model).steps
    assert turns(model) == (0, 1, 3, 6, 10, 14, 17, 19) and [step.index for step in steps] == list(range(20))
    assert all(step.negative in (0, step.calls) for step in steps)
    assert record_of(model).evaluations < 0.7 * record_of(model).full
    alone = sample(base("Flux"), **{**options, "cfg": 1.0})
    assert (out - plain).norm() < 0.3 * (alone - plain).norm()


def test_a_sampler_that_chooses_its_steps_is_guided_in_full():
    """By the error that it sees, of which an extrapolation would be a part."""
    options = dict(family="SD15", steps=8, sampler="dpm_adaptive", cfg=1.5)
    ours = extrapolated(base("SD15"))
    assert torch.equal(sample(ours, **options), sample(base("SD15"), **options))
    assert any("dpm_adaptive" in problem for problem in record_of(ours).problems)


@pytest.mark.parametrize("sampler", ["euler_cfg_pp", "euler_ancestral_cfg_pp"])
def test_samplers_that_ask_for_the_negative(sampler):
    options = dict(steps=8, sampler=sampler, cfg=2.0)
    same(sample(extrapolated(base("SD15")), **options), sample(standing(base("SD15"), EIGHT), **options),
         sample(base("SD15"), **options))


def test_a_noise_level_that_rises_begins_anew():
    down, up = torch.linspace(10, 1, 8), torch.linspace(6, 0.5, 7)
    sigmas = torch.cat([down, up, torch.zeros(1)])
    ours = extrapolated(base("SD15"))
    guider = comfy.samplers.CFGGuider(ours)
    guider.set_conds(SD15.cond(11), SD15.cond(12))
    guider.set_cfg(12.0)
    assert guided(guider, sigmas).isfinite().all()
    found = turns(ours)
    assert 8 in found and 9 in found and not set(range(2, 8)) <= set(found) and not set(range(10, 15)) <= set(found)


@pytest.mark.parametrize("first", [0, 4])
def test_a_run_that_starts_in_the_middle(first):
    def drawn(model) -> Tensor:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(SD15.cond(11), SD15.cond(12))
        guider.set_cfg(12.0)
        return guided(guider, schedule(base("SD15"), 8 + first)[first:], latent=SD15.noise(seed=4))

    same(drawn(extrapolated(base("SD15"))), drawn(standing(base("SD15"), EIGHT)), drawn(base("SD15")))


def test_a_schedule_of_cfg():
    """Where another node sets cfg to 1 no negative is evaluated; from where it has been off for long, two steps are."""
    override = node("nodes_custom_sampler", "CFGOverride")
    ours = override.execute(extrapolated(base("SD15")), 1.0, 0.3, 0.6).args[0]
    out = sample(ours, steps=20)
    off = [step.index for step in record_of(ours).steps if not step.negative and not step.predicted]
    assert len(off) > 4 and off == list(range(off[0], off[-1] + 1))
    assert {off[-1] + 1, off[-1] + 2} <= set(turns(ours)) and record_of(ours).evaluations < record_of(ours).full
    plain, wanted = (override.execute(model, 1.0, 0.3, 0.6).args[0]
                     for model in (base("SD15"), standing(base("SD15"), turns(ours))))
    same(out, sample(wanted, steps=20), sample(plain, steps=20))


def test_inpainting_masks_and_areas():
    """Regional prompts, a negative with a mask per picture, and a latent of which a part is kept."""
    mask = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    regions = [[SD15.cond(11)[0][0], {"area": (8, 4, 0, 0), "strength": 1.0}], [SD15.cond(14)[0][0], {}]]
    negative = [[SD15.cond(12)[0][0], {"mask": mask, "mask_strength": 1.0}], [SD15.cond(13)[0][0], {}]]
    keep = torch.zeros(1, 1, 8, 8)
    keep[..., :4] = 1

    def drawn(model) -> Tensor:
        noise = SD15.noise(2, seed=1)
        with torch.inference_mode():
            return comfy.sample.sample(model, noise, 8, 12.0, "euler", "normal", regions, negative,
                                       SD15.noise(2, seed=5), noise_mask=keep, seed=1, disable_pbar=True)

    same(drawn(extrapolated(base("SD15"))), drawn(standing(base("SD15"), EIGHT)), drawn(base("SD15")))


# --- context windows ---


def test_context_windows():
    """The whole predictions that windows are put together to are extrapolated."""
    options = dict(family="Wan", steps=8)
    model = windowed("Wan")
    ours, plain = extrapolated(model), sample(model, **options)
    assert torch.equal(sample(extrapolated(model, 0.0), **options), plain)
    same(sample(ours, **options), sample(standing(model, EIGHT, True), **options), plain)
    assert turns(ours) == EIGHT


def test_dual_cfg_in_context_windows_is_guided_in_full():
    model, kind = windowed("Wan"), FAMILIES["Wan"]

    def drawn(model) -> Tensor:
        guider = node("nodes_custom_sampler", "Guider_DualCFG")(model)
        guider.set_conds(kind.cond(11), kind.cond(13), kind.cond(12))
        guider.set_cfg(5.0, 2.0)
        return guided(guider, schedule(base("Wan"), 8), "Wan")

    ours = extrapolated(model)
    assert torch.equal(drawn(ours), drawn(model))
    assert any("whole predictions" in problem for problem in record_of(ours).problems)


# --- the pack's own methods ---


@pytest.mark.parametrize("first", ["composition", "guidance"])
@pytest.mark.parametrize("make", [merge, composite, lambda m, e: method(m, e, CMLoRA),
                                  lambda m, e: method(m, e, LoRAtorio)], ids=["Merge", "Composite", "CMLoRA",
                                                                              "LoRAtorio"])
def test_compositions(make, first, loras):
    """On mixed predictions; a negative that is left out leaves out all of its branches."""
    model, options = base("SD15"), dict(steps=8, batch=2)
    ensemble = three(model, loras)
    ours = extrapolated(make(model, ensemble)) if first == "composition" else make(extrapolated(model), ensemble)
    out = sample(ours, **options)
    assert turns(ours) == EIGHT
    rows = [step.rows for step in ours.get_attachment(COMPOSITION).record.steps]
    whole = [step.rows for step in sampled(make(model, ensemble), options).get_attachment(COMPOSITION).record.steps]
    assert rows == [each if i in EIGHT else each / 2 for i, each in enumerate(whole)]
    same(out, sample(standing(make(model, ensemble), EIGHT), **options), sample(make(model, ensemble), **options))


def sampled(model, options: dict):
    sample(model, **options)
    return model


def test_routed(loras):
    model = base("SD15")
    options = dict(positive=prompt(), steps=8)
    ensemble = specs(model, loras)
    ours = extrapolated(routed(model, ensemble))
    out = sample(ours, **options)
    assert turns(ours) == EIGHT
    same(out, sample(standing(routed(model, ensemble), EIGHT), **options), sample(routed(model, ensemble), **options))


@pytest.mark.parametrize("interval", [2, 3])
def test_branch_cache(interval, loras):
    """A negative that comes back finds features of its own that are young enough, or its branch runs whole."""
    model, options = base("SD15"), dict(steps=20)
    ensemble = three(model, loras)
    ours = extrapolated(cached(composite(model, ensemble), interval))
    out = sample(ours, **options)
    plain = sample(composite(model, ensemble), **options)
    close(out, plain, sample(composite(model, ensemble), cfg=1.0, **options))
    steps = ours.get_attachment(COMPOSITION).record.steps
    assert sum(step.notes["cache"]["reused"] for step in steps) > 0
    assert max(age for step in steps for age in step.notes["cache"]["ages"]) < interval


# --- a tolerance ---


def test_a_tolerance_is_each_picture_s_own(spied):
    """What comes out for a picture does not depend on its neighbours, and rows are evaluated as the record says."""
    kind, sigmas = FAMILIES["SD15"], schedule(base("SD15"), 16)
    noise = kind.noise(3, seed=1)
    sampler = comfy.samplers.sampler_object("euler")

    def run(model, rows) -> Tensor:
        guider = comfy.samplers.CFGGuider(extrapolated(model, tolerance=0.05))
        guider.set_conds(SD15.cond(11), SD15.cond(12))
        guider.set_cfg(12.0)
        with torch.inference_mode():
            return guider.sample(noise[rows], torch.zeros_like(noise[rows]), sampler, sigmas, disable_pbar=True)

    together = run(spied.model, [0, 1, 2])
    negative = spied.rows(SD15.cond(12))
    alone = Spy(base("SD15"))
    for row in range(3):
        same(together[row:row + 1], run(alone.model, [row]), torch.zeros(1))
    assert negative == alone.rows(SD15.cond(12)) and 6 < negative < 48


@pytest.mark.parametrize(("tolerance", "evaluated"), [(1e-6, 14), (1e3, 6)])
def test_a_tolerance_at_its_ends(tolerance, evaluated):
    """All steps, but for two before the first miss is known; and none that `widest` does not ask for."""
    ours = extrapolated(base("SD15"), tolerance=tolerance)
    out = sample(ours, steps=16)
    assert len(turns(ours)) == evaluated and out.isfinite().all()


# --- state ---


def test_runs_start_fresh():
    ours = extrapolated(base("SD15"))
    whole = sample(ours, steps=8)
    sample(ours, steps=6)
    assert torch.equal(sample(ours, steps=8), whole) and not runs()


def test_an_interrupted_run_leaves_nothing():
    ours = extrapolated(base("SD15"))

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(ours, steps=8, callback=stop)
    assert not runs() and not record_of(ours).finished and record_of(ours).problems == []


def test_another_size_of_latent_within_a_run():
    """Nodes that grow the latent while they sample: a line of the old size is of no use."""
    ours = extrapolated(base("SD15"))

    def growing(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            if i == 3:
                x = torch.nn.functional.interpolate(x, scale_factor=2)
            out = model(x, sigmas[i] * x.new_ones([x.shape[0]]), **(extra_args or {}))
            x = out + (x - out) * (sigmas[i + 1] / sigmas[i])
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": out})
        return x

    guider = comfy.samplers.CFGGuider(ours)
    guider.set_conds(SD15.cond(11), SD15.cond(12))
    guider.set_cfg(12.0)
    noise = SD15.noise(seed=1)
    with torch.inference_mode():
        out = guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(growing),
                            schedule(base("SD15"), 8), disable_pbar=True)
    assert out.shape[-1] == 16 and out.isfinite().all() and 3 in turns(ours)


def test_the_wrapper_is_the_run_s_alone():
    ours = extrapolated(base("SD15"))
    sample(ours, steps=3)
    assert not ours.get_all_wrappers(WrappersMP.CALC_COND_BATCH) if hasattr(ours, "get_all_wrappers") else True
