"""Routing: which rows get which branch, however rows lie, and what installing and removing leaves behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.engine.layout import NotRows, folded
from lora_ensemble.engine.transfer import on_device
from lora_ensemble.kernels.branch import Branch, one_hot
from lora_ensemble.tests.reference import Change, close, expected, make_ops
from torch import Tensor, nn

STRENGTHS = (0.7, 0.9, 1.1)
ALONE = [one_hot(STRENGTHS, i) for i in range(3)]
BASE, ALL = Branch((0.0, 0.0, 0.0)), Branch(STRENGTHS)


class Small(nn.Module):
    """A convolution, then a matrix product per position: [rows, 4, h, w] -> [rows, positions, 16]."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.conv(x)).flatten(2).mT)


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    return Small()


def adapters(model: nn.Module, kinds=("lora", "lora", "lora"), seed: int = 0) -> tuple[Bank, list[dict[str, Change]]]:
    """A bank with one adapter of each kind on both layers, and the changes of the weights that it stands for."""
    ops, changes = [], []
    for i, kind in enumerate(kinds):
        built = {name: make_ops(kind, model.get_submodule(name).weight.shape, seed + 10 * i + k)
                 for k, name in enumerate(("conv", "linear"))}
        ops.append({name: made for name, (made, _) in built.items()})
        changes.append({name: change for name, (_, change) in built.items()})
    return Bank(ops), changes


def evaluate(model: nn.Module, bank: Bank, branches, x: Tensor, order=folded) -> Tensor:
    routed = RoutedForwards(model, bank, order=order)
    routed.install()
    try:
        with torch.no_grad(), routed.rows(branches):
            return model(x)
    finally:
        routed.remove()


def clean(model: nn.Module) -> bool:
    return not [name for name, module in model.named_modules() if "forward" in module.__dict__]


LAYOUTS = {
    "composite": [ALONE[0], ALONE[0], ALONE[1], ALONE[1], ALONE[2], ALONE[2]],
    "composite after base rows": [BASE, BASE, ALONE[0], ALONE[1], ALONE[2]],
    "composite before base rows": [ALONE[0], ALONE[1], ALONE[2], BASE],
    "some of the stack": [ALONE[1], ALONE[2]],
    "backwards": [ALONE[2], ALONE[1], ALONE[0]],
    "scattered": [ALONE[0], ALONE[1], ALONE[0], BASE, ALONE[1], ALONE[2], ALONE[0]],
    "unequal runs": [ALONE[0], ALONE[1], ALONE[1], ALONE[1], ALONE[2]],
    "one branch": [ALONE[1]] * 4,
    "merged": [ALL] * 3,
    "merged beside single": [ALL, ALONE[0], BASE, ALL],
    "two of three": [Branch((0.7, 0.0, 1.1)), Branch((0.0, 0.9, 1.1)), BASE],
    "one adapter at two strengths": [Branch((0.3, 0.0, 0.0)), Branch((0.6, 0.0, 0.0))],
    "negative strength": [Branch((-0.7, 0.0, 0.0)), BASE],
    "base only": [BASE, BASE],
    "one row": [ALONE[2]],
}


@pytest.mark.parametrize("kinds", [("lora", "lora", "lora"), ("lora", "lora wide", "lora"), ("lora", "boft", "dense")],
                         ids="-".join)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_gets_its_branch(model, layout, kinds):
    bank, changes = adapters(model, kinds)
    x = torch.randn(len(LAYOUTS[layout]), 4, 5, 6)
    assert close(evaluate(model, bank, LAYOUTS[layout], x), expected(model, changes, LAYOUTS[layout], x))
    assert clean(model)


@pytest.mark.parametrize("layout", ["composite", "composite after base rows", "scattered", "two of three"])
def test_base_rows_keep_their_bits_and_all_rows_their_order(model, layout):
    bank, changes = adapters(model)
    branches = LAYOUTS[layout] + [BASE]
    x = torch.randn(len(branches), 4, 5, 6)
    with torch.no_grad():
        plain = model(x)
    y = evaluate(model, bank, branches, x)
    for row, branch in enumerate(branches):
        assert torch.equal(y[row], plain[row]) == branch.is_base
    order = torch.randperm(len(branches), generator=torch.Generator().manual_seed(3)).tolist()
    shuffled = evaluate(model, bank, [branches[r] for r in order], x[order])
    assert close(shuffled, y[order].double())


