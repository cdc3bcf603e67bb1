"""What models and nodes keep from call to call: it must be that of the LoRAs at work, and nothing of it may stay."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from lora_ensemble.host.compose.apply import with_cache
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.schedule import Uniform
from lora_ensemble.methods.switch import Switch
from torch import nn

from .any_model import any_model, latent_of, prompt_of
from .blocks import Transformer
from .builders import lora, merge, method, same, stock
from .models import FAMILIES, build, patcher, randomize
from .small import FLUX_2, REFERENCE, like, references
from .small_video import SMALL
from .test_parity_families import NAME, layers_of
from .test_routed import MARKS, bare, prompt, rests, routed, specs

WAN = FAMILIES["Wan"]
CAUSAL = replace(WAN, name="Causal", kind="WAN21_CausalAR_T2V", config={**WAN.config, "causal_ar": True})
PLAIN = like(FLUX_2, "Flux 2 timestep zero", references(*REFERENCE, method="index_timestep_zero"))


def drawn(model, steps: int = 3, cfg: float = 1.0) -> torch.Tensor:
    import comfy.sample

    start = latent_of(model, 1)
    with torch.inference_mode():
        return comfy.sample.sample(model, start, steps, cfg, "euler", "simple", prompt_of(model, 11),
                                   prompt_of(model, 12), start * 0, seed=1, disable_pbar=True)


def pair(model, loras) -> list[LoRASpec]:
    layers = layers_of(model)
    return [LoRASpec(loras(lora(layers, seed, **NAME)), 0.8, 0) for seed in (1, 2)]


def said(model, words: str) -> list[str]:
    return [line for line in record_of(model).problems if words in line]


# --- FluxKVCache ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux():
    return any_model(PLAIN)


def with_flux_cache(model):
    nodes = pytest.importorskip("comfy_extras.nodes_flux")
    if not hasattr(nodes, "FluxKVCache"):
        pytest.skip("this ComfyUI has no FluxKVCache")
    return nodes.FluxKVCache.execute(model).args[0]


def kv(model):
    (patch,) = model.model_options["transformer_options"]["patches"]["attn1_patch"]
    return patch


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("after", [False, True], ids=["cache below", "cache above"])
def test_flux_keeps_its_references_where_gains_are_constant(flux, loras, cfg, after):
    """As ComfyUI's own chain of loaders with the same node; it does change what comes out."""
    ensemble, cached = pair(flux, loras), with_flux_cache(flux)
    ours = with_flux_cache(merge(flux, ensemble)) if after else merge(cached, ensemble)
    want, plain = drawn(stock(cached, ensemble), cfg=cfg), drawn(flux, cfg=cfg)
    same(drawn(ours, cfg=cfg), want, plain)
    assert (want - drawn(stock(flux, ensemble), cfg=cfg)).abs().max() > 3e-4 * want.abs().max()
    assert record_of(ours).problems == [] and not kv(ours).cache


def test_flux_rows_side_by_side_keep_what_is_theirs(flux, loras):
    first, _ = pair(flux, loras)
    cached = with_flux_cache(flux)
    twins = method(cached, [first, first], Composite)
    same(drawn(twins), drawn(stock(cached, [first])), drawn(flux))
    assert record_of(twins).problems == []


def test_flux_switch_does_not_read_the_other_loras_references(flux, loras):
    """With a step for each, keeping would be in vain: as without the node."""
    ensemble, cached = pair(flux, loras), with_flux_cache(flux)
    ours = method(cached, ensemble, lambda strengths: Switch(strengths, 1))
    want = drawn(method(flux, ensemble, lambda strengths: Switch(strengths, 1)), 4)
    same(drawn(ours, 4), want, drawn(flux, 4), 1e-5)
    assert len(said(ours, "KV_Attn_Input of 'attn1_patch': not used in this run, since other LoRAs act")) == 1


def test_flux_switch_keeps_while_a_lora_has_its_turn(flux, loras):
    ensemble, cached = pair(flux, loras), with_flux_cache(flux)
    ours, patch = method(cached, ensemble, lambda strengths: Switch(strengths, 2)), kv(cached)
    read, call = [], type(patch).__call__

    def watched(self, *args, **kwargs):
        out = call(self, *args, **kwargs)
        read.append(not self.set_cache)
        return out

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(patch), "__call__", watched)
        drawn(ours, 4)
    blocks = len(read) // 4
    assert read == ([False] * blocks + [True] * blocks) * 2
    assert said(ours, "made anew 1 time in this run") and not patch.cache


