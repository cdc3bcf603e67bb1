"""Calibration, LinearAG and files of coefficients on real ComfyUI."""

from __future__ import annotations

from dataclasses import replace

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from lora_ensemble.host.compose.apply import with_cache
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.files.ensemble import Mask
from lora_ensemble.host.guidance.apply import apply_guidance, guidance_record_of
from lora_ensemble.host.guidance.calibrate import Paths, calibrate
from lora_ensemble.host.guidance.identity import describe_kind, describe_model
from lora_ensemble.host.guidance.options import GuidanceOptions, guidance_of, saving_threshold
from lora_ensemble.host.look.calibration import plot, summary
from lora_ensemble.kernels.guidance import guided_steps
from lora_ensemble.methods.guidance.adaptive import AdaptiveGuidance
from lora_ensemble.methods.schedule import Uniform
from lora_ensemble.nodes.baselines import LoRAEnsembleMerge, LoRAEnsembleSwitch
from lora_ensemble.nodes.calibration import LoRAEnsembleCalibrateGuidance
from lora_ensemble.nodes.cmlora import LoRAEnsembleCMLoRA
from lora_ensemble.nodes.klora import LoRAEnsembleESTLoRA, LoRAEnsembleKLoRA
from lora_ensemble.nodes.loratorio import LoRAEnsembleLoRAtorio
from lora_ensemble.nodes.routed import LoRAEnsembleRouted

from .builders import composite, guided, merge, schedule, three
from .guidance_tools import SD15, Spy, ag, dual, same, sample
from .models import base

STEPS = 8


def paths(**options) -> Paths:
    """Three seeds of two prompts, with the settings of `sample`."""
    settings = dict(positive=[*SD15.cond(11), *SD15.cond(15)], negative=SD15.cond(12),
                    latent=torch.zeros_like(SD15.noise()), steps=STEPS, cfg=12.0, sampler_name="euler",
                    scheduler="normal", denoise=1.0, seed=1, seeds=3, batch=2)
    return Paths(**{**settings, **options})


def options_of(coeffs, mode: str = "LinearAG", nearest: bool = False, saving: float = 0.25,
               **policy) -> GuidanceOptions:
    return GuidanceOptions(mode, AdaptiveGuidance(**policy), saving, True, coeffs, nearest)


def guide(model, coeffs, mode: str = "LinearAG", nearest: bool = False, **options):
    return apply_guidance(model, guidance_of(options_of(coeffs, mode, nearest, **options)))


_found: dict[str, object] = {}


@pytest.fixture
def found():
    """One calibration, shared."""
    if not _found:
        _found["coeffs"] = calibrate(base("SD15"), paths())
    return _found["coeffs"]


@pytest.fixture
def exact():
    """The small model with a negative that is an exact fixed combination of what came before."""
    model, last = base("SD15").clone(), {}

    def linear(executor, model_, conds, x, timestep, options):
        outs = executor(model_, conds, x, timestep, options)
        sigma = timestep.view(-1, 1, 1, 1)
        if conds[0] is not None:
            c = (x - outs[0]) / sigma
            start = float(timestep[0]) > last.get("sigma", 0) * 1.001
            u = 0.9 * c if start else 0.6 * c + 0.25 * last["u"] + 0.1 * last["c"]
            last.update(sigma=float(timestep[0]), c=c, u=u)
        if len(conds) > 1 and conds[1] is not None:
            outs[1] = x - last["u"] * sigma
        return outs

    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "linear", linear)
    return model


# --- calibration ---


def test_curves_are_those_of_full_guidance(found):
    """A path is the one that a sampler with its seed takes."""
    for row, (prompt, seed) in enumerate((p, s) for p in (11, 15) for s in (1, 2, 3)):
        for space in ("noise", "x0"):
            model = ag(base("SD15"), 1.5, space=space)
            noise = SD15.noise()  # the host's noise of this seed
            generator = torch.manual_seed(seed)
            noise = torch.randn(noise.shape, generator=generator)
            with torch.inference_mode():
                comfy.sample.sample(model, noise, STEPS, 12.0, "euler", "normal", SD15.cond(prompt), SD15.cond(12),
                                    torch.zeros_like(noise), seed=seed, disable_pbar=True)
            curve = [step.gamma[0] for step in guidance_record_of(model).steps]
            assert found.found.gamma[space][row].tolist() == pytest.approx(curve, abs=2e-6)


def test_batches_do_not_matter(found):
    alone = calibrate(base("SD15"), paths(batch=1))
    assert torch.allclose(alone.found.gamma["noise"], found.found.gamma["noise"], atol=1e-5)
    assert torch.allclose(alone.found.r2, found.found.r2, atol=1e-3)
    assert found.found.gamma["noise"].shape == (6, STEPS)