def test_a_call_outside_of_rows_is_noticed(model):
    bank, _ = adapters(model)
    routed, x = RoutedForwards(model, bank), torch.randn(1, 4, 5, 6)
    routed.install()
    with torch.no_grad():
        with routed.rows([BASE]):
            model(x)
        assert not routed.bare
        model(x)
        assert routed.bare
    routed.remove()


@pytest.mark.parametrize("fold", [1, 3])
@pytest.mark.parametrize("layout", ["composite", "composite after base rows", "scattered", "one branch"])
def test_frames_folded_into_the_batch_follow_their_row(model, layout, fold):
    """Video models and attention blocks fold frames into the batch: entry e belongs to row e // fold."""
    bank, changes = adapters(model)
    x = torch.randn(len(LAYOUTS[layout]) * fold, 4, 5, 6)
    assert close(evaluate(model, bank, LAYOUTS[layout], x), expected(model, changes, LAYOUTS[layout], x))


@pytest.mark.parametrize("layout", ["composite", "scattered", "merged beside single"])
def test_rows_that_are_repeated_as_a_block_follow_an_order_that_names_it(model, layout):
    """Models that double their batch [t, t * 0] hand all rows to a layer twice: entry e belongs to row e % rows."""
    bank, changes = adapters(model)
    branches, order = LAYOUTS[layout], lambda layer, entries, rows: "tile"
    x = torch.randn(2 * len(branches), 4, 5, 6)
    assert close(evaluate(model, bank, branches, x, order), expected(model, changes, branches * 2, x))
    assert not close(evaluate(model, bank, branches, x), expected(model, changes, branches * 2, x))


def test_entries_that_cannot_be_told_apart_stop_what_needs_to_know(model):
    """Guard: a LoRA on the wrong rows without a word. One branch for all needs no order at all."""
    bank, changes = adapters(model)
    x = torch.randn(5, 4, 5, 6)
    routed = RoutedForwards(model, bank)
    routed.install()
    with torch.no_grad(), pytest.raises(NotRows, match="'conv' has 5 entries"), routed.rows([ALONE[0], ALONE[1]]):
        model(x)
    routed.remove()
    x = torch.randn(6, 4, 5, 6)
    for branches in ([ALONE[0], ALONE[1]], [ALONE[0], BASE]):
        with pytest.raises(NotRows, match="'conv' has 6 entries"):
            evaluate(model, bank, branches, x, lambda layer, entries, rows: None)
    for branches in ([ALL, ALL], [ALONE[1]] * 4):
        y = evaluate(model, bank, branches, x, lambda layer, entries, rows: None)
        assert close(y, expected(model, changes, branches[:1], x))
    assert clean(model)


