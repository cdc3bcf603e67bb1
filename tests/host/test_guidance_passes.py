"""Guidance beside nodes that evaluate the model themselves: the deprecated Perp-Neg node, Self-Attention Guidance; and
under guiders with a formula of their own in context windows."""

from __future__ import annotations

import comfy.context_windows
import comfy.samplers
import comfy_extras.nodes_custom_sampler as extras
import pytest
import torch
from lora_ensemble.host.compose.composition import KEY as COMPOSITION
from lora_ensemble.host.guidance.apply import guidance_record_of as record_of
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.loratorio import LoRAtorio
from torch import Tensor

from .builders import guided, merge, method, schedule, three
from .guidance_tools import SD15, ag, basic, gammas, late, middle, patched, perp_neg, same, sample
from .models import FAMILIES, base
from .test_mixing import by_hand

EMPTY = SD15.cond(13)


def node(model, neg_scale: float = 1.0):
    """The deprecated node: its formula of guidance evaluates the empty prompt by itself."""
    return patched("nodes_perpneg", "PerpNeg", model, empty_conditioning=EMPTY, neg_scale=neg_scale)


def sag(model):
    return patched("nodes_sag", "SelfAttentionGuidance", model, scale=0.5, blur_sigma=2.0)


def perpendicular(c: Tensor, u: Tensor, e: Tensor, scale: float, neg_scale: float, rows: Tensor) -> Tensor:
    """Perp-Neg over the given rows [B, 1, 1, 1] of a batch, in float64: e + s (p - k (n - <n, p> / <p, p> p))."""
    p, n = (c - e) * rows, (u - e) * rows
    return e + scale * (p - neg_scale * (n - (n * p).sum() / (p * p).sum() * p))


def written_down(model, neg_scale: float, weights) -> object:
    """Perp-Neg with guidance, once more on the host's cfg function, both negatives evaluated for every row.
    `weights(index, gamma)`: how much of the guidance each picture gets in a step, [B]."""
    model, steps = model.clone(), []

    def cfg(args):
        c, u, x = (args[name].double() for name in ("cond_denoised", "uncond_denoised", "input"))
        conds = comfy.samplers.encode_model_conds(args["model"].extra_conds, comfy.sampler_helpers.convert_cond(EMPTY),
                                                  args["input"], args["input"].device, "negative")
        e = comfy.samplers.calc_cond_batch(args["model"], [conds], args["input"], args["sigma"],
                                           args["model_options"])[0].double()
        gamma = torch.cosine_similarity((x - c).flatten(1), (x - u).flatten(1))
        weight = weights(len(steps), gamma).view(-1, 1, 1, 1)
        steps.append(gamma)
        out = perpendicular(c, u, e, args["cond_scale"], neg_scale, weight > 0)
        return (x - torch.where(weight > 0, c + weight * (out - c), c)).to(args["input"])

    model.set_model_sampler_cfg_function(cfg)
    return model


both = pytest.mark.parametrize("ours_first", [False, True], ids=["after it", "before it"])


# --- the deprecated Perp-Neg node ---


@both
def test_perp_neg_node_is_untouched_until_the_switch(ours_first):
    plain = sample(node(base("SD15"), 0.8), steps=4, batch=2)
    ours = node(ag(base("SD15"), 1.5), 0.8) if ours_first else ag(node(base("SD15"), 0.8), 1.5)
    assert torch.equal(sample(ours, steps=4, batch=2), plain)
    assert not torch.allclose(plain, sample(base("SD15"), steps=4, batch=2), rtol=0.1), "the node must matter"


@both
@pytest.mark.parametrize("min_steps", [0, 2])
def test_perp_neg_node_is_conditional_from_the_switch_on(ours_first, min_steps, spied):
    """As under Perp-Neg Guider. Its formula divides by the difference of two predictions that are then equal."""
    policy = dict(threshold=-1.0, min_steps=min_steps)
    ours = node(ag(spied.model, **policy)) if ours_first else ag(node(spied.model), **policy)
    out, plain = sample(ours, steps=4, batch=2), sample(node(base("SD15")), steps=4, batch=2)
    sigmas = schedule(base("SD15"), 4)
    same(out, guided(perp_neg(ag(base("SD15"), **policy)), sigmas, batch=2), plain)
    assert spied.rows(EMPTY) == spied.rows(SD15.cond(12)) == 2 * (min_steps + 1)
    if not min_steps:
        same(out, guided(basic(base("SD15")), sigmas, batch=2), plain)


@both
def test_perp_neg_node_for_some_pictures(ours_first, spied):
    """Finished pictures are conditional and have no say in the others' projection; the empty prompt is evaluated for
    the open ones alone."""
    options = dict(steps=5, batch=3)
    threshold = middle(gammas(node(base("SD15"), 0.8), **options))
    ours = node(ag(spied.model, threshold), 0.8) if ours_first else ag(node(spied.model, 0.8), threshold)
    out, done = sample(ours, **options), torch.zeros(3, dtype=torch.bool)

    def weights(index: int, gamma: Tensor) -> Tensor:
        done.logical_or_(gamma >= threshold)
        return (~done).double()

    same(out, sample(written_down(base("SD15"), 0.8, weights), **options), sample(node(base("SD15"), 0.8), **options))
    negative = [step.negative for step in record_of(ours).steps]
    assert any(0 < rows < 3 for rows in negative)
    assert spied.rows(EMPTY) == spied.rows(SD15.cond(12)) == sum(negative)