def test_an_exact_relation_makes_linear_ag_full_guidance(exact):
    """Every latent of the first half is plain CFG's, with half of its negatives; the fit is exact."""
    coeffs = calibrate(exact, paths())
    assert (coeffs.found.r2 > 1 - 1e-4).all()
    ours, plain = [], []
    model = guide(exact, coeffs)
    sample(model, steps=STEPS, callback=lambda i, x0, x, n: ours.append(x.clone()))
    sample(exact, steps=STEPS, callback=lambda i, x0, x, n: plain.append(x.clone()))
    base_latents = []
    sample(base("SD15"), steps=STEPS, cfg=1.0, callback=lambda i, x0, x, n: base_latents.append(x.clone()))
    for step in range(1, STEPS // 2 + 1):
        same(ours[step], plain[step], base_latents[step])
    sides = [(step.negative, step.predicted) for step in guidance_record_of(model).steps]
    assert sides == [(1, 0), (0, 1), (1, 0), (0, 1), (0, 0), (0, 0), (0, 0), (0, 0)]


def test_number_of_evaluations(found):
    spy = Spy(base("SD15"))
    model = guide(spy.model, found)
    sample(model, steps=STEPS, batch=2)
    assert spy.rows(SD15.cond(11)) == 2 * STEPS and spy.rows(SD15.cond(12)) == 2 * 2
    record = guidance_record_of(model)
    assert record.evaluations == 2 * (STEPS + 2) and record.full == 4 * STEPS and not record.problems
    assert sample(model, steps=STEPS, batch=2).isfinite().all()


def test_twenty_steps_cost_twenty_five():
    coeffs = calibrate(base("SD15"), paths(steps=20, seeds=1, positive=SD15.cond(11)))
    model = guide(base("SD15"), coeffs)
    sample(model, steps=20)
    assert guidance_record_of(model).evaluations == 25


def test_a_second_round_fits_what_is_predicted(found):
    """The first predicted step has the same regressors in both rounds; later ones see their own estimates."""
    again = calibrate(base("SD15"), paths(), on_policy=True).found
    first = found.found
    assert torch.allclose(again.coefficients[1], first.coefficients[1], atol=1e-2)
    assert not torch.allclose(again.coefficients[3], first.coefficients[3], atol=1e-4)
    others = [0, 2, *range(STEPS // 2, STEPS)]
    assert torch.equal(again.coefficients[others], first.coefficients[others])


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "dpmpp_sde"])
def test_samplers_with_several_calls_per_step(sampler):
    coeffs = calibrate(base("SD15"), paths(sampler_name=sampler, seeds=1, steps=4))
    spy = Spy(base("SD15"))
    model = guide(spy.model, coeffs)
    assert sample(model, steps=4, sampler=sampler).isfinite().all()
    record = guidance_record_of(model)
    assert not record.problems and [step.negative > 0 for step in record.steps] == [True, False, False, False]
    assert record.steps[1].predicted == record.steps[1].calls


def test_composition_and_calibration(loras):
    """Coefficients of a composed model belong to its LoRAs and their strengths."""
    model = base("SD15")
    ensemble = three(model, loras)
    composed = composite(model, ensemble)
    coeffs = calibrate(composed, paths(seeds=1))
    ours = guide(composed, coeffs)
    assert sample(ours, steps=STEPS).isfinite().all()
    assert guidance_record_of(ours).evaluations == STEPS + 2
    for other in (model, merge(model, ensemble), composite(model, ensemble[:2])):
        with pytest.raises(ValueError, match="calibrated for model"):
            sample(guide(other, coeffs), steps=STEPS)


def test_stopping(found):
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        calibrate(base("SD15"), paths(), progress=stop)
    whole = []
    calibrate(base("SD15"), paths(), on_policy=True, progress=lambda: whole.append(1))
    assert len(whole) == 2 * 2 * 2 * STEPS


def test_nothing_to_calibrate():
    with pytest.raises(ValueError, match="at cfg 1"):
        calibrate(base("SD15"), paths(cfg=1.0))
    with pytest.raises(ValueError, match="at denoise 0 nothing is sampled"):
        calibrate(base("SD15"), paths(denoise=0.0))
    with pytest.raises(ValueError, match="sampled without evaluating a negative"):
        calibrate(base("SD15"), paths(negative=[]))


def test_a_sampler_that_decides_itself_how_often_it_calls(spied):
    """Before anything is sampled, and where one batch is all there is as well."""
    with pytest.raises(ValueError, match="number of calls is fixed"):
        calibrate(spied.model, paths(sampler_name="dpm_adaptive", batch=2, seeds=2, positive=SD15.cond(11)))
    assert not spied.calls


# --- whether it fits ---


@pytest.mark.parametrize("mode", ["LinearAG", "saving"])
@pytest.mark.parametrize(("options", "words"), [
    ({"steps": 6}, "8 steps, here 6"), ({"sampler": "heun"}, "sampler sample_euler, here sample_heun"),
    ({"cfg": 7.0}, "cfg 12, here 7"), ({"denoise": 0.5}, "a schedule from")])  # fmt: skip
def test_other_settings_are_refused(found, options, words, mode):
    with pytest.raises(ValueError, match=words) as refused:
        sample(guide(base("SD15"), found, mode), **{"steps": STEPS, **options})
    assert "nearest" in str(refused.value) and "Calibrate" in str(refused.value)


@pytest.mark.parametrize("steps", [5, 8, 13])
def test_nearest_uses_them_all_the_same(found, steps):
    model = guide(base("SD15"), found, nearest=True)
    assert sample(model, steps=steps, cfg=10.0).isfinite().all()
    record = guidance_record_of(model)
    assert "cfg 12, here 10" in record.problems[0] and len(record.problems) == 1
    assert record.evaluations == {5: 7, 8: 10, 13: 17}[steps]


def test_nearest_keeps_the_sum_of_the_weights(found):
    """Predictions of neighbouring steps are nearly equal; what counts is their total weight."""
    sigmas = tuple(schedule(base("SD15"), 5).tolist())
    policy = found.linear(sigmas)
    calibrated = found.found.coefficients
    for n, row in enumerate(policy.coefficients):
        sums = calibrated.sum(1)
        assert min(abs(sum(row) - float(total)) for total in sums) < 1e-9 or n == 0


def test_another_checkpoint_is_noticed():
    model = base("SD15")
    name = describe_model(model)
    assert describe_model(model.clone()) == name
    weights = [p for key, p in model.model.named_parameters() if key.startswith("diffusion_model.") and p.ndim == 1]
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        try:
            for weight in weights:
                weight += 0.125
            assert describe_model(model) != name
        finally:
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)
    assert describe_model(model) == name


