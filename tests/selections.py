"""Random LoRAs as pairs, the two methods that choose between them, and who acts where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lora_ensemble.engine.adapters import LowRank
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.sizes import measure
from lora_ensemble.kernels.branch import Branch, Step
from lora_ensemble.methods.est import ESTLoRA
from lora_ensemble.methods.klora import KLoRA
from lora_ensemble.methods.session import RunContext

LAYERS = {"q": (24, 32), "k": (48, 40), "v": (64, 16), "ff": (96, 64), "conv": (16, 12, 3, 3), "out": (40, 24)}
PAIR = (True, False)
STEPS = 37


@dataclass
class Lora:
    """One random LoRA: ops for the bank, and its dense deltas in float64 (alpha/rank in or out)."""

    ops: dict[str, list[LowRank]]
    rank: int

    @classmethod
    def random(cls, seed: int, rank: int, layers=LAYERS, size: float = 1.0, alpha: float | None = None,
               louder=None) -> Lora:
        g, ops = torch.Generator().manual_seed(seed), {}
        for name, (out, *rest) in layers.items():
            spread = torch.exp(0.6 * torch.randn(1, generator=g)) * (louder or {}).get(name, 1.0)
            up, down = torch.randn(out, rank, generator=g), torch.randn(rank, *rest, generator=g)
            ops[name] = [LowRank(size * spread * up, down, 1.0 if alpha is None else alpha / rank)]
        return cls(ops, rank)

    def dense(self, layer: str, raw: bool = False) -> np.ndarray:
        (op,) = self.ops[layer]
        up, down = op.up.double().numpy(), op.down.double().flatten(1).numpy()
        return up @ down * (1.0 if raw else op.scale)


def bank(*loras: Lora) -> Bank:
    return Bank([lora.ops for lora in loras])


def branch_of(method, step: Step) -> Branch:
    (branch,) = method.begin(RunContext(sigmas=tuple(range(step.total, -1, -1)))).branches(step)
    return branch


def chosen(method, layers, step: Step) -> list[int]:
    """Per layer, the LoRA that acts; exactly one does."""
    branch = branch_of(method, step)
    out = []
    for layer in layers:
        acting = [i for i, gain in enumerate(branch.at(layer)) if gain]
        assert len(acting) == 1
        out.append(acting[0])
    return out


def schedule(method, layers=LAYERS, steps: int = STEPS) -> np.ndarray:
    """[step, layer] -> who acts."""
    return np.array([chosen(method, layers, Step(j, steps, 0.0)) for j in range(steps)])


def klora(loras, strengths=(1.0, 1.0), subjects=PAIR, k: int = 0, raw: bool = False, **options) -> KLoRA:
    return KLoRA.of(measure(bank(*loras), subjects, k, raw), strengths, subjects, raw=raw, **options)


def est(loras, strengths=(1.0, 1.0), subjects=PAIR, **options) -> ESTLoRA:
    return ESTLoRA.of(measure(bank(*loras), subjects), strengths, subjects, **options)


PAIRS = {
    "alike": lambda: (Lora.random(1, 4), Lora.random(2, 8)),
    "unequal strength and alpha": lambda: (Lora.random(3, 4, size=0.2, alpha=1.0), Lora.random(4, 2, alpha=16.0)),
    "an outlier": lambda: (Lora.random(5, 8, louder={"k": 30.0}), Lora.random(6, 4, size=3.0)),
}
each_pair = pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)


def top(x: np.ndarray, k: int) -> float:
    return float(np.sort(np.abs(x).reshape(-1))[::-1][:k].sum())


def varies(found: np.ndarray) -> bool:
    return 0 < found.mean() < 1
