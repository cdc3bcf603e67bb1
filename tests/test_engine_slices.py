"""Layers that are several in one weight (q, k and v of Flux, SD3, Qwen), with LoRAs for each of them apart."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from lora_ensemble.engine import products
from lora_ensemble.engine.adapters import LowRank, Op, Span
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.engine.positions import Places, Segment
from lora_ensemble.engine.products import ACCELERATOR, Rates
from lora_ensemble.kernels.branch import Branch, one_hot
from lora_ensemble.tests.reference import TOLERANCE, Change, close, expected, make_ops, relative_error
from lora_ensemble.tests.test_engine_beneath import BETWEEN
from lora_ensemble.tests.test_engine_cost import DEAR, FREE, Spy
from lora_ensemble.tests.test_engine_ops import One, routed_output, spanned
from torch import Tensor, nn

WIDE = 16
QKV = [(0, k * WIDE, WIDE) for k in range(3)]
LINEAR1 = [*QKV, (0, 3 * WIDE, 2 * WIDE)]
"""q, k, v and the feed-forward of a single block of Flux."""
RATES = {"free starts": FREE, "between": BETWEEN, "dear starts": DEAR, "dear views": Rates(1.0, 1e9, 1.0, 1.0),
         "dear reading": Rates(1e3, 0.0, 1.0, 1e-9)}


def adapter(slices: dict[Span, str], out: int, seed: int, dtype: torch.dtype) -> tuple[list[Op], Change]:
    """What one file does to a layer with `out` outputs: a kind for each slice, None the whole weight."""
    made = []
    for k, (span, kind) in enumerate(slices.items()):
        ops, change = make_ops(kind, (out if span is None else span[2], 24), 10 * seed + k, dtype)
        made.append((span, [op if span is None else spanned(op, span) for op in ops], change))

    def changed(w: Tensor, b: Tensor, g: float) -> tuple[Tensor, Tensor]:
        w = w.clone()
        for span, _, change in made:
            target = w if span is None else w.narrow(*span)
            target.copy_(change(target, b, g)[0])
        return w, b

    return [op for _, ops, _ in made for op in ops], changed


def each(spans: list[Span], *kinds: str) -> dict[Span, str]:
    return dict(zip(spans, kinds * len(spans), strict=False))


SETS = {
    "alike": [each(QKV, "lora")] * 3,
    "unequal ranks": [each(QKV, "lora"), each(QKV, "lora wide"), each(QKV, "lora")],
    "another rank per slice": [each(QKV, "lora", "lora wide", "lora")] * 3,
    "linear1": [each(LINEAR1, "lora")] * 3,
    "some slices": [each(QKV, "lora"), each(QKV[::2], "lora"), each(QKV[1:2], "lora")],
    "q, k and v of linear1": [each(QKV, "lora"), each(QKV, "lora wide"), each(QKV, "lora")],
    "k and v": [each(QKV[1:], "lora")] * 3, "one slice each": [each(QKV[k:k + 1], "lora") for k in range(3)],
    "a gap": [each([LINEAR1[0], LINEAR1[3]], "lora")] * 3,
    "fused and sliced": [each(QKV, "lora"), {None: "lora"}, each(QKV, "lora")],
    "both in one file": [{**each(QKV, "lora"), None: "lora"}, each(QKV, "lora"), {None: "lora wide"}],
    "in another order": [each(QKV[::-1], "lora"), each(QKV, "lora"), each(QKV[1:], "lora")],
    "q, k and v in one slice": [each(LINEAR1, "lora"), {(0, 0, 3 * WIDE): "lora", LINEAR1[3]: "lora"},
                                each(QKV, "lora")],
    "other kinds": [each(QKV, "lora", "kron", "lora"), each(QKV, "dora out"), each(QKV, "dense", "lora", "lora")],
}
ALONE = [one_hot((0.7, -0.9, 1.1), i) for i in range(3)]
BASE, ALL = Branch((0.0,) * 3), Branch((0.7, -0.9, 1.1))
LAYOUTS = {
    "merged": [ALL] * 3, "merged at one strength": [Branch((0.7,) * 3)] * 2, "a turn": [ALONE[1]] * 2,
    "composite": [row for row in ALONE for _ in range(2)], "scattered": [ALONE[2], ALONE[0], BASE, ALONE[2], ALL],
    "with the base": [BASE, ALONE[0], ALONE[1], BASE],
    "two of three": [Branch((0.7, 0.7, 0.0)), Branch((0.0, 0.4, 1.1))],
    "first and last of three": [Branch((0.7, 0.0, 0.7)), Branch((0.0, 0.4, 0.0))],
    "unequal runs": [ALONE[0], ALONE[0], ALONE[1]],
    "one beneath": [Branch((1.0, 0.5, 0.0)), Branch((1.0, 0.0, 0.5))], "one row": [ALL],
}


def bank_and_changes(name: str, dtype: torch.dtype = torch.float32) -> tuple[One, Bank, list[dict]]:
    torch.manual_seed(0)
    spans = [span for slices in SETS[name] for span in slices if span is not None]
    out = 5 * WIDE if "linear1" in name else max(span[1] + span[2] for span in spans)
    made = [adapter(slices, out, seed, dtype) for seed, slices in enumerate(SETS[name])]
    return One(nn.Linear(24, out).to(dtype)), Bank([{"layer": ops} for ops, _ in made], dtype=dtype), [
        {"layer": change} for _, change in made]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SETS)
def test_every_row_gets_its_own(name, layout, monkeypatch):
    """Whichever way is taken, for vectors and for tokens."""
    model, bank, changes = bank_and_changes(name)
    rows = LAYOUTS[layout]
    x = torch.randn(len(rows), 6, 24)
    want = expected(model, changes, rows, x)
    for way, rates in RATES.items():
        monkeypatch.setitem(products.RATES, "cpu", rates)
        for x_, want_ in ((x, want), (x.unflatten(1, (2, 3)), want.unflatten(1, (2, 3))), (x[:, 0], want[:, 0])):
            assert close(routed_output(model, bank, rows, x_), want_), way


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", ["merged", "a turn", "composite", "scattered"])
@pytest.mark.parametrize("name", ["alike", "linear1", "fused and sliced"])
def test_tolerance_by_dtype(name, layout, dtype):
    model, bank, changes = bank_and_changes(name, dtype)
    x = torch.randn(len(LAYOUTS[layout]), 5, 24).to(dtype)
    assert close(routed_output(model, bank, LAYOUTS[layout], x), expected(model, changes, LAYOUTS[layout], x))


class Turned(nn.Linear):
    """Whose outputs are no contiguous memory."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mT.contiguous().mT