def test_stock_loras_are_noticed(loras):
    from .builders import stock

    model = base("SD15")
    ensemble = three(model, loras)
    names = {describe_model(stock(model, chosen)) for chosen in ((), ensemble[:1], ensemble[1:2], ensemble)}
    assert len(names) == 4


@pytest.mark.parametrize("node", [LoRAEnsembleKLoRA, LoRAEnsembleESTLoRA])
def test_the_loras_of_a_choice_are_noticed(node, loras):
    """Guard: K-LoRA and EST-LoRA hold their strengths in the contest, and were taken for models without a LoRA."""
    a, b, c = three(base("SD15"), loras)
    options = {part.id: part.default for part in node.GET_SCHEMA().inputs if hasattr(part, "default")}
    names = [describe_model(node.execute(base("SD15"), ensemble, **options).args[0])
             for ensemble in ((a, b), (a, c), (a, replace(b, strength_model=0.3)))]
    assert len(set(names)) == 3 and all(a.name in name for name in names)


def test_when_and_where_loras_act_is_noticed(loras):
    """Windows, masks and words; the same ones again are the same model. Names of models without them stay."""
    model = base("SD15")
    one, other = three(model, loras)[:2]
    half, rest = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    half[..., :4] = rest[..., 4:] = 1

    def named(node=LoRAEnsembleMerge, **changes) -> str:
        options = {part.id: part.default for part in node.GET_SCHEMA().inputs
                   if getattr(part, "default", None) is not None}
        options |= {name: changes.pop(name) for name in list(changes) if name in options and name != "start"}
        return describe_model(node.execute(model, (replace(one, **changes), other), **options).args[0])

    assert named().endswith(f"Merge ({one.name} {one.strength_model:g}, {other.name} {other.strength_model:g})")
    ways = [lambda: named(), lambda: named(start=0.5), lambda: named(end=0.5), lambda: named(mask=Mask(half.clone())),
            lambda: named(mask=Mask(rest.clone())), lambda: named(LoRAEnsembleRouted),
            lambda: named(LoRAEnsembleRouted, gamma=4.0), lambda: named(LoRAEnsembleRouted, words="vexa")]
    names = [way() for way in ways]
    assert names == [way() for way in ways] and len(set(names)) == len(names)


