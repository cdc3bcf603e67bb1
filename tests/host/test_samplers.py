"""Every way to sample: guiders of their own, samplers that evaluate a step several times, ancestral ones."""

from __future__ import annotations

from dataclasses import replace

import comfy.samplers
import pytest
import torch
from lora_ensemble.host.compose.composition import KEY, record_of
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.host.guidance.apply import guidance_record_of
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.switch import Switch
from torch import Tensor
from torch.nn import functional as F

from .builders import composite, guided, hooked, lora, merge, method, same, sample, schedule, shapes, stock, three
from .guidance_tools import ag
from .models import FAMILIES, base
from .runs import MAKES
from .started import node
from .test_routed import prompt, routed

SD15 = FAMILIES["SD15"]


def basic(model, wrap):
    guider = pytest.importorskip("comfy_extras.nodes_custom_sampler").Guider_Basic(model)
    guider.set_conds(wrap(SD15.cond(11)))
    return guider


def cfg(model, wrap):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(wrap(SD15.cond(11)), wrap(SD15.cond(12)))
    guider.set_cfg(3.0)
    return guider


def dual(model, wrap):
    guider = pytest.importorskip("comfy_extras.nodes_custom_sampler").Guider_DualCFG(model)
    guider.set_conds(wrap(SD15.cond(11)), wrap(SD15.cond(13)), wrap(SD15.cond(12)))
    guider.set_cfg(3.0, 2.0)
    return guider


def perp_neg(model, wrap):
    guider = pytest.importorskip("comfy_extras.nodes_perpneg").Guider_PerpNeg(model)
    guider.set_conds(wrap(SD15.cond(11)), wrap(SD15.cond(12)), wrap(SD15.cond(13)))
    guider.set_cfg(3.0, 1.0)
    return guider


@pytest.mark.parametrize(("make", "conds"), [(basic, 1), (cfg, 2), (dual, 3), (perp_neg, 3)])
def test_guiders(make, conds, loras):
    """Which index means what is the guider's own affair; ours keeps them."""
    model = base("SD15")
    ensemble, sigmas = three(model, loras), schedule(model, 2)
    plain = guided(make(model, lambda cond: cond), sigmas)
    ours = composite(model, ensemble)
    same(guided(make(ours, lambda cond: cond), sigmas),
         guided(make(model, lambda cond: hooked(cond, ensemble)), sigmas), plain)
    assert [step.rows for step in ours.get_attachment(KEY).record.steps] == [3 * conds] * 2
    same(guided(make(merge(model, ensemble), lambda cond: cond), sigmas),
         guided(make(stock(model, ensemble), lambda cond: cond), sigmas), plain)


def test_a_guider_used_again(loras):
    """Guiders are cached between prompts; a run must not find anything of the last one."""
    model = composite(base("SD15"), three(base("SD15"), loras))
    guider, sigmas = cfg(model, lambda cond: cond), schedule(model, 2)
    first = guided(guider, sigmas)
    assert torch.equal(guided(guider, sigmas), first)
    assert [step.index for step in model.get_attachment(KEY).record.steps] == [0, 1]


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "euler_ancestral", "dpmpp_sde", "uni_pc", "ddim", "lcm"])
def test_samplers(sampler, loras):
    """Same noise, same calls: parity holds for samplers that evaluate twice or add noise."""
    model, kind = base("Flux"), FAMILIES["Flux"]
    ensemble = three(model, loras)
    ours = composite(model, ensemble)
    reference = sample(model, "Flux", hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble), steps=4,
                       sampler=sampler)
    same(sample(ours, "Flux", steps=4, sampler=sampler), reference, sample(model, "Flux", steps=4, sampler=sampler))
    record = ours.get_attachment(KEY).record
    assert [step.index for step in record.steps] == [0, 1, 2, 3]
    calls = sum(step.calls for step in record.steps)
    assert calls == {"heun": 7, "dpmpp_sde": 7}.get(sampler, calls) and calls >= 4


def test_a_switch_holds_through_the_evaluations_of_a_step(loras):
    """A noise level between two steps belongs to the step that it is in; each step has one LoRA on."""
    model = base("Flux")
    ours = method(model, three(model, loras), lambda s: Switch(s, 1))
    sample(ours, "Flux", steps=6, sampler="dpmpp_sde")
    on = [[i for i, gain in enumerate(step.branches[0][0]) if gain] for step in ours.get_attachment(KEY).record.steps]
    assert on == [[0], [1], [2], [0], [1], [2]]