@pytest.mark.parametrize("layout", ["composite", "scattered", "merged"])
def test_memory_formats_and_strided_inputs(model, layout):
    bank, changes = adapters(model)
    x = torch.randn(len(LAYOUTS[layout]), 4, 5, 6)
    want = expected(model, changes, LAYOUTS[layout], x)
    every_second = torch.stack([x, x], dim=-1)[..., 1]
    for same in (x.to(memory_format=torch.channels_last), every_second, x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert close(evaluate(model, bank, LAYOUTS[layout], same), want)
    model.to(memory_format=torch.channels_last)
    assert close(evaluate(model, bank, LAYOUTS[layout], x.to(memory_format=torch.channels_last)), want)


def test_equal_strengths_share_one_number(model):
    bank, changes = adapters(model)
    branches = [one_hot((0.8, 0.8, 0.8), i) for i in range(3)]
    x = torch.randn(3, 4, 5, 6)
    assert close(evaluate(model, bank, branches, x), expected(model, changes, branches, x))


def test_gains_per_module(model):
    """A branch may give single layers other gains: K-LoRA's choice per layer, block weights."""
    bank, changes = adapters(model)
    branches = [Branch(STRENGTHS, (("conv", (0.0, 0.9, 0.0)),)), Branch((0.0,) * 3, (("linear", (1.0, 0.0, 0.0)),)),
                BASE, Branch(STRENGTHS, (("conv", (0.0, 0.0, 0.0)),))]
    x = torch.randn(len(branches), 4, 5, 6)
    assert close(evaluate(model, bank, branches, x), expected(model, changes, branches, x))


def test_an_adapter_that_lacks_a_layer(model):
    bank, changes = adapters(model)
    ops = [{"conv": make_ops("lora", (8, 4, 3, 3), 1)[0]}, {"linear": make_ops("lora", (16, 8), 2)[0]}, {}]
    own = [{"conv": make_ops("lora", (8, 4, 3, 3), 1)[1]}, {"linear": make_ops("lora", (16, 8), 2)[1]}, {}]
    for branches in (ALONE, [ALL, BASE, ALONE[2]]):
        x = torch.randn(3, 4, 5, 6)
        assert close(evaluate(model, Bank(ops), branches, x), expected(model, own, branches, x))


def test_a_layer_that_the_model_lacks_is_named(model):
    (op,), _ = make_ops("lora", (8, 8), 0)
    told: list = []
    routed = RoutedForwards(model, Bank([{"missing.proj": [op], "linear": make_ops("lora", (16, 8), 0)[0]}]),
                            report=lambda *problem: told.append(problem))
    routed.install()
    routed.remove()
    assert told == [("all", "missing.proj", "the model has no such layer that can be routed; left out")]


def test_outside_rows_and_for_base_rows_a_routed_layer_is_the_layer(model):
    bank, _ = adapters(model)
    x = torch.randn(2, 4, 5, 6)
    with torch.no_grad():
        plain = model(x)
        routed = RoutedForwards(model, bank)
        routed.install()
        assert torch.equal(model(x), plain)
        with routed.rows([BASE, BASE]):
            assert torch.equal(model(x), plain) and not routed.seen
        with routed.rows([ALL, ALL]):
            assert not torch.equal(model(x), plain) and routed.seen == {"conv", "linear"}
        assert torch.equal(model(x), plain)
        routed.remove()
        assert torch.equal(model(x), plain) and clean(model)


def test_an_exception_in_the_model_ends_the_rows(model):
    bank, _ = adapters(model)
    routed = RoutedForwards(model, bank)
    routed.install()
    with pytest.raises(RuntimeError), routed.rows([ALL]):
        model(torch.randn(1, 5, 5, 6))
    assert routed.current is None
    with routed.rows([ALL]):
        with routed.rows([BASE]):
            assert routed.current is None
        assert routed.current is not None
    routed.remove()


def test_weights_and_inputs_are_never_written(model):
    bank, _ = adapters(model, ("lora", "boft", "dora out"))
    before = {name: value.clone() for name, value in [*model.state_dict().items(), *bank.state_dict().items()]}
    x = torch.randn(7, 4, 5, 6)
    kept = x.clone()
    evaluate(model, bank, LAYOUTS["scattered"], x)
    assert torch.equal(x, kept)
    for name, value in [*model.state_dict().items(), *bank.state_dict().items()]:
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("repeat", [1, 2])
def test_installing_and_removing_again_is_harmless(model, repeat):
    bank, changes = adapters(model)
    routed = RoutedForwards(model, bank)
    x = torch.randn(3, 4, 5, 6)
    want = expected(model, changes, ALONE, x)
    for _ in range(2):
        for _ in range(repeat):
            routed.install()
        with torch.no_grad(), routed.rows(ALONE):
            assert close(model(x), want)
        for _ in range(repeat):
            routed.remove()
        assert clean(model)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_two_banks_on_one_model_removed_in_any_order(model, order):
    """Method nodes in a row: every bank adds its own branch, and whoever goes first leaves the other working."""
    (bank_a, changes_a), (bank_b, changes_b) = adapters(model), adapters(model, seed=100)
    x = torch.randn(4, 4, 5, 6)
    rows_a, rows_b = [ALONE[0], ALONE[0], ALL, BASE], [ALONE[1], BASE, ALONE[2], ALL]
    both = [Branch(a.gains + b.gains) for a, b in zip(rows_a, rows_b, strict=True)]
    with torch.no_grad():
        plain = model(x)
        routed = [RoutedForwards(model, bank_a, position=0), RoutedForwards(model, bank_b, position=1)]
        for each in routed:
            each.install()
        with routed[0].rows(rows_a), routed[1].rows(rows_b):
            assert close(model(x), expected(model_without(model, routed), changes_a + changes_b, both, x))
        for each in routed:
            each.install()
        routed[order[0]].remove()
        rest, rows, changes = [(routed[1], rows_b, changes_b), (routed[0], rows_a, changes_a)][order[0]]
        with rest.rows(rows):
            y = model(x)
        routed[order[1]].remove()
        assert torch.equal(model(x), plain)
        assert close(y, expected(model_without(model, routed), changes, rows, x))


def model_without(model: Small, routed: list[RoutedForwards]) -> Small:
    """The same weights in a model that nothing was ever installed on."""
    fresh = Small()
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_a_foreign_wrapper_on_top_survives_and_ours_below_turns_plain(model):
    bank, changes = adapters(model)
    x = torch.randn(3, 4, 5, 6)
    with torch.no_grad():
        plain = model(x)
    want = expected(model, changes, ALONE, x)
    routed = RoutedForwards(model, bank)
    routed.install()
    ours = model.linear.forward
    model.linear.forward = lambda *args: 2 * ours(*args)
    with torch.no_grad():
        with routed.rows(ALONE):
            assert close(model(x), 2 * want)
        routed.remove()
        assert torch.equal(model(x), 2 * plain) and "forward" not in model.conv.__dict__
        # Installed again above the foreign wrapper: our old forward below it must not add its delta a second time.
        routed.install()
        with routed.rows(ALONE):
            hidden = torch.tanh(model.conv(x)).flatten(2).mT
            y = model.linear(hidden)
        routed.remove()
        del model.linear.forward
        delta = expected(nn.Sequential(model.linear), [{"0": layers["linear"]} for layers in changes], ALONE, hidden)
        assert close(y, delta + model.linear(hidden).double())


def test_a_wrapper_that_was_there_before_comes_back(model):
    bank, changes = adapters(model)
    x = torch.randn(3, 4, 5, 6)
    before = model.linear.forward
    model.linear.forward = foreign = lambda *args: before(*args) + 1
    routed = RoutedForwards(model, bank)
    routed.install()
    routed.remove()
    assert model.linear.forward is foreign
    with torch.no_grad():
        del model.linear.forward
        want = model(x) + 1
        model.linear.forward = foreign
        assert torch.equal(model(x), want)


def test_nothing_stays_alive_after_removal(model):
    bank, _ = adapters(model)
    routed = RoutedForwards(model, bank)
    routed.install()
    with torch.no_grad(), routed.rows(LAYOUTS["scattered"]):
        model(torch.randn(7, 4, 5, 6))
    routed.remove()
    gone = weakref.ref(bank)
    del routed, bank
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_any_autograd_mode_and_no_factor_asks_for_a_gradient(model, context):
    bank, changes = adapters(model, ("lora", "boft", "dora in"))
    assert not any(parameter.requires_grad for parameter in bank.parameters())
    x = torch.randn(7, 4, 5, 6)
    routed = RoutedForwards(model, bank)
    routed.install()
    with context(), routed.rows(LAYOUTS["scattered"]):
        y = model(x)
    routed.remove()
    assert close(y.detach(), expected(model, changes, LAYOUTS["scattered"], x))


def test_bank_counts_its_bytes_and_moves_as_a_module(model):
    bank, _ = adapters(model)
    numbers = 16 * (8 + 4 * 9) + 16 * (16 + 8)  # three of rank 3, filled up
    assert bank.nbytes() == numbers * 4
    assert bank.to(torch.bfloat16).nbytes() == numbers * 2


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("mps", True), ("xpu", True), ("cpu", True)])
def test_numbers_are_sent_without_waiting_where_that_is_safe(device, waits, monkeypatch):
    """Guards: on devices that are not CUDA's, the host itself holds such copies for unsafe."""
    sent = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, where, **how: sent.append((where.type, how)) or tensor)
    found = on_device((1.0, 2.0), torch.device(device), torch.float16)
    assert sent == [(device, {"non_blocking": not waits})]
    assert found.tolist() == [1.0, 2.0] and found.dtype == torch.float16