def test_what_of_a_latent_is_not_used_is_said(caplog):
    """Paths come of one picture, the whole of it; how many there are is said elsewhere."""
    given = {"model": base("SD15"), "positive": SD15.cond(11), "negative": SD15.cond(12), "seed": 1, "seeds": 1,
             "batch_size": 1, "steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
             "second_round": False, "intercept": False}
    three, mask = torch.rand(3, 4, 8, 8), torch.ones(1, 1, 64, 64)
    for latent, denoise, parts in (({"samples": three}, 0.5, ["not the other 2"]), ({"samples": three}, 1.0, []),
                                   ({"samples": three[:1], "noise_mask": mask}, 0.5, ["the mask of latent_image"])):
        caplog.clear()
        LoRAEnsembleCalibrateGuidance.execute(**given, latent_image=latent, denoise=denoise)
        lines = [line for line in caplog.messages if "latent_image" in line]
        assert len(lines) == len(parts) and all(part in line for part, line in zip(parts, lines, strict=True))


def test_what_is_set_on_a_method_is_noticed(loras):
    """Guard: coefficients of one Switch were used with any other, and with a Branch Cache, and nothing was said. Of the
    same LoRAs they still fit, if less well."""
    model = base("SD15")
    pair = three(model, loras)[:2]

    def made(node, **changes):
        options = {part.id: part.default for part in node.GET_SCHEMA().inputs
                   if getattr(part, "default", None) is not None}
        return node.execute(model, pair, **options | changes).args[0]

    ways = [lambda: made(LoRAEnsembleMerge), lambda: with_cache(made(LoRAEnsembleMerge), CacheSpec(Uniform(2))),
            lambda: with_cache(made(LoRAEnsembleMerge), CacheSpec(Uniform(3))), lambda: made(LoRAEnsembleSwitch),
            lambda: made(LoRAEnsembleSwitch, order="2,1"), lambda: made(LoRAEnsembleSwitch, steps_per_lora=2),
            lambda: made(LoRAEnsembleSwitch, ending="subject"), lambda: made(LoRAEnsembleCMLoRA),
            lambda: made(LoRAEnsembleCMLoRA, dominance=3.0), lambda: made(LoRAEnsembleCMLoRA, cache_depth=0),
            lambda: made(LoRAEnsembleLoRAtorio), lambda: made(LoRAEnsembleLoRAtorio, temperature=3.0),
            lambda: made(LoRAEnsembleLoRAtorio, top_k=1), lambda: made(LoRAEnsembleKLoRA),
            lambda: made(LoRAEnsembleKLoRA, alpha=1.0), lambda: made(LoRAEnsembleKLoRA, k=5),
            lambda: made(LoRAEnsembleKLoRA, gamma="released code")]
    names = [describe_model(way()) for way in ways]
    assert names == [describe_model(way()) for way in ways] and len(set(names)) == len(names)
    assert len({describe_kind(way()) for way in ways}) == 5  # methods
    coeffs = calibrate(made(LoRAEnsembleSwitch, steps_per_lora=2), paths(seeds=1, positive=SD15.cond(11)))
    for steps, told in ((2, 0), (1, 1)):
        ours = guide(made(LoRAEnsembleSwitch, steps_per_lora=steps), coeffs)
        sample(ours, steps=STEPS)
        assert sum("or other settings" in line and "steps_per_lora 1" in line
                   for line in guidance_record_of(ours).problems) == told


def test_a_guider_with_two_negatives(found):
    with pytest.raises(ValueError, match="this guider has 2"):
        guided(dual(guide(base("SD15"), found)), schedule(base("SD15"), STEPS))


@pytest.mark.parametrize("mode", ["LinearAG", "saving"])
def test_modes_that_need_coefficients(mode):
    with pytest.raises(ValueError, match="Connect Load Guidance Coefficients"):
        guidance_of(options_of(None, mode))


# --- a saving instead of a threshold ---


@pytest.mark.parametrize("space", ["noise", "x0"])
@pytest.mark.parametrize("saving", [0.1, 0.25, 0.4])
def test_saving(found, saving, space):
    wanted = saving_threshold(options_of(found, "saving", saving=saving, space=space))
    unguided = STEPS - guided_steps(found.found.gamma[space].double(), wanted).double().mean()
    assert abs(unguided / (2 * STEPS) - saving) <= 0.08
    model = guide(base("SD15"), found, "saving", saving=saving, space=space)
    sample(model, steps=STEPS)
    assert f"{100 * saving:g} %" in guidance_record_of(model).policy


def test_to_save_nothing_is_full_guidance(found):
    """Guard: guidance ended in the last step, which saved nothing and drew another picture."""
    model = guide(base("SD15"), found, "saving", saving=0.0)
    assert torch.equal(sample(model, steps=STEPS), sample(base("SD15"), steps=STEPS))
    assert guidance_record_of(model).problems == []


def test_plot_and_text(found):
    image, text = plot(found), summary(found)
    assert image.shape[0] == 1 and image.shape[2:] == (1024, 3) and 0 <= image.min() < 0.3 and image.max() == 1
    assert "6 paths of 8 steps" in text and " 25 %" in text and text.count("\n") == 7 + STEPS
