"""What did each LoRA do?: pictures are those of runs in which the LoRA is muted, shares those of the definition."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from lora_ensemble.host.compose.apply import with_cache
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.files.ensemble import ALWAYS, LoRASpec, Mask
from lora_ensemble.host.look import leave_one_out as looking
from lora_ensemble.host.look.leave_one_out import Found, leave_one_out, measured_steps
from lora_ensemble.host.look.leave_one_out_sheet import _half, _shares, changed, draw, pictures_of
from lora_ensemble.host.look.sheet import WIDTH
from lora_ensemble.host.look.spectrum import Sampling
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.schedule import Uniform
from lora_ensemble.methods.switch import Switch
from lora_ensemble.nodes.guidance import LoRAEnsembleAdaptiveGuidance
from lora_ensemble.nodes.klora import LoRAEnsembleKLoRA
from lora_ensemble.nodes.leave_one_out import LoRAEnsembleLeaveOneOut
from lora_ensemble.tests.devices import Plain

from .builders import lora, merge, method, shapes, three
from .models import FAMILIES, base
from .test_routed import prompt, routed, specs

SEED = 5
STEPS = 4


def how(family: str = "SD15", **changes) -> Sampling:
    kind = FAMILIES[family]
    given = Sampling(kind.cond(11), kind.cond(12), torch.zeros_like(kind.noise()), SEED, STEPS, 3.0, "euler", "normal")
    return replace(given, **changes)


def picture(model, given: Sampling) -> torch.Tensor:
    """What a KSampler makes of the same inputs."""
    noise = comfy.sample.prepare_noise(given.latent[:1], given.seed)
    return comfy.sample.sample(model, noise, given.steps, given.cfg, given.sampler, given.scheduler, given.positive,
                               given.negative, given.latent[:1], seed=given.seed, denoise=given.denoise,
                               noise_mask=given.mask, disable_pbar=True)


def gap(a: torch.Tensor, b: torch.Tensor, effect: float | None = None) -> float:
    """The largest difference as a share of an effect, or of the spread of `b`."""
    return float((a - b).abs().max()) / (effect or float(b.std()))


def zeroed(model, loras, ensemble, names):
    """The same ensemble in which some LoRAs' files are zeros: the slow reference of what leaving out means."""
    layers = shapes(model)
    empty = {key: torch.zeros_like(value) if "up" in key else value for key, value in lora(layers, 99).items()}
    return tuple(replace(spec, name=loras(empty)) if spec.name in names else spec for spec in ensemble)


# --- the pictures ---


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_lora_is_what_comes_when_it_is_muted(family, loras):
    """The slow reference: one run each, with the LoRA taken out of the ensemble."""
    model, given = base(family), how(family)
    ensemble = three(model, loras)
    found = leave_one_out(merge(model, ensemble), given)
    assert found.batches == [5] and found.why == ""
    assert found.titles[0] == "all LoRAs" and found.titles[-1] == "without LoRAs" and len(found.titles) == 5
    alone = [ensemble, *(tuple(spec for spec in ensemble if spec is not left) for left in ensemble)]
    wanted = [picture(merge(model, each), given) for each in alone] + [picture(model, given)]
    effect = float((wanted[0] - wanted[-1]).abs().max())
    for title, one, other in zip(found.titles, found.latents, wanted, strict=True):
        assert one.shape == other.shape and gap(one, other, effect) < 1e-4, title
    assert all(gap(one, wanted[0], effect) > 0.01 for one in found.latents[1:])


@pytest.mark.parametrize("make", [Composite, lambda s: Switch(s, 1), Merge], ids=["composite", "switch", "merge"])
def test_other_methods_go_on_as_they_were(make, loras):
    """Leaving out means that the LoRA does nothing: its branch and its turn are those of the base model."""
    model, given = base("SD15"), how()
    ensemble = three(model, loras)
    found = leave_one_out(method(model, ensemble, make), given)
    assert found.batches == [5]
    for k, left in enumerate(ensemble):
        wanted = picture(method(model, zeroed(model, loras, ensemble, {left.name}), make), given)
        effect = float((found.latents[0] - found.latents[-1]).abs().max())
        assert gap(found.latents[1 + k], wanted, effect) < 1e-4, left.name


@pytest.mark.parametrize("make", [
    lambda s: LoRAtorio(s), lambda s: CMLoRA(s, ("subject",) * 3), ], ids=["loratorio", "cmlora"])