@pytest.mark.parametrize("name", ["alike", "linear1", "q, k and v of linear1"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_in_another_order_of_memory(layout, name, monkeypatch):
    monkeypatch.setitem(products.RATES, "cpu", DEAR)
    model, bank, changes = bank_and_changes(name)
    turned = Turned(24, model.layer.out_features)
    turned.load_state_dict(model.layer.state_dict())
    x = torch.randn(len(LAYOUTS[layout]), 5, 24)
    want = expected(model, changes, LAYOUTS[layout], x)
    model.layer = turned
    assert close(routed_output(model, bank, LAYOUTS[layout], x), want)


@pytest.mark.parametrize("rates", [FREE, DEAR], ids=["free starts", "dear starts"])
@pytest.mark.parametrize("name", ["alike", "unequal ranks", "linear1", "some slices", "fused and sliced"])
@pytest.mark.parametrize("layout", ["merged", "composite", "one beneath"])
def test_at_places(name, layout, rates, monkeypatch):
    """Token by token."""
    monkeypatch.setitem(products.RATES, "cpu", rates)
    model, bank, changes = bank_and_changes(name)
    rows, x, maps = LAYOUTS[layout], torch.randn(len(LAYOUTS[layout]), 4, 24), torch.rand(1, 3, 2, 2)
    places = Places(maps, (0,) * len(rows), locate=lambda layer, tokens: (Segment("picture", 4, (1, 2, 2)),))
    here = [[Branch(tuple(g * float(m) for g, m in zip(branch.gains, at, strict=True))) for at in maps[0].flatten(1).T]
            for branch in rows]
    want = torch.stack([torch.cat([expected(model, changes, [gains], x[row:row + 1, t:t + 1])
                                   for t, gains in enumerate(own)], dim=1)[0] for row, own in enumerate(here)])
    routed = RoutedForwards(model, bank)
    routed.install()
    with torch.no_grad(), routed.rows(rows, places):
        y = model(x)
    routed.remove()
    assert close(y, want)


def operations(name: str, layout: str) -> Counter:
    """What LoRAs add to a call of the layer."""
    model, bank, _ = bank_and_changes(name)
    routed, x = RoutedForwards(model, bank), torch.randn(len(LAYOUTS[layout]), 5, 24)
    with torch.no_grad():
        with Spy() as plain:
            model(x)
        routed.install()
        with routed.rows(LAYOUTS[layout]):
            model(x)
            with Spy() as spy:
                model(x)
        routed.remove()
    spy.ops.subtract(plain.ops)
    return +spy.ops


TWO = {"bmm": 1, "baddbmm": 1}
COSTS = {
    ("alike", "merged at one strength"): TWO, ("alike", "merged"): {**TWO, "mul": 1},
    ("alike", "a turn"): {"bmm": 1, "baddbmm": 1}, ("alike", "composite"): {**TWO, "mul": 1},
    ("alike", "scattered"): {**TWO, "mul": 1}, ("unequal ranks", "composite"): {**TWO, "mul": 1},
    ("q, k and v of linear1", "a turn"): {"bmm": 1, "baddbmm": 1},
    ("linear1", "merged at one strength"): {**TWO, "addmm": 1}, ("linear1", "composite"): {**TWO, "addmm": 1, "mul": 1},
    ("another rank per slice", "merged at one strength"): {"bmm": 1, "addmm": 3},
    ("fused and sliced", "merged at one strength"): {**TWO, "addmm": 1},
    ("q, k and v in one slice", "merged at one strength"): {**TWO, "addmm": 2},
    ("some slices", "composite"): {"bmm": 1, "addmm": 3, "mul": 1},
}
"""Each slice for itself would take two operations, or three where ranks have gains of their own."""


@pytest.mark.parametrize("case", COSTS, ids=": ".join)
def test_slices_share_operations(case, monkeypatch):
    """Where starting an operation is dear."""
    monkeypatch.setitem(products.RATES, "cpu", DEAR)
    assert operations(*case) == Counter(COSTS[case])


AS_MEASURED = {
    ("another rank per slice", "merged at one strength"): 4, ("another rank per slice", "merged"): 5,
    ("some slices", "merged at one strength"): 4, ("some slices", "composite"): 5, ("some slices", "scattered"): 5,
    ("another rank per slice", "composite"): 5, ("unequal ranks", "composite"): 3, ("linear1", "merged"): 4,
    ("a gap", "composite"): 4, ("q, k and v in one slice", "merged"): 5,
}


@pytest.mark.parametrize("rates", [products.RATES["cpu"], ACCELERATOR], ids=["processor", "accelerator"])
@pytest.mark.parametrize("case", AS_MEASURED, ids=": ".join)
def test_slices_share_operations_by_the_rates_that_were_measured(case, rates, monkeypatch):
    """Guard: views charged to the shared way alone, so that three slices of other ranks took six operations and nine.
    """
    monkeypatch.setitem(products.RATES, "cpu", rates)
    assert operations(*case).total() == AS_MEASURED[case]


def test_each_slice_has_its_own_where_work_is_dear(monkeypatch):
    """No branch's ranks are multiplied for rows that are not its own, and no slice's with outputs of another."""
    monkeypatch.setitem(products.RATES, "cpu", FREE)
    model, bank, _ = bank_and_changes("unequal ranks")
    routed, rows = RoutedForwards(model, bank), LAYOUTS["composite"]
    routed.install()
    x = torch.randn(len(rows), 5, 24)
    with torch.no_grad(), Spy() as plain:
        model(x)
    with torch.no_grad(), routed.rows(rows), Spy() as spy:
        model(x)
    routed.remove()
    assert spy.multiplies - plain.multiplies == 5 * sum(2 * 3 * rank * (24 + WIDE) for rank in (3, 7, 3))


def test_memory_is_that_of_the_factors():
    """Guard: a matrix of all outputs with zeros where ranks belong to other slices. Nor does a run hold copies."""
    for name, slices in SETS.items():
        model, bank, _ = bank_and_changes(name)
        if name == "other kinds":
            continue
        ranks = Counter()
        for span, kind in (each for file in slices for each in file.items()):
            ranks[span] += {"lora": 3, "lora wide": 7}[kind]
        numbers = sum((rank if rank <= 8 else -(-rank // 8) * 8) * (24 + (model.layer.out_features if span is None
                                                                         else span[2])) for span, rank in ranks.items())
        assert bank.nbytes() == 4 * numbers
        routed = RoutedForwards(model, bank)
        routed.install()
        held = {parameter.untyped_storage().data_ptr() for parameter in bank.parameters()}
        for rows in LAYOUTS.values():
            with torch.no_grad(), routed.rows(rows):
                model(torch.randn(len(rows), 5, 24))
        made = [kept for kept in routed._programs._made.values() if isinstance(kept, tuple)]
        routed.remove()
        assert len(held) == len(list(bank.parameters())) and not made


def test_a_slice_takes_nothing_of_its_neighbours():
    """Guard: ranks or outputs that are off by one slice. One adapter on v alone, the others' outputs bit by bit."""
    torch.manual_seed(0)
    model, x = One(nn.Linear(24, 48)), torch.randn(2, 5, 24)
    (op,), _ = make_ops("lora", (WIDE, 24), 3)
    nothing = [LowRank(torch.zeros(WIDE, 3), torch.randn(3, 24), span=span) for span in QKV[:2]]
    bank = Bank([{"layer": [*nothing, spanned(op, QKV[2])]}])
    plain, y = model(x), routed_output(model, bank, [Branch((1.0,))] * 2, x)
    assert torch.equal(y[..., :2 * WIDE], plain[..., :2 * WIDE])
    assert relative_error(y[..., 2 * WIDE:], plain[..., 2 * WIDE:].double()) > 0.1
