"""What layers do: which products are chosen, how often, and on what memory."""

from __future__ import annotations

from collections import Counter
from math import prod

import pytest
import torch
from lora_ensemble.engine import gains as gains_module
from lora_ensemble.engine import products as products_module
from lora_ensemble.engine import program as program_module
from lora_ensemble.engine import ways as ways_module
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.engine.positions import Places, Segment
from lora_ensemble.engine.products import Rates
from lora_ensemble.engine.reach import Reach
from lora_ensemble.kernels.branch import Branch
from lora_ensemble.tests.reference import close, expected, make_ops
from lora_ensemble.tests.test_engine_rows import ALONE, LAYOUTS, Small, adapters, model_without
from torch import nn


def watched(monkeypatch: pytest.MonkeyPatch, method: str) -> list[str]:
    """The layers with which a method of `Programs` is called from now on, in order."""
    layers: list[str] = []
    real = getattr(program_module.Programs, method)
    monkeypatch.setattr(program_module.Programs, method,
                        lambda self, layer, *call: layers.append(layer.site.name) or real(self, layer, *call))
    return layers


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small()


def test_the_ways_to_serve_several_branches_agree(model, monkeypatch):
    """Batched, masked and group by group are one sum, whichever is expected to be the fastest."""
    bank, changes = adapters(model)
    layout = LAYOUTS["composite"]
    x = torch.randn(len(layout), 4, 5, 6)
    want = expected(model, changes, layout, x)
    ways = {"batched": Rates(1.0, 0.0, 1.0, 1.0), "masked": Rates(1e9, 0.0, 1.0, 1.0),
            "groups": Rates(1e-9, 0.0, 1.0, 1e9)}
    taken = {}
    for way, rates in ways.items():
        monkeypatch.setitem(products_module.RATES, "cpu", rates)
        if way != "batched":
            monkeypatch.setattr(ways_module, "_batched", lambda *call: None)
        routed = RoutedForwards(model, bank)
        routed.install()
        with torch.no_grad(), routed.rows(layout):
            assert close(model(x), want)
        taken[way] = [line for line in routed.explain() if "linear" in line]
        routed.remove()
    assert ["3 groups of 2 entries" in line for line in taken["batched"]] == [True]
    assert ["6 of 6 entries, rank 16, gains 6x1x16" in line for line in taken["masked"]] == [True]
    assert ["2 of 6 entries, rank 3" in line for line in taken["groups"]] == [True] * 3


@pytest.mark.parametrize("size", [(), (5,), (2, 5)], ids=str)
@pytest.mark.parametrize("layout", ["composite", "some of the stack", "merged", "merged beside single"])
def test_gains_lie_in_the_size_of_few_hidden_values_and_broadcast_over_many(layout, size, monkeypatch):
    """Guard: the host's time for an operation that broadcasts, at each layer; and more memory read where it is worth
    the host's time."""
    torch.manual_seed(0)
    model, made = nn.Sequential(nn.Linear(24, 32)), [make_ops("lora", (32, 24), seed) for seed in range(3)]
    bank, changes = Bank([{"0": ops} for ops, _ in made]), [{"0": change} for _, change in made]
    rows = LAYOUTS[layout]
    x = torch.randn(len(rows), *size, 24)
    want = expected(model, changes, rows, x)
    monkeypatch.setattr(ways_module, "_batched", lambda *call: None)
    found = {}
    for few, rates in {True: Rates(1e9, 1.0, 1.0, 1e9), False: Rates(1e9, 1.0, 1.0, 1.0)}.items():
        monkeypatch.setitem(products_module.RATES, "cpu", rates)
        routed = RoutedForwards(model, bank)
        routed.install()
        with torch.no_grad(), routed.rows(rows):
            assert close(model(x), want)
            assert not size or close(model(torch.cat([x, x], 1)), torch.cat([want, want], 1))
            assert close(model(x), want)
        (line,) = routed.explain()
        found[few] = [int(number) for number in line.rpartition("gains ")[2].split("x")]
        routed.remove()
    entries, *places, ranks = found[True]
    assert (entries, ranks) == (len(rows), found[False][-1]) and places == ([prod(size)] if size else [])
    assert found[False][1:-1] == [1] * len(places) and prod(found[False]) < prod(found[True]) or not size