def test_methods_that_look_at_their_pictures_have_runs_of_their_own(make, loras):
    model, given = base("SD15"), how()
    ensemble = three(model, loras)
    ours = method(model, ensemble, make)
    found = leave_one_out(ours, given)
    assert found.batches == [1] * 5 and "goes by what it finds" in found.why
    assert gap(found.latents[0], picture(ours, given)) == 0
    assert gap(found.latents[-1], picture(model, given)) < 1e-4
    assert len(found.steps) == STEPS


def test_samplers_that_draw_noise_give_every_picture_the_same(loras):
    model, given = base("SD15"), how(sampler="euler_ancestral")
    ensemble = three(model, loras)
    found = leave_one_out(merge(model, ensemble), given)
    assert found.batches == [1] * 5 and "euler_ancestral" in found.why
    assert gap(found.latents[2], picture(merge(model, (ensemble[0], ensemble[2])), given)) < 1e-4
    assert gap(found.latents[-1], picture(model, given)) < 1e-4


@pytest.mark.parametrize(("sampler", "alone"), [("euler", False), ("dpmpp_2m", False), ("heun", False), ("lcm", True),
                                                ("uni_pc", False), ("dpmpp_sde", True), ("dpm_adaptive", True),
                                                ("dpm_fast", True), ("ddim", False)])
def test_which_samplers_keep_pictures_apart(sampler, alone):
    assert looking._stochastic(sampler) is alone


def test_a_chain_of_methods_and_one_that_is_always_on(loras):
    model, given = base("SD15"), how()
    a, b, c = three(model, loras)
    fast = replace(b, role=ALWAYS)
    ours = merge(merge(model, (a, fast)), (c,))
    found = leave_one_out(ours, given)
    assert found.names == (a.name, c.name) and found.batches == [4]
    only = merge(model, (fast,))
    for one, other in zip(found.latents, (ours, merge(only, (c,)), merge(only, (a,)), only), strict=True):
        assert gap(one, picture(other, given)) < 1e-4


def test_a_branch_cache_is_the_same_with_it(loras):
    """What is measured beside the run leaves no trace in it."""
    model, given = base("SD15"), how(steps=6)
    ours = with_cache(method(model, three(model, loras), Composite), CacheSpec(schedule=Uniform(2)))
    found = leave_one_out(ours, given)
    assert gap(found.latents[0], picture(ours, given)) < 1e-4
    assert gap(picture(with_cache(ours, CacheSpec(schedule=Uniform(1))), given), picture(ours, given)) > 1e-3


def test_masks_and_part_of_a_picture(loras):
    model, half = base("SD15"), torch.zeros(1, 64, 64)
    half[..., :32] = 1
    ensemble = tuple(replace(spec, mask=Mask(half) if k == 0 else None) for k, spec in enumerate(three(model, loras)))
    given = how(denoise=0.5, mask=half[:, None], latent=FAMILIES["SD15"].noise(2, seed=3))
    found = leave_one_out(merge(model, ensemble), given)
    assert found.batches == [1] * 5 and found.latents[0].shape[0] == 1
    assert gap(found.latents[1], picture(merge(model, ensemble[1:]), given)) < 1e-4
    given = replace(given, mask=None)
    found = leave_one_out(merge(model, ensemble), given)
    assert found.batches == [5]
    assert gap(found.latents[1], picture(merge(model, ensemble[1:]), given)) < 1e-4


def adaptive(model):
    return LoRAEnsembleAdaptiveGuidance.execute(model, "threshold", 0.5, 0.3, "noise", "per picture", 1, 0,
                                                "exact").args[0]


@pytest.mark.parametrize("kind", ["routed", "K-LoRA", "Adaptive Guidance"])
def test_what_goes_by_its_pictures_has_a_run_for_each(kind, loras):
    model, given = base("SD15"), how()
    ensemble = three(model, loras)
    if kind == "routed":
        ours, given = routed(model, specs(model, loras)), replace(given, positive=prompt())
    elif kind == "K-LoRA":
        ours = LoRAEnsembleKLoRA.execute(model, ensemble, 1.5, -1.0, "s", "paper", 0, "as applied").args[0]
    else:
        ours = adaptive(merge(model, ensemble))
    found = leave_one_out(ours, given)
    assert set(found.batches) == {1} and found.why and found.problems == []
    assert gap(found.latents[0], picture(ours, given)) < 1e-4
    plainly = picture(adaptive(model) if kind == "Adaptive Guidance" else model, given)
    assert gap(found.latents[-1], plainly) < 1e-4
    assert all(sum(each) > 0 for each in found.shares) and len(found.steps) == STEPS


