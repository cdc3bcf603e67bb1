"""K-LoRA and EST-LoRA: their rules against transcriptions of the formulas on dense deltas, and what always holds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from lora_ensemble.engine.adapters import OFT, Bias, Decomposed, Dense, LowRank, Replace, given
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.sizes import measure
from lora_ensemble.kernels.branch import Branch, Step
from lora_ensemble.kernels.deltas import hadamard
from lora_ensemble.kernels.orthogonal import cayley
from lora_ensemble.methods.est import ESTLoRA
from lora_ensemble.methods.klora import KLoRA
from lora_ensemble.methods.selection import Size, sides
from lora_ensemble.methods.session import POSITIVE, UNCONDITIONAL, Call, RunFacts

LAYERS = {"q": (24, 32), "k": (48, 40), "v": (64, 16), "ff": (96, 64), "conv": (16, 12, 3, 3), "out": (40, 24)}
PAIR = (True, False)
STEPS = 37


@dataclass
class Lora:
    """One random LoRA: ops for the bank, and its dense deltas in float64 (alpha/rank in or out)."""

    ops: dict[str, list[LowRank]]
    rank: int

    @classmethod
    def random(cls, seed: int, rank: int, layers=LAYERS, size: float = 1.0, alpha: float | None = None) -> Lora:
        g, ops = torch.Generator().manual_seed(seed), {}
        for name, (out, *rest) in layers.items():
            spread = torch.exp(0.6 * torch.randn(1, generator=g))
            up, down = torch.randn(out, rank, generator=g), torch.randn(rank, *rest, generator=g)
            ops[name] = [LowRank(size * spread * up, down, 1.0 if alpha is None else alpha / rank)]
        return cls(ops, rank)

    def dense(self, layer: str, raw: bool = False) -> np.ndarray:
        (op,) = self.ops[layer]
        up, down = op.up.double().numpy(), op.down.double().flatten(1).numpy()
        return up @ down * (1.0 if raw else op.scale)


def bank(*loras: Lora) -> Bank:
    return Bank([lora.ops for lora in loras])


def branch_of(method, step: Step) -> Branch:
    (branch,) = method.begin(RunFacts(sigmas=tuple(range(step.total, -1, -1)))).branches(step)
    return branch


def chosen(method, layers, step: Step) -> list[int]:
    """Per layer, the LoRA that acts; exactly one does."""
    branch = branch_of(method, step)
    out = []
    for layer in layers:
        acting = [i for i, gain in enumerate(branch.at(layer)) if gain]
        assert len(acting) == 1
        out.append(acting[0])
    return out


def schedule(method, layers=LAYERS, steps: int = STEPS) -> np.ndarray:
    """[step, layer] -> who acts."""
    return np.array([chosen(method, layers, Step(j, steps, 0.0)) for j in range(steps)])


def klora(loras, strengths=(1.0, 1.0), subjects=PAIR, k: int = 0, raw: bool = False, **options) -> KLoRA:
    return KLoRA.of(measure(bank(*loras), subjects, k, raw), strengths, subjects, raw=raw, **options)


def est(loras, strengths=(1.0, 1.0), subjects=PAIR, **options) -> ESTLoRA:
    return ESTLoRA.of(measure(bank(*loras), subjects), strengths, subjects, **options)


PAIRS = {
    "alike": lambda: (Lora.random(1, 4), Lora.random(2, 8)),
    "unequal strength and alpha": lambda: (Lora.random(3, 4, size=0.2, alpha=1.0), Lora.random(4, 2, alpha=16.0)),
    "an outlier": lambda: (Lora.random(5, 8), Lora.random(6, 4, size=3.0)),
}
each_pair = pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)


# --- transcriptions of the formulas ---


def top(x: np.ndarray, k: int) -> float:
    return float(np.sort(np.abs(x).reshape(-1))[::-1][:k].sum())


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


def varies(found: np.ndarray) -> bool:
    return 0 < found.mean() < 1


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


# --- invariants (methods.md 2.6 and 4.6) ---


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


def test_star_starts_with_style_and_wraps_at_the_papers_progress():
    method = klora(PAIRS["alike"](), star=True)
    assert method.scale(0.0) == pytest.approx(1.3) and method.scale(0.2 / 1.5 - 1e-6) == pytest.approx(1.5, abs=1e-5)
    assert method.scale(0.2 / 1.5 + 1e-6) == pytest.approx(0.0, abs=1e-5) and method.scale(1.0) == pytest.approx(1.3)


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
    second = method.begin(RunFacts(tuple(range(11, -1, -1)), span=(0.5, 1.0)))
    for j in range(11):
        assert second.branches(Step(j, 11, 0.0)) == (branch_of(method, Step(10 + j, 21, 0.0)),)


def test_a_session_hands_predictions_on_and_notes_who_acted():
    session = klora(PAIRS["alike"]()).begin(RunFacts((1.0, 0.5, 0.0)))
    branches = session.branches(Step(0, 2, 1.0))
    positive = torch.ones(1, 2, 3)
    call = Call(torch.zeros(2, 3), torch.ones(2), branches, [positive, None], (POSITIVE, UNCONDITIONAL))
    mixed = session.mix(Step(0, 2, 1.0), call)
    assert mixed[0] is not None and torch.equal(mixed[0], positive[0]) and mixed[1] is None
    acting = [branches[0].at(layer) for layer in LAYERS]
    assert session.notes() == {"layers": [acting.count((1.0, 0.0)), acting.count((0.0, 1.0))]}


# --- more than two ---


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


def test_k_of_several_is_the_product_of_the_sides_largest_ranks():
    loras = [Lora.random(0, 2), Lora.random(1, 8), Lora.random(2, 4)]
    sizes = measure(bank(*loras), (True, True, False))
    assert sizes["q"][0].top == pytest.approx(top(loras[0].dense("q"), 32), rel=1e-6)
    subjects_only = measure(bank(*loras[:2]), (True, True))
    assert subjects_only["q"][0].top == pytest.approx(top(loras[0].dense("q"), 64), rel=1e-6)


@pytest.mark.parametrize("make", [lambda loras, sides: klora(loras, (1.0,) * 3, sides, released=True),
                                  lambda loras, sides: est(loras, (1.0,) * 3, sides, balance="l1")])
def test_the_released_balance_is_for_two(make):
    with pytest.raises(ValueError, match="one subject and one style"):
        make([Lora.random(s, 4) for s in range(3)], (True, False, False))


@pytest.mark.parametrize(("make", "message"), [
    (lambda sizes: KLoRA.of(sizes, (1.0, 1.0), PAIR, alpha=0.0, star=True), "alpha above 0, got 0"),
    (lambda sizes: ESTLoRA.of(sizes, (1.0, 1.0), PAIR, balance="l2"), "balance is 'l2', choose one of energy"),
])
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make({})


# --- kinds that are not low-rank ---


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


# --- cost of a step ---


def test_a_run_makes_few_branches_and_finds_them_again():
    layers = {f"layer.{i}": (8, 8) for i in range(200)}
    method = klora((Lora.random(1, 2, layers), Lora.random(2, 2, layers)))
    first = [branch_of(method, Step(j, 20, 0.0)) for j in range(20)]
    again = [branch_of(method, Step(j, 20, 0.0)) for j in range(20)]
    assert all(a is b for a, b in zip(first, again, strict=True)) and len({id(b) for b in first}) > 5
    assert all(len(branch.per_module) <= 100 for branch in first)  # the LoRA of most layers needs no exceptions
    assert all(a == b and hash(a) == hash(b) for a, b in zip(first, first, strict=True))
