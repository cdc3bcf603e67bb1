"""What Adaptive Guidance and LinearAG cost a sampler step, as a share of the model evaluation that the step makes, and
what they save."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..methods.guidance.adaptive import AdaptiveGuidance, AdaptiveSession
from ..methods.guidance.linear import LinearAG, LinearSession
from ..methods.guidance.session import GuidanceSession
from .measure import Seconds, alternate, median, total
from .models import forward_of, sampled

STEPS = 40
LED = range(1, STEPS // 2)  # steps in which LinearAG keeps or foretells; the first one begins the run
NEVER = 2.0  # a threshold that no similarity reaches: every step decides, none is saved


def half_saved(steps: int) -> Callable[[], AdaptiveSession]:
    """Adaptive Guidance as it is meant to be used: the second half of the steps without a negative, a quarter of all
    evaluations. The threshold is reached whatever the predictions are, since these are those of random weights."""
    return lambda: AdaptiveSession(AdaptiveGuidance(-NEVER, min_steps=steps // 2), exact=False)


def linear(steps: int) -> Callable[[], LinearSession]:
    """LinearAG with coefficients that may be anything: to use them takes the same time."""
    rows = tuple((0.0,) * (2 * call) + (1.0, 0.0) for call in range(steps))
    return lambda: LinearSession(LinearAG(rows, tuple(range(steps))))


def sessions() -> dict[str, Callable[[], GuidanceSession]]:
    """Sessions that decide in every step."""
    return {"AdaptiveGuidance": lambda: AdaptiveSession(AdaptiveGuidance(NEVER), exact=False),
            "AdaptiveGuidance, x0": lambda: AdaptiveSession(AdaptiveGuidance(NEVER, "x0"), exact=False),
            "LinearAG": linear(STEPS)}


def guided(model, make: Callable[[], GuidanceSession]):
    """The MODEL as the node would give it."""
    from ..host.guidance.apply import Guidance, apply_guidance

    return apply_guidance(model, Guidance("benchmark", lambda model, context, tell: make()))


def bench_saving(model, conds: list, noise: Tensor, steps: int, rounds: int) -> dict[str, dict[str, float]]:
    """Per policy: seconds of all steps of a run but the first, those of the same run with guidance throughout, and the
    quotient, medians of `rounds` runs."""
    arms = {"CFG": model, "AdaptiveGuidance": guided(model, half_saved(steps)),
            "LinearAG": guided(model, linear(steps))}
    runs: dict[str, list[Seconds]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            runs[name].append(total(sampled(arm, *conds, noise, steps)[1][1:]))
    seconds = {name: median(each) for name, each in runs.items()}
    whole = seconds.pop("CFG")
    return {name: {"ratio": whole.wall / one.wall, "cpu_ratio": whole.cpu / one.cpu, "seconds": one.wall,
                   "whole_seconds": whole.wall, "steps": steps} for name, one in seconds.items()}


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