def test_flux_batches_that_the_host_splits(flux, loras, monkeypatch):
    """Guard: equal batches of different branches would read each other's keys and values."""
    ensemble, cached = pair(flux, loras), with_flux_cache(flux)
    monkeypatch.setattr(comfy.model_management, "get_free_memory",
                        lambda device=None, both=False: (1, 1) if both else 1)
    ours = method(cached, ensemble, Composite)
    same(drawn(ours), drawn(method(flux, ensemble, Composite)), drawn(flux), 1e-5)
    assert record_of(ours).steps[0].calls == 2 and said(ours, "not used in this run")


def test_flux_with_places_or_the_branch_cache(flux, loras):
    """Both count on all tokens of a call: without the guard masks were not found in the shorter ones, and features had
    another length."""
    ensemble, cached = pair(flux, loras), with_flux_cache(flux)
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    masked = [LoRASpec(ensemble[0].name, 0.8, 0, mask=Mask(left)), ensemble[1]]
    ours = merge(cached, masked)
    same(drawn(ours), drawn(merge(flux, masked)), drawn(flux), 1e-5)
    assert said(ours, "since LoRAs act in places of the picture")
    deep = CacheSpec(Uniform(2), depth=1)
    ours = with_cache(merge(cached, ensemble), deep)
    same(drawn(ours, 4), drawn(with_cache(merge(flux, ensemble), deep), 4), drawn(flux, 4), 1e-5)
    assert said(ours, "since the Branch Cache keeps tokens of its own")


# --- WanAnimate2Cache -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def animate():
    if not hasattr(pytest.importorskip("comfy_extras.nodes_wan"), "WanAnimate2Cache"):
        pytest.skip("this ComfyUI has no WanAnimate2Cache")
    return any_model(SMALL["Wan Animate 2"])


def with_pose_cache(model):
    from comfy_extras.nodes_wan import WanAnimate2Cache

    return WanAnimate2Cache.execute(model, "cpu").args[0]


def takes(model, draw) -> int:
    """How many blocks' poses a drawing took from the cache."""
    store, counted = model.model_options["transformer_options"]["animate2_cache"], []
    take = type(store).take
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(store), "take", lambda *args: counted.append(1) or take(*args))
        draw()
    assert store.slots == []
    return len(counted)


def test_animate_keeps_its_poses_where_gains_are_constant(animate, loras):
    ensemble, plain = pair(animate, loras), drawn(animate)
    ours, found = merge(with_pose_cache(animate), ensemble), []
    blocks = len(animate.model.diffusion_model.blocks)
    assert takes(ours, lambda: found.append(drawn(ours))) == 2 * blocks
    same(found[0], drawn(stock(animate, ensemble)), plain)
    assert record_of(ours).problems == []


@pytest.mark.parametrize("make", [Composite, lambda strengths: Switch(strengths, 1)], ids=["Composite", "Switch"])
def test_animate_branches_have_their_own_poses(animate, loras, make):
    ensemble = pair(animate, loras)
    ours, found = method(with_pose_cache(animate), ensemble, make), []
    assert takes(ours, lambda: found.append(drawn(ours))) == 0
    same(found[0], drawn(method(animate, ensemble, make)), drawn(animate), 1e-5)
    assert said(ours, "PoseBranchCache of 'animate2_cache': not used in this run")


# --- Qwen-Image 2.1 -------------------------------------------------------------------------------------------------


class Prefix(nn.Module):
    """A stand-in with the contract of Qwen-Image 2.1 in later releases (none of the tested ones has it): what the text
    comes to is kept for a run, by the text alone, unless `transformer_options["qwen_image21_cache"]` says off."""

    def __init__(self):
        super().__init__()
        self.txt_in, self.img_in, self.proj_out = nn.Linear(24, 32), nn.Linear(4, 32), nn.Linear(32, 4)
        self.prefix_cache, self.prefix_cache_enabled, self.made, self.dtype = None, True, 0, torch.float32

    def reset_prefix_cache(self, enabled: bool) -> None:
        self.prefix_cache, self.prefix_cache_enabled = None, enabled

    def forward(self, x, timestep, context, transformer_options, **kwargs):
        kept = self.prefix_cache
        if kept is None or not torch.equal(kept[0], context):
            self.made += 1
            kept = context.clone(), self.txt_in(context)
            if self.prefix_cache_enabled and transformer_options.get("qwen_image21_cache", {}).get("device") != "off":
                self.prefix_cache = kept
        tokens = self.img_in(x.flatten(2).mT)
        attention = (tokens @ kept[1].mT / 32**0.5).softmax(dim=-1)
        return self.proj_out(tokens + attention @ kept[1]).mT.unflatten(2, x.shape[2:])


class PrefixKind(Transformer):
    def build(self, device: str = "cpu"):
        model = Prefix().eval().requires_grad_(False)
        randomize(model)
        return model