def test_programs_are_chosen_once(model, monkeypatch):
    """Guards: Python's work at every call of a layer that could have been done once."""
    made = []
    real = program_module.stack_products
    monkeypatch.setattr(program_module, "stack_products", lambda *call: made.append(1) or real(*call))
    bank, _ = adapters(model)
    routed = RoutedForwards(model, bank)
    routed.install()
    x = torch.randn(6, 4, 5, 6)
    with torch.no_grad():
        for _ in range(3):
            for layout in ("composite", "scattered", "composite"):
                with routed.rows(LAYOUTS[layout][:6]):
                    model(x)
                    model(x)
    routed.remove()
    assert len(made) == 4


def test_a_choice_per_layer_that_is_new_finds_what_the_layers_did_before(model, monkeypatch):
    """A method that chooses anew at each step has a new layout at each, of the programs of old ones: none is looked up
    for an input as it was. They are not taken for another size, several branches, places, a reach, moved factors."""
    asked = watched(monkeypatch, "program")
    bank, changes = adapters(model)
    x = {size: torch.randn(2, 4, size, 6) for size in (5, 7)}
    first, second, third = (branch.gains for branch in ALONE)
    routed = RoutedForwards(model, bank)
    routed.install()

    def lookups(rows: list[Branch], size: int = 5, times: float = 1, **how) -> list[str]:
        asked.clear()
        scaled = [{name: (lambda w, b, g, change=change: change(w, b, times * g)) for name, change in layers.items()}
                  for layers in changes]
        with torch.no_grad(), routed.rows(rows, **how):
            assert close(model(x[size]), expected(model_without(model, []), scaled, rows, x[size]))
        return asked.copy()

    def segments(layer: str, tokens: int) -> tuple[Segment, ...]:
        return (Segment("picture", tokens, (1, 5, 6)),)

    both = ["conv", "linear"]
    assert lookups([Branch(first, (("linear", second),))] * 2) == both
    assert lookups([Branch(second, (("linear", first),))] * 2) == both
    assert lookups([Branch(first)] * 2) == lookups([Branch(first, (("conv", second),))] * 2) == []
    assert lookups([Branch(second, (("linear", third),))] * 2) == both
    assert routed.unseen([{2}]) == []  # that one adapter more acted is known of both layers
    assert lookups([Branch(second)] * 2, size=7) == both
    assert lookups([Branch(second), Branch(first)], size=7) == both
    assert lookups([Branch(first)] * 2, times=0.5, places=Places(torch.full((1, 3, 5, 6), 0.5), (0, 0), locate=segments)
                   ) == both
    assert lookups([Branch(first)] * 2, reach=Reach(segments, range(3))) == both
    for parameter in bank.parameters():
        parameter.data = parameter.data * 2
    assert lookups([Branch(first, (("linear", third),))] * 2, times=4) == both
    routed.remove()


def test_layers_of_one_shape_share_the_choice_and_what_is_copied_to_the_device(monkeypatch):
    """Guards: a choice and a copy for each of hundreds of layers, in the first step of every run and layout."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(5)), nn.Linear(24, 32), nn.Linear(32, 32))
    made = [{name: make_ops("lora", layer.weight.shape, seed) for name, layer in model.named_children()}
            for seed in range(3)]
    bank = Bank([{name: ops for name, (ops, _) in each.items()} for each in made])
    rows, x = [Branch((0.7, 0.9, 0.5)), ALONE[1], ALONE[2]], torch.randn(3, 5, 24)
    want = expected(model, [{name: change for name, (_, change) in each.items()} for each in made], rows, x)
    calls = Counter()
    for module, name in ((ways_module, "_chosen"), (gains_module, "on_device")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, real=real: calls.update([name]) or real(*a))
    routed = RoutedForwards(model, bank)
    routed.install()
    with torch.no_grad(), routed.rows(rows):
        assert close(model(x), want)
    routed.remove()
    assert calls == {"_chosen": 3, "on_device": 1}


def test_factors_that_the_host_moves_are_found_again(model):
    """Guard: a program that holds on to memory which the host has given to somebody else."""
    bank, changes = adapters(model)
    x = torch.randn(3, 4, 5, 6)
    routed = RoutedForwards(model, bank)
    routed.install()
    with torch.no_grad():
        with routed.rows(ALONE):
            assert close(model(x), expected(model_without(model, []), changes, ALONE, x))
        for parameter in bank.parameters():
            moved = parameter.data * 2
            parameter.data.fill_(float("nan"))
            parameter.data = moved
        with routed.rows(ALONE):
            doubled = [{name: (lambda w, b, g, change=change: change(w, b, 4 * g)) for name, change in layers.items()}
                       for layers in changes]
            assert close(model(x), expected(model_without(model, []), doubled, ALONE, x))
    routed.remove()