def test_one_lora_needs_two_pictures(loras):
    model = base("SD15")
    found = leave_one_out(merge(model, three(model, loras)[:1]), how())
    assert found.titles == ("all LoRAs", "without LoRAs") and found.batches == [2]
    assert found.parts == [pytest.approx([1.0] * STEPS)]


# --- the shares ---


@pytest.mark.parametrize("make", [Merge, Composite])
def test_shares_are_those_of_the_definition(make, loras):
    """At the latents of the picture with all LoRAs, evaluated one by one with models of their own."""
    model, given, seen = base("SD15"), how(), []
    ensemble = three(model, loras)
    ours = method(model, ensemble, make)

    def listen(apply, args):
        seen.append((args["input"].clone(), args["timestep"].clone()))
        return apply(args["input"], args["timestep"], **args["c"])

    heard = ours.clone()
    heard.set_model_unet_function_wrapper(listen)
    given = replace(given, cfg=1.0)
    picture(heard, given)
    found = leave_one_out(ours, given)
    assert found.steps == list(range(STEPS))

    def predicted(other, x, sigma) -> torch.Tensor:
        """The prediction of one evaluation: the x0 that the first step of a run from x sees."""
        out = []
        comfy.sample.sample_custom(
            other, torch.zeros_like(x), 1.0, comfy.samplers.sampler_object("euler"), torch.stack([sigma, sigma * 0]),
            given.positive, given.negative, x, disable_pbar=True,
            callback=lambda step, x0, *_: out.append(x0.clone()))
        return out[0]

    process = model.model.process_latent_out
    for step in (0, 2):
        x, sigma = seen[step][0][:1], seen[step][1][0]
        start = process(x)
        whole, none = (predicted(other, start, sigma) for other in (ours, model))
        for i, left in enumerate(ensemble):
            without = predicted(method(model, zeroed(model, loras, ensemble, {left.name}), make), start, sigma)
            own = (whole - without).square().mean().sqrt()
            assert found.shares[i][step] == pytest.approx(float(own / (x - whole).square().mean().sqrt()), rel=1e-3)
            assert found.parts[i][step] == pytest.approx(float(own / (whole - none).square().mean().sqrt()), rel=1e-3)


def test_on_a_device_without_float64(loras, monkeypatch):
    model = base("SD15")
    ours = merge(model, three(model, loras))
    found, square = leave_one_out(ours, how()), looking._square
    monkeypatch.setattr(looking, "_square", lambda difference: Plain(square(difference)))
    there = leave_one_out(ours, how())
    assert there.shares == found.shares and torch.equal(there.maps, found.maps)


def test_the_map_is_where_the_lora_acts(loras):
    model, half = base("Flux"), torch.zeros(1, 64, 64)
    half[..., :32] = 1
    layers = shapes(model, lambda layer: "img_mlp" in layer)
    specs = tuple(LoRASpec(loras(lora(layers, k)), 1.0, 1.0, mask=mask) for k, mask in
                  enumerate((Mask(half), Mask(1 - half))))
    found = leave_one_out(merge(model, specs), how("Flux"))
    left, right = found.maps
    assert left.shape == (8, 8)
    assert left[:, :4].mean() > 3 * left[:, 4:].mean() and right[:, 4:].mean() > 3 * right[:, :4].mean()


def test_a_lora_that_does_nothing_is_named(loras):
    model = base("SD15")
    ensemble = three(model, loras)
    idle = zeroed(model, loras, ensemble, {ensemble[1].name})
    found = leave_one_out(merge(model, idle), how())
    assert [found.does_nothing(i) for i in range(3)] == [False, True, False]
    told = json.loads(found.as_json())
    assert [each["does_nothing"] for each in told["loras"]] == [False, True, False]
    assert told["loras"][1]["share"] < 1e-5 < told["loras"][0]["share"] and told["measured_at"] == [1, 2, 3, 4]


def test_where_the_model_predicts_no_numbers_no_lora_is_blamed(loras):
    """Nor freed: what was measured then says nothing, and the page says so."""
    model, given = base("SD15"), how()
    given.positive[0][0] = torch.full_like(given.positive[0][0], float("nan"))
    ours = merge(model, three(model, loras))
    found = leave_one_out(ours, given)
    assert found.problems[-1] == looking.NO_NUMBERS and found.steps == [] and not any(map(found.does_nothing, range(3)))
    pictures, _ = pictures_of(found, ours)
    json.loads(found.as_json(changed(pictures)), parse_constant=lambda name: pytest.fail(name))
    assert torch.isfinite(draw(found, pictures, "about")).all()


