"""Adapters beneath all branches, as LoRAs are that are always on: the first of a bank, at one gain in every row."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from lora_ensemble.engine import products
from lora_ensemble.engine.positions import Places, Segment
from lora_ensemble.engine.products import Rates
from lora_ensemble.kernels.branch import Branch
from lora_ensemble.tests.reference import close, expected
from lora_ensemble.tests.test_engine_cost import DEAR, FREE, LAYERS, cost
from lora_ensemble.tests.test_engine_rows import adapters, evaluate, model  # noqa: F401  (a fixture)
from lora_ensemble.tests.test_positions import routed_output, token_reference
from torch import nn

ALONE = [Branch((0.7, *gains)) for gains in ((0.9, 0.0), (0.0, 1.1))]
"""Two branches above one adapter."""
LAYOUTS = {
    "composite": [ALONE[0], ALONE[0], ALONE[1], ALONE[1]], "scattered": [ALONE[1], ALONE[0], ALONE[1]],
    "with the base": [Branch((0.7, 0.0, 0.0)), *ALONE], "merged": [Branch((0.7, 0.9, 1.1))] * 2,
    "one turn": [ALONE[1]] * 2, "at one strength": [Branch((0.7, 0.7, 0.7))] * 2,
    "a choice per layer": [Branch((0.7, 0.9, 0.0), (("linear", (0.7, 0.0, 1.1)),))] * 2,
    "alone": [Branch((0.7, 0.0, 0.0))] * 2,
}
BETWEEN = Rates(100.0, 0.0, 1.0, 1.0)
"""A device on which starting an operation is worth some work."""
ABOVE = [("lora", "lora wide"), ("lora", "boft"), ("dora in", "glora"), ("kron", "dora out")]


@pytest.mark.parametrize("rates", [FREE, BETWEEN, DEAR], ids=["free starts", "between", "dear starts"])
@pytest.mark.parametrize("above", ABOVE, ids="-".join)
@pytest.mark.parametrize("beneath", ["lora", "lora+bias", "kron", "dora out", "glora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_gets_both(model, layout, beneath, above, rates, monkeypatch):  # noqa: F811
    """Against the weights as they would be, one change after the other."""
    monkeypatch.setitem(products.RATES, "cpu", rates)
    bank, changes = adapters(model, (beneath, *above))
    x = torch.randn(len(LAYOUTS[layout]), 4, 5, 6)
    assert close(evaluate(model, bank, LAYOUTS[layout], x), expected(model, changes, LAYOUTS[layout], x))


@LAYERS
@pytest.mark.parametrize("rows", [
    [*ALONE], [ALONE[1], ALONE[0], Branch((0.7, 0.0, 0.0))], [Branch((0.7, 0.9, 1.1))] * 2, [ALONE[1]] * 2],
    ids=["composite", "scattered, with the base", "merged", "one turn"])
def test_where_starts_are_dear_it_costs_what_one_lora_more_costs(layer, rows, monkeypatch):
    """Guard: two operations more for it, of its own."""
    monkeypatch.setitem(products.RATES, "cpu", DEAR)
    product = {"convolution": 1} if layer == "conv" else {"bmm": 1}
    assert +cost(layer, ("lora", "lora", "lora wide"), rows).ops == Counter({**product, "mul": 1, "baddbmm": 1})


@LAYERS
@pytest.mark.parametrize("above", ["lora", "dora out"])
@pytest.mark.parametrize("beneath", ["lora", "kron"])
def test_it_is_never_evaluated_per_branch(layer, beneath, above, monkeypatch):
    """Where work is dear: however many branches, the operations that it adds are those of one product for all rows."""
    monkeypatch.setitem(products.RATES, "cpu", BETWEEN)

    def added(count: int) -> Counter:
        rows = [[(gain, *(float(i == k) for i in range(count))) for k in range(count)] for gain in (0.7, 0.0)]
        both, without = (cost(layer, (beneath, *[above] * count), [Branch(row) for row in each]).ops for each in rows)
        both.subtract(without)
        return +both

    assert added(2) == added(5) and 2 <= sum(added(5).values()) <= 6


@pytest.mark.parametrize("rates", [BETWEEN, DEAR], ids=["between", "dear starts"])
@pytest.mark.parametrize("kinds", [("lora", "lora", "lora wide"), ("kron", "lora", "lora"), ("lora", "dora in", "lora"),
                                   ("dora out", "lora", "lora")], ids="-".join)
@pytest.mark.parametrize("words", [False, True])
def test_it_acts_at_all_places(kinds, words, rates, monkeypatch):
    """Maps and words are of the others alone: token by token, now and after an update."""
    monkeypatch.setitem(products.RATES, "cpu", rates)
    torch.manual_seed(0)
    layer, rows, x = nn.Linear(8, 16), [*ALONE, *ALONE], torch.randn(4, 7, 8)
    segments = (Segment("text", 3), Segment("picture", 4, (1, 2, 2)))
    places = Places(torch.zeros(2, 2, 2, 2), (0, 0, 1, 1), torch.zeros(2, 2, 3) if words else None, (0, 0, 1, 1),
                    lambda name, tokens: segments, beneath=1)
    for _ in range(2):
        maps, text = torch.rand(2, 2, 2, 2), torch.rand(2, 2, 3)
        places.update(maps, text if words else None)
        gain = torch.cat([text if words else torch.ones_like(text), maps.flatten(2)], dim=2).mT
        gain = torch.cat([torch.ones(2, 7, 1), gain], dim=2).repeat_interleave(2, dim=0)
        want = token_reference(layer, rows, x, gain, kinds)
        assert close(routed_output(layer, kinds, rows, x, places), want)
