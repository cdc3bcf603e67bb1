"""K-LoRA and EST-LoRA with more than two LoRAs, and settings that make no sense."""

from __future__ import annotations

import numpy as np
import pytest
from lora_ensemble.engine.sizes import measure
from lora_ensemble.kernels.branch import Step
from lora_ensemble.methods.est import ESTLoRA
from lora_ensemble.methods.klora import KLoRA
from lora_ensemble.methods.selection import sides
from lora_ensemble.tests.selections import LAYERS, PAIR, STEPS, Lora, bank, chosen, est, klora, schedule, top, varies


def test_sides():
    assert sides(("auto", "auto")) == (True, False)
    assert sides(("auto", "auto", "auto")) == (True, False, False)
    assert sides(("style", "auto")) == (False, True)
    assert sides(("auto", "character")) == (False, True)
    assert sides(("character", "clothing", "style", "background", "object")) == (True, True, False, False, True)
    assert sides(("style", "background")) == (False, False) and sides(()) == ()


def test_the_winner_of_a_side_competes_as_one_of_two_would():
    """Two subjects, two styles: whoever acts at a layer has the best balanced score of its side there, and the sides
    compare as those two alone do."""
    loras = [Lora.random(s, 4) for s in range(4)]
    subjects, strengths = (True, False, True, False), (1.0, 0.6, 0.8, 1.2)
    method = klora(loras, strengths, subjects)
    k = 16
    unit = [np.mean([np.abs(g * lora.dense(m)).sum() for m in LAYERS])
            for g, lora in zip(strengths, loras, strict=True)]
    for j in range(STEPS):
        want = []
        for m in LAYERS:
            score = [top(g * lora.dense(m), k) / t for g, lora, t in zip(strengths, loras, unit, strict=True)]
            c, s = max((0, 2), key=score.__getitem__), max((1, 3), key=score.__getitem__)
            want.append(c if score[c] >= (1.5 * j / (STEPS - 1) + 0.5) * score[s] else s)
        assert chosen(method, LAYERS, Step(j, STEPS, 0.0)) == want


def test_one_side_alone_is_decided_by_the_score():
    loras = [Lora.random(s, 4) for s in range(2)]
    found = schedule(klora(loras, subjects=(True, True)))
    assert (found == found[0]).all() and varies(found)


def test_a_lora_of_fewer_layers_has_no_advantage():
    """Two subjects of equal deltas, one of them on half the layers only: on these they stay equal."""
    subject, style = Lora.random(1, 4).ops["q"], Lora.random(2, 4).ops["q"]
    whole, half, other = (Lora(dict.fromkeys(layers, ops), 4) for layers, ops in
                          (("abcd", subject), ("ab", subject), ("abcd", style)))
    for method in (klora([whole, half, other], (1.0,) * 3, (True, True, False)),
                   est([whole, half, other], (1.0,) * 3, (True, True, False))):
        assert method.contest.ratios == pytest.approx((method.contest.ratios[0],) * 4, rel=1e-6)
        assert method.contest.subjects == (0,) * 4  # of equals the first


def test_k_of_several_is_the_product_of_the_sides_largest_ranks():
    loras = [Lora.random(0, 2), Lora.random(1, 8), Lora.random(2, 4)]
    sizes = measure(bank(*loras), (True, True, False))
    assert sizes["q"][0].top == pytest.approx(top(loras[0].dense("q"), 32), rel=1e-6)
    subjects_only = measure(bank(*loras[:2]), (True, True))
    assert subjects_only["q"][0].top == pytest.approx(top(loras[0].dense("q"), 64), rel=1e-6)


@pytest.mark.parametrize(("name", "make"), [
    ("K-LoRA", lambda loras, sides: klora(loras, (1.0,) * 3, sides, released=True)),
    ("EST-LoRA", lambda loras, sides: est(loras, (1.0,) * 3, sides, balance="l1"))])
def test_the_released_balance_is_for_two(name, make):
    said = f"^{name}: .*one subject and one style .* subjects: 1, styles: 2. Change their roles"
    with pytest.raises(ValueError, match=said):
        make([Lora.random(s, 4) for s in range(3)], (True, False, False))


@pytest.mark.parametrize(("make", "message"), [
    (lambda sizes: KLoRA.of(sizes, (1.0, 1.0), PAIR, alpha=0.0, star=True),
     "alpha is 0, and pattern s. needs one above 0. Raise alpha"),
    (lambda sizes: ESTLoRA.of(sizes, (1.0, 1.0), PAIR, balance="l2"), "balance is 'l2', choose one of energy"),
])
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make({})
