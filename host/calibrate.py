"""Calibration: sample paths with full guidance; learn how alike the two sides are and how one foretells the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import torch

from ..engine.calibration import Calibration, NormalEquations
from ..engine.guidance import LinearState
from ..methods.guidance import LinearAG
from .coeffs import CoeffsError, GuidanceCoeffs
from .guidance import Guidance, apply_guidance
from .identity import describe_model
from .run_info import RunInfo


@dataclass(frozen=True)
class Paths:
    """What to sample: seeds x prompts, with the settings that the coefficients will be used with.

    positive     every entry of this CONDITIONING is one prompt
    latent       one latent [1, ...]; only its shape counts where `denoise` is 1
    seeds        paths per prompt, with seed, seed + 1, ..
    batch        paths sampled at a time
    """

    positive: list
    negative: list
    latent: torch.Tensor
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float
    seed: int
    seeds: int
    batch: int


class _Collector:
    """One round over all paths: the sums, the similarity curves, and the run that they belong to."""

    def __init__(self, policy: LinearAG | None):
        self.policy = policy
        self.equations = NormalEquations()
        self.gamma: dict[str, list[torch.Tensor]] = {"noise": [], "x0": []}
        self.info: RunInfo | None = None
        self.steps: tuple[int, ...] = ()

    def begin(self, info: RunInfo) -> tuple[LinearState, None]:
        self.info, self.state = info, LinearState(self.policy, watch=True)
        return self.state, None

    def collect(self) -> None:
        state = self.state
        calls = len(state.targets)
        self.equations.add(state.features[:2 * calls], state.targets)
        self.steps = tuple(state.steps[:calls])
        for space, curve in state.gamma.items():
            self.gamma[space].append(torch.stack(curve, dim=1).cpu())


def calibrate(model, paths: Paths, on_policy: bool = False, intercept: bool = False,
              progress: Callable[[], None] = lambda: None) -> GuidanceCoeffs:
    """Coefficients and similarity curves from all paths.

    on_policy   sample a second round along LinearAG's own trajectories, and fit what it predicts to those
    progress    called after every sampling step
    Raises CoeffsError where there is nothing to calibrate, and whatever stops sampling.
    """
    if abs(paths.cfg - 1) < 1e-6:
        raise CoeffsError("Calibrate Guidance: at cfg 1 no negative is evaluated, so there is nothing to calibrate. "
                          "Set cfg to the value that you sample with.")
    if paths.denoise <= 0:
        raise CoeffsError("Calibrate Guidance: at denoise 0 nothing is sampled, so there is nothing to calibrate. Set "
                          "denoise to the value that you sample with.")
    first = _round(model, paths, None, progress)
    coefficients, r2 = first.equations.solve(intercept)
    found = Calibration(coefficients, first.steps, r2,
                        {space: torch.cat(curves) for space, curves in first.gamma.items()})
    if on_policy:
        second = _round(model, paths, found.policy(), progress)
        found = found.refitted(second.equations, len(first.info.sigmas) - 1, intercept)
    info = first.info
    return GuidanceCoeffs(describe_model(model), info.sampler, info.sigmas, info.cfg, found)


def _round(model, paths: Paths, policy: LinearAG | None, progress: Callable[[], None]) -> _Collector:
    collector = _Collector(policy)
    guided = apply_guidance(model, Guidance("calibration", collector.begin))
    for prompt in paths.positive:
        for start in range(0, paths.seeds, paths.batch):
            comfy.model_management.throw_exception_if_processing_interrupted()
            seeds = range(paths.seed + start, paths.seed + min(start + paths.batch, paths.seeds))
            # A path is the same whatever it is batched with: every one has the noise of its own seed.
            noise = torch.cat([comfy.sample.prepare_noise(paths.latent, seed) for seed in seeds])
            comfy.sample.sample(guided, noise, paths.steps, paths.cfg, paths.sampler_name, paths.scheduler, [prompt],
                                paths.negative, paths.latent.repeat(len(seeds), *[1] * (paths.latent.ndim - 1)),
                                denoise=paths.denoise, seed=seeds[0], disable_pbar=True,
                                callback=lambda *_: progress())
            if not collector.state.targets:
                raise CoeffsError("Calibrate Guidance: this model was sampled without evaluating a negative; there is "
                                  "nothing to calibrate.")
            try:
                collector.collect()
            except ValueError as error:
                raise CoeffsError(f"Calibrate Guidance: {error}. Coefficients need a sampler whose number of calls is "
                                  "fixed; choose another one.") from None
    return collector
