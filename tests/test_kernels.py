"""Kernels against float64 definitions."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.kernels.branch import Branch, Step, one_hot
from lora_ensemble.kernels.decompose import magnitude_scale
from lora_ensemble.kernels.deltas import balanced, hadamard, hadamard_factors, kronecker, tucker, tucker_down
from lora_ensemble.kernels.lowrank import (
    Columns,
    Number,
    Share,
    Update,
    add_pointwise_,
    grouped,
    rows,
    shares,
    shares_apart,
    tokens,
)
from lora_ensemble.kernels.orthogonal import block_rotate, butterfly_rotate, cayley
from lora_ensemble.tests.reference import TOLERANCE, butterfly_matrix, close
from lora_ensemble.tests.test_engine_cost import Spy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def gain_of(kind: str, *shape: int, dtype: torch.dtype) -> tuple[dict, Tensor]:
    """A gain as the kernels take it, and in float64."""
    if kind == "number":
        return {"alpha": Number(0.7)}, torch.full(shape, 0.7, dtype=torch.float64)
    tensor = rand(*shape, dtype=dtype, seed=5)
    return ({"gain": tensor}, tensor.double()) if sum(shape) % 2 else (
        {"gain": tensor, "alpha": Number(0.5)}, 0.5 * tensor.double())


@DTYPES
@pytest.mark.parametrize("gain", ["number", "ranks", "rows and ranks"])
@pytest.mark.parametrize(("n", "inputs", "out", "rank"), [
    (1, 1, 1, 1), (1, 16, 8, 4), (33, 24, 40, 1), (64, 40, 24, 16), (5, 8, 8, 32), (0, 8, 6, 2)])
def test_rows(n, inputs, out, rank, gain, dtype):
    x, y = rand(n, inputs, dtype=dtype), rand(n, out, dtype=dtype, seed=1)
    down, up = rand(rank, inputs, dtype=dtype, seed=2), rand(rank, out, dtype=dtype, seed=3)
    how, wide = gain_of(gain, *((n, rank) if gain.startswith("rows") else (rank,)), dtype=dtype)
    want = y.double() + (x.double() @ down.double().T * wide) @ up.double()
    assert rows(down, up, **how)(y, x) is y
    assert close(y, want)


@DTYPES
def test_rows_into_columns_from_strided_input(dtype):
    """y a slice of a fused layer's columns, x every second column of a wider tensor: the rest of y stays as it is."""
    whole, x = rand(9, 30, dtype=dtype), rand(9, 16, dtype=dtype, seed=1)[:, ::2]
    down, up, before = rand(4, 8, dtype=dtype, seed=2), rand(10, 4, dtype=dtype, seed=3), whole.clone()
    rows(down, up.T, alpha=Number(0.5))(whole[:, 10:20], x)
    assert close(whole[:, 10:20], before[:, 10:20].double() + 0.5 * x.double() @ (up.double() @ down.double()).T)
    assert torch.equal(whole[:, :10], before[:, :10]) and torch.equal(whole[:, 20:], before[:, 20:])


@DTYPES
@pytest.mark.parametrize("gain", ["number", "per row", "per token"])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("n", "count", "inputs", "out", "rank"), [(1, 1, 1, 1, 1), (2, 7, 24, 40, 4),
                                                                  (5, 1, 16, 8, 1), (3, 0, 4, 4, 2)])
def test_tokens(n, count, inputs, out, rank, strided, gain, dtype):
    x, y = rand(n, count, inputs, dtype=dtype), rand(n, count, out, dtype=dtype, seed=1)
    if strided:  # some channels of a fused layer, tokens before rows
        whole = rand(count, n, out + 3, dtype=dtype, seed=1)
        y = whole[..., 2:2 + out].transpose(0, 1)
    down, up = rand(rank, inputs, dtype=dtype, seed=2), rand(rank, out, dtype=dtype, seed=3)
    how, wide = gain_of(gain, n, 1 if gain == "per row" else count, rank, dtype=dtype)
    want = y.double() + (x.double() @ down.double().T * wide) @ up.double()
    assert tokens(down, up.expand(n, -1, -1), **how)(y, x) is y
    assert close(y, want)


