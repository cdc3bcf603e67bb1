"""The branch cache beside what people do around a sampler: ControlNets, windows, extra passes, several devices."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import comfy.context_windows
import comfy.controlnet
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from lora_ensemble.host.compose.composition import KEY, record_of
from lora_ensemble.host.families import row_order, split_points
from lora_ensemble.host.files.ensemble import Mask

from .builders import composite, merge, sample, schedule, three
from .caches import Watch, cached, cmlora, steps_of
from .models import FAMILIES, base, build
from .neighbours import easy_cache
from .test_conditionings import boxes
from .test_scenarios import CONDS, control_model  # noqa: F401  (a fixture)

SD15 = FAMILIES["SD15"]


def near(found, expected, share: float = 0.5) -> None:
    apart = ((found - expected).norm() / expected.norm()).item()
    assert 0 < apart < share, f"relative difference {apart:.2e}"


@pytest.mark.parametrize("conds", CONDS)
def test_areas_masks_ranges_and_lengths(conds, loras, monkeypatch):
    """Prompts that begin later than others run whole at first, and again after a pause that is too long."""
    watch = Watch(monkeypatch)
    ours = composite(base("SD15"), three(base("SD15"), loras))
    positive, negative = CONDS[conds](), CONDS[conds]()[::-1]
    plain = sample(ours, "SD15", positive, negative, steps=6)
    reusing = cached(ours)
    near(sample(reusing, "SD15", positive, negative, steps=6), plain)
    steps = steps_of(reusing)
    assert watch.reused and [step["rows"] for step in steps] == [step.rows for step in record_of(ours).steps]
    assert [step["reused"] > 0 for step in steps] == [False, True, True] * 2 and not record_of(reusing).problems


def test_a_controlnet_is_fresh_in_every_step(control_model, loras, monkeypatch, caplog):  # noqa: F811
    """The real one: its residuals for the outer blocks arrive on reuse, and no block refuses one."""
    model = composite(base("SD15"), three(base("SD15"), loras))
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    told, original = [], split_points.UNetSplit.reuse

    def conds(seed: int) -> list:
        net = comfy.controlnet.ControlNet(control_model, load_device=torch.device("cpu"))
        return SD15.cond(seed, control=net.set_cond_hint(hint, 0.4), control_apply_to_uncond=False)

    @contextmanager
    def reuse(split, features, control, options):
        with original(split, features, control, options) as (outer, inner):
            told.append([value is not None for value in outer["output"]])
            yield outer, inner

    monkeypatch.setattr(split_points.UNetSplit, "reuse", reuse)
    positive, negative = conds(11), conds(12)
    reusing = cached(model)
    out = sample(reusing, "SD15", positive, negative, steps=4)
    near(out, sample(model, "SD15", positive, negative, steps=4))
    assert told == [[True, False, False, False]] * 4, "two calls in two steps; the first of four is the last block's"
    assert "control could not be applied" not in caplog.text
    assert not torch.allclose(out, sample(model, steps=4), rtol=0.1), "the ControlNet must matter"


def test_context_windows(loras, monkeypatch):
    """Every window of a video has features of its own."""
    windows, model = comfy.context_windows, deep_wan()
    handler = windows.IndexListContextHandler(
        windows.get_matching_context_schedule("standard_static"), windows.get_matching_fuse_method("pyramid"),
        context_length=2, context_overlap=1, dim=2)
    model.model_options["context_handler"] = handler
    watch = Watch(monkeypatch)
    ours = composite(model, three(model, loras))
    plain, reusing = sample(ours, "Wan", steps=4), cached(ours)
    near(sample(reusing, "Wan", steps=4), plain)
    assert [step["reused"] for step in steps_of(reusing)] == [0, 12, 12, 0], "3 branches, 2 conds, 2 windows"
    assert len(watch.caught) == 12 and len({window for _, window, _ in watch.caught}) == 2


def test_windows_that_wander_do_not_fill_the_memory(loras, monkeypatch):
    """Guards: such windows are others at every step, and the features of old ones were held to the end of the run."""
    monkeypatch.setitem(FAMILIES, "Wan", replace(FAMILIES["Wan"], frames=9))
    windows, model = comfy.context_windows, deep_wan()
    model.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule("standard_uniform"), windows.get_matching_fuse_method("pyramid"),
        context_length=3, context_overlap=1, dim=2)
    ours = cached(composite(model, three(model, loras)[:2]), interval=2)
    sample(ours, "Wan", steps=8)
    steps = steps_of(ours)
    assert len({step["rows"] for step in steps}) > 1, "the windows are not the same at every step"
    row = 1.1 * steps[0]["bytes"] / steps[0]["rows"]  # windows may be a frame shorter
    assert max(step["bytes"] for step in steps) <= row * max(step["rows"] for step in steps)


def deep_wan():
    """Wan with enough blocks to cut."""
    kind = FAMILIES["Wan"]
    from .models import patcher, randomize

    try:
        model = build(type(kind)(kind.name, kind.kind, dict(kind.config, num_layers=4), kind.latent, kind.context,
                                 frames=kind.frames))
    except (TypeError, KeyError, AttributeError) as error:
        pytest.skip(f"this ComfyUI does not build Wan small: {error}")
    randomize(model)
    return patcher(model)


def growing(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """A sampler whose latent is larger from its second step on."""
    for i in range(len(sigmas) - 1):
        if i == 1:
            x = torch.nn.functional.interpolate(x, size=(12, 12))
        denoised = model(x, sigmas[i].expand(x.shape[0]), **extra_args)
        callback({"i": i, "denoised": denoised, "x": x, "sigma": sigmas[i], "sigma_hat": sigmas[i]})
        x = denoised + (x - denoised) * sigmas[i + 1] / sigmas[i]
    return x


def test_a_latent_that_changes_its_size_within_a_run(loras):
    """Features of the smaller one are of no use: the step after runs whole, and the next ones reuse what it left."""
    def drawn(model) -> list:
        seen = []
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(SD15.cond(11), SD15.cond(12))
        guider.set_cfg(3.0)
        noise = SD15.noise(1)
        with torch.inference_mode():
            guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(growing), schedule(model, 6),
                          callback=lambda step, x0, x, total: seen.append(x0.clone()), disable_pbar=True)
        return seen

    ours = composite(base("SD15"), three(base("SD15"), loras))
    plain, reusing = drawn(ours), cached(ours)
    found = drawn(reusing)
    assert [step["reused"] for step in steps_of(reusing)] == [0, 0, 6, 0, 6, 6]
    assert found[1].shape[-1] == 12 and all(torch.equal(found[i], plain[i]) for i in (0, 1))
    near(found[2], plain[2])


def test_perturbed_attention_has_features_of_its_own(loras, monkeypatch):
    """PAG evaluates the positive once more with another attention, under the same identity."""
    pag = pytest.importorskip("comfy_extras.nodes_pag").PerturbedAttentionGuidance
    ours = composite(base("SD15"), three(base("SD15"), loras))
    perturbed = pag.execute(ours, 3.0).args[0] if hasattr(pag, "execute") else pag().patch(ours, 3.0)[0]
    watch = Watch(monkeypatch)
    plain, reusing = sample(perturbed, steps=4), cached(perturbed)
    near(sample(reusing, steps=4), plain, 1.0)
    assert [step["reused"] for step in steps_of(reusing)] == [0, 9, 9, 0]
    assert sum(1 for _, _, attention in watch.caught if attention) == 3


def test_self_attention_guidance_has_features_of_its_own(loras):
    """SAG evaluates the negative once more on a blurred latent, with nothing else to tell the passes apart."""
    sag = pytest.importorskip("comfy_extras.nodes_sag").SelfAttentionGuidance
    ours = composite(base("SD15"), three(base("SD15"), loras))
    guided = sag.execute(ours, 0.5, 2.0).args[0] if hasattr(sag, "execute") else sag().patch(ours, 0.5, 2.0)[0]
    seen = []
    reusing = cached(guided)
    sample(reusing, steps=4, size=16, callback=lambda *_: seen.append(
        {(place[0], place[-1]) for place in reusing.get_attachment(KEY).run.cache.store._entries}))
    assert [step["reused"] for step in steps_of(reusing)] == [0, 9, 9, 0]
    assert len(seen[-1]) == 9 and sum(time for _, time in seen[-1]) == 3


@pytest.mark.parametrize("how", ["GLIGEN", "ToMe beside masks"])
def test_patches_that_are_made_anew_for_every_call(how, loras):
    """The host makes those of GLIGEN so, and the pack's look at merged tokens is one. Guard: `neighbours._which`,
    without which features were those of a patch at the same address, if there happened to be one."""
    model, cond, mask = base("SD15"), SD15.cond(11), None
    if how == "GLIGEN":
        cond = boxes(cond)
    else:
        node = pytest.importorskip("comfy_extras.nodes_tomesd").TomePatchModel
        model = node.execute(model, 0.5)[0] if hasattr(node, "execute") else node().patch(model, 0.5)[0]
        mask = Mask(torch.ones(1, 8, 8))
    reusing = cached(merge(model, [replace(spec, mask=mask) for spec in three(model, loras)]))
    assert torch.isfinite(sample(reusing, "SD15", cond, steps=6)).all()
    assert [step["reused"] for step in steps_of(reusing)] == [0, 2, 2] * 2


def test_a_call_that_is_begun_again_in_other_batches(loras, monkeypatch):
    """Where rows turn out to be untold apart in a layer. Guard: `BranchCache.again`, without which features of the
    first step are those of a second evaluation in it, which no later step has."""
    monkeypatch.setitem(row_order.FAMILIES, "modules.diffusionmodules.openaimodel.UNetModel",
                        row_order.Layers(never=r"middle_block\.1\..*\.attn1\.to_q"))
    reusing = cached(composite(base("SD15"), three(base("SD15"), loras)))
    sample(reusing, "SD15", steps=3)
    assert [step["reused"] for step in steps_of(reusing)] == [0, 6, 6]
    assert any("in an order that is not known" in line for line in record_of(reusing).problems)


@pytest.mark.parametrize("make", [lambda *made: cmlora(*made, 1), lambda *made: cached(composite(*made))],
                         ids=["CMLoRA", "Composite"])
def test_calls_that_another_node_leaves_out(make, loras):
    """There is nothing to keep of them, and the model is none that cannot be cut. Guard: without these CMLoRA stopped,
    and Branch Cache was off from then on."""
    plain = make(base("SD15"), three(base("SD15"), loras))
    reusing, skipped = easy_cache(plain), sample(easy_cache(base("SD15")), steps=8)
    assert not torch.equal(sample(base("SD15"), steps=8), skipped), "it leaves out nothing"
    assert torch.isfinite(sample(reusing, "SD15", steps=8)).all()
    assert not any("replaced" in line for line in record_of(reusing).problems) and steps_of(reusing)[2]["reused"]


def test_freeu(loras):
    """Writes into what enters each output block: what is cached must be what was there before."""
    freeu = pytest.importorskip("comfy_extras.nodes_freelunch").FreeU_V2
    ours = composite(base("SD15"), three(base("SD15"), loras))
    arguments = (1.3, 1.4, 0.9, 0.2)
    patched = freeu.execute(ours, *arguments).args[0] if hasattr(freeu, "execute") else freeu().patch(
        ours, *arguments)[0]
    plain = sample(patched, steps=4)
    assert torch.equal(sample(cached(patched, 1), steps=4), plain)
    near(sample(cached(patched), steps=4), plain)


def test_two_devices(loras):
    """Features are made and used on whichever device a row is sent to."""
    if not hasattr(comfy.model_patcher.ModelPatcher, "match_multigpu_clones"):
        pytest.skip("this ComfyUI has no multi-GPU scheduler")
    from .test_multigpu import two_devices

    model, second = two_devices()
    ensemble = three(model, loras)
    alone = sample(cached(composite(base("SD15"), ensemble)), steps=4)
    both = cached(composite(model, ensemble))
    for _ in range(2):
        torch.testing.assert_close(sample(both, steps=4), alone, rtol=1e-3, atol=1e-3 * alone.abs().max().item())
        assert [step["reused"] for step in steps_of(both)] == [0, 6, 6, 0]
    assert not [name for name, module in second.model.named_modules() if "forward" in module.__dict__]


# --- families without a place to cut ----------------------------------------------------------------------------------


def uncached(model, family: str, word: str, **options) -> None:
    """Runs as without the cache and says so once."""
    ours = cached(model)
    assert torch.equal(sample(ours, family, **options), sample(model, family, **options))
    problem, = record_of(ours).problems
    assert word in problem and "runs whole" in problem
    assert all(step["reused"] == step["bytes"] == 0 for step in steps_of(ours))


def test_the_testbeds_own_unet(monkeypatch):
    """A model of another pack: no class that we know, no list of blocks."""
    from lora_ensemble.testbed.model import UNet
    from lora_ensemble.tests.comfy_testbed.wrap import wrap_model

    torch.manual_seed(0)
    model = wrap_model(UNet())
    monkeypatch.setitem(FAMILIES, "testbed", type(SD15)("testbed", "", {}, 12, 96))
    uncached(model, "testbed", "UNet: this model family offers no place to cut it", steps=3)


def test_blocks_that_cannot_be_replaced(monkeypatch):
    """A list of blocks by a known name in a model that never asks for replacements (Cosmos-Predict2)."""
    config = dict(image_model="cosmos_predict2", max_img_h=16, max_img_w=16, max_frames=4, in_channels=16,
                  out_channels=16, patch_spatial=2, patch_temporal=1, model_channels=64, num_blocks=4, num_heads=2,
                  crossattn_emb_channels=32, pos_emb_cls="rope3d", concat_padding_mask=True)
    family = type(SD15)("Cosmos", "CosmosT2IPredict2", config, 16, 32, frames=1)
    from .models import patcher, randomize

    try:
        model = build(family)
    except (TypeError, KeyError, AttributeError) as error:
        pytest.skip(f"this ComfyUI does not build Cosmos small: {error}")
    randomize(model)
    monkeypatch.setitem(FAMILIES, "Cosmos", family)
    uncached(patcher(model), "Cosmos", "does not let its blocks be replaced", steps=3)
