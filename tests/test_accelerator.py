"""The pretended accelerator itself: it computes, and it finds what a real one would punish."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.methods.session import Sent
from lora_ensemble.tests.accelerator import DEVICE, OnDevice
from lora_ensemble.tests.on_gpu import REAL

pytestmark = pytest.mark.skipif(REAL, reason="nothing is pretended where the device is real")


def kinds(accelerator) -> list[str]:
    return [transfer.kind for transfer in accelerator.transfers]


def test_it_computes_what_the_cpu_computes(accelerator):
    g = torch.Generator().manual_seed(0)
    layer, x = torch.nn.Linear(4, 6), torch.randn(3, 4, generator=g)
    want = layer(x).relu()
    got = layer.to(DEVICE)(x.to(DEVICE)).relu()
    assert isinstance(got, OnDevice) and got.device == DEVICE and got.is_cuda
    assert torch.equal(got.cpu(), want.detach()) and type(got.cpu()) is torch.Tensor


@pytest.mark.parametrize("inference", [True, False])
def test_views_and_work_in_place(inference, accelerator):
    with torch.inference_mode(inference), torch.no_grad():
        x = torch.zeros(2, 3, device=DEVICE)
        assert x.add_(1) is x
        x[:, :2].mul_(5)
        x.view(6)[0] = 7
        assert x.cpu().tolist() == [[7, 5, 1], [5, 5, 1]]


def test_two_devices_do_not_mix(accelerator):
    x = torch.ones(3, device=DEVICE)
    for wrong in (lambda: x + torch.ones(3), lambda: torch.cat([torch.ones(3), x]), lambda: torch.ones(2, 3) @ x):
        with pytest.raises(RuntimeError, match="same device"):
            wrong()
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2], "a number on the CPU may take part"


WAITS = {"item": lambda x: x[0].item(), "bool": lambda x: bool((x > 0).all()), "tolist": lambda x: x.tolist(),
         "cpu": lambda x: x.cpu(), "nonzero": lambda x: x.nonzero(), "mask": lambda x: x[x > 1],
         "copy": lambda x: torch.empty(3).copy_(x)}


@pytest.mark.parametrize("how", WAITS)
def test_waits_are_noted(how, accelerator):
    x = torch.ones(3, device=DEVICE)
    assert kinds(accelerator) == []
    WAITS[how](x)
    (transfer,) = accelerator.transfers
    assert transfer.kind == "wait" and transfer.line.startswith("tests/test_accelerator.py:") and not transfer.ours


def test_copies_and_doubles_are_noted(accelerator):
    x = torch.ones(3).to(DEVICE)
    x[torch.tensor([0, 1])]
    x.double()
    torch.tensor([1.0, 2.0], device=DEVICE)
    torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
    assert kinds(accelerator) == ["upload", "upload", "double", "upload", "send"]


def test_a_value_that_was_sent_is_read_without_a_wait(accelerator):
    """methods/session.py: a copy that nobody waits for, then only its own event."""
    sent = Sent(0, torch.arange(3, device=DEVICE))
    assert kinds(accelerator) == ["send"] and accelerator.transfers[0].ours
    assert sent.read() == [0, 1, 2] and kinds(accelerator) == ["send", "settle"]


def test_nothing_stays_when_it_is_closed(accelerator):
    accelerator.__exit__(None, None, None)
    try:
        assert type(torch.ones(2) + 1) is torch.Tensor
    finally:
        accelerator.__enter__()
