"""Calibration: sample paths with full guidance; learn how alike the two sides are and how one foretells the other."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher

from ...methods.counted import counted, verb
from ...methods.guidance.adaptive import SPACES
from ...methods.guidance.calibration import CALLS, Calibration, CalibrationSession, NormalEquations
from ...methods.guidance.linear import LinearAG
from ...methods.guidance.session import Tell
from ...methods.session import RunContext
from ..compose.earlier import parts_of_latent
from .apply import Guidance, apply_guidance
from .coeffs import GuidanceCoeffs
from .identity import describe_kind, describe_model
from .options import ADAPTIVE

EVALUATED = 2**22
"""Steps of all paths together, at most: what is kept of each is a few numbers."""
log = logging.getLogger("lora_ensemble")


@dataclass(frozen=True)
class Paths:
    """What to sample: seeds x prompts, with the settings that the coefficients will be used with.

    positive     every entry of this CONDITIONING is one prompt
    latent       one latent [1, ...], or the host's nested one; only its shape counts where `denoise` is 1
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
        self.gamma: dict[str, list[torch.Tensor]] = {space: [] for space in SPACES}
        self.context: RunContext | None = None
        self.session: CalibrationSession | None = None
        self.steps: tuple[int, ...] = ()

    def begin(self, model: ModelPatcher, context: RunContext, tell: Tell) -> CalibrationSession:
        """The next batch of paths."""
        self.context, self.session = context, CalibrationSession(self.policy, tell)
        return self.session

    def collect(self) -> None:
        """The batch has been sampled: add what was seen. Raises ValueError where it made another number of calls."""
        session = self.session
        calls = len(session.targets)
        self.equations.add(session.features[:2 * calls], session.targets)
        self.steps = tuple(session.steps[:calls])
        for space, curve in session.gamma.items():
            self.gamma[space].append(torch.stack(curve, dim=1).cpu())


def calibrate(model, paths: Paths, on_policy: bool = False, intercept: bool = False,
              progress: Callable[[], None] = lambda: None,
              solving: Callable[[int, int], None] = lambda done, calls: None) -> GuidanceCoeffs:
    """Coefficients and similarity curves from all paths.

    on_policy   sample a second round along LinearAG's own trajectories, and fit what it predicts to those
    progress    called after every sampling step
    solving     called before every solve for a model call: (solved, of how many)
    What it takes is logged before it begins. Raises ValueError where there is nothing to calibrate, or more than can
    be, and whatever stops sampling; it can be interrupted at any time.
    """
    if abs(paths.cfg - 1) < 1e-6:
        raise ValueError("Calibrate Guidance: at cfg 1 no negative is evaluated, so there is nothing to calibrate. "
                         "Set cfg to the value that you sample with.")
    if paths.denoise <= 0:
        raise ValueError("Calibrate Guidance: at denoise 0 nothing is sampled, so there is nothing to calibrate. Set "
                         "denoise to the value that you sample with.")
    if paths.sampler_name == ADAPTIVE:
        raise ValueError(f"Calibrate Guidance: {ADAPTIVE} decides itself how often it calls the model, for each "
                         "picture anew. Use a sampler whose number of calls is fixed.")
    log.info("Calibrate Guidance: %s", cost(paths, 1 + on_policy))

    def solve(done: int, calls: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        solving(done, calls)

    first = _round(model, paths, None, progress)
    coefficients, r2 = first.equations.solve(intercept, progress=solve)
    found = Calibration(coefficients, first.steps, r2,
                        {space: torch.cat(curves) for space, curves in first.gamma.items()})
    if on_policy:
        second = _round(model, paths, found.policy(), progress)
        found = found.refitted(second.equations, first.context.total, intercept, solve)
    run = first.context
    coeffs = GuidanceCoeffs(describe_model(model), run.sampler, run.sigmas, run.cfg, found, describe_kind(model))
    try:
        coeffs.check_whole()
    except ValueError as error:
        raise ValueError(f"Calibrate Guidance: what was found is of no use: {error}. Sample a picture with these "
                         "settings and see whether it is as it should be.") from None
    return coeffs


def cost(paths: Paths, rounds: int) -> str:
    """What a calibration takes, in words. Raises ValueError where that is more than can be."""
    count = len(paths.positive) * paths.seeds
    if not count:
        raise ValueError("Calibrate Guidance: there is no prompt. Connect at least one conditioning to 'positive'.")
    if paths.steps > CALLS or count * paths.steps > EVALUATED:
        raise ValueError(f"Calibrate Guidance: {counted(count, 'path')} of {counted(paths.steps, 'step')} "
                         f"{verb(count, 'are')} more than can be solved: "
                         f"at most {CALLS:,} steps, and {EVALUATED:,} of all paths. Lower steps or seeds.")
    evaluations = 2 * rounds * count * paths.steps
    numbers = sum(math.prod(part.shape[1:]) for part in parts_of_latent(paths.latent))
    kept = 2 * paths.steps * min(paths.batch, paths.seeds) * numbers * 4
    memory = comfy.model_management.get_total_memory(torch.device("cpu"))
    if kept > memory:
        raise ValueError(f"Calibrate Guidance: the predictions of {counted(min(paths.batch, paths.seeds), 'path')} of "
                         f"{counted(paths.steps, 'step')} at a time take {kept / 2**30:,.0f} GB, and this machine has "
                         f"{memory / 2**30:,.0f}. Lower batch_size, steps or the size of the latent.")
    return (f"{counted(count, 'path')} of {counted(paths.steps, 'step')}, {counted(evaluations, 'evaluation')} of the "
            f"model or more, {kept / 2**30:.2f} GB for the predictions of "
            f"{counted(min(paths.batch, paths.seeds), 'path')} at a time")


def _round(model, paths: Paths, policy: LinearAG | None, progress: Callable[[], None]) -> _Collector:
    collector = _Collector(policy)
    guided = apply_guidance(model, Guidance("calibration", collector.begin))
    for prompt in paths.positive:
        for start in range(0, paths.seeds, paths.batch):
            comfy.model_management.throw_exception_if_processing_interrupted()
            seeds = [(paths.seed + k) % 2**64 for k in range(start, min(start + paths.batch, paths.seeds))]
            # A path is the same whatever it is batched with: every one has the noise of its own seed.
            noise = _batch([comfy.sample.prepare_noise(paths.latent, seed) for seed in seeds])
            comfy.sample.sample(guided, noise, paths.steps, paths.cfg, paths.sampler_name, paths.scheduler, [prompt],
                                paths.negative, _batch([paths.latent] * len(seeds)), denoise=paths.denoise,
                                seed=seeds[0], disable_pbar=True, callback=lambda *_: progress())
            if not collector.session.targets:
                raise ValueError("Calibrate Guidance: this model was sampled without evaluating a negative; there is "
                                 "nothing to calibrate.")
            try:
                collector.collect()
            except ValueError as error:
                raise ValueError(f"Calibrate Guidance: {error}. Coefficients need a sampler whose number of calls is "
                                 "fixed; choose another one.") from None
    return collector


def _batch(latents: Sequence):
    """Latents as one batch, part by part."""
    parts = [torch.cat(same) for same in zip(*map(parts_of_latent, latents), strict=True)]
    return type(latents[0])(parts) if latents[0].is_nested else parts[0]
