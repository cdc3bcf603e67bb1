"""How large a delta is: exact top-K sums, sums and energies of products, against dense float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lora_ensemble.kernels import topk
from lora_ensemble.kernels.energy import energy
from lora_ensemble.kernels.topk import sums_on_device, top_and_total
from lora_ensemble.tests.operations import Operations
from torch import Tensor

LAYERS = {  # (out, in, *kernel) of real models
    "SD1.5 attention": (320, 320), "SD1.5 context": (320, 768), "SD1.5 conv": (320, 320, 3, 3),
    "SDXL attention": (1280, 1280), "SDXL feed-forward": (1280, 5120), "SDXL context": (640, 2048),
    "Flux attention": (3072, 3072),
}
each_layer = pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
TOLERANCE = 1e-6  # relative; the factors are exact in float32 whatever they are stored in


def factors(shape: tuple[int, ...], rank: int, dtype: torch.dtype = torch.float32, seed: int = 0,
            spread: float = 0.7) -> tuple[Tensor, Tensor]:
    """(down, up) whose row and column norms are log-normal, as those of trained LoRAs are; spread 0: flat."""
    g = torch.Generator().manual_seed(seed)
    out, *rest = shape
    down = torch.randn(rank, *rest, generator=g) * torch.exp(spread * torch.randn(1, *rest, generator=g))
    up = torch.randn(out, rank, generator=g) * torch.exp(spread * torch.randn(out, 1, generator=g))
    return (0.02 * down).to(dtype), (0.02 * up).to(dtype)


def dense(down: Tensor, up: Tensor) -> np.ndarray:
    """Independent of the kernels: float64 in numpy, flat."""
    down, up = down.double().flatten(1).numpy(), up.double().numpy()
    return np.abs(up @ down).reshape(-1)


def reference(entries: np.ndarray, k: int) -> tuple[float, float]:
    entries = np.sort(entries.reshape(-1))[::-1]
    return float(entries[:k].sum()), float(entries.sum())


@each_dtype
@each_layer
def test_sums_equal_the_dense_ones(shape, dtype):
    down, up = factors(shape, 16, dtype)
    assert top_and_total([(down, up)], 256) == pytest.approx(reference(dense(down, up), 256), rel=TOLERANCE)


CPU = torch.device("cpu")


@each_dtype
@pytest.mark.parametrize("most", [1000, 50_000, 10**9])
@pytest.mark.parametrize("k", [0, 5, 3000, 10**7])
def test_sums_on_a_device_equal_the_dense_ones(k, most, dtype):
    """Products and dense parts, whole and in tiles; also where K is more than a tile or all of it."""
    down, up = factors((64, 30, 3, 3), 8, dtype)
    rest = 0.02 * torch.randn(40, 50, generator=torch.Generator().manual_seed(3)).to(dtype)
    found = sums_on_device([(down, up), rest], k, CPU, most)
    entries = np.concatenate([dense(down, up), np.abs(rest.double().numpy()).reshape(-1)])
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([*reference(entries, k), float(np.square(entries).sum())], rel=TOLERANCE)
    assert found[:2].tolist() == pytest.approx(top_and_total([(down, up), rest], k), rel=TOLERANCE)
    assert torch.equal(sums_on_device([(down, up), rest], k, CPU, most), found), "equal deltas have equal sums"
    assert sums_on_device([], k, CPU, most).tolist() == [0, 0, 0]


def test_operations_of_sums_on_a_device():
    """A GPU waits for the host to ask for each."""
    down, up = factors((64, 48), 8)
    with torch.no_grad(), Operations() as asked:
        sums_on_device([(down, up)], 64, CPU, 10**9)
    assert len(asked.names) <= 16, asked.names


@pytest.mark.parametrize("spread", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 8), (8, 128), (32, 32), (64, 16), (128, 128)], ids=str)
def test_any_pair_of_ranks(ranks, spread):
    down, up = factors((640, 768), ranks[0], spread=spread)
    k = ranks[0] * ranks[1]
    assert top_and_total([(down, up)], k) == pytest.approx(reference(dense(down, up), k), rel=TOLERANCE)


@each_layer
def test_energy_equals_the_dense_one(shape):
    for rank in (1, 16, 128):
        down, up = factors(shape, rank)
        want = float((dense(down, up) ** 2).sum())
        assert energy(down.flatten(1), up).item() == pytest.approx(want, rel=1e-12)


@each_dtype
def test_energy_of_any_dtype_is_that_of_its_values(dtype):
    down, up = factors((640, 320), 16, dtype)
    found = energy(down, up)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(float((dense(down, up) ** 2).sum()), rel=1e-12)


def test_energy_survives_cancellation():
    """Two almost equal factors of opposite sign: float32 Gram matrices would lose this."""
    down, up = factors((64, 48), 4)
    down, up = torch.cat([down, down]), torch.cat([up, -up * (1 + 1e-4)], dim=1)
    assert energy(down, up).item() == pytest.approx(float((dense(down, up) ** 2).sum()), rel=1e-6)


def test_an_energy_that_cancels_is_never_negative():
    """Ranks that undo each other, turned so that rounding leaves something."""
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        down, up, turn = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((3, 5), (4, 3), (6, 6)))
        turn = torch.linalg.qr(turn)[0]
        assert 0 <= energy(turn.T @ torch.cat([down, down]), torch.cat([up, -up], dim=1) @ turn).item() < 1e-12


def test_energies_of_a_stack_are_those_of_its_layers():
    pairs = [factors((64, 48), 4, seed=s) for s in range(5)]
    stacked = energy(*(torch.stack(each) for each in zip(*pairs, strict=True)))
    assert stacked.tolist() == pytest.approx([energy(*pair).item() for pair in pairs], rel=1e-14)


# --- properties ---


@pytest.mark.parametrize("c", [0.5, -3.0, 1e-4, 100.0])
def test_sums_are_homogeneous_of_degree_one_and_energy_of_two(c):
    down, up = factors((96, 80), 8)
    before, after = top_and_total([(down, up)], 64), top_and_total([(down, c * up)], 64)
    assert after == pytest.approx([abs(c) * value for value in before], rel=1e-5)
    assert energy(down, c * up).item() == pytest.approx(c * c * energy(down, up).item(), rel=1e-5)


def test_rows_columns_and_ranks_may_be_permuted():
    down, up = factors((200, 150), 8)
    g = torch.Generator().manual_seed(3)
    rows, columns, ranks = (torch.randperm(n, generator=g) for n in (200, 150, 8))
    moved = down[ranks][:, columns], up[rows][:, ranks]
    assert top_and_total([moved], 64) == pytest.approx(top_and_total([(down, up)], 64), rel=1e-6)
    assert energy(*moved).item() == pytest.approx(energy(down, up).item(), rel=1e-12)


def test_more_entries_never_sum_to_less_and_all_of_them_are_the_total():
    down, up = factors((30, 20), 4)
    sums = [top_and_total([(down, up)], k)[0] for k in (0, 1, 10, 100, 599, 600, 601, 10**6)]
    assert sums[0] == 0.0 and all(a < b for a, b in zip(sums[:6], sums[1:6], strict=False))
    total = top_and_total([(down, up)], 1)[1]
    assert sums[5:] == pytest.approx([total] * 3, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 2, 3, 3), (2, 2)], ids=str)
def test_degenerate_shapes(shape):
    down, up = factors(shape, 8)  # a rank above the dimensions, too
    assert top_and_total([(down, up)], 64) == pytest.approx(reference(dense(down, up), 64), rel=TOLERANCE)
    assert energy(down.flatten(1), up).item() == pytest.approx(float((dense(down, up) ** 2).sum()), rel=1e-12)


def test_equal_entries_are_counted_as_often_as_they_occur():
    down, up = torch.ones(1, 300), torch.ones(400, 1)
    assert top_and_total([(down, up)], 1000) == (1000.0, 120000.0)


def test_zeros():
    down, up = torch.zeros(4, 300), torch.ones(400, 4)
    assert top_and_total([(down, up)], 16) == (0.0, 0.0) and energy(down, up).item() == 0.0
    assert top_and_total([], 16) == (0.0, 0.0)


def test_a_negative_k_is_refused():
    with pytest.raises(ValueError, match="k must not be negative, got -1"):
        top_and_total([torch.ones(2, 2)], -1)


# --- parts and tiles ---


@pytest.mark.parametrize("shape", [(64,), (64, 48), (64, 32, 3, 3), (32, 8, 3, 3, 3)], ids=str)
@each_dtype
def test_dense_matrices(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = reference(np.abs(x.double().numpy()), 25)
    assert top_and_total([x], 25) == pytest.approx(want, rel=TOLERANCE)


def test_float64_is_summed_in_float64():
    down, up = (factor.double() for factor in factors((64, 48), 4))
    down = down * torch.linspace(1, 1 + 1e-9, 48, dtype=torch.float64)
    assert top_and_total([(down, up)], 16) == pytest.approx(reference(dense(down, up), 16), rel=1e-13)


def test_parts_are_one_matrix():
    """Three projections that a model has fused into one layer, and a dense rest; the largest entries may lie anywhere.
    """
    pairs = [factors((300, 200), rank, seed=s) for s, rank in enumerate((4, 8, 4))]
    rest = torch.randn(10, 200, generator=torch.Generator().manual_seed(9)) * 1e-3
    entries = np.concatenate([*(dense(*pair) for pair in pairs), np.abs(rest.double().numpy()).reshape(-1)])
    assert top_and_total([*pairs, rest], 256) == pytest.approx(reference(entries, 256), rel=TOLERANCE)


def test_the_product_is_never_formed_and_hardly_searched(monkeypatch):
    """Tiles stay small, and with norms that differ the bound leaves most of them unsearched."""
    searched, largest = [], []
    tiles = topk._tiles

    def spy(part, k):
        for tile, limit in tiles(part, k):
            largest.append(tile.numel())
            searched.append((tile.numel(), limit))
            yield tile, limit

    monkeypatch.setattr(topk, "_tiles", spy)
    down, up = factors((3072, 3072), 4, spread=2.0)
    top, total = top_and_total([(down, up)], 16)
    assert sum(largest) == 3072 * 3072 and max(largest) <= topk.LARGEST_TILE
    kth = np.sort(dense(down, up))[-16]
    assert sum(n for n, limit in searched if limit > kth) < 0.2 * 3072 * 3072
    assert top == pytest.approx(reference(dense(down, up), 16)[0], rel=TOLERANCE)
