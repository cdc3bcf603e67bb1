"""The three baselines: their formulas, and what must hold for any model (invariants of the papers)."""

from __future__ import annotations

import itertools
import math
from itertools import permutations

import pytest
import torch
from lora_ensemble.kernels.branch import Branch, Step
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.session import RunContext, begin
from lora_ensemble.methods.switch import Switch
from torch import Tensor

STRENGTHS = (0.8, 0.5, 1.2)
METHODS = [Merge, Switch, Composite]
each_method = pytest.mark.parametrize("make", METHODS, ids=lambda make: make.__name__)


def step(index: int = 0, total: int = 10) -> Step:
    return Step(index, total, float(total - index))


def toy_model(branch: Branch, deltas: list[Tensor]) -> Tensor:
    """A model whose prediction is nonlinear in its weight: tanh((W + sum_i g_i D_i) x), fixed W and x, float64."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in [(4, 4), (4, 2)])
    return torch.tanh((weight + sum(g * d for g, d in zip(branch.gains, deltas, strict=True))) @ x)


def deltas(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def branches_of(method, at: Step) -> tuple[Branch, ...]:
    return begin(method, RunContext(tuple(map(float, range(at.total, -1, -1))))).branches(at)


def evaluate(method, deltas: list[Tensor], at: Step) -> Tensor:
    return method.mix(at, torch.stack([toy_model(branch, deltas) for branch in branches_of(method, at)]))


@each_method
def test_one_lora_alone_is_that_lora(make):
    for index in range(10):
        got = evaluate(make((0.8,)), deltas(1), step(index))
        assert torch.equal(got, toy_model(Branch((0.8,)), deltas(1)))


@each_method
def test_strength_zero_is_the_base(make):
    for index in range(10):
        method = make((0.0, 0.0, 0.0))
        assert all(branch.is_base for branch in branches_of(method, step(index)))
        # A mean over three equal predictions may round once.
        torch.testing.assert_close(evaluate(method, deltas(3), step(index)), toy_model(Branch((0.0,) * 3), deltas(3)),
                                   rtol=1e-15, atol=1e-15)


@each_method
def test_no_lora_is_the_base(make):
    assert branches_of(make(()), step()) == (Branch(()),)
    prediction = torch.ones(1, 2, 3)
    assert torch.equal(make(()).mix(step(), prediction), prediction[0])


def test_identical_loras_act_once_in_switch_and_composite_and_k_times_in_merge():
    same = deltas(1) * 3
    single, triple = toy_model(Branch((0.8,)), same[:1]), toy_model(Branch((2.4,)), same[:1])
    for index in range(10):
        torch.testing.assert_close(evaluate(Switch((0.8,) * 3, 2), same, step(index)), single)
        torch.testing.assert_close(evaluate(Composite((0.8,) * 3), same, step(index)), single)
        torch.testing.assert_close(evaluate(Merge((0.8,) * 3), same, step(index)), triple)
    assert (single - triple).abs().max() > 0.01


def test_merge_is_the_sum_of_the_deltas():
    want = toy_model(Branch((1.0,)), [sum(s * d for s, d in zip(STRENGTHS, deltas(3), strict=True))])
    torch.testing.assert_close(evaluate(Merge(STRENGTHS), deltas(3), step()), want)


def test_composite_is_equation_3_with_guidance_inside_the_mean():
    """e~ = 1/k sum_i [e_i(z) + s (e_i(z, c) - e_i(z))], and the node applies guidance after the mean."""
    guidance, generator = 7.0, torch.Generator().manual_seed(2)
    conditional, unconditional = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    paper = sum(u + guidance * (c - u) for c, u in zip(conditional, unconditional, strict=True)) / 3
    composite = Composite(STRENGTHS)
    c, u = composite.mix(step(), conditional), composite.mix(step(), unconditional)
    torch.testing.assert_close(u + guidance * (c - u), paper)


def test_composite_does_not_depend_on_the_order_but_switch_does():
    reference = evaluate(Composite(STRENGTHS), deltas(3), step())
    switched = set()
    for order in permutations(range(3)):
        own = [deltas(3)[i] for i in order]
        strengths = tuple(STRENGTHS[i] for i in order)
        torch.testing.assert_close(evaluate(Composite(strengths), own, step()), reference)
        switched.add(evaluate(Switch(strengths), own, step())[0, 0].item())
    assert len(switched) == 3


@each_method
def test_branches_carry_each_strength_and_mixing_keeps_constants(make):
    """Weights of a mix sum to 1: it may act on noise, velocity or denoised predictions alike."""
    method = make(STRENGTHS)
    seen = set()
    for index in range(30):
        branches = branches_of(method, step(index, 30))
        assert all(len(branch.gains) == 3 and all(g in (0.0, s) for g, s in zip(branch.gains, STRENGTHS, strict=True))
                   for branch in branches)
        seen |= {i for branch in branches for i, g in enumerate(branch.gains) if g}
        constant = torch.full((len(branches), 2, 3), 0.25)
        assert torch.equal(method.mix(step(index, 30), constant), constant[0])
    assert seen == {0, 1, 2}


def paper_switch(t: int, k: int, tau: int) -> int:
    """i = floor(((t - 1) mod (k tau)) / tau) + 1, t and i counted from 1."""
    return math.floor(((t - 1) % (k * tau)) / tau) + 1


def released_switch(total: int, k: int, tau: int) -> list[int]:
    """The adapter active during each step: the callback changes it at the end of a step."""
    current, active = 0, []
    for step_index in range(total):
        active.append(current)
        if step_index > 0 and step_index % tau == 0:
            current = (current + 1) % k
    return active


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("tau", [1, 2, 5, 7])
@pytest.mark.parametrize("total", [1, 4, 20, 53])
def test_switch_follows_the_formula_and_late_the_released_code(k, tau, total):
    exact, late = Switch((1.0,) * k, tau), Switch((1.0,) * k, tau, late=True)
    turns = exact.turns([range(k)] * total)
    assert turns == [paper_switch(j + 1, k, tau) - 1 for j in range(total)]
    assert late.turns([range(k)] * total) == released_switch(total, k, tau)
    for j in range(total):
        (branch,) = branches_of(exact, step(j, total))
        assert [i for i, g in enumerate(branch.gains) if g] == [turns[j]]


def test_switch_takes_turns_in_the_given_order():
    switch = Switch(STRENGTHS, 2, order=(2, 0, 1))
    assert switch.turns([range(3)] * 8) == [2, 2, 0, 0, 1, 1, 2, 2]
    assert branches_of(switch, step(0))[0].gains == (0.0, 0.0, 1.2)


@pytest.mark.parametrize(("total", "count", "tau"), [(200, 2, 5), (50, 3, 5), (30, 3, 5), (20, 2, 5), (20, 3, 3),
                                                     (20, 5, 2), (8, 2, 2), (8, 4, 1), (4, 2, 1), (4, 4, 1), (3, 5, 1)])
def test_turns_go_by_the_number_of_steps(total, count, tau):
    """Each LoRA has two turns where there are steps for it, and one where there are steps enough for that."""
    switch = Switch((1.0,) * count)
    assert switch.turn(total) == tau
    turns = switch.turns([range(count)] * total)
    assert set(turns) == set(range(min(count, total)))
    if total >= 2 * count:
        assert sum(a != b for a, b in itertools.pairwise(turns)) >= 2 * count - 1


def test_switch_refuses_turns_without_steps():
    with pytest.raises(ValueError, match="steps_per_lora must be at least 0, got -3"):
        Switch(STRENGTHS, -3)


@pytest.mark.parametrize("order", [(0, 1), (0, 1, 1), (1, 2, 3), (0, 1, 2, 2)], ids=str)
def test_switch_refuses_an_order_that_does_not_name_each_lora_once(order):
    with pytest.raises(ValueError, match="order must name each of the 3 LoRAs once"):
        Switch(STRENGTHS, order=order)