@pytest.mark.parametrize("kernel", [rows, lambda down, up, **how: tokens(down, up[None], **how)])
@pytest.mark.parametrize("gain", [None, torch.tensor([0.3, -1.5])])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 0.5])
def test_a_number_in_front(alpha, gain, kernel):
    """Powers of two: to the last bit as if the factor were so much larger."""
    x, down, up = rand(1, 5, 6), rand(2, 6), rand(2, 4)
    x = x[0] if kernel is rows else x
    y = rand(*x.shape[:-1], 4, seed=1)
    found = kernel(down, up, gain=gain, alpha=Number(alpha))(y.clone(), x)
    assert torch.equal(found, kernel(alpha * down, up, gain=gain)(y.clone(), x)) and not torch.equal(found, y)


@DTYPES
@pytest.mark.parametrize("gain", ["number", "per group"])
@pytest.mark.parametrize(("g", "n", "inputs", "out", "rank"), [(1, 1, 1, 1, 1), (2, 7, 24, 40, 4), (5, 1, 16, 8, 1),
                                                               (3, 0, 4, 4, 2)])
def test_grouped(g, n, inputs, out, rank, gain, dtype):
    x, y = rand(g, n, inputs, dtype=dtype), rand(g, n, out, dtype=dtype, seed=1)
    # The engine's factors are views of one stack: strided, not contiguous.
    down = rand(g * rank, inputs, dtype=dtype, seed=2).view(g, rank, inputs).mT
    up = rand(out, g * rank, dtype=dtype, seed=3).T.unflatten(0, (g, rank))
    how, wide = gain_of(gain, g, 1, 1, dtype=dtype)
    want = torch.stack([y[k].double() + x[k].double() @ down[k].double() * wide[k] @ up[k].double() for k in range(g)])
    assert grouped(down, up, n, **how)(y, x) is y
    assert close(y, want)


@pytest.mark.parametrize("turned", ["neither", "inputs", "outputs"])
@pytest.mark.parametrize("dims", [2, 3], ids=["vectors", "tokens"])
def test_groups_of_some_rows_and_columns(dims, turned):
    """Two groups of two entries behind the first and before the last, into 5 of 12 outputs, of 4 of 9 inputs; all lie
    somewhere within what is larger."""
    tokens = (3,) if dims == 3 else ()
    x, y = rand(7, *tokens, 9)[1:], rand(7, *tokens, 12, seed=1)[1:]
    down, up, gain, count = rand(2, 4, 2, seed=2), rand(2, 2, 5, seed=3), rand(2, 1, 1, seed=4), 2 * 3 ** (dims - 2)
    want = y.double()
    for group in range(2):
        for entry in (1 + 2 * group, 2 + 2 * group):
            want[entry, ..., 6:11] += (
                0.5 * x[entry, ..., 2:6].double() @ down[group].double() * gain[group].item() @ up[group].double())
    whole = y.clone()
    if turned != "neither":
        x, y = (t.mT.contiguous().mT if turned == name else t for name, t in (("inputs", x), ("outputs", y)))
    assert grouped(down, up, count, gain, Number(0.5), count // 2, Columns(6, 12), Columns(2, 9))(y, x) is y
    assert close(y, want) and torch.equal(y[0], whole[0]) and torch.equal(y[5], whole[5])


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.to(memory_format=torch.channels_last if t.ndim == 4 else torch.channels_last_3d),
    "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@DTYPES
@pytest.mark.parametrize("gain", ["number", "ranks", "places"])
@pytest.mark.parametrize(("size", "layout"), [(size, layout) for size in [(7,), (1, 1), (5, 6), (2, 3, 4)]
                                              for layout in LAYOUTS if len(size) > 1 or layout != "channels last"])
def test_add_pointwise(size, layout, gain, dtype):
    b, out, rank = 3, 8, 4
    y, hidden = (LAYOUTS[layout](rand(b, c, *size, dtype=dtype, seed=c)) for c in (out, rank))
    up = rand(rank, out, dtype=dtype, seed=9)
    how, wide = gain_of(gain, *((b, rank, *size) if gain == "places" else (1, rank, *[1] * len(size))), dtype=dtype)
    want = y.double() + torch.einsum("ro,br...->bo...", up.double(), hidden.double() * wide)
    strides = y.stride()
    assert add_pointwise_(y, hidden, up, **how) is y and y.stride() == strides
    assert close(y, want)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_add_pointwise_holds_no_delta_of_its_own(layout):
    """Guards: memory of a whole output more, and two passes over it, with --force-channels-last."""
    y, hidden = (LAYOUTS[layout](rand(2, c, 5, 6)) for c in (64, 4))
    up = rand(4, 64)
    with Spy() as spy:
        add_pointwise_(y, hidden, up, alpha=Number(0.5))
    assert spy.written == y.numel()


def test_add_pointwise_into_some_channels_of_one_row():
    whole, hidden, up = rand(1, 12, 4, 4), rand(1, 1, 4, 4, seed=1), rand(1, 5, seed=2)
    before = whole.clone()
    delta = (up.double().T @ hidden.double().flatten(2)).view(1, 5, 4, 4)
    add_pointwise_(whole[:, 3:8], hidden, up, alpha=Number(2.0))
    assert close(whole[:, 3:8], before[:, 3:8].double() + 2 * delta)
    assert torch.equal(whole[:, :3], before[:, :3]) and torch.equal(whole[:, 8:], before[:, 8:])


@pytest.mark.parametrize("kernel", [(), (1,), (3,), (3, 3), (1, 2, 3)], ids=str)
def test_tucker_is_its_sum(kernel):
    core, a, b = rand(2, 3, *kernel), rand(2, 4, seed=1), rand(3, 5, seed=2)
    want = torch.zeros(4, 5, *kernel, dtype=torch.float64)
    for o in range(4):
        for i in range(5):
            for p in range(2):
                for q in range(3):
                    want[o, i] += core[p, q].double() * a[p, o].double() * b[q, i].double()
    assert close(tucker(core, a, b), want)


@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (4, 4)], ids=str)
def test_hadamard_factors_multiply_to_the_hadamard_product(ranks):
    first, second = ranks
    factors = (rand(6, first), rand(first, 5, seed=1), rand(6, second, seed=2), rand(second, 5, seed=3))
    up, down = hadamard_factors(*(f.double() for f in factors))
    assert up.shape == (6, first * second) and down.shape == (first * second, 5)
    assert close((up @ down).float(), hadamard(*(f.double() for f in factors)))


