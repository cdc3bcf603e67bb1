"""K-LoRA and EST-LoRA: their rules against transcriptions of the formulas on dense deltas."""

from __future__ import annotations

import numpy as np
import pytest
from lora_ensemble.engine.adapters import LowRank
from lora_ensemble.engine.sizes import measure
from lora_ensemble.kernels.size import Size
from lora_ensemble.methods.selection import released_gamma
from lora_ensemble.tests.selections import (
    LAYERS,
    PAIR,
    PAIRS,
    STEPS,
    Lora,
    bank,
    each_pair,
    est,
    klora,
    schedule,
    top,
    varies,
)


def paper_klora(c: Lora, s: Lora, g: tuple[float, float], u: float, star: bool) -> list[int]:
    """K = r_c r_s; gamma = sum_l sum_i |DW_c| / sum_l sum_i |DW_s|; c where S_c >= gamma S(u) S_s."""
    k = c.rank * s.rank
    gamma = (sum(np.abs(g[0] * c.dense(m)).sum() for m in LAYERS)
             / sum(np.abs(g[1] * s.dense(m)).sum() for m in LAYERS))
    scale = (1.5 * u + 1.3) % 1.5 if star else 1.5 * u + 0.5
    return [0 if top(g[0] * c.dense(m), k) >= gamma * scale * top(g[1] * s.dense(m), k) else 1 for m in LAYERS]


def released_klora(c: Lora, s: Lora, u: float, star: bool) -> list[int]:
    """Raw factors; gamma the mean of the layers' L1 ratios below 3 times their mean; style where its side is at least
    as large; s* starts at 0.85 alpha."""
    k = c.rank * s.rank
    ratios = np.array([np.abs(c.dense(m, True)).sum() / np.abs(s.dense(m, True)).sum() for m in LAYERS])
    gamma = ratios[ratios < 3 * ratios.mean()].mean()
    scale = (1.5 * u + 0.85 * 1.5) % 1.5 if star else 1.5 * u + 0.5
    out = []
    for m in LAYERS:
        ratio = top(c.dense(m, True), k) / (gamma * top(s.dense(m, True), k) * scale)
        out.append(0 if ratio > 1 else 1)
    return out


def plain_est(c: Lora, s: Lora, g: tuple[float, float], u: float, discrepancy: float, balance: str) -> list[int]:
    """c where E_c / gamma > E_s (1.5 u + (1 - S)), E the squared Frobenius norm."""
    energies = [[float((g[i] ** 2) * (lora.dense(m) ** 2).sum()) for m in LAYERS] for i, lora in enumerate((c, s))]
    ratios = np.array([np.abs(g[0] * c.dense(m)).sum() / np.abs(g[1] * s.dense(m)).sum() for m in LAYERS])
    gamma = {"none": 1.0, "energy": sum(energies[0]) / sum(energies[1]),
             "l1": ratios[ratios < 3 * ratios.mean()].mean()}[balance]
    scale = 1.5 * u + (1 - discrepancy)
    return [0 if e_c / gamma > e_s * scale else 1 for e_c, e_s in zip(*energies, strict=True)]


@pytest.mark.parametrize("strengths", [(1.0, 1.0), (0.7, -1.3)], ids=str)
@pytest.mark.parametrize("star", [False, True], ids=["s", "s*"])
@each_pair
def test_klora_is_the_paper(make, star, strengths):
    pair = make()
    want = np.array([paper_klora(*pair, strengths, j / (STEPS - 1), star) for j in range(STEPS)])
    assert varies(want)
    np.testing.assert_array_equal(schedule(klora(pair, strengths, star=star)), want)


@pytest.mark.parametrize("star", [False, True], ids=["s", "s*"])
@each_pair
def test_klora_is_the_released_code(make, star):
    pair = make()
    want = np.array([released_klora(*pair, j / (STEPS - 1), star) for j in range(STEPS)])
    assert varies(want)
    method = klora(pair, (0.7, 1.3), raw=True, released=True, star=star, beta=0.85 * 1.5 if star else 0.5)
    np.testing.assert_array_equal(schedule(method), want)


def test_the_released_balance_leaves_out_ratios_of_three_times_the_mean_or_more():
    def gamma(*ratios: float) -> float:
        sizes = {str(i): {0: Size(total=r), 1: Size(total=1.0)} for i, r in enumerate(ratios)}
        return released_gamma(sizes, PAIR, "K-LoRA")[0]

    assert gamma(1.0, 1.0, 1.0, 1.0, 1.0, 20.0) == 1.0
    assert gamma(1.0, 1.0, 1.0, 1.0, 1.0, 4.9) == pytest.approx(9.9 / 6)
    assert gamma(1.0, 1.0, 1.0, 1.0, 1.0, 5.0) == 1.0  # exactly 3 times


def test_the_two_rules_differ():
    pair = PAIRS["an outlier"]()
    assert (schedule(klora(pair)) != schedule(klora(pair, raw=True, released=True))).any()


def test_raw_factors_leave_alpha_out():
    """One alpha/rank for all layers cancels in gamma; where it differs between layers, the choice does."""
    c, s = PAIRS["unequal strength and alpha"]()
    assert klora((c, s)).contest.ratios == pytest.approx(klora((c, s), raw=True).contest.ratios, rel=1e-6)
    uneven = Lora({m: [LowRank(op.up, op.down, 1.0 + 3.0 * n)] for n, (m, (op,)) in enumerate(c.ops.items())}, c.rank)
    np.testing.assert_array_equal(schedule(klora((uneven, s), raw=True)), schedule(klora((c, s))))
    assert (schedule(klora((uneven, s))) != schedule(klora((c, s)))).any()


@pytest.mark.parametrize("balance", ["energy", "l1", "none"])
@pytest.mark.parametrize("discrepancy", [-0.2, 0.5, 0.9])
@each_pair
def test_est_is_its_formula(make, discrepancy, balance):
    pair, strengths = make(), (0.7, -1.3)
    want = np.array([plain_est(*pair, strengths, j / (STEPS - 1), discrepancy, balance) for j in range(STEPS)])
    found = schedule(est(pair, strengths, style_discrepancy=discrepancy, balance=balance))
    np.testing.assert_array_equal(found, want)


def test_k_may_be_given():
    c, s = PAIRS["alike"]()
    for k in (1, 5, 10**6):
        sizes = measure(bank(c, s), PAIR, k)
        for layer in LAYERS:
            assert sizes[layer][0].top == pytest.approx(top(c.dense(layer), k), rel=1e-6)
            assert sizes[layer][1].total == pytest.approx(np.abs(s.dense(layer)).sum(), rel=1e-6)
