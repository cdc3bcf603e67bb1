"""Kernels of guidance against float64 definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lora_ensemble.kernels import guidance as kernels
from lora_ensemble.kernels.guidance import (
    combine,
    cosine,
    guided_steps,
    least_squares,
    products,
    similarity_terms,
    threshold_for,
)
from lora_ensemble.tests.test_engine_cost import Spy
from torch import Tensor


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cosine_64(a: Tensor, b: Tensor) -> np.ndarray:
    a, b = (t.double().flatten(1).numpy() for t in (a, b))
    return np.array([x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("away", [1.0, 1e-2, 1e-3])
def test_cosine(dtype, away):
    """Also near 1, where half precision could not tell; inputs are rounded first, so the reference sees the same."""
    a = rand(5, 4, 32, 32, dtype=dtype)
    b = (a.float() + away * rand(5, 4, 32, 32, seed=1)).to(dtype)
    found = cosine(similarity_terms(a, b))
    assert found.dtype == torch.float32 and found.shape == (5,)
    assert np.abs(found.double().numpy() - cosine_64(a, b)).max() < 1e-6
    x = rand(5, 4, 32, 32, seed=2, dtype=dtype)
    assert np.abs(cosine(similarity_terms(a, b, x)).double().numpy() - cosine_64(x - a, x - b)).max() < 1e-6


def test_cosine_ignores_positive_scaling_and_adds_up_over_parts():
    a, b = rand(3, 4, 8), rand(3, 4, 8, seed=1)
    whole = cosine(similarity_terms(a, b))
    assert torch.allclose(cosine(similarity_terms(7 * a, 0.01 * b)), whole, atol=1e-6)
    parts = similarity_terms(a[..., :3], b[..., :3]) + similarity_terms(a[..., 3:], b[..., 3:])
    assert torch.allclose(cosine(parts), whole, atol=1e-6)
    assert torch.allclose(cosine(similarity_terms(a, -b)), -whole, atol=1e-6)


def test_cosine_of_nothing():
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert cosine(similarity_terms(zero, zero)) == 1
    assert cosine(similarity_terms(zero, one)) == cosine(similarity_terms(one, zero)) <= kernels.NOTHING
    assert cosine(similarity_terms(one, one)) == 1 and cosine(similarity_terms(1e-4 * one, 1e-4 * one)) == 1


def test_products(monkeypatch):
    monkeypatch.setattr(kernels, "CHUNK", 7)
    a, b = rand(3, 2, 10, seed=1), rand(4, 2, 10, seed=2)
    want = np.einsum("kn,ln->kl", a.double().flatten(1).numpy(), b.double().flatten(1).numpy())
    found = products(a, b)
    assert found.dtype == torch.float64 and np.abs(found.numpy() - want).max() < 1e-12


def test_least_squares_against_numpy():
    f, y = rand(6, 500).double(), rand(500, seed=1).double()
    want = np.linalg.lstsq(f.T.numpy(), y.numpy(), rcond=None)[0]
    assert np.abs(least_squares(f @ f.T, f @ y, ridge=0.0).numpy() - want).max() < 1e-10
    assert np.abs(least_squares(f @ f.T, f @ y).numpy() - want).max() < 1e-5
    twice = torch.cat([f, f])  # singular: the ridge shares the weight out
    assert np.abs(least_squares(twice @ twice.T, twice @ y).view(2, 6).sum(0).numpy() - want).max() < 1e-4


def test_combine():
    f = rand(3, 2, 4, 4)
    before = f.clone()
    want = 0.5 * f[0] - 2 * f[1] + 0.25 * f[2] + 0.1
    with Spy() as spy:
        found = combine(list(f), (0.5, -2.0, 0.25), 0.1)
    assert torch.allclose(found, want, atol=1e-6) and torch.equal(f, before)
    assert spy.largest <= f[0].numel(), "of a video all features together are gigabytes"


GAMMA = torch.tensor([[0.5, 0.9, 0.8, 0.95, 0.99], [0.6, 0.7, 0.85, 0.9, 0.97]])


@pytest.mark.parametrize(("threshold", "min_steps", "ramp", "wanted"), [
    (0.9, 0, 0, [2, 4]), (0.9, 2, 0, [4, 4]), (0.9, 0, 2, [4, 5]), (1.5, 0, 0, [5, 5]), (-1, 0, 0, [1, 1]),
    (-1, 3, 0, [4, 4])])  # fmt: skip
def test_guided_steps(threshold, min_steps, ramp, wanted):
    before = GAMMA.clone()
    assert guided_steps(GAMMA, threshold, min_steps, ramp).tolist() == wanted
    assert torch.equal(GAMMA, before)


@pytest.mark.parametrize("saving", [0.0, 0.1, 0.2, 0.25, 0.3, 0.4])
def test_threshold_for_a_saving(saving):
    """No other threshold comes nearer."""
    gamma = torch.sort(rand(40, 20).double().sigmoid(), dim=1).values
    found = threshold_for(gamma, saving)

    def miss(threshold: float) -> float:
        return abs(float((20 - guided_steps(gamma, threshold).double()).mean()) / 40 - saving)

    assert miss(found) <= min(miss(t) for t in torch.linspace(-0.1, 1.1, 500).tolist()) + 1e-12
    assert miss(found) < 0.01


@pytest.mark.parametrize(("min_steps", "ramp"), [(0, 0), (3, 0), (2, 4), (9, 0)])
@pytest.mark.parametrize("digits", [1, 2, 9])
def test_it_is_the_nearest_of_all_thresholds(digits, min_steps, ramp):
    """The lowest of those equally near, as in a search of all; of curves that rise and fall, with equal values."""
    gamma = (rand(6, 8, seed=digits).double().sigmoid() * 10**digits).round() / 10**digits
    values = gamma.unique()
    every = torch.cat([values[:1] - 1e-6, (values[1:] + values[:-1]) / 2, values[-1:] + 1e-6]).tolist()
    for saving in torch.linspace(0, 0.5, 41).tolist():
        missed = [abs(float((8 - guided_steps(gamma, each, min_steps, ramp)).double().mean()) / 16 - saving)
                  for each in every]
        assert threshold_for(gamma, saving, min_steps, ramp) == every[missed.index(min(missed))]


def test_thousands_of_paths_do_not_take_the_square_of_their_steps(monkeypatch):
    tried = []
    monkeypatch.setattr(kernels, "guided_steps", lambda *given: tried.append(given[1]) or guided_steps(*given))
    kernels.threshold_for(rand(2000, 20).double(), 0.2)
    assert 0 < len(tried) < 50
