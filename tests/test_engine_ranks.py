"""Ranks that make slow products, as files that were resized by their singular values have them, are filled up with
zeros: what is held then, which products there are, and that they give the same."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from lora_ensemble.engine import products, ways
from lora_ensemble.engine.adapters import LowRank, Span
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.engine.products import Rates
from lora_ensemble.kernels.branch import Branch, one_hot
from lora_ensemble.tests.reference import close
from torch import Tensor, nn

IN, OUT, TOKENS = 12, 6, 5
HELD = {(4,): 4, (8,): 8, (9,): 16, (1, 2, 3): 6, (3, 3, 3): 16, (4, 4, 4, 4, 4): 24, (13, 16, 15): 48, (1, 2, 20): 32,
        (20, 2, 1): 32}
"""Ranks of adapters beside each other -> how many are held."""
DEAR = {"starting an operation": Rates(1.0, 0.0, 1e9, 1e9), "arithmetic": Rates(1e-9, 0.0, 1.0, 1e9)}
RANKS = pytest.mark.parametrize("ranks", HELD, ids=str)


def adapter(rank: int, seed: int, spans: Sequence[Span] = (None,)) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return [LowRank(torch.randn(OUT, rank, generator=generator), torch.randn(rank, IN, generator=generator), 0.5,
                    span=span) for span in spans]


def batches(count: int) -> dict[str, list[Branch]]:
    strengths = tuple(0.7 + 0.2 * k for k in range(count))
    alone = [one_hot(strengths, k) for k in range(count)]
    return {"merged": [Branch(strengths)] * 2, "at one strength": [Branch((0.7,) * count)] * 2,
            "composite": [row for row in alone for _ in range(2)], "scattered": alone[::-1] + alone,
            "with the base": [Branch((0.0,) * count), *alone],
            **{f"{k} alone": [row] * 2 for k, row in enumerate(alone)}}


def added(loras: Sequence[Sequence[LowRank]], rows: Sequence[Branch], x: Tensor) -> Tensor:
    """What the rows' adapters add to the slices of the layer, in float64."""
    return torch.stack([torch.cat([sum(gain * op.scale * each.double() @ op.down.double().T @ op.up.double().T
                                       for gain, op in zip(row.gains, ops, strict=True))
                                   for ops in zip(*loras, strict=True)], dim=-1)
                        for row, each in zip(rows, x, strict=True)])


@RANKS
@pytest.mark.parametrize("slices", [1, 3])
@pytest.mark.parametrize("dear", DEAR)
def test_what_is_filled_up_adds_what_its_adapters_do(ranks, slices, dear, monkeypatch):
    monkeypatch.setitem(products.RATES, "cpu", DEAR[dear])
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(IN, OUT * slices))
    spans = [None] if slices == 1 else [(0, OUT * k, OUT) for k in range(slices)]
    loras = [adapter(rank, seed, spans) for seed, rank in enumerate(ranks)]
    bank = Bank([{"0": ops} for ops in loras])
    (stack,) = bank.sites["0"].stacks
    assert stack.down.shape[0] == slices * HELD[ranks]
    assert [stack.down[slot.filled].shape[0] for slot in stack.slots] == [*ranks] * slices
    for name, rows in batches(len(ranks)).items():
        x = torch.randn(len(rows), TOKENS, IN)
        routed = RoutedForwards(root, bank)
        with torch.no_grad():
            plain = root(x)
            routed.install()
            with routed.rows(rows):
                assert close(root(x), plain + added(loras, rows, x)), name
            routed.remove()


@RANKS
def test_an_adapter_alone_takes_no_zeros_of_what_lies_beside_it(ranks, monkeypatch):
    root, bank = nn.Sequential(nn.Linear(IN, OUT)), Bank([{"0": adapter(rank, 0)} for rank in ranks])
    routed = RoutedForwards(root, bank)
    routed.install()
    with torch.no_grad():
        for rows in [[one_hot((1.0,) * len(ranks), k)] for k in range(len(ranks))]:
            with routed.rows(rows):
                root(torch.randn(1, TOKENS, IN))
    assert [int(line.rpartition("rank ")[2]) for line in routed.explain()] == [
        rank if rank <= 8 else -(-rank // 8) * 8 for rank in ranks]
    routed.remove()


@pytest.mark.parametrize(("ranks", "rank"), [((13, 16, 15), 16), ((3, 3, 3), 3), ((16, 16, 3), None), ((4, 4, 3), 4),
                                             ((4, 4, 4, 4, 4), 4), ((4, 4, 4, 9), None), ((2, 4, 4), None)])
def test_ranks_that_are_filled_up_to_the_same_are_one_batch(ranks, rank, monkeypatch):
    """Of the last one, what is filled up because of those beside it does not count."""
    monkeypatch.setitem(products.RATES, "cpu", DEAR["starting an operation"])
    monkeypatch.setattr(ways, "_masked", lambda *call: None)
    found = []
    grouped = ways.grouped
    monkeypatch.setattr(ways, "grouped", lambda down, *more: found.append(down.shape[2]) or grouped(down, *more))
    root, bank = nn.Sequential(nn.Linear(IN, OUT)), Bank([{"0": adapter(rank, 0)} for rank in ranks])
    routed, rows = RoutedForwards(root, bank), batches(len(ranks))["composite"]
    routed.install()
    with torch.no_grad(), routed.rows(rows):
        root(torch.randn(len(rows), TOKENS, IN))
    routed.remove()
    assert found == ([] if rank is None else [rank])
