"""Sizes of what adapters of other kinds than low-rank do to a layer, and who is told while they are measured."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from lora_ensemble.engine import sizes
from lora_ensemble.engine.adapters import OFT, Bias, Decomposed, Dense, GLoRA, LowRank, Replace, given
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.sizes import measure
from lora_ensemble.kernels.deltas import hadamard, kronecker
from lora_ensemble.kernels.orthogonal import cayley
from lora_ensemble.kernels.size import Size
from lora_ensemble.methods.est import ESTLoRA
from lora_ensemble.methods.klora import KLoRA
from lora_ensemble.tests.accelerator import DEVICE
from lora_ensemble.tests.devices import Plain
from lora_ensemble.tests.selections import LAYERS, PAIR, PAIRS, Lora, bank, each_pair, schedule, top


def sized(*ops, k: int = 7, **options) -> Size:
    """The size of one adapter's ops on a layer of 12x10, next to another adapter of rank 1."""
    other = [LowRank(torch.ones(12, 1), torch.ones(1, 10))]
    return measure(Bank([{"x": list(ops)}, {"x": other}]), PAIR, k, **options)["x"][0]


def like(delta: torch.Tensor, k: int = 7) -> Size:
    x = delta.double().numpy()
    return Size(top(x, k), float(np.abs(x).sum()), float((x**2).sum()))


def assert_size(found: Size, want: Size) -> None:
    assert (found.top, found.total, found.energy) == pytest.approx((want.top, want.total, want.energy), rel=1e-5)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def test_dense_kinds_count_with_their_delta():
    w = [rand(12, 3), rand(3, 10), rand(12, 3, seed=1), rand(3, 10, seed=1)]
    assert_size(sized(Dense(hadamard, w, (12, 10), 0.5)), like(0.5 * (w[0] @ w[1]) * (w[2] @ w[3])))
    assert_size(sized(Dense(given, [rand(12, 10)], (12, 10))), like(rand(12, 10)))


def test_raw_factors_of_every_kind_leave_alpha_out():
    """An alpha of 0, too, of which nothing could be divided."""
    w, up, down = [rand(12, 3), rand(3, 10), rand(12, 3, seed=1), rand(3, 10, seed=1)], rand(12, 2), rand(2, 10)
    delta = (w[0] @ w[1]) * (w[2] @ w[3])
    assert_size(sized(Dense(hadamard, w, (12, 10), 0.5), raw=True), like(delta))
    assert_size(sized(LowRank(up, down, 0.5), Dense(hadamard, w, (12, 10), 0.25), raw=True), like(up @ down + delta))
    for kind in (Dense(hadamard, w, (12, 10), 0.0), LowRank(up, down, 0.0)):
        assert sized(kind, raw=True) == Size(0.0, 0.0, 0.0)


def test_a_dense_delta_of_several_tiles():
    x = rand(1100, 500)
    pair = [{"x": [Dense(given, [x * c], (1100, 500))]} for c in (1.0, 2.0)]
    assert_size(measure(Bank(pair), PAIR, 7)["x"][0], like(x))


def test_ops_on_one_slice_add_up_and_slices_lie_side_by_side():
    up, down, extra = rand(12, 2), rand(2, 10), rand(12, 10)
    both = sized(LowRank(up, down, 0.5), Dense(given, [extra], (12, 10)))
    assert_size(both, like(0.5 * up @ down + extra))
    ups = [rand(4, 2, seed=s) for s in range(3)]
    fused = sized(*(LowRank(u, down, span=(0, 4 * s, 4)) for s, u in enumerate(ups)))
    assert_size(fused, like(torch.cat([u @ down for u in ups])))


def test_an_op_on_the_whole_weight_and_one_on_a_slice_of_it_add_up():
    up, down, part = rand(12, 2), rand(2, 10), rand(4, 3)
    both = sized(LowRank(part, rand(3, 10), span=(0, 8, 4)), LowRank(up, down, 0.5))
    want = 0.5 * up @ down
    want[8:] += part @ rand(3, 10)
    assert_size(both, like(want))


def test_biases_do_not_count():
    up, down = rand(12, 2), rand(2, 10)
    assert_size(sized(LowRank(up, down), Bias(torch.ones(12))), like(up @ down))
    assert sized(Bias(torch.ones(12))) == Size(0.0, 0.0, 0.0)


