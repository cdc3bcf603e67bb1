"""What always holds of K-LoRA's and EST-LoRA's choices, and what a step costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lora_ensemble.engine.adapters import LowRank
from lora_ensemble.kernels.branch import Branch, Step
from lora_ensemble.kernels.size import Size
from lora_ensemble.methods.est import ESTLoRA
from lora_ensemble.methods.klora import KLoRA
from lora_ensemble.methods.selection import Contest
from lora_ensemble.methods.session import POSITIVE, UNCONDITIONAL, Call, RunContext
from lora_ensemble.tests.selections import (
    LAYERS,
    PAIR,
    PAIRS,
    STEPS,
    Lora,
    branch_of,
    each_pair,
    est,
    klora,
    schedule,
)


@each_pair
def test_the_selected_delta_is_exactly_one_loras(make):
    """At every layer and step the gains are those of one LoRA at its own strength, whatever the other's."""
    method = klora(make(), (0.7, 1.3))
    for j in range(STEPS):
        branch = branch_of(method, Step(j, STEPS, 0.0))
        assert {branch.at(layer) for layer in LAYERS} <= {(0.7, 0.0), (0.0, 1.3)}


@pytest.mark.parametrize("c", [1e-3, 0.5, 40.0])
@pytest.mark.parametrize("which", [0, 1])
def test_scaling_a_lora_does_not_change_the_choice(which, c):
    pair = PAIRS["alike"]()
    strengths = tuple(c if i == which else 1.0 for i in range(2))
    np.testing.assert_array_equal(schedule(klora(pair, strengths)), schedule(klora(pair)))
    np.testing.assert_array_equal(schedule(est(pair, strengths)), schedule(est(pair)))
    assert (schedule(est(pair, strengths, balance="none")) != schedule(est(pair, balance="none"))).any()


def test_identical_loras_at_scale_one_are_the_subject():
    one = Lora.random(1, 4)
    assert (schedule(klora((one, one), alpha=0.0, beta=1.0)) == 0).all()
    assert (schedule(klora((one, one), alpha=0.0, beta=1.0, raw=True, released=True)) == 1).all()
    assert (schedule(est((one, one), alpha=0.0, style_discrepancy=0.0)) == 1).all()  # E_c > E_s, strictly


def test_identical_loras_are_that_lora_at_any_setting():
    """Both gains apply the same delta, so what is chosen does not matter; something always is."""
    one = Lora.random(1, 4)
    for method in (klora((one, one)), klora((one, one), star=True), est((one, one))):
        assert schedule(method).shape == (STEPS, len(LAYERS))


@each_pair
def test_layers_go_to_the_style_once_and_stay(make):
    for method in (klora(make()), est(make())):
        found = schedule(method)
        assert (np.diff(found, axis=0) >= 0).all()
        for column, ratio in zip(found.T, method.contest.ratios, strict=True):
            u = np.arange(STEPS) / (STEPS - 1)
            np.testing.assert_array_equal(column, (u > method.flip(ratio)).astype(int))
    still = klora(make(), alpha=0.0, beta=1.0)
    assert [still.flip(ratio) for ratio in (0.9, 1.0, 1.1)] == [-np.inf, np.inf, np.inf]


def test_star_starts_with_style_and_wraps_at_the_papers_progress():
    method = klora(PAIRS["alike"](), star=True)
    assert method.scale(0.0) == pytest.approx(1.3) and method.scale(0.2 / 1.5 - 1e-6) == pytest.approx(1.5, abs=1e-5)
    assert method.scale(0.2 / 1.5 + 1e-6) == pytest.approx(0.0, abs=1e-5) and method.scale(1.0) == pytest.approx(1.3)
    assert klora(PAIRS["alike"](), star=True, alpha=2.0).scale(0.6) == pytest.approx(0.5)  # 2.5 mod 2


def test_settings_left_alone_are_the_published_ones():
    pair = PAIRS["alike"]()
    assert [(m.alpha, m.beta) for m in (klora(pair), klora(pair, star=True), est(pair))] == [(1.5, 0.5), (1.5, 1.3),
                                                                                             (1.5, 0.5)]
    assert klora(pair, beta=0.0).beta == 0.0
    assert est(pair).contest == est(pair, balance="energy").contest


@pytest.mark.parametrize("ties", [True, False])
def test_a_branch_is_that_of_its_scale_in_whatever_order_they_are_asked_for(ties):
    """At the ratios themselves, too, where a step below and one above have two different branches."""
    layers = ("a", "b", "c")
    contest = Contest((1.0, 1.0), layers, (0, 0, 0), (1, 1, 1), (0.5, 1.0, 2.0), PAIR, ties)
    for scale in (0.4, 1.5, 0.5, 1.0, 0.7, 2.0, 1.0, 2.1, 0.5):
        want = [0 if ratio > scale or (ties and ratio == scale) else 1 for ratio in (0.5, 1.0, 2.0)]
        branch = contest.branch(scale)
        assert [branch.at(layer).index(1.0) for layer in layers] == want, scale


