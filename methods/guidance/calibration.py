"""Calibration of guidance: paths on which every negative is seen, sums over them, and the coefficients they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels.branch import Step
from ...kernels.guidance import cosine, least_squares, products, similarity_terms
from ..counted import counted
from .adaptive import SPACES
from .linear import LinearAG, LinearSession
from .session import FULL, Need, Tell, noise_of

CALLS = 1000
"""Model calls of a path, at most. The sums of a path take their square, and the solve their fourth power: on one core
0.04 s at 50, 13 s at 500 and minutes at this number."""
LARGEST = 1e6
"""No coefficient is larger: on predictions that are alike at all they are of the order of 1."""


class CalibrationSession(LinearSession):
    """One sampled path: both sides of every call up to the last one that has a negative.

    policy   the path is the one that LinearAG leads along, with what it foretells; None: that of full guidance
    """

    def __init__(self, policy: LinearAG | None = None, tell: Tell | None = None):
        super().__init__(policy, tell)
        self.targets: list[Tensor] = []  # u_0, u_1, ... in noise space, as the model says it
        self.gamma: dict[str, list[Tensor]] = {space: [] for space in SPACES}  # similarity per call, [B] each
        self._need = FULL

    def begin(self, step: Step, pictures: int = 1, windowed: bool = False) -> Need:
        """As LinearAG, but every negative that it foretells is evaluated as well. Raises ValueError after CALLS calls.
        """
        if len(self.steps) >= CALLS:
            raise ValueError(f"Calibrate Guidance: the sampler calls the model more than {CALLS:,} times on one path. "
                             "Lower steps, or choose another sampler.")
        if self.policy is None:
            self.steps.append(step.index)
            self._windowed = windowed
            return FULL
        need = super().begin(step, pictures, windowed)
        self._need = replace(need, watch=need.guided)
        return self._need

    def keep(self, x: Tensor, c: Tensor, negatives: Mapping[str, Tensor], sigma: Tensor) -> None:
        """Remember the negative as a target, and how like the conditional prediction it is."""
        if self._windowed:
            return
        (u,) = negatives.values()
        sides = noise_of(x, c, sigma), noise_of(x, u, sigma)
        self.targets.append(sides[1])
        self.gamma["noise"].append(cosine(similarity_terms(*sides)))
        self.gamma["x0"].append(cosine(similarity_terms(c, u)))
        if self._need.rows is None:
            self.features += sides


@dataclass(frozen=True)
class Calibration:
    """What calibration found.

    coefficients   [calls, 2 calls + 1] float64, as LinearAG takes them
    steps          the step that each call belongs to
    r2             [calls]: 1 - |u - u^|^2 / |u - c|^2, how much of the guidance direction is foretold: 1 all of it,
                   0 no more than with the conditional prediction in the negative's place
    gamma          space -> [paths, calls]: similarity curves under full guidance
    """

    coefficients: Tensor
    steps: tuple[int, ...]
    r2: Tensor
    gamma: dict[str, Tensor]

    def check(self) -> None:
        """Raises ValueError where this is not what a calibration can find: the message says which part is wrong."""
        calls = len(self.steps)
        if not 1 <= calls <= CALLS:
            raise ValueError(f"{calls} model calls, where there are 1 to {CALLS}")
        if any(earlier > later for earlier, later in zip((0, *self.steps), self.steps, strict=False)):
            raise ValueError("the steps of its calls do not follow each other")
        shapes = {"coefficients": (self.coefficients, (calls, 2 * calls + 1)), "r2": (self.r2, (calls,))}
        for space in SPACES:
            if space not in self.gamma:
                raise ValueError(f"no similarities of {space}")
            curves = self.gamma[space]
            shapes[f"gamma.{space}"] = curves, (*curves.shape[:1], calls)
            if not len(curves):
                raise ValueError(f"gamma.{space} has no path")
        for name, (values, shape) in shapes.items():
            if tuple(values.shape) != shape:
                raise ValueError(f"{name} has the shape {list(values.shape)} instead of {list(shape)}")
            if not values.is_floating_point() or not values.isfinite().all():
                raise ValueError(f"{name} holds values that are not numbers")
        if (self.coefficients.abs() > LARGEST).any():
            raise ValueError(f"coefficients larger than {LARGEST:g}")
        if any(row[2 * n + 1:-1].any() for n, row in enumerate(self.coefficients)):
            raise ValueError("coefficients of predictions that are not yet made")
        if any((curve.abs() > 1 + 1e-3).any() for curve in self.gamma.values()):
            raise ValueError("similarities beyond 1")

    def policy(self) -> LinearAG:
        """LinearAG with these coefficients."""
        return LinearAG(tuple(map(tuple, self.coefficients.tolist())), self.steps)

    def by_step(self, space: str) -> Tensor:
        """Similarity at the first call of each step, the one that decides: [paths, steps]."""
        return self.gamma[space][:, [self.steps.index(step) for step in sorted(set(self.steps))]]

    def refitted(self, equations: NormalEquations, total: int, intercept: bool,
                 progress: Callable[[int, int], None] | None = None) -> Calibration:
        """With the coefficients of the predicted calls of `total` steps taken from paths that LinearAG itself has led;
        those end with the last call that had a negative."""
        coefficients, r2 = equations.solve(intercept, progress=progress)
        kept, kept_r2 = self.coefficients.clone(), self.r2.clone()
        for call in range(len(r2)):
            if LinearAG.kind_at(self.steps[call], total) == "predicted":
                kept[call, :2 * call + 1], kept[call, -1] = coefficients[call, :2 * call + 1], coefficients[call, -1]
                kept_r2[call] = r2[call]
        return replace(self, coefficients=kept, r2=kept_r2)


class NormalEquations:
    """Gram matrix of all features and their products with all targets, added up path by path in float64; no path is
    kept. Features of a path of E calls are c_0, u_0, .., c_{E-1}, u_{E-1} and the constant 1.

    Source: ordinary least squares of LinearAG's section; the sums need each path once.
    """

    def __init__(self):
        self.gram = torch.zeros(0, 0, dtype=torch.float64)
        self.cross = torch.zeros(0, 0, dtype=torch.float64)  # [calls, features]
        self.energy = torch.zeros(0, dtype=torch.float64)  # [calls]: <target, target>

    def add(self, features: list[Tensor], targets: list[Tensor]) -> None:
        """Paths of one batch: 2E features and E targets of shape [B, ...] each, on any device; summed on the CPU, as
        not every accelerator has float64.

        Raises ValueError where the number of calls differs from that of earlier paths.
        """
        f, t = (torch.stack([each.cpu() for each in tensors]) for tensors in (features, targets))
        f = torch.cat([f, torch.ones_like(f[:1])])
        gram, cross = products(f, f), products(t, f)
        energy = torch.stack([products(each[None], each[None])[0, 0] for each in t])
        if not len(self.gram):
            self.gram, self.cross, self.energy = gram, cross, energy
        elif self.gram.shape != gram.shape:
            raise ValueError(f"the sampler called the model {counted(len(energy), 'time')} on one path and "
                             f"{len(self.energy)} on another")
        else:
            self.gram, self.cross, self.energy = self.gram + gram, self.cross + cross, self.energy + energy

    def solve(self, intercept: bool = False, ridge: float = 1e-6,
              progress: Callable[[int, int], None] | None = None) -> tuple[Tensor, Tensor]:
        """(coefficients [E, 2E + 1], r2 [E]); call n is foretold from c_0..c_n and u_0..u_{n-1}, 2n + 1 features.

        progress   (calls solved, of how many), before each of them: each takes the cube of its number of features, and
                   what this raises stops the solve
        Raises ValueError where the sums are not numbers.
        """
        calls = len(self.energy)
        if not all(sums.isfinite().all() for sums in (self.gram, self.cross, self.energy)):
            raise ValueError("Calibrate Guidance: the model predicted values that are not numbers (NaN or infinite). "
                             "Sample a picture with these settings and see what makes it so.")
        coefficients = torch.zeros(calls, 2 * calls + 1, dtype=torch.float64)
        r2 = torch.zeros(calls, dtype=torch.float64)
        for n in range(calls):
            if progress is not None:
                progress(n, calls)
            index = torch.tensor([*range(2 * n + 1), *([2 * calls] if intercept else [])])
            gram, cross = self.gram[index][:, index], self.cross[n, index]
            b = least_squares(gram, cross, ridge)
            coefficients[n, index] = b
            error = self.energy[n] - 2 * b @ cross + b @ gram @ b
            direction = self.energy[n] - 2 * self.cross[n, 2 * n] + self.gram[2 * n, 2 * n]
            r2[n] = 1 - error / direction if direction > 0 else 1.0
        return coefficients, r2
