"""The second body of the testbed is the host's own Flux, small: its weights load there and give the same output."""

from __future__ import annotations

import comfy.ldm.flux.model
import comfy.ops
import pytest
import torch
from lora_ensemble.testbed.joint import model
from lora_ensemble.testbed.joint.base import JointBase


def hosts(flux: model.Flux) -> torch.nn.Module:
    """The host's class with our weights. Older releases call the scales of query and key norms differently."""
    theirs = comfy.ldm.flux.model.Flux(dtype=torch.float32, operations=comfy.ops.disable_weight_init,
                                       **{k: v for k, v in model.CONFIG.items() if k in known()})
    names = {name.replace("_norm.scale", "_norm.weight"): name for name in theirs.state_dict()}
    theirs.load_state_dict({names[name]: tensor for name, tensor in flux.state_dict().items()})
    return theirs.eval()


def known() -> set[str]:
    return set(comfy.ldm.flux.model.FluxParams.__dataclass_fields__)


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
        theirs = hosts(base.flux)(x, sigma, context, context.mean(1))
    assert ours.std() > 0.1
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4), (ours - theirs).abs().max()


def test_any_weights_give_the_hosts_output(random_body):
    agree(random_body)


def test_and_at_another_size(random_body):
    agree(random_body, (8, 12))
