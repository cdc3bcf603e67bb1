"""What the weights of LoRAtorio and the spectrum of CMLoRA cost, as a share of the model evaluations of their step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.branch import Step
from ..methods.cmlora import CMLoRA
from ..methods.loratorio import LoRAtorio
from ..methods.session import POSITIVE, UNCONDITIONAL, Call, RunContext, Session
from .measure import alternate
from .models import forward_of

STEPS = 1000


def methods(count: int) -> dict[str, LoRAtorio | CMLoRA]:
    ones = (1.0,) * count
    return {"LoRAtorio": LoRAtorio(ones), "LoRAtorio, bilinear": LoRAtorio(ones, upsampling="bilinear"),
            "LoRAtorio, pool": LoRAtorio(ones, top_k=max(count // 2, 1), recheck_every=3),
            "CMLoRA": CMLoRA(ones), "CMLoRA, online": CMLoRA(ones, order="online")}


class Mixing:
    """The host's calls of a session, step by step, on random predictions of the run's shape."""

    def __init__(self, session: Session, x: Tensor):
        self.session, self.x, self.index = session, x, 0
        self.predictions: dict[int, list[Tensor]] = {}

    def __call__(self) -> None:
        step = Step(self.index % STEPS, STEPS, 1.0)
        self.index += 1
        self.session.observe(step, self.x)
        branches = self.session.branches(step)
        if len(branches) not in self.predictions:
            shape = (len(branches), *self.x.shape)
            self.predictions[len(branches)] = [torch.randn(shape, device=self.x.device) for _ in range(2)]
        both = self.predictions[len(branches)]
        self.session.mix(step, Call(self.x, torch.ones(1, device=self.x.device), branches, both,
                                    (POSITIVE, UNCONDITIONAL)))


def bench_mixing(model, conds: list, count: int, noise: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Per method: seconds of observing, naming branches and mixing (all steps together over their number), seconds of
    the forwards that a step takes (2 N rows, the least of any), and the share of the one in the other."""
    import comfy.model_management

    device = model.load_device
    comfy.model_management.load_models_gpu([model])
    x = noise.to(device)
    context = RunContext(tuple(float(i) for i in range(STEPS, -1, -1)), tuple(1 - i / STEPS for i in range(STEPS)),
                         tuple(x.shape))
    arms = {name: Mixing(method.begin(context), x) for name, method in methods(count).items()}
    seconds = alternate({**arms, "forward": forward_of(model, conds, noise, count)}, repeats, device, warmups=3)
    whole = seconds.pop("forward")
    return {name: {"seconds": one.wall, "forward_seconds": whole.wall, "share": one.wall / whole.wall,
                   "cpu_share": one.cpu / whole.cpu} for name, one in seconds.items()}