@pytest.mark.parametrize("kernel", [(1,), (3, 3), (3, 1, 2)], ids=str)
def test_tucker_down_then_up_is_the_whole_convolution(kernel):
    """up (mid (down)): folding mid into down gives the weight that the three layers in a row have."""
    down, mid, up = rand(3, 5, *[1] * len(kernel)), rand(2, 3, *kernel, seed=1), rand(4, 2, seed=2)
    folded = tucker_down(down, mid)
    assert folded.shape == (2, 5, *kernel)
    want = torch.zeros(4, 5, *kernel, dtype=torch.float64)
    for o in range(4):
        for i in range(5):
            for r in range(2):
                for q in range(3):
                    want[o, i] += up[o, r].double() * mid[r, q].double() * down[q, i].double()
    assert close(torch.einsum("or,r...->o...", up, folded), want)


@DTYPES
@pytest.mark.parametrize("turned", [False, True], ids=["in one piece", "in another order"])
@pytest.mark.parametrize("size", [(6,), (2, 3)], ids=["vectors", "tokens"])
def test_shares(size, turned, dtype):
    """Three slices of 5 outputs and 2 ranks, one of 4 outputs and 3 ranks after a gap of one output; slice by slice."""
    torch.manual_seed(0)
    x, y, down = (torch.randn(shape).to(dtype) for shape in ((*size, 8), (*size, 20), (9, 8)))
    three, last, gain = torch.randn(3, 2, 5).to(dtype), torch.randn(1, 3, 4).to(dtype), torch.rand(9).to(dtype)
    want, hidden = y.double(), x.double() @ down.double().T
    for k in range(3):
        want[..., 5 * k:5 * k + 5] += 0.5 * (hidden * gain.double())[..., 2 * k:2 * k + 2] @ three[k].double()
    want[..., 16:20] += 0.5 * (hidden * gain.double())[..., 6:] @ last[0].double()
    own, entries = y.mT.contiguous().mT if turned else y.clone(), None if len(size) == 1 else size[0]
    assert shares(down, [Share(0, 0, three), Share(16, 6, last)], entries, 20, gain, Number(0.5))(own, x) is own
    assert close(own, want)

    want = y.double()
    for k in range(3):
        want[..., 5 * k:5 * k + 5] += 0.5 * hidden[..., 2 * k:2 * k + 2] @ three[k].double()
    own = y.mT.contiguous().mT if turned else y.clone()
    assert shares_apart(down[:6].unflatten(0, (3, 2)).mT, Share(0, 0, three), 20, Number(0.5))(own, x) is own
    assert close(own, want)


