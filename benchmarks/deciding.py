"""What Adaptive Guidance and LinearAG cost a sampler step, as a share of the model evaluation that the step makes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..methods.guidance.adaptive import AdaptiveGuidance, AdaptiveSession
from ..methods.guidance.linear import LinearAG, LinearSession
from ..methods.guidance.session import GuidanceSession
from .measure import Seconds, alternate, median
from .sd15 import forward_of, sampled

STEPS = 40
LED = range(1, STEPS // 2)  # steps in which LinearAG keeps or foretells; the first one begins the run
NEVER = 2.0  # a threshold that no similarity reaches: every step decides, none is saved


def sessions() -> dict[str, Callable[[], GuidanceSession]]:
    """Sessions that decide in every step. Coefficients may be anything: to use them takes the same time."""
    rows = tuple((0.0,) * (2 * call) + (1.0, 0.0) for call in range(STEPS))
    return {"AdaptiveGuidance": lambda: AdaptiveSession(AdaptiveGuidance(NEVER), exact=False),
            "AdaptiveGuidance, x0": lambda: AdaptiveSession(AdaptiveGuidance(NEVER, "x0"), exact=False),
            "LinearAG": lambda: LinearSession(LinearAG(rows, tuple(range(STEPS))))}


def guided(model, make: Callable[[], GuidanceSession]):
    """The MODEL as the node would give it."""
    from ..host.guidance.apply import Guidance, apply_guidance

    return apply_guidance(model, Guidance("benchmark", lambda model, context, tell: make()))


def stand_in(model, x: Tensor):
    """The MODEL with its forward replaced by a constant of the right shape: what is left of a step is the host."""
    answer = torch.randn(8, *x.shape[1:], generator=torch.Generator().manual_seed(0)).to(model.load_device)
    cheap = model.clone()
    cheap.set_model_unet_function_wrapper(lambda apply, args: answer[:args["input"].shape[0]].to(args["input"]))
    return cheap


class Run:
    """Sampler runs of a MODEL; `steps`: the mean of the steps in LED of each run."""

    def __init__(self, model, conds: list, noise: Tensor):
        self.model, self.conds, self.noise = model, conds, noise
        self.steps: list[Seconds] = []

    def __call__(self) -> None:
        _, times = sampled(self.model, *self.conds, self.noise, STEPS)
        self.steps.append(Seconds(*(sum(each) / len(LED) for each in zip(*(times[i] for i in LED), strict=True))))


def bench_deciding(model, conds: list, noise: Tensor, repeats: int) -> dict[str, dict[str, float]]:
    """Per policy: seconds that a step takes beyond a step without guidance's node, both with a stand-in for the model,
    seconds of the forward of a step (the positive and the negative of one picture), and the share of the one in the
    other. The median of `repeats` runs."""
    import comfy.model_management

    device = model.load_device
    comfy.model_management.load_models_gpu([model])
    whole = alternate({"forward": forward_of(model, conds, noise, 1)}, 3, device)["forward"]
    cheap = stand_in(model, noise)
    runs = {name: Run(guided(cheap, make), conds, noise) for name, make in sessions().items()}
    plain = Run(cheap, conds, noise)
    alternate({**runs, "plain": plain}, repeats, device)
    without = median(plain.steps)
    found = {}
    for name, run in runs.items():
        with_it = median(run.steps)
        found[name] = {"seconds": with_it.wall - without.wall, "host_seconds": without.wall,
                       "forward_seconds": whole.wall, "share": (with_it.wall - without.wall) / whole.wall,
                       "cpu_share": (with_it.cpu - without.cpu) / whole.cpu}
    return found