@pytest.fixture
def qwen():
    return any_model(PrefixKind("Qwen-Image 2.1", ("", ""), {}, (4, 4, 4), (5, 24)))


def drawn_from_nothing(model, steps: int = 3) -> torch.Tensor:
    model.model.diffusion_model.reset_prefix_cache(True)
    model.model.diffusion_model.made = 0
    return drawn(model, steps)


def never_kept(model, steps: int = 3) -> torch.Tensor:
    root = model.model.diffusion_model
    handle = root.register_forward_pre_hook(lambda module, args: module.reset_prefix_cache(True))
    try:
        return drawn_from_nothing(model, steps)
    finally:
        handle.remove()
        root.reset_prefix_cache(True)


def test_qwen_keeps_its_prompt_where_gains_are_constant(qwen, loras):
    ensemble, plain = pair(qwen, loras), drawn_from_nothing(qwen)
    ours, root = merge(qwen, ensemble), qwen.model.diffusion_model
    assert root.made == 1 and root.prefix_cache is not None
    found = drawn(ours)  # after the plain model's, with the same prompt
    assert root.made == 2
    same(found, never_kept(stock(qwen, ensemble)), plain)
    assert root.made == 3 and root.prefix_cache is None and root.prefix_cache_enabled and record_of(ours).problems == []


@pytest.mark.parametrize("make", [Composite, lambda strengths: Switch(strengths, 1)], ids=["Composite", "Switch"])
def test_qwen_is_off_where_loras_change(qwen, loras, make):
    ensemble, plain = pair(qwen, loras), drawn_from_nothing(qwen)
    ours = method(qwen, ensemble, make)
    found = drawn_from_nothing(ours)
    assert said(ours, "Prefix's keys and values of prompt and reference pictures: not used in this run")
    same(found, never_kept(ours), plain, 1e-5)


# --- Wan's autoregressive form --------------------------------------------------------------------------------------


def frame_by_frame(model, conds: list | None = None, anew: bool = False) -> torch.Tensor:
    """What SamplerARVideo draws; `anew`: with nothing kept of the prompt."""
    guider, noise = comfy.samplers.CFGGuider(model), WAN.noise(seed=1)
    guider.set_conds(conds or WAN.cond(11), WAN.cond(12))
    guider.set_cfg(1.0)

    def reset(root, args, kwargs):
        if anew:
            root.reset_crossattn_caches(kwargs["transformer_options"]["ar_state"]["crossattn_caches"])

    sampler = comfy.samplers.ksampler("ar_video", {"num_frame_per_block": 1})
    with torch.inference_mode(), model.model.diffusion_model.register_forward_pre_hook(reset, with_kwargs=True):
        return guider.sample(noise, noise * 0, sampler, torch.linspace(1, 0, 4), disable_pbar=True, seed=1)


@pytest.fixture(scope="module")
def causal():
    if not hasattr(comfy.supported_models, CAUSAL.kind):
        pytest.skip("this ComfyUI has no autoregressive Wan")
    model = build(CAUSAL)
    randomize(model)
    return patcher(model)


def test_a_film_that_is_drawn_frame_by_frame_has_the_prompt_of_the_loras_at_work(causal, loras):
    """Guard: `keepers_of`. The host keeps the text's keys and values of the first call."""
    ensemble, plain = bare(specs(causal, loras)), frame_by_frame(causal)
    same(frame_by_frame(merge(causal, ensemble)), frame_by_frame(stock(causal, ensemble)), plain, 1e-4)
    for ours in (method(causal, ensemble, lambda strengths: Switch(strengths, 1)),
                 merge(causal, [replace(ensemble[0], start=0.5), ensemble[1]])):
        found = frame_by_frame(ours)
        assert said(ours, "CausalWanModel's keys and values of the prompt: made anew")
        same(found, frame_by_frame(ours, anew=True), plain, 1e-5)


@pytest.mark.parametrize("mode", ["once", "contrast"])
def test_words_are_not_sought_in_a_film_with_one_history(mode, causal, loras):
    """Whatever is evaluated would be a part of it. Guard: `history` in `find_places`."""
    rest = rests(MARKS, [prompt("Wan", None, 20 + k)[0] for k in range(3)])
    ensemble, conds = specs(causal, loras), prompt("Wan", lora_ensemble_without=rest)
    ours = routed(causal, ensemble, mode=mode)
    merged = stock(causal, bare(ensemble))
    same(frame_by_frame(ours, conds), frame_by_frame(merged, conds), frame_by_frame(causal, conds), 1e-4)
    (line,) = record_of(ours).problems
    assert "keeps one history of it" in line and "act everywhere" in line
