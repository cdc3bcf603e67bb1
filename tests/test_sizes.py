"""Sizes of what adapters of other kinds than low-rank do to a layer, and who is told while they are measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lora_ensemble.engine.adapters import OFT, Bias, Decomposed, Dense, LowRank, Replace, given
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.sizes import measure
from lora_ensemble.kernels.deltas import hadamard
from lora_ensemble.kernels.orthogonal import cayley
from lora_ensemble.methods.selection import Size
from lora_ensemble.tests.devices import Plain
from lora_ensemble.tests.selections import LAYERS, PAIR, PAIRS, bank, top


def sized(*ops, other=None, reader=None, report=None) -> Size:
    """The size of one adapter's ops on a layer of 12x10, next to another adapter."""
    other = other or [LowRank(torch.ones(12, 1), torch.ones(1, 10))]
    return measure(Bank([{"x": list(ops)}, {"x": other}]), PAIR, 7, reader=reader, report=report)["x"][0]


def like(delta: torch.Tensor) -> Size:
    x = delta.double().numpy()
    return Size(top(x, 7), float(np.abs(x).sum()), float((x**2).sum()))


def assert_size(found: Size, want: Size) -> None:
    assert (found.top, found.total, found.energy) == pytest.approx((want.top, want.total, want.energy), rel=1e-5)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def test_dense_kinds_count_with_their_delta():
    w = [rand(12, 3), rand(3, 10), rand(12, 3, seed=1), rand(3, 10, seed=1)]
    assert_size(sized(Dense(hadamard, w, (12, 10), 0.5)), like(0.5 * (w[0] @ w[1]) * (w[2] @ w[3])))
    assert_size(sized(Dense(given, [rand(12, 10)], (12, 10))), like(rand(12, 10)))


def test_ops_on_one_slice_add_up_and_slices_lie_side_by_side():
    up, down, extra = rand(12, 2), rand(2, 10), rand(12, 10)
    both = sized(LowRank(up, down, 0.5), Dense(given, [extra], (12, 10)))
    assert_size(both, like(0.5 * up @ down + extra))
    ups = [rand(4, 2, seed=s) for s in range(3)]
    fused = sized(*(LowRank(u, down, span=(0, 4 * s, 4)) for s, u in enumerate(ups)))
    assert_size(fused, like(torch.cat([u @ down for u in ups])))


def test_biases_do_not_count():
    up, down = rand(12, 2), rand(2, 10)
    assert_size(sized(LowRank(up, down), Bias(torch.ones(12))), like(up @ down))
    assert sized(Bias(torch.ones(12))) == Size(0.0, 0.0, 0.0)


@pytest.mark.parametrize("make", [
    lambda: Decomposed(LowRank(rand(12, 2), rand(2, 10)), rand(12, 1).abs()),
    lambda: OFT(cayley(rand(3, 4, 4))), lambda: Replace(rand(12, 10, seed=5)),
])
def test_a_change_that_depends_on_the_weight_is_taken_from_it(make):
    weight, op = rand(12, 10, seed=9), make()
    found = sized(op, reader=lambda name: weight if name == "x.weight" else None)
    assert_size(found, like(op.on_weight(weight, 1.0) - weight))


def test_an_unreadable_weight_is_said_and_the_rest_counts():
    told, up, down = [], rand(12, 2), rand(2, 10)
    found = sized(Decomposed(LowRank(up, down), rand(12, 1).abs()), report=lambda *what: told.append(what))
    assert_size(found, like(up @ down))
    assert [what[:2] for what in told] == [("0", "x")] and "unreadable" in told[0][2]
    assert sized(Replace(rand(12, 10))) == Size(0.0, 0.0, 0.0)


def test_a_visitor_sees_every_layer_and_may_stop_it():
    seen = []
    measure(bank(*PAIRS["alike"]()), PAIR, visit=lambda done, total: seen.append((done, total)))
    assert seen == [(n + 1, len(LAYERS)) for n in range(len(LAYERS))]

    def stop(done: int, total: int) -> None:
        raise InterruptedError(done)

    threads = torch.get_num_threads()
    with pytest.raises(InterruptedError):
        measure(bank(*PAIRS["alike"]()), PAIR, visit=stop)
    assert torch.get_num_threads() == threads  # layers are measured side by side, each by a single thread


def test_the_number_of_threads_does_not_change_sizes():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(measure(bank(*PAIRS["alike"]()), PAIR))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] and len(found[0]) == len(LAYERS)


def test_a_base_weight_on_a_device_without_float64():
    weight, op = rand(12, 10), OFT(cayley(rand(3, 4, 4)))
    found = sized(op, reader=lambda name: Plain(weight))
    assert_size(found, like(op.on_weight(weight, 1.0) - weight))
