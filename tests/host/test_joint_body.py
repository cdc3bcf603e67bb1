"""The second body of the testbed is the host's own Flux, small: its weights load there and give the same output."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import pytest
import torch
from lora_ensemble.testbed.beds import JOINT
from lora_ensemble.testbed.joint import model
from lora_ensemble.testbed.joint.base import JointBase
from lora_ensemble.testbed.sampler import Picture, Sampler
from lora_ensemble.tests.comfy_testbed.wrap import host_flux, load_testbed

PROMPT = "red pointed creature left, blue robe left, yellow round creature right, green ball, white wavy backdrop"


@pytest.fixture(scope="module")
def random_body() -> JointBase:
    base = JointBase()
    g = torch.Generator().manual_seed(0)
    for p in base.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=g) / (p[0].numel() ** 0.5 if p.ndim > 1 else 1)
    return base.eval().requires_grad_(False)


def agree(base: JointBase, size: tuple[int, int] = model.LATENT[1:]) -> None:
    g = torch.Generator().manual_seed(1)
    x, sigma = torch.randn(3, model.LATENT[0], *size, generator=g), torch.tensor([1.0, 0.6, 0.1])
    context = base.contexts(["", "vexa red pointed creature left, blue ball", "momu creature right"])
    with torch.inference_mode():
        ours = base.velocity(x, sigma, context)
        theirs = host_flux(base.flux).eval()(x, sigma, context, context.mean(1))
    assert ours.std() > 0.1
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4), (ours - theirs).abs().max()


def test_any_weights_give_the_hosts_output(random_body):
    agree(random_body)


def test_and_at_another_size(random_body):
    agree(random_body, (8, 12))


def test_the_trained_weights_do():
    agree(JOINT.load_base())


def test_host_draws_what_the_standalone_sampler_draws():
    """Twenty steps with guidance, through the host's own conditionings and sampler."""
    patcher, clip, vae = load_testbed("joint")
    conds = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (PROMPT, "")]
    noise = torch.randn(1, *model.LATENT, generator=torch.manual_seed(4))
    latent = comfy.sample.sample(patcher, noise, 20, 2.0, "euler", "simple", *conds, torch.zeros_like(noise), seed=4)
    with Sampler(JOINT.load_base(), []) as sampler:
        drawn = sampler.draw([Picture(PROMPT, 4)])
    assert (vae.decode(latent).movedim(-1, 1) - drawn).abs().max() < 0.02