@pytest.mark.parametrize("method", [KLoRA.of, ESTLoRA.of])
def test_where_a_lora_changes_nothing_the_other_one_acts(method):
    """No ratio of two numbers, but a choice: of both that change nothing, any."""
    nothing, some = Size(0.0, 0.0, 0.0), Size(1.0, 4.0, 2.0)
    sizes = {"c": {0: some, 1: nothing}, "s": {0: nothing, 1: some}, "none": {0: nothing, 1: nothing},
             "both": {0: some, 1: some}}
    found = schedule(method(sizes, (1.0, 1.0), PAIR), sizes)
    assert (found[:, 0] == 0).all() and (found[:, 1] == 1).all()
    empty = {layer: {0: nothing, 1: some} for layer in sizes}
    assert (schedule(method(empty, (1.0, 1.0), PAIR), empty) == 1).all()


@pytest.mark.parametrize("steps", [2, 5, 20, 101])
def test_steps_and_images_do_not_change_the_choice_at_a_progress(steps):
    method = klora(PAIRS["alike"]())
    first = schedule(method, steps=steps)
    np.testing.assert_array_equal(schedule(method, steps=steps), first)  # the next image
    fine = schedule(method, steps=(steps - 1) * 4 + 1)
    np.testing.assert_array_equal(fine[::4], first)


def test_extremes_of_the_ratio():
    """rho >= 2: always the subject; rho < 0.5: always the style."""
    sizes = {"strong": {0: Size(4.0, 1.0), 1: Size(2.0, 1.0)}, "weak": {0: Size(0.98, 1.0), 1: Size(2.0, 1.0)}}
    found = schedule(KLoRA.of(sizes, (1.0, 1.0), PAIR), sizes)
    assert (found[:, 0] == 0).all() and (found[:, 1] == 1).all()


def test_full_similarity_starts_with_the_subject():
    """S = 1 and u = 0: the scale is 0, every layer is the subject's."""
    assert (schedule(est(PAIRS["alike"](), style_discrepancy=1.0))[0] == 0).all()


def test_klora_and_est_agree_on_proportional_loras():
    """DW_s = c DW_c: every balanced ratio is 1 in both, at any c."""
    one = Lora.random(1, 4)
    for c in (0.3, 5.0):
        pair = (one, Lora({m: [LowRank(c * op.up, op.down)] for m, (op,) in one.ops.items()}, 4))
        for method in (klora(pair), est(pair)):
            assert method.contest.ratios == pytest.approx((1.0,) * len(LAYERS), rel=1e-6)


def test_a_layer_of_one_lora_is_that_loras():
    only_c, only_s = {"a": (24, 32)}, {"b": (24, 32)}
    pair = Lora.random(1, 4, {**LAYERS, **only_c}, size=1e-6), Lora.random(2, 4, {**LAYERS, **only_s}, size=1e6)
    for method in (klora(pair), klora(pair, star=True), est(pair), est(pair, balance="none")):
        assert (schedule(method, only_c) == 0).all() and (schedule(method, only_s) == 1).all()
    shared = klora([Lora({m: lora.ops[m] for m in LAYERS}, 4) for lora in pair])
    np.testing.assert_array_equal(schedule(klora(pair)), schedule(shared))  # they do not count in the balance


def test_one_lora_acts_everywhere_and_none_is_the_base():
    one = Lora.random(1, 4)
    assert (schedule(klora([one], (0.8,), (True,))) == 0).all()
    assert branch_of(klora([one], (0.8,), (True,)), Step(0, 5, 1.0)) == Branch((0.8,))
    assert branch_of(KLoRA.of({}, (), ()), Step(0, 5, 1.0)).is_base


def test_a_run_over_part_of_the_noise_has_the_choices_of_that_part():
    """denoise 0.5, or the second of two samplers: 10 of the 21 steps of a full run, from its 11th on."""
    method = klora(PAIRS["alike"]())
    second = method.begin(RunContext(tuple(range(11, -1, -1)), span=(0.5, 1.0)))
    for j in range(11):
        assert second.branches(Step(j, 11, 0.0)) == (branch_of(method, Step(10 + j, 21, 0.0)),)


def test_a_session_hands_predictions_on_and_notes_who_acted():
    session = klora(PAIRS["alike"]()).begin(RunContext((1.0, 0.5, 0.0)))
    branches = session.branches(Step(0, 2, 1.0))
    positive = torch.ones(1, 2, 3)
    call = Call(torch.zeros(2, 3), torch.ones(2), branches, [positive, None], (POSITIVE, UNCONDITIONAL))
    mixed = session.mix(Step(0, 2, 1.0), call)
    assert mixed[0] is not None and torch.equal(mixed[0], positive[0]) and mixed[1] is None
    acting = [branches[0].at(layer) for layer in LAYERS]
    assert session.notes() == {"layers": [acting.count((1.0, 0.0)), acting.count((0.0, 1.0))]}
    later = session.branches(Step(1, 2, 0.5))[0]
    assert session.notes()["layers"][0] == sum(later.at(layer) == (1.0, 0.0) for layer in LAYERS) != acting.count(
        (1.0, 0.0))


def test_a_run_makes_few_branches_and_finds_them_again():
    layers = {f"layer.{i}": (8, 8) for i in range(200)}
    method = klora((Lora.random(1, 2, layers), Lora.random(2, 2, layers)))
    first = [branch_of(method, Step(j, 20, 0.0)) for j in range(20)]
    again = [branch_of(method, Step(j, 20, 0.0)) for j in range(20)]
    assert all(a is b for a, b in zip(first, again, strict=True)) and len({id(b) for b in first}) > 5
    assert all(len(branch.per_module) <= 100 for branch in first)  # the LoRA of most layers needs no exceptions
    assert all(a == b and hash(a) == hash(b) for a, b in zip(first, first, strict=True))