def test_perp_neg_node_fades():
    """The formula is homogeneous: both negatives are drawn towards the prompt's prediction, and it fades linearly."""
    ours = ag(node(base("SD15"), 0.8), -1.0, ramp_steps=3, min_steps=1)

    def weights(index: int, gamma: Tensor) -> Tensor:
        return torch.full_like(gamma, min(max((4 - index) / 4, 0), 1))

    same(sample(ours, steps=6), sample(written_down(base("SD15"), 0.8, weights), steps=6),
         sample(node(base("SD15"), 0.8), steps=6))


def test_perp_neg_node_is_re_centred_by_loratorio(loras):
    """Its empty prompt is a negative, not another positive."""
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    ours = node(method(model, ensemble, LoRAtorio), 0.8)
    c, u, e = (by_hand(model, ensemble, cond, share).double()
               for cond, share in ((SD15.cond(11), 1.0), (SD15.cond(12), 0.5), (EMPTY, 0.5)))
    want = perpendicular(c, u, e, 3.0, 0.8, torch.ones(1, dtype=torch.bool)).float()
    same(sample(ours, steps=1, cfg=3.0), want, sample(node(model, 0.8), steps=1, cfg=3.0))


def test_perp_neg_node_with_cmlora(loras):
    """Three times one LoRA is that LoRA, in the node's own pass as well; and guidance leaves out all branches of it."""
    model = base("SD15")
    one = three(model, loras)[:1]
    ours = node(method(model, one * 3, CMLoRA), 0.8)
    plain = sample(node(model, 0.8), steps=3)
    same(sample(ours, steps=3), sample(node(merge(model, one), 0.8), steps=3), plain)
    switched = ag(ours, -1.0, min_steps=1)
    assert sample(switched, steps=4).isfinite().all()
    assert [step.rows for step in switched.get_attachment(COMPOSITION).record.steps] == [9, 9, 3, 3]


# --- Self-Attention Guidance ---


@both
def test_sag_is_untouched_until_the_switch(ours_first):
    plain = sample(sag(base("SD15")), steps=4, batch=2)
    ours = sag(ag(base("SD15"), 1.5)) if ours_first else ag(sag(base("SD15")), 1.5)
    assert torch.equal(sample(ours, steps=4, batch=2), plain)
    assert not torch.allclose(plain, sample(base("SD15"), steps=4, batch=2), rtol=1e-2), "the node must matter"


@both
def test_sag_keeps_the_batch_whole(ours_first, spied):
    """It keeps attention maps of every row. Its own pass of the negative, on a blurred picture, goes on."""
    threshold = middle(gammas(sag(base("SD15")), steps=5, batch=3))
    ours = sag(ag(spied.model, threshold)) if ours_first else ag(sag(spied.model), threshold)
    assert sample(ours, steps=5, batch=3).isfinite().all()
    record = record_of(ours)
    negative = [step.negative for step in record.steps]
    assert set(negative) == {0, 3} and any("attention" in problem for problem in record.problems)
    assert spied.rows(SD15.cond(12)) == sum(negative) + 15


# --- context windows ---


def windowed(name: str):
    windows, model = comfy.context_windows, base(name).clone()
    model.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule("standard_static"), windows.get_matching_fuse_method("pyramid"),
        context_length=2, context_overlap=1, dim=2)
    return model


@pytest.mark.parametrize("min_steps", [0, 1])
def test_dual_cfg_in_context_windows(min_steps):
    """The predictions of a window are no whole ones: such a guider's own result stands until all is conditional."""
    model, kind, sigmas = windowed("Wan"), FAMILIES["Wan"], schedule(base("Wan"), 3)
    noise = kind.noise(seed=1)

    def drawn(model, sigmas: Tensor, noise: Tensor, latent: Tensor, alone: bool = False) -> Tensor:
        guider = (extras.Guider_Basic if alone else extras.Guider_DualCFG)(model)
        guider.set_conds(kind.cond(11), *([] if alone else [kind.cond(13), kind.cond(12)]))
        if not alone:
            guider.set_cfg(5.0, 2.0)
        with torch.inference_mode():
            return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True)

    zero = torch.zeros_like(noise)
    plain = drawn(model, sigmas, noise, zero)
    assert torch.equal(drawn(ag(model, 1.5), sigmas, noise, zero), plain)
    ours = ag(model, -1.0, min_steps=min_steps)
    begun = drawn(model, sigmas[:min_steps + 2], noise, zero)
    same(drawn(ours, sigmas, noise, zero), drawn(model, sigmas[min_steps + 1:], zero, begun, alone=True), plain)
    assert [step.negative > 0 for step in record_of(ours).steps] == [i <= min_steps for i in range(3)]


def test_apg_in_context_windows_is_read_late(monkeypatch):
    """On an accelerator guidance is over some steps before the host knows. What gives predictions back then has to give
    whole ones."""
    apg = patched("nodes_apg", "APG", windowed("Wan"), eta=0.5, norm_threshold=5.0, momentum=-0.5)
    options, policy = dict(family="Wan", steps=5), dict(threshold=-1.0, min_steps=1)
    wanted, plain = sample(ag(apg, **policy), **options), sample(apg, **options)
    late(monkeypatch)
    ours = ag(apg, exact=False, **policy)
    same(sample(ours, **options), wanted, plain)
    assert [step.negative > 0 for step in record_of(ours).steps] == [True] * 3 + [False] * 2