def test_part_of_a_schedule(loras):
    """KSamplerAdvanced's later half: steps count within the run that is sampled."""
    model = base("SD15")
    ours = method(model, three(model, loras), lambda s: Switch(s, 1))
    guided(cfg(ours, lambda cond: cond), schedule(model, 6)[3:], latent=SD15.noise(seed=4))
    record = ours.get_attachment(KEY).record
    assert [step.index for step in record.steps] == [0, 1, 2]
    assert [step.sigma for step in record.steps] == pytest.approx(schedule(model, 6)[3:-1].tolist(), rel=1e-4)


@pytest.mark.parametrize("sigmas", [[], [0.0]])
def test_an_empty_schedule(sigmas, loras):
    """Denoise 0, or a split behind the last step: nothing is sampled, nothing breaks, and nothing is to be said."""
    model = ag(composite(base("SD15"), three(base("SD15"), loras)), 2.0)
    latent = SD15.noise(seed=4)
    out = guided(cfg(model, lambda cond: cond), torch.tensor(sigmas), latent=latent)
    assert torch.allclose(out, latent, atol=1e-6) and not model.get_attachment(KEY).runs
    assert all(not record.problems for record in (record_of(model), guidance_record_of(model)) if record is not None)


# --- a sampler that changes the size of its latent on the way ---------------------------------------------------------


LEFT = torch.zeros(1, 8, 8)
LEFT[..., :4] = 1


def drawn(model, sampler, sigmas: Tensor, positive: list | None = None) -> Tensor:
    guider, noise = comfy.samplers.CFGGuider(model), SD15.noise()
    guider.set_conds(SD15.cond(11) if positive is None else positive, SD15.cond(12))
    guider.set_cfg(3.0)
    torch.manual_seed(1)
    with torch.inference_mode():
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)


def by_masks(model, loras, make):
    masks = LEFT, 1 - LEFT, LEFT
    return method(model, [replace(spec, mask=Mask(mask)) for spec, mask in
                          zip(three(model, loras), masks, strict=True)], make)


def by_words(model, loras, make):
    ensemble = [replace(spec, words=words) for spec, words in
                zip(three(model, loras), ("ohwx", "sks", "field"), strict=True)]
    return routed(model, ensemble, make, mode="every step")


METHODS = {**{name: MAKES[name] for name in ("Switch", "CMLoRA online", "LoRAtorio", "Composite")}, "Merge": Merge,
           "CMLoRA, cached": lambda strengths: CMLoRA(strengths, (True, False, True))}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("placed", [by_masks, by_words])
def test_a_latent_that_grows(placed, name, loras):
    """Nothing that is of one size meets the next one."""
    model = base("SD15")
    ours, sigmas = placed(model, loras, METHODS[name]), schedule(model, 5)
    (sampler,) = node("nodes_advanced_samplers", "SamplerLCMUpscale", scale_ratio=2.0, scale_steps=-1,
                      upscale_method="bilinear")
    out = drawn(ours, sampler, sigmas, prompt())
    record = ours.get_attachment(KEY).record
    assert out.shape[-2:] == (16, 16) and out.isfinite().all() and [step.index for step in record.steps] == [*range(5)]
    assert [line for line in record.problems if "turn" not in line and "led" not in line] == []
    assert not torch.equal(out, drawn(model, sampler, sigmas, prompt()))


@pytest.mark.parametrize("parts", ["layers", "predictions"])
def test_masks_grow_with_it(parts, loras):
    """The last layer of all acts where it is called."""
    model, large = base("SD15"), SD15.noise(size=16, seed=5)

    def once(inner, x, sigmas, extra_args=None, callback=None, disable=None):
        return inner(large, sigmas[0] * large.new_ones(1), **extra_args)

    sampler, sigmas = comfy.samplers.KSAMPLER(once), schedule(model, 1)
    spec = LoRASpec(loras(lora(shapes(model, lambda layer: layer == "out.2"), 1)), 0.8, 0)
    plain, alone = (drawn(each, sampler, sigmas) for each in (model, stock(model, [spec])))
    ours = (merge if parts == "layers" else composite)(model, [replace(spec, mask=Mask(LEFT))])
    mask = F.interpolate(LEFT[None], (16, 16), mode="bilinear")
    same(drawn(ours, sampler, sigmas), plain + mask * (alone - plain), plain, 1e-4)