def calls(run: Update, outputs: int) -> list[str]:
    """What a product asks of the host for two entries of four tokens, of 8 inputs."""
    seen, y, x = [], rand(2, 4, outputs, seed=1), rand(2, 4, 8)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Seen():
        run(y, x)
    return seen


def test_slices_that_are_a_whole_layer_need_no_pieces_of_it():
    """Six calls for the host: two products, and two views of y and of the hidden values."""
    whole, part = (calls(shares(rand(6, 8), [Share(0, 0, rand(3, 2, 5))], 2, outputs), outputs)
                   for outputs in (15, 16))
    assert len(whole) == 6 < len(part)


def test_groups_of_some_rows_need_one_view_of_each():
    """Which rows, groups and columns: where a few views take the host as long as a product."""
    run = grouped(rand(1, 8, 2), rand(1, 2, 5), 4, first=4, into=Columns(3, 16))
    assert calls(run, 16) == ["as_strided.default", "bmm.default", "as_strided.default", "baddbmm_.default"]


def test_hadamard_of_two_products():
    w1_a, w1_b, w2_a, w2_b = rand(6, 2), rand(2, 7, seed=1), rand(6, 3, seed=2), rand(3, 7, seed=3)
    want = torch.empty(6, 7, dtype=torch.float64)
    for o in range(6):
        for i in range(7):
            want[o, i] = (w1_a[o].double() @ w1_b[:, i].double()) * (w2_a[o].double() @ w2_b[:, i].double())
    assert close(hadamard(w1_a, w1_b, w2_a, w2_b), want)


def test_hadamard_with_cores():
    t1, t2 = rand(2, 2, 3, 3), rand(2, 2, 3, 3, seed=1)
    w1_a, w1_b, w2_a, w2_b = rand(2, 4, seed=2), rand(2, 5, seed=3), rand(2, 4, seed=4), rand(2, 5, seed=5)
    want = tucker(t1.double(), w1_a.double(), w1_b.double()) * tucker(t2.double(), w2_a.double(), w2_b.double())
    got = hadamard(w1_a, w1_b, w2_a, w2_b, t1, t2)
    assert got.shape == (4, 5, 3, 3) and close(got, want)


@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=str)
def test_kronecker_puts_a_scaled_copy_at_each_entry(kernel):
    w1, w2 = rand(2, 3), rand(4, 5, *kernel, seed=1)
    got = kronecker(w1, w2)
    assert got.shape == (8, 15, *kernel)
    for p in range(2):
        for q in range(3):
            assert close(got[4 * p:4 * p + 4, 5 * q:5 * q + 5], w1[p, q].double() * w2.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (5, 4, 4), (2, 3, 8, 8)], ids=str)
def test_cayley_rotates(shape, dtype):
    rotations = cayley(rand(*shape).to(dtype))
    assert rotations.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eye = torch.eye(shape[-1], dtype=torch.float64).expand(shape)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (rotations.double() @ rotations.double().mT - eye).abs().max() < tolerance
    assert (torch.linalg.det(rotations.double()) - 1).abs().max() < tolerance  # a rotation, no reflection


def test_cayley_of_symmetric_blocks_is_the_identity():
    block = rand(3, 4, 4)
    assert torch.equal(cayley(block + block.mT), torch.eye(4).expand(3, 4, 4))


def test_cayley_constraint_shrinks_all_blocks_by_one_factor():
    blocks = rand(3, 4, 4)
    q = blocks.double() - blocks.double().mT
    small = q * 0.2 / q.norm()
    eye = torch.eye(4, dtype=torch.float64)
    want = (eye + small) @ torch.linalg.inv(eye - small)
    assert close(cayley(blocks, 0.2), want)
    assert torch.equal(cayley(blocks, 1e6), cayley(blocks))  # a constraint that is met changes nothing


@pytest.mark.parametrize("rest", [(), (5,), (3, 2, 2)], ids=str)
def test_block_rotate_is_a_block_diagonal_product(rest):
    rotations, w = cayley(rand(3, 4, 4)), rand(12, *rest, seed=1)
    want = torch.einsum("po,o...->p...", torch.block_diag(*rotations.double()).T, w.double())
    assert close(block_rotate(rotations, w), want)