@pytest.mark.parametrize("make", [
    lambda: [Decomposed(LowRank(rand(12, 2), rand(2, 10)), rand(12, 1).abs())],
    lambda: [OFT(cayley(rand(3, 4, 4)))], lambda: [Replace(rand(12, 10, seed=5))],
    lambda: [Decomposed(LowRank(rand(4, 2, seed=s), rand(2, 10)), rand(4, 1, seed=s).abs(), (0, 4 * s, 4))
             for s in range(3)],
    lambda: [OFT(cayley(rand(3, 4, 4))), Dense(given, [rand(12, 10)], (12, 10))],
], ids=["DoRA", "OFT", "set", "slices", "one after the other"])
def test_a_change_that_depends_on_the_weight_is_taken_from_it(make):
    weight, ops = rand(12, 10, seed=9), make()
    found, changed = sized(*ops, reader=lambda name: weight if name == "x.weight" else None), weight
    for op in ops:
        changed = op.on_weight(changed, 1.0)
    assert_size(found, like(changed - weight))


@pytest.mark.parametrize("strength", [0.5, -1.5])
@pytest.mark.parametrize("make", [lambda: OFT(cayley(rand(3, 4, 4))), lambda: Replace(rand(12, 10, seed=5))])
def test_a_change_that_is_not_proportional_to_the_strength_is_taken_at_it(make, strength):
    weight, op = rand(12, 10, seed=9), make()
    options = dict(reader=lambda name: weight, strengths=(strength, 1.0))
    found = sized(op, **options).at(strength)
    assert_size(found, like(op.on_weight(weight, strength) - weight))
    other = [LowRank(torch.ones(12, 1), torch.ones(1, 10))]
    behind = Bank([{"x": layer} for layer in (other, [op], other)])
    assert_size(measure(behind, PAIR, 7, first=1, **options)["x"][0].at(strength), found)


@pytest.mark.parametrize("magnitude", [(12, 1), (1, 10)], ids=["outputs", "inputs"])
def test_the_rank_of_a_dora_is_that_of_its_factors(magnitude):
    weight, op = rand(12, 10, seed=9), Decomposed(LowRank(rand(12, 4), rand(4, 10)), rand(*magnitude).abs())
    assert_size(sized(op, k=0, reader=lambda name: weight), like(op.on_weight(weight, 1.0) - weight, 4))


@pytest.mark.parametrize(("ops", "rank"), [
    ([Dense(hadamard, [rand(12, 3), rand(3, 10), rand(12, 3), rand(3, 10)], (12, 10))], 3),
    ([LowRank(rand(12, 4), rand(4, 10), rank=3)], 3),
    ([Dense(given, [rand(12, 10)], (12, 10))], 10),
    ([Dense(kronecker, [rand(3, 2), rand(4, 5)], (12, 10))], 2),
    ([LowRank(rand(4, 2), rand(2, 10), span=(0, at, 4)) for at in (0, 4, 8)], 6),
    ([LowRank(rand(12, 2), rand(2, 10)), LowRank(rand(12, 3), rand(3, 10))], 5),
], ids=["LoHa", "LoHa as one product", "difference", "LoKr", "slices", "two on one layer"])
def test_k_counts_the_rank_of_every_kind(ops, rank):
    """Next to a LoRA of rank 1: K is the rank."""
    assert sized(*ops, k=0) == sized(*ops, k=rank) != sized(*ops, k=rank + 1)


def test_k_of_a_layer_on_which_one_side_acts_alone():
    """Two subjects, say: the larger rank is that of either side."""
    pair = Bank([{"x": [LowRank(rand(12, rank), rand(rank, 10))]} for rank in (2, 3)])
    for sides in ((True, True), (False, False)):
        assert measure(pair, sides) == measure(pair, sides, 9) != measure(pair, sides, 8)


def test_differences_of_vectors_and_biases_have_rank_one():
    scale = Dense(given, [torch.arange(1.0, 13.0)], (12,))
    found = measure(Bank([{"x": [scale, Bias(torch.ones(12))]}, {"x": [Bias(torch.ones(12))]}]), PAIR)
    assert found["x"] == {0: Size(12.0, 78.0, 650.0), 1: Size(0.0, 0.0, 0.0)}


