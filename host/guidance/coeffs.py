"""Calibrated guidance: what it was fitted on, and whether it fits a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from comfy.model_patcher import ModelPatcher

from ...methods.counted import counted
from ...methods.guidance.calibration import Calibration
from ...methods.guidance.linear import LinearAG
from ...methods.guidance.session import Tell
from ...methods.session import RunContext
from .identity import describe_kind, describe_model


@dataclass(frozen=True)
class GuidanceCoeffs:
    """What travels on a GUIDANCE_COEFFS socket.

    model     the model it was calibrated on, as `describe_model` names it
    sampler   name of the sampler's function with its options
    sigmas    the schedule, with the final 0
    kind      the model as `describe_kind` names it; empty for files that do not know it
    """

    model: str
    sampler: str
    sigmas: tuple[float, ...]
    cfg: float
    found: Calibration
    kind: str = ""

    def check_whole(self) -> None:
        """Raises ValueError where this is not what a calibration can find: the message says which part is wrong."""
        self.found.check()
        if not math.isfinite(self.cfg):
            raise ValueError("its cfg is no number")
        if len(self.sigmas) < 2 or not all(math.isfinite(sigma) and sigma >= 0 for sigma in self.sigmas):
            raise ValueError("its schedule holds values that are not noise levels")
        if any(later > earlier for earlier, later in zip(self.sigmas, self.sigmas[1:], strict=False)):
            raise ValueError("its schedule rises")
        if max(self.found.steps) > len(self.sigmas) - 2:
            raise ValueError("it has more steps than its schedule")

    def other_strengths(self, model: ModelPatcher) -> bool:
        """Whether a MODEL has the LoRAs that this was calibrated with, at other strengths or settings."""
        return bool(self.kind) and describe_model(model) != self.model and describe_kind(model) == self.kind

    def begins(self, run: RunContext) -> int | None:
        """The step of this schedule at which a run begins that goes along it: all of it, or one of the runs in which a
        picture is sampled. None: it does not."""
        own, size = torch.tensor(self.sigmas), len(run.sigmas)
        at = range(len(own) - size + 1) if run.whole else (0,) if size == len(own) else ()
        return next((k for k in at if torch.allclose(torch.tensor(run.sigmas), own[k:k + size], rtol=1e-3, atol=1e-6)),
                    None)

    def differences(self, model: ModelPatcher, run: RunContext) -> list[str]:
        """How a run of a MODEL differs from what this was calibrated on, in words, other strengths and settings of
        its LoRAs left out; empty where it does not."""
        out = []
        if (here := describe_model(model)) != self.model and not self.other_strengths(model):
            out.append(f"model '{self.model}', here '{here}'")
        if run.sampler != self.sampler:
            out.append(f"sampler {self.sampler}, here {run.sampler}")
        if self.begins(run) is not None:
            pass
        elif len(run.sigmas) != len(self.sigmas):
            out.append(f"{counted(len(self.sigmas) - 1, 'step')}, here {len(run.sigmas) - 1}")
        else:
            out.append(f"a schedule from {self.sigmas[0]:.4g} to {self.sigmas[-2]:.4g}, here another one, from "
                       f"{run.sigmas[0]:.4g} to {run.sigmas[-2]:.4g}")
        if run.cfg is None or abs(run.cfg - self.cfg) > 1e-4:
            out.append(f"cfg {self.cfg:g}, here {'none' if run.cfg is None else format(run.cfg, 'g')}")
        return out

    def check(self, model: ModelPatcher, run: RunContext, nearest: bool, tell: Tell) -> None:
        """Raises ValueError where it does not fit a run of a MODEL; `nearest`: tells what differs and lets it pass, as
        it does with other strengths and settings of the same LoRAs in any case."""
        if self.other_strengths(model):
            tell("the guidance coefficients were calibrated with other strengths of the LoRAs, or other settings: "
                 f"'{self.model}', here '{describe_model(model)}'. They fit less well; calibrate again if the "
                 "difference is large")
        differences = self.differences(model, run)
        if not differences:
            return
        text = "the guidance coefficients were calibrated for " + "; ".join(differences)
        if not nearest:
            raise ValueError(f"Adaptive Guidance: {text}. Calibrate with these settings (Calibrate Guidance), or set "
                              "if_different to 'nearest' to use them all the same.")
        tell(text)

    def linear(self, sigmas: tuple[float, ...]) -> LinearAG:
        """LinearAG's policy for a schedule: as calibrated where the number of steps agrees, else every call stands for
        the calibrated one nearest in noise level, and the weights of calls that fall together are added."""
        policy = self.found.policy()
        if len(sigmas) == len(self.sigmas):
            return policy
        if len(set(self.found.steps)) != len(self.found.steps):
            raise ValueError("Adaptive Guidance: coefficients of a sampler that calls the model several times in a "
                              "step cannot be used with another number of steps. Calibrate with this number.")
        here, there = sigmas[:-1], [self.sigmas[step] for step in self.found.steps]
        nearest_there = [min(range(len(there)), key=lambda k: abs(there[k] - sigma)) for sigma in here]
        rows = []
        for n, twin in enumerate(nearest_there):
            row = [0.0] * (2 * len(here) + 1)
            for k in range(twin + 1):
                near = min(range(n + 1), key=lambda i: abs(here[i] - there[k])) if k < twin else n
                row[2 * near] += policy.coefficients[twin][2 * k]
                if k < twin and n:
                    row[2 * min(near, n - 1) + 1] += policy.coefficients[twin][2 * k + 1]
            row[-1] = policy.coefficients[twin][-1]
            rows.append(tuple(row))
        return LinearAG(tuple(rows), tuple(range(len(here))))