@pytest.mark.parametrize(("total", "steps"), [(1, {0}), (4, {0, 1, 2, 3}), (8, set(range(8)))])
def test_measured_from_the_first_step_to_the_last(total, steps):
    assert measured_steps(total) == steps
    assert len(measured_steps(50)) == 8 and {0, 49} <= measured_steps(50)


# --- the sheet and the node ---


@pytest.mark.parametrize("family", ["SD15", "Flux", "Wan"])
def test_the_node(family, loras):
    model, given = base(family), how(family)
    out = LoRAEnsembleLeaveOneOut.execute(merge(model, three(model, loras)), given.positive, given.negative,
                                          {"samples": given.latent}, 1, 2, 1.0, "euler", "normal", 1.0, None, "dark")
    image, pictures, text = out.args
    assert image.shape[2] == WIDTH and image.min() >= 0 and image.max() <= 1
    assert pictures.shape == (5, 64, 64, 3) and (pictures[1:] != pictures[:1]).any(dim=1).all(dim=0).any()
    told = json.loads(text)
    assert [each["title"] for each in told["pictures"]][::4] == ["all LoRAs", "without LoRAs"]
    assert told["pictures"][0]["changed"] == 0 and all(each["changed"] > 0 for each in told["pictures"][1:])


def test_the_first_picture_of_a_batch_is_that_of_a_sampler(loras):
    """Guard: of sizes whose numbers are no multiple of 16 the first of three has other noise than one alone."""
    model, latent = base("SD15"), torch.zeros(3, 4, 9, 7)
    ours, noise = merge(model, three(model, loras)), comfy.sample.prepare_noise(latent, SEED)
    assert not torch.equal(noise[:1], comfy.sample.prepare_noise(latent[:1], SEED))
    given = how(latent=latent)
    want = comfy.sample.sample(ours, noise, STEPS, 3.0, "euler", "normal", given.positive, given.negative, latent,
                               seed=SEED, disable_pbar=True)
    assert gap(leave_one_out(ours, given).latents[0], want[:1]) < 1e-4


def test_wrong_numbers_are_refused(loras):
    model, given = base("SD15"), how()
    ours = merge(model, three(model, loras)[:1])
    for wrong in ({"steps": 0}, {"denoise": 2.0}, {"cfg": float("nan")}, {"theme": "pink"}):
        inputs = {"steps": 2, "denoise": 1.0, "cfg": 1.0, "theme": "light", **wrong}
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoRAEnsembleLeaveOneOut.execute(ours, given.positive, given.negative, {"samples": given.latent}, 1,
                                            sampler_name="euler", scheduler="normal", **inputs)


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_sheets_of_many_loras(count, loras):
    model = base("SD15")
    layers = shapes(model, lambda layer: "attn" in layer)
    specs = tuple(LoRASpec(loras(lora(layers, k)), 0.5, 0.5) for k in range(count))
    found = leave_one_out(merge(model, specs), how(steps=2))
    _, lines = _shares(found, found.names).blocks
    assert lines.across == ("step", [(0.25, "1"), (0.75, "2")]) and found.steps == [0, 1]
    pictures, note = pictures_of(found, model)
    sheet = draw(found, pictures, "about", note)
    assert sheet.shape[2] == WIDTH and sheet.shape[1] < 6000 and changed(pictures)[0] == 0
    blank = (sheet[0] == 1).all(dim=-1)
    assert not blank[-60:].all() and blank[:, -20:].all() and blank[:, :20].all()


@pytest.mark.parametrize(("shape", "drawn"), [((64, 3000), (64, 3000)), ((8, 16, 646), (96, 3876)),
                                              ((4, 300), (32, 2400))])
def test_latents_of_sound_are_drawn_themselves(shape, drawn):
    """Guard: with its VAE the node ended in an error after the last picture; without one, a picture of two minutes was
    1.5 million pixels wide."""
    model = base("SD15")
    found = Found(("a", "b"), ("all", "a", "b", "none"), [torch.randn(1, *shape) for _ in range(4)], [0], [[0.1]] * 2,
                  [[0.1]] * 2, torch.rand(2, 1, shape[-1]), [4])
    sound = SimpleNamespace(decode=lambda latent: torch.randn(1, 999, 2))
    for vae, said in ((sound, "sound"), (None, "no VAE")):
        pictures, note = pictures_of(found, model, vae)
        assert pictures.shape == (4, *drawn, 3) and (pictures[1] != pictures[0]).any() and said in note
        assert draw(found, pictures, "about", note).shape[2] == WIDTH


def test_half_of_a_map():
    assert _half(torch.ones(10, 10)) == 0.5
    assert _half(torch.tensor([1.0] * 4 + [0.0] * 96)) == 0.02