def test_an_unreadable_weight_is_said_and_the_rest_counts():
    told, up, down = [], rand(12, 2), rand(2, 10)
    found = sized(Decomposed(LowRank(up, down), rand(12, 1).abs()), report=lambda *what: told.append(what))
    assert_size(found, like(up @ down))
    dora, other = [Decomposed(LowRank(up, down), rand(12, 1).abs())], [LowRank(up, down)]
    behind = Bank([{"x": ops} for ops in (other, dora, other)])
    measure(behind, PAIR, first=1, report=lambda *what: told.append(what))
    assert [what[:2] for what in told] == [("0", "x"), ("1", "x")] and "unreadable" in told[0][2]
    assert sized(Replace(rand(12, 10))) == Size(0.0, 0.0, 0.0)
    assert_size(sized(GLoRA(rand(10, 2), rand(2, 10), up, down, 0.5)), like(0.5 * up @ down))


def test_unreadable_slices_lie_side_by_side():
    spans = [(0, 0, 2), (0, 2, 4), (0, 6, 6)]
    ups, down = [rand(span[2], 2) for span in spans], rand(2, 10)
    fused = [Decomposed(LowRank(up, down), torch.ones(len(up), 1), span) for up, span in zip(ups, spans, strict=True)]
    assert_size(sized(*fused), like(torch.cat([up @ down for up in ups])))


@pytest.mark.parametrize("first", [0, 1], ids=["alone", "behind another"])
def test_values_that_are_not_finite_are_refused(first):
    """A scale that a narrow dtype cannot hold: nothing could be compared with that, and pictures would be black."""
    pair = [{"x": [LowRank(torch.full((12, 1), 6e4), torch.ones(1, 10), scale)]} for scale in (1.0, 2.0)]
    behind, names = [pair[0]] * first + pair, ("always",) * first + ("a", "b")
    with pytest.raises(ValueError, match="LoRA 'b': its change of the layer 'x' holds values that are not finite in "
                                         "torch.float16"):
        measure(Bank(behind, names, torch.float16), PAIR, first=first)
    assert measure(Bank(pair, ("a", "b"), torch.bfloat16), PAIR)["x"][1].top == pytest.approx(1.2e5, rel=1e-2)


def test_a_visitor_sees_every_layer_and_may_stop_it():
    seen = []
    measure(bank(*PAIRS["alike"]()), PAIR, visit=lambda done, total: seen.append((done, total)))
    assert seen == [(n + 1, len(LAYERS)) for n in range(len(LAYERS))]

    def stop(done: int, total: int) -> None:
        raise InterruptedError(done)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with pytest.raises(InterruptedError):
            measure(bank(*PAIRS["alike"]()), PAIR, visit=stop)
        with ThreadPoolExecutor(1) as later:  # layers are measured side by side, each by a single thread
            assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_what_nobody_asks_for_is_not_measured():
    """Sums where energies are enough, and the sizes of a layer that one LoRA has to itself."""
    op = [LowRank(rand(12, 2), rand(2, 10))]
    both = Bank([{"x": op, "y": op}, {"x": op}])
    found = measure(both, PAIR, top=False)
    assert np.isnan([found["x"][0].top, found["x"][0].total]).all()
    assert found["x"][0].energy == measure(both, PAIR)["x"][0].energy > 0
    assert list(found["y"]) == [0] and np.isnan(found["y"][0].energy)


def test_dense_deltas_do_not_pile_up(monkeypatch):
    """Made ahead of the one that is measured as far as they are small."""
    def lead(entries: int) -> list[int]:
        made = []

        def items():
            for n in range(9):
                made.append(n)
                yield n, entries
        return [len(made) - n for n in sizes._ahead(items(), 4)]

    monkeypatch.setattr(sizes, "AT_ONCE", 100)
    assert max(lead(0)) == 5 and max(lead(40)) == 3 and lead(101) == [1] * 9
    held, low_rank, dense = [], LowRank(rand(12, 2), rand(2, 10)), Dense(given, [rand(12, 10)], (12, 10))
    monkeypatch.setattr(sizes, "_ahead", lambda items, count: (held.append(entries) or item for item, entries in items))
    measure(Bank([{"x": [low_rank], "y": [dense], "z": [dense]}, {"x": [low_rank], "y": [low_rank], "z": [dense]}]),
            PAIR)
    assert held == [0, 120, 240]