@pytest.mark.parametrize("rest", [(), (5,), (3, 2, 2)], ids=str)
@pytest.mark.parametrize(("stages", "blocks", "size"), [(1, 1, 2), (1, 4, 4), (2, 4, 2), (3, 4, 4)])
def test_butterfly_is_a_product_of_permutations_and_rotations(stages, blocks, size, rest):
    rotations, w = cayley(rand(stages, blocks, size, size)), rand(blocks * size, *rest, seed=1)
    matrix = butterfly_matrix(rotations)
    assert (matrix @ matrix.T - torch.eye(blocks * size)).abs().max() < 1e-5
    assert close(butterfly_rotate(rotations, w), torch.einsum("po,o...->p...", matrix, w.double()))


@DTYPES
@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=str)
def test_magnitude_scale(kernel, dtype):
    weight, delta = rand(6, 5, *kernel, dtype=dtype), 0.1 * rand(6, 5, *kernel, dtype=dtype, seed=1)
    eps = torch.finfo(dtype).eps
    of_outputs, of_inputs = rand(6, 1, *[1] * len(kernel), seed=2), rand(1, 5, *[1] * len(kernel), seed=3)
    s, on_output = magnitude_scale(of_outputs, weight, delta)
    assert on_output and s.dtype == torch.float32
    for o in range(6):
        assert s[o].item() == pytest.approx(of_outputs[o].item() / (weight[o].double().norm().item() + eps), rel=1e-5)
    s, on_output = magnitude_scale(of_outputs, weight, delta, of_changed=True)
    for o in range(6):
        norm = (weight + delta)[o].double().norm().item() + eps
        assert on_output and s[o].item() == pytest.approx(of_outputs[o].item() / norm, rel=1e-5)
    s, on_output = magnitude_scale(of_inputs, weight, delta)
    assert not on_output
    for i in range(5):
        norm = (weight + delta)[:, i].double().norm().item() + eps
        assert s[i].item() == pytest.approx(of_inputs[0, i].item() / norm, rel=1e-5)


def test_magnitude_scale_of_an_unchanged_layer_is_one():
    weight = rand(6, 5)
    for norms in (weight.norm(dim=1, keepdim=True), weight.norm(dim=0, keepdim=True)):
        s, _ = magnitude_scale(norms, weight, torch.zeros_like(weight))
        assert (s - 1).abs().max() < 1e-6


def test_branch_is_a_value_and_knows_when_it_is_the_base():
    assert one_hot((0.5, 0.8), 1) == Branch((0.0, 0.8)) and hash(one_hot((0.5, 0.8), 1)) == hash(Branch((0.0, 0.8)))
    assert Branch((0.0, 0.0)).is_base and Branch(()).is_base and not Branch((0.0, 0.1)).is_base
    exception = Branch((0.0, 0.0), (("a.b", (0.0, 1.0)),))
    assert not exception.is_base and exception.at("a.b") == (0.0, 1.0) and exception.at("a") == (0.0, 0.0)


def test_step_progress_runs_from_zero_to_one():
    assert [Step(j, 5, 1.0).progress for j in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert Step(0, 1, 1.0).progress == 0.0


@pytest.mark.parametrize("size", [1e-30, 1e-6, 0.1, 30.0, 1e3, 1e20])
@DTYPES
def test_balanced_factors_have_the_same_product(size, dtype):
    """Exactly, as powers of two round nothing; and none is lost or infinite in half precision."""
    if not torch.finfo(dtype).tiny < size < torch.finfo(dtype).max:
        pytest.skip("no such factor in this dtype")
    down, up = (rand(4, 9, seed=2) * size).to(dtype), (rand(6, 4, seed=3).float() / size).to(dtype)
    new_up, new_down = balanced(up, down)
    assert torch.equal(new_up.double() @ new_down.double(), up.double() @ down.double())
    assert 2**-11 < new_down.half().abs().amax() < 5


def test_factors_of_ordinary_size_are_left_alone():
    up, down = rand(6, 4), rand(4, 9)
    assert balanced(up, down)[0] is up and balanced(up, down)[1] is down
    zeros = torch.zeros(4, 9)
    assert balanced(up, zeros)[1] is zeros
