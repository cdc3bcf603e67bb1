"""What a step may cost: no work for base rows, no operation per row, no copy of a weight, no wait for the device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from lora_ensemble.engine import products
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.engine.products import Rates
from lora_ensemble.kernels.branch import Branch, one_hot
from lora_ensemble.tests.accelerator import READS
from lora_ensemble.tests.reference import make_ops
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {"view", "_unsafe_view", "slice", "select", "t", "transpose", "permute", "unflatten", "expand", "as_strided",
         "unsqueeze", "squeeze", "alias", "detach", "split", "narrow", "_reshape_alias"}
MISSING = {"index_copy"}
"""What not every torch has for Apple's devices."""
BASE = Branch((0.0, 0.0, 0.0))
ALONE = [one_hot((0.7, 0.9, 1.1), i) for i in range(3)]


class Spy(TorchDispatchMode):
    """Counts operations that do work, the numbers they write (and the most by one), and the multiply-adds of products.
    """

    def __init__(self):
        super().__init__()
        self.ops, self.written, self.multiplies, self.largest = Counter(), 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in VIEWS or not isinstance(out, Tensor):
            return out
        self.ops[name] += 1
        tensors = [a for a in args if isinstance(a, Tensor)]
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = tensors[-2:]
            self.multiplies += left.numel() * right.shape[-1]
        elif name == "convolution":
            self.multiplies += out.numel() * args[1][0].numel()
        self.largest = max(self.largest, out.numel())
        self.written += tensors[-1].numel() if name == "index_put" else out.numel()
        return out