def test_the_number_of_threads_does_not_change_sizes():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(measure(bank(*PAIRS["alike"]()), PAIR))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] and len(found[0]) == len(LAYERS)


# --- on a GPU ---


def everything() -> Bank:
    """All ways to hold a delta, and a layer of one LoRA alone."""
    up, down, weight = rand(12, 3), rand(3, 10), rand(12, 10, seed=7)
    kinds = {"low-rank": [LowRank(up, down, 0.5)], "dense": [Dense(given, [weight], (12, 10))],
             "sliced": [LowRank(rand(4, 2, seed=s), rand(2, 10), span=(0, 4 * s, 4)) for s in range(3)],
             "both": [LowRank(up, down), Dense(given, [weight], (12, 10))], "bias": [Bias(torch.ones(12))],
             "rotated": [OFT(cayley(rand(3, 4, 4)))]}
    other = {name: [LowRank(rand(12, 2, seed=3), rand(2, 10, seed=3))] for name in kinds}
    first, second = ({"convolution": [LowRank(rand(12, rank), rand(rank, 10, 3, 3))]} for rank in (3, 2))
    return Bank([{**kinds, **first, "alone": other["dense"]}, {**other, **second}])


@pytest.mark.parametrize("most", [7, 10**6])
@pytest.mark.parametrize("options", [{}, {"top": False}, {"alone": True}, {"k": 3}], ids=str)
def test_a_device_finds_what_the_processor_finds(options, most, accelerator):
    """To 1e-6, in tiles and whole; the numbers come to the host together, when all have been asked for."""
    bank, seen, reader = everything(), [], lambda name: rand(12, 10, seed=9)
    want = measure(bank, PAIR, reader=reader, **options)
    accelerator.transfers.clear()
    found = measure(bank, PAIR, reader=reader, visit=lambda *at: seen.append(at), device=DEVICE, most=most, **options)
    assert [t for t in accelerator.transfers if t.kind not in ("upload", "double")] == [("wait", ANY, ANY)]
    assert seen == [(n + 1, len(bank.sites)) for n in range(len(bank.sites))]
    assert list(found) == list(want) and all(list(found[name]) == list(want[name]) for name in want)
    for name, here in want.items():
        for i, size in here.items():
            assert astuple(found[name][i]) == pytest.approx(astuple(size), rel=1e-6, nan_ok=True), (name, i)


@each_pair
def test_a_device_chooses_as_the_processor_does(make, accelerator):
    loras = make()
    here, there = (measure(bank(*loras), PAIR, device=device) for device in (None, DEVICE))
    for method in (KLoRA, ESTLoRA):
        assert (schedule(method.of(there, (1.0, 1.0), PAIR)) == schedule(method.of(here, (1.0, 1.0), PAIR))).all()


def test_equal_deltas_are_equal_on_a_device_too(accelerator):
    """A tie stays one: the choice at equal sums must not depend on where they were made."""
    lora = Lora.random(1, 4)
    for device in (None, DEVICE):
        found = measure(bank(lora, lora), PAIR, device=device)
        assert all(here[0] == here[1] for here in found.values())
        twice = measure(Bank([lora.ops, {name: [LowRank(op.up, op.down, 2.0)] for name, (op,) in lora.ops.items()}]),
                        PAIR, device=device)
        assert all(here[1] == here[0].at(2.0) for here in twice.values())


def test_a_device_refuses_values_that_are_not_finite_and_is_stopped(accelerator):
    pair = [{"x": [LowRank(torch.full((12, 1), 6e4), torch.ones(1, 10), scale)]} for scale in (1.0, 2.0)]
    with pytest.raises(ValueError, match="LoRA 'b': its change of the layer 'x' holds values that are not finite"):
        measure(Bank(pair, ("a", "b"), torch.float16), PAIR, device=DEVICE)

    def stop(done: int, total: int) -> None:
        raise InterruptedError(done)

    with pytest.raises(InterruptedError, match="1"):
        measure(bank(*PAIRS["alike"]()), PAIR, visit=stop, device=DEVICE)


def test_a_base_weight_on_a_device_without_float64():
    weight, op = rand(12, 10), OFT(cayley(rand(3, 4, 4)))
    found = sized(op, reader=lambda name: Plain(weight))
    assert_size(found, like(op.on_weight(weight, 1.0) - weight))
