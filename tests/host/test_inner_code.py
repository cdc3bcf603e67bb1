"""What patches, wrappers and guidance of other nodes see: the conds their caller meant, and nothing of branches."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from lora_ensemble.host.compose.composition import KEY

from .builders import composite, hooked, merge, same, sample, stock, three
from .models import FAMILIES, base

SD15 = FAMILIES["SD15"]


def hooks(model, ensemble) -> torch.Tensor:
    return sample(model, "SD15", hooked(SD15.cond(11), ensemble), hooked(SD15.cond(12), ensemble))


@pytest.fixture
def ensemble(loras):
    return three(base("SD15"), loras)


@pytest.mark.parametrize("place", ["before", "after"])
def test_attention_patches_see_the_callers_conds(place, ensemble):
    """Guard: apply_model puts `cond_or_uncond` back. A patch that acts on the positive alone (index 0), as NAG does,
    must act on the positive of every branch and on nothing else, whichever node came first."""
    seen = []

    def patch(q, k, v, options):
        seen.append((list(options["cond_or_uncond"]), tuple(options["uuids"])))
        rows = q.shape[0] // len(options["cond_or_uncond"])
        scale = torch.tensor([0.3 if index == 0 else 1.0 for index in options["cond_or_uncond"]])
        return q, k, v * scale.repeat_interleave(rows).reshape(-1, 1, 1)

    def patched(model):
        model = model.clone()
        model.set_model_attn1_patch(patch)
        return model

    model = base("SD15")
    reference, plain = hooks(patched(model), ensemble), sample(patched(model))
    assert {i for indexes, _ in seen for i in indexes} == {0, 1}
    seen.clear()
    ours = patched(composite(model, ensemble)) if place == "after" else composite(patched(model), ensemble)
    same(sample(ours), reference, plain)
    assert all(sorted(indexes) == [0, 0, 0, 1, 1, 1] for indexes, _ in seen)
    assert all(len(set(uuids)) == 6 for _, uuids in seen), "caches keyed by uuid must tell branches apart"
    assert len({frozenset(uuids) for _, uuids in seen}) == 1, "and find the same ones in every step"


def test_function_wrappers_see_the_callers_conds(ensemble):
    """Guard: _caller_options. `model_function_wrapper` is called before any wrapper of ours around the model."""
    seen = []

    def wrapper(apply, args):
        seen.append((list(args["cond_or_uncond"]), list(args["c"]["transformer_options"]["cond_or_uncond"])))
        return apply(args["input"], args["timestep"], **args["c"])

    model = composite(base("SD15"), ensemble)
    whole = sample(model)
    model.set_model_unet_function_wrapper(wrapper)
    assert torch.equal(sample(model), whole)
    assert [sorted(outer) for outer, _ in seen] == [[0, 0, 0, 1, 1, 1]] * 2
    assert all(outer == inner for outer, inner in seen)


def test_diffusion_model_wrappers_see_the_callers_conds(ensemble):
    seen = []

    def wrapper(executor, *args, **kwargs):
        options = next(a for a in (*args, *kwargs.values()) if isinstance(a, dict) and "cond_or_uncond" in a)
        seen.append(sorted(options["cond_or_uncond"]))
        return executor(*args, **kwargs)

    model = composite(base("SD15"), ensemble)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "watch", wrapper)
    sample(model)
    assert seen == [[0, 0, 0, 1, 1, 1]] * 2


@pytest.mark.parametrize("place", ["before", "after"])
def test_cond_batch_wrappers_of_others(place, ensemble):
    """A CALC_COND_BATCH wrapper outside or inside ours: predictions are linear in both, so the order is free."""
    def halved(executor, model, conds, x, timestep, options):
        return [0.5 * out for out in executor(model, conds, x, timestep, options)]

    def patched(model):
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "halved", halved)
        return model

    model = base("SD15")
    ours = patched(composite(model, ensemble)) if place == "after" else composite(patched(model), ensemble)
    same(sample(ours), hooks(patched(model), ensemble), sample(patched(model)))


def test_guidance_sees_one_mixed_pair(ensemble):
    """Pre, own and post CFG functions get the caller's conds with one prediction each."""
    seen = []

    def pre(args):
        seen.append(("pre", len(args["conds"]), len(args["conds_out"])))
        return args["conds_out"]

    def post(args):
        seen.append(("post", args["cond_denoised"].shape, args["uncond_denoised"].shape))
        return args["denoised"]

    model = composite(base("SD15"), ensemble)
    whole = sample(model)
    model.set_model_sampler_pre_cfg_function(pre)
    model.set_model_sampler_post_cfg_function(post)
    assert torch.equal(sample(model), whole)
    assert seen == [("pre", 2, 2), ("post", (1, 4, 8, 8), (1, 4, 8, 8))] * 2


def test_extra_passes_of_a_step(ensemble):
    """Perturbed and self-attention guidance evaluate one cond again from a post-CFG function: all branches, mixed."""
    model, again = composite(base("SD15"), ensemble), []

    def post(args):
        out, = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"],
                                              args["model_options"])
        again.append((out - args["cond_denoised"]).abs().max() / args["cond_denoised"].abs().max())
        return args["denoised"]

    whole = sample(model)
    model.set_model_sampler_post_cfg_function(post)
    assert torch.equal(sample(model), whole)
    assert len(again) == 2 and max(again) < 1e-5
    record = model.get_attachment(KEY).record
    assert [(step.index, step.calls, step.rows) for step in record.steps] == [(0, 2, 9), (1, 2, 9)]


def test_passes_with_an_uncond_of_none(ensemble):
    """cfg 1 drops the negative; with the optimisation off it is there, and with no weight."""
    model = composite(base("SD15"), ensemble)
    dropped = sample(model, cfg=1.0)
    model.model_options["disable_cfg1_optimization"] = True
    same(sample(model, cfg=1.0), dropped, sample(base("SD15"), cfg=1.0), 1e-4)


@pytest.mark.parametrize("make", [merge, composite])
def test_a_direct_call_of_the_model(make, ensemble):
    """A node that calls apply_model by itself in a run gets the run's one branch, or the base if there are several."""
    model, direct = base("SD15"), []
    x, t, context = SD15.noise(), torch.tensor([5.0]), SD15.cond(11)[0][0]

    def post(args):
        options = {**args["model_options"]["transformer_options"]}
        direct.append(args["model"].apply_model(x, t, c_crossattn=context, transformer_options=options))
        return args["denoised"]

    for variant in (model, stock(model, ensemble), make(model, ensemble)):
        variant = variant.clone()
        variant.set_model_sampler_post_cfg_function(post)
        sample(variant, steps=1)
    plain, merged, ours = direct
    if make is merge:
        same(ours, merged, plain)
    else:
        assert torch.equal(ours, plain)
