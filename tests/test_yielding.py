"""Deltas that yield to others, against projections that are found by singular values of the deltas themselves."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.engine.adapters import LowRank
from lora_ensemble.engine.yielding import yield_to
from lora_ensemble.kernels.yielding import directions, hidden, yielding
from lora_ensemble.tests.reference import close, make_ops
from torch import Tensor


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen_by(deltas: list[Tensor], most: int) -> Tensor:
    """The projector on the strongest input directions of dense deltas [out, in], by their singular values."""
    _, values, right = torch.linalg.svd(torch.cat([delta.double() for delta in deltas]), full_matrices=False)
    right = right[values > 1e-3 * values[0]][:most]
    return right.mT @ right


def test_what_a_delta_sees_of_its_input_has_its_energy():
    down, up = rand(4, 10), rand(7, 4, seed=1)
    rows = hidden(down, up)
    assert close((rows.mT @ rows).float(), (up @ down).double().mT @ (up @ down).double())


@pytest.mark.parametrize("inputs", [40, 12, 1], ids=["of all directions few", "more than half of all", "there is one"])
def test_it_keeps_nothing_of_what_the_others_see(inputs):
    down, others = rand(4, inputs), [(rand(6, inputs, seed=2), rand(9, 6, seed=3)), (rand(3, inputs, seed=4),
                                                                                     0.2 * rand(9, 3, seed=5))]
    found = yielding(down, [hidden(*other) for other in others])
    wanted = down.double() - down.double() @ seen_by([up @ factor for factor, up in others], inputs // 2)
    assert found.dtype is torch.float32 and close(found, wanted)
    assert close(found, down) is (inputs == 1)


def test_rows_of_zeros_and_rows_that_are_there_twice_take_nothing_more():
    """A direction that nobody sees would be an arbitrary one."""
    down, factor, up = rand(4, 30), rand(3, 30, seed=1), rand(5, 3, seed=2)
    padded = torch.cat([factor, torch.zeros(2, 30), factor[:1]]), torch.cat([up, rand(5, 2, seed=3), up[:, :1]], dim=1)
    assert directions(hidden(*padded), 15).shape == (30, 3)
    assert close(yielding(down, [hidden(*padded)]), yielding(down, [hidden(factor, up)]))
    assert torch.equal(yielding(down, [torch.zeros(2, 30, dtype=torch.float64)]), down)
    for seed in range(9):  # energies of 0, which rounding makes less
        assert hidden(rand(8, 30), rand(5, 1, seed=seed).expand(5, 8)).isfinite().all()


def test_half_of_all_directions_are_left():
    """Others of a high rank leave a delta something."""
    found = yielding(torch.eye(10), [hidden(rand(32, 10, seed=1), rand(40, 32, seed=2))])
    assert torch.linalg.matrix_rank(found) == 5


def low(out: int, inputs: tuple[int, ...], rank: int, seed: int, span=None, dtype=torch.float32, scale: float = 0.5,
        of: int | None = None) -> LowRank:
    up, down = rand(out, rank, seed=seed).to(dtype), rand(rank, *inputs, seed=seed + 50).to(dtype)
    return LowRank(up, down, scale, span, of)


def dense(op: LowRank) -> Tensor:
    return op.delta(torch.zeros(1)).flatten(1).double()


def test_adapters_that_yield():
    """By layer: of a Linear, of a convolution, of one in which others see more than half of all directions and act with
    other strengths, of one that an adapter lacks."""
    adapters = [{"linear": [low(8, (20,), 2, 1, of=3)], "conv": [low(8, (6, 3, 3), 2, 2, of=3)],
                 "narrow": [low(8, (6,), 2, 8, of=3)], "alone": [low(8, (20,), 2, 3)]},
                {"linear": [low(8, (20,), 3, 4)], "conv": [low(8, (6, 3, 3), 3, 5)], "narrow": [low(8, (6,), 3, 9)]},
                {"linear": [low(8, (20,), 1, 6)], "conv": [low(8, (6, 3, 3), 1, 7)],
                 "narrow": [low(8, (6,), 3, 10, scale=0.05)]}]
    found, changed = yield_to(adapters, [0], [1, 2])
    assert changed == 3 and found[1:] == adapters[1:] and found[0]["alone"][0] is adapters[0]["alone"][0]
    for name in ("linear", "conv", "narrow"):
        own, *others = (dense(each[name][0]) for each in adapters)
        new = found[0][name][0]
        assert new.down.shape == adapters[0][name][0].down.shape and (new.scale, new.rank) == (0.5, 3)
        assert close(dense(new).float(), own - own @ seen_by(others, own.shape[1] // 2))
    assert yield_to(adapters, [], [1])[0] == adapters and yield_to(adapters, [0], [])[1] == 0


@pytest.mark.parametrize(("own", "other", "meet"), [
    (None, (0, 0, 4), True), ((0, 4, 4), (0, 0, 4), False), ((0, 0, 4), (0, 4, 4), False), ((0, 2, 4), (0, 0, 4), True),
    ((0, 0, 4), None, True), ((1, 0, 4), None, False), ((1, 0, 4), (1, 0, 4), True), ((1, 0, 4), (1, 4, 4), False)])
def test_slices_of_a_layer_that_several_are_fused_in(own, other, meet):
    """Where both add to the same outputs from the same inputs, and nowhere else."""
    def op(span, seed: int) -> LowRank:
        return low(12 if span is None or span[0] == 1 else span[2], (8,) if span is None or span[0] == 0 else (4,), 2,
                   seed, span)

    adapters = [{"qkv": [op(own, 1)]}, {"qkv": [op(other, 2)]}]
    found, changed = yield_to(adapters, [0], [1])
    assert changed == meet and (found[0]["qkv"][0] is adapters[0]["qkv"][0]) is not meet
    if meet:
        new, before, wide = (dense(each["qkv"][0]) for each in (found[0], *adapters))
        assert found[0]["qkv"][0].span == own
        assert close(new.float(), before - before @ seen_by([wide], new.shape[1] // 2))


@pytest.mark.parametrize(("own", "other"), [((20,), (24,)), ((6, 3, 3), (6, 1, 1))], ids=["enlarged", "kernels"])
def test_layers_that_others_see_otherwise(own, other):
    """One LoRA enlarges the layer, or both have kernels of another size: nothing is the same input."""
    adapters = [{"a": [low(8, own, 2, 1)]}, {"a": [low(8, other, 2, 2)]}]
    found, changed = yield_to(adapters, [0], [1])
    assert changed == 0 and found[0]["a"][0] is adapters[0]["a"][0]


@pytest.mark.parametrize("kind", ["kron", "dense", "dora out", "lora+bias"])
def test_other_kinds_neither_yield_nor_are_yielded_to(kind):
    shape = torch.Size((16, 24))
    other, plain = make_ops(kind, shape, 1)[0], [low(16, (24,), 2, 2)]
    plain_there = any(type(op) is LowRank for op in other)
    found, changed = yield_to([{"a": other}, {"a": plain}], [0], [1])
    assert changed == plain_there and all(new is op for new, op in zip(found[0]["a"], other, strict=True)
                                          if type(op) is not LowRank)
    found, changed = yield_to([{"a": plain}, {"a": other}], [0], [1])
    assert changed == plain_there


@pytest.mark.parametrize(("dtype", "after"), [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
                                              (torch.float8_e4m3fn, torch.float32)])
def test_factors_in_half_precision_and_less(dtype, after):
    """Of 8 bits, they are not rounded once more."""
    own, other = low(8, (20,), 2, 1, dtype=dtype), low(8, (20,), 3, 2, dtype=dtype)
    new = yield_to([{"a": [own]}, {"a": [other]}], [0], [1])[0][0]["a"][0]
    assert new.down.dtype is after
    left = new.down.double() @ torch.linalg.pinv(other.down.double())
    assert left.abs().max() < 0.05 * (own.down.double() @ torch.linalg.pinv(other.down.double())).abs().max()
