"""What is kept of the programs of a run is used where it was made for, and nowhere else: each call of many is as in a
run of its own."""

from __future__ import annotations

from random import Random

import pytest
import torch
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.engine.positions import Places, Segment
from lora_ensemble.kernels.branch import Branch
from lora_ensemble.tests.reference import make_ops
from lora_ensemble.tests.test_positions import ALL, ALONE, maps
from torch import Tensor, nn

GAINS = (ALL, ALONE[1], Branch((0.7, 0.2, 1.1)), Branch((0.7, 0.2, 0.4)))


class Widening(nn.Linear):
    """A layer that computes in float32 whatever it gets, as some norms and embeddings do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def placed(seed: int, rows: tuple[int, ...]) -> Places | None:
    """The picture has as many tokens as there are, or stands before a text."""
    if not seed:
        return None

    def locate(name: str, tokens: int) -> tuple[Segment, ...]:
        return Segment("picture", 16, (1, 4, 4)), *([Segment("other", tokens - 16)] if tokens > 16 else [])

    return Places(maps(2, seed=seed), rows, locate=locate)


def drawn(layer: nn.Module, kinds, calls: list) -> list[Tensor]:
    """What a layer gives in these calls of one run, in which equal places are one object."""
    root, out, known = nn.Sequential(layer), [], {}
    bank = Bank([{"0": make_ops(kind, layer.weight.shape, seed)[0]} for seed, kind in enumerate(kinds)])
    routed = RoutedForwards(root, bank)
    routed.install()
    try:
        for branches, where, x in calls:
            known.setdefault(where, placed(*where))
            with torch.no_grad(), routed.rows(branches, known[where]):
                out.append(root(x))
    finally:
        routed.remove()
    return out


@pytest.mark.parametrize("kinds", [("lora", "lora wide", "lora"), ("lora", "dense", "lora+bias"),
                                   ("lora", "dora out", "lora")], ids="/".join)
@pytest.mark.parametrize("kind", [nn.Linear, Widening])
def test_each_call_is_as_in_a_run_of_its_own(kind, kinds):
    """Of other gains, places, orders of rows, numbers of tokens, and dtypes of what comes in."""
    torch.manual_seed(0)
    random, layer = Random(1), kind(6, 8)
    dtypes = (torch.float32, torch.bfloat16) if kind is Widening else (torch.float32,)
    places = [(0, ()), *((seed, rows) for seed in (1, 2) for rows in ((0, 1), (1, 0)))]
    calls = []
    for _ in range(60):
        x = torch.randn(2, random.choice((16, 32)), 6).to(random.choice(dtypes))
        calls.append(([random.choice(GAINS) for _ in range(2)], random.choice(places), x))
    for found, call in zip(drawn(layer, kinds, calls), calls, strict=True):
        (want,) = drawn(layer, kinds, [call])
        assert found.dtype is want.dtype and torch.equal(found, want)
