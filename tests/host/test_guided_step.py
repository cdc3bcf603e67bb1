"""One guided step among few without guidance, as the help pages advise, by the host's own nodes: the picture is the one
that the testbed's tables were drawn with."""

from __future__ import annotations

import comfy_extras.nodes_custom_sampler
import pytest
import torch
from lora_ensemble.host.files.ensemble import ALWAYS, LoRASpec
from lora_ensemble.methods.merge import Merge
from lora_ensemble.testbed.beds import UNET
from lora_ensemble.testbed.sampler import Picture, Sampler

import nodes

from ..comfy_testbed.wrap import load_testbed
from .builders import merge

PROMPT = "vexa red pointed creature left, drosh blue robe, yellow ball, green striped backdrop, plain finish"
STEPS, CFG, SEED = 4, 3.0, 4
OVERRIDE = getattr(comfy_extras.nodes_custom_sampler, "CFGOverride", None)
AT = (0.2, 0.45)  # of the second of four steps; the others are at 0, 0.5 and 0.75


def by_override(model, positive, negative, latent):
    model = OVERRIDE.execute(model, CFG, *AT).args[0]
    return nodes.KSampler().sample(model, SEED, STEPS, 1.0, "euler", "simple", positive, negative, latent)[0]


def by_three_samplers(model, positive, negative, latent):
    for start, end, cfg in ((0, 1, 1.0), (1, 2, CFG), (2, STEPS, 1.0)):
        latent = nodes.KSamplerAdvanced().sample(
            model, "disable" if start else "enable", SEED, STEPS, cfg, "euler", "simple", positive, negative, latent,
            start, end, "disable" if end == STEPS else "enable")[0]
    return latent


@pytest.mark.parametrize("draw", [
    pytest.param(by_override, marks=pytest.mark.skipif(OVERRIDE is None, reason="this ComfyUI has no CFG Override")),
    by_three_samplers], ids=["CFG Override", "three KSampler (Advanced)"])
def test_the_second_step_alone_is_guided(draw, loras):
    patcher, clip, vae = load_testbed()
    files = UNET.load_loras("narrow")
    turbo = LoRASpec(loras(UNET.load_turbo()), 1.0, 0, ALWAYS)
    model = merge(patcher, [turbo, LoRASpec(loras(files[0]), 1.0, 0), LoRASpec(loras(files[3]), 1.0, 0)])
    conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, "")]
    with torch.inference_mode():
        drawn = draw(model, *conds, {"samples": torch.zeros(1, *UNET.load_base().latent)})["samples"]
    ours = vae.decode(drawn).movedim(-1, 1)
    with Sampler(UNET.load_base(), files, [UNET.load_turbo()]) as sampler:
        picture = Picture(PROMPT, SEED, (0, 3), Merge((1.0, 1.0)))
        wanted, without = (sampler.draw([picture], STEPS, guidance) for guidance in ((1.0, CFG, 1.0, 1.0), 1.0))
    assert (ours - wanted).abs().max() < 0.02 < 0.2 < (without - wanted).abs().max()