def layer_of(kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(0)
    return (nn.Linear(24, 32), (5, 24)) if kind == "linear" else (nn.Conv2d(8, 16, 3, padding=1), (8, 6, 5))


def cost(layer: str, kinds, branches, warm: int = 1) -> Spy:
    """What routing adds to one call of the layer after `warm` calls."""
    module, size = layer_of(layer)
    root = nn.Sequential(module)
    bank = Bank([{"0": make_ops(kind, module.weight.shape, seed)[0]} if kind != "none" else {}
                 for seed, kind in enumerate(kinds)])
    routed = RoutedForwards(root, bank)
    x = torch.randn(len(branches), *size)
    with torch.no_grad():
        with Spy() as plain:
            root(x)
        routed.install()
        with routed.rows(branches):
            for _ in range(warm):
                root(x)
            with Spy() as spy:
                root(x)
        routed.remove()
    spy.ops.subtract(plain.ops)
    spy.written -= plain.written
    spy.multiplies -= plain.multiplies
    return spy


FREE, DEAR = Rates(0.0, 0.0, 1.0, 1.0), Rates(1e9, 0.0, 1.0, 1.0)
"""Devices on which starting an operation costs nothing, and everything."""

EQUAL, MIXED = ("lora", "lora", "lora"), ("lora", "lora wide", "dense")
LAYERS = pytest.mark.parametrize("layer", ["linear", "conv"])
KINDS = pytest.mark.parametrize("kinds", [EQUAL, MIXED, ("lora", "boft", "dora out")], ids="-".join)


@LAYERS
@KINDS
@pytest.mark.parametrize("layout", ["runs", "scattered"])
def test_base_rows_cost_nothing(layer, kinds, layout, monkeypatch):
    """But where a view costs more than they do: with work to spare, nothing."""
    monkeypatch.setitem(products.RATES, "cpu", FREE)
    own = [ALONE[0], ALONE[0], ALONE[1], ALONE[1], ALONE[2]]
    if layout == "scattered":
        own = [own[i] for i in (0, 2, 1, 4, 3)]
    without = cost(layer, kinds, own)
    with_base = cost(layer, kinds, [BASE] * 3 + own + [BASE] * 4)
    assert +with_base.ops == +without.ops
    assert (with_base.multiplies, with_base.written) == (without.multiplies, without.written)
    assert without.multiplies > 0


@LAYERS
@KINDS
def test_only_base_rows_cost_nothing_at_all(layer, kinds):
    spy = cost(layer, kinds, [BASE] * 3)
    assert not +spy.ops and spy.multiplies == 0


@LAYERS
@KINDS
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("rates", [FREE, DEAR], ids=["free starts", "dear starts"])
def test_no_operation_per_row(layer, kinds, scattered, rates, monkeypatch):
    """Four times the rows: the same operations."""
    monkeypatch.setitem(products.RATES, "cpu", rates)
    few = [ALONE[0]] * 2 + [ALONE[1]] * 2 + [ALONE[2]] * 2
    many = [branch for branch in few for _ in range(4)]
    if scattered:
        few, many = few[::2] + few[1::2], many[::2] + many[1::2]
    assert cost(layer, kinds, few).ops == cost(layer, kinds, many).ops


def test_composite_takes_two_products_per_layer_however_many_loras():
    for count in (2, 5, 9):
        branches = [one_hot((1.0,) * count, i) for i in range(count) for _ in range(2)]
        spy = cost("linear", ("lora",) * count, branches)
        assert +spy.ops == Counter({"bmm": 1, "baddbmm": 1})


def test_merge_takes_two_products_per_layer_however_many_loras():
    for count in (1, 2, 5):
        spy = cost("linear", ("lora",) * count, [Branch((1.0,) * count)] * 2)
        assert +spy.ops == Counter({"bmm": 1, "baddbmm": 1})


@LAYERS
@pytest.mark.parametrize("layout", ["runs", "scattered", "two branches on several", "with base rows",
                                    "one of them, scattered"])
@pytest.mark.parametrize("kinds", [("lora", "lora wide", "lora"), ("lora wide", "none", "lora")], ids="-".join)
def test_any_mixture_takes_three_operations(layer, kinds, layout, monkeypatch):
    """Where starting an operation is dear: unequal ranks, LoRAs that lack the layer, base rows, rows in any order."""
    monkeypatch.setitem(products.RATES, "cpu", DEAR)
    branches = {"runs": ALONE, "scattered": [ALONE[2], ALONE[0], ALONE[2], ALONE[1], ALONE[0]],
                "two branches on several": [Branch((0.7, 0.9, 0.0)), Branch((0.0, 0.4, 1.1)), Branch((1.0, 1.0, 1.0))],
                "with base rows": [BASE, ALONE[0], BASE, ALONE[2], ALONE[1], BASE],
                "one of them, scattered": [ALONE[2], BASE, ALONE[2], BASE]}[layout]
    product = {"convolution": 1} if layer == "conv" else {"bmm": 1}
    assert +cost(layer, kinds, branches).ops == Counter({**product, "mul": 1, "baddbmm": 1})


@LAYERS
def test_a_choice_per_layer_costs_what_one_lora_costs(layer):
    """K-LoRA and EST-LoRA: a LoRA of its own for each layer, here the second of three, against a single LoRA."""
    chosen = Branch((0.7, 0.0, 0.0), (("0", (0.0, 0.9, 0.0)),))
    ours, single = cost(layer, EQUAL, [chosen] * 2), cost(layer, ("lora",), [Branch((0.7,))] * 2)
    assert +ours.ops == +single.ops
    assert (ours.multiplies, ours.written) == (single.multiplies, single.written)
    assert single.multiplies > 0


@LAYERS
def test_low_rank_products_are_the_factors_and_no_more(layer, monkeypatch):
    """A row's multiply-adds: rank x (inputs x kernel + outputs) per position, once. Where starting an operation costs
    nothing there are no others."""
    monkeypatch.setitem(products.RATES, "cpu", FREE)
    module, size = layer_of(layer)
    spy = cost(layer, EQUAL, [ALONE[0], ALONE[0], ALONE[1], ALONE[1], ALONE[2], ALONE[2]])
    positions = size[0] if layer == "linear" else size[1] * size[2]
    assert spy.multiplies == 6 * positions * 3 * (module.weight[0].numel() + module.weight.shape[0])


@LAYERS
@pytest.mark.parametrize("kinds", [EQUAL, ("lora", "lora wide", "lora")], ids="-".join)
def test_no_weight_is_copied_or_rebuilt(layer, kinds):
    """Low-rank kinds never write a tensor as large as the weight: a single position goes in, little comes out."""
    module, _ = layer_of(layer)
    root = nn.Sequential(module)
    routed = RoutedForwards(root, Bank([{"0": make_ops(k, module.weight.shape, s)[0]} for s, k in enumerate(kinds)]))
    x = torch.randn(3, 24) if layer == "linear" else torch.randn(3, 8, 1, 1)
    routed.install()
    with torch.no_grad(), routed.rows(ALONE), Spy() as spy:
        root(x)
    routed.remove()
    assert spy.written < module.weight.numel()


class NoSync(TorchDispatchMode):
    """Fails on whatever makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in READS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@LAYERS
@pytest.mark.parametrize("kinds", [EQUAL, MIXED, ("oft", "boft", "glora"), ("dora out", "dora in", "set")],
                         ids="-".join)
def test_no_step_waits_for_the_device_or_asks_what_it_may_lack(layer, kinds):
    module, size = layer_of(layer)
    root = nn.Sequential(module)
    routed = RoutedForwards(root, Bank([{"0": make_ops(k, module.weight.shape, s)[0]} for s, k in enumerate(kinds)]))
    routed.install()
    layouts = [[ALONE[0], ALONE[1], ALONE[2]], [ALONE[0], BASE, ALONE[0]], [Branch((0.7, 0.9, 1.1))] * 3]
    with torch.no_grad():
        with Spy() as spy, routed.rows(layouts[1]):
            root(torch.randn(3, *size))
        assert not spy.ops.keys() & MISSING
        for run in range(2):
            for branches in layouts:
                with routed.rows(branches):
                    if run:
                        with NoSync():
                            root(torch.randn(3, *size))
                    else:
                        root(torch.randn(3, *size))
    routed.remove()


def test_the_guard_against_waiting_works():
    with pytest.raises(AssertionError, match="waits for the device"), NoSync():
        torch.ones(1).item()


@LAYERS
@pytest.mark.parametrize("kinds", [("glora",) * 8, ("dora in",) * 3 + ("glora",) * 3, ("boft", "glora", "glora")],
                         ids=["8 GLoRAs", "mixed", "after a rotation"])
def test_ops_on_inputs_call_the_layer_once_more_however_many(layer, kinds):
    """Guard: 2^N calls of the layer for N GLoRAs."""
    module, size = layer_of(layer)
    calls, plain = [], module.forward
    module.forward = lambda x: calls.append(1) or plain(x)
    root = nn.Sequential(module)
    routed = RoutedForwards(root, Bank([{"0": make_ops(k, module.weight.shape, s)[0]} for s, k in enumerate(kinds)]))
    routed.install()
    with torch.no_grad(), routed.rows([Branch((0.5,) * len(kinds))] * 2):
        root(torch.randn(2, *size))
    routed.remove()
    assert len(calls) == 2


@LAYERS
@pytest.mark.parametrize("kind", ["dora out", "dora in", "kron"])
def test_what_is_a_product_of_small_factors_is_never_dense(layer, kind):
    """LoKr and DoRA: no tensor as large as the weight is written, once the magnitudes are known."""
    module, _ = layer_of(layer)
    root = nn.Sequential(module)
    routed = RoutedForwards(root, Bank([{"0": make_ops(kind, module.weight.shape, 0)[0]}]))
    x = torch.randn(1, 24) if layer == "linear" else torch.randn(1, 8, 1, 1)
    routed.install()
    with torch.no_grad(), routed.rows([Branch((0.7,))]):
        root(x)
        with Spy() as spy:
            root(x)
    routed.remove()
    # Factors are scaled at each call, which is as little as they are.
    assert spy.largest < module.weight.numel() / 2
