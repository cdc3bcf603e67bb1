"""Where words are: attention to clauses, competition, contrast and what a run does with them, against loops."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.kernels.branch import Step
from lora_ensemble.kernels.routing import clause_attention, clause_shares, clause_values, compete, contrast
from lora_ensemble.methods.routed import MODES, Routes, Routing, clauses_of
from lora_ensemble.tests.operations import Operations
from lora_ensemble.tests.reference import close
from torch import Tensor


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(q, k, members, text, *more) -> Tensor:
    return clause_attention([clause_shares(q, k, clause_values(members, k.shape[2], text, q), members.shape[1], *more)])


def attention_by_loops(q, k, members, text, mask=None, scale=None):
    batch, heads, places, width = q.shape
    out = torch.zeros(batch, members.shape[1], places, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h * k.shape[1] // heads].double()
            for p in range(places):
                logits = keys @ q[b, h, p].double() * (width**-0.5 if scale is None else scale)
                if mask is not None:
                    logits = logits.masked_fill(~mask[b, 0, 0], -torch.inf)
                share = logits.softmax(0)[text]
                out[b, :, p] += members[b % len(members)].double() @ share / heads
    return out


@pytest.mark.parametrize("clauses", [1, 3, 8, 19], ids=lambda n: f"{n} clauses")
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
def test_attention_to_clauses(clauses, heads, groups):
    """19 clauses are more than a head has channels: they are read in parts, and in no more than it takes."""
    q, k = rand(2, heads, 6, 8), rand(2, groups, 11, 8, seed=1)
    members = (torch.rand(2, clauses, 5, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    for text in (slice(0, 5), slice(3, 8)):
        assert clause_values(members, 11, text, q).shape == (2, 1, 11, 24 if clauses > 8 else 8)
        found = attention(q, k, members, text)
        assert found.dtype is torch.float32 and found.shape == (2, clauses, 6)
        assert close(found, attention_by_loops(q, k, members, text))


def test_attention_with_a_mask_and_a_scale():
    q, k, members = rand(2, 2, 4, 8), rand(2, 2, 7, 8, seed=1), torch.ones(1, 1, 3)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 2:] = False
    found = attention(q, k, members, slice(0, 3), mask, 0.9)
    assert close(found, attention_by_loops(q, k, members, slice(0, 3), mask, 0.9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_in_half_precision(dtype):
    q, k, members = rand(1, 2, 4, 8).to(dtype), rand(1, 2, 7, 8, seed=1).to(dtype), torch.eye(3)[None]
    found = attention(q, k, members, slice(2, 5))
    assert found.dtype is torch.float32
    assert close(found, attention_by_loops(q, k, members, slice(2, 5)), dtype)


def compete_by_loops(attention, own, rivals, gamma):
    batch, _, *grid = attention.shape
    out = torch.ones(batch, len(own), *grid)
    flat, places = attention.flatten(2), out.view(batch, len(own), -1)
    for b in range(batch):
        relative = [[float(a) / float(row.max()) for a in row] for row in flat[b]]
        for i, clause in enumerate(own):
            for p in range(flat.shape[2]):
                best = max(relative[c][p] for c in rivals)
                if clause is not None and best > 0:
                    places[b, i, p] = min(relative[clause][p] / best, 1.0) ** gamma
    return out


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("grid", [(3, 4), (2, 3, 4)], ids=["picture", "film"])
def test_competition(grid, gamma):
    attention = torch.rand(2, 4, *grid, generator=torch.Generator().manual_seed(3))
    own, rivals = (1, None, 0, 3), (0, 1, 2)  # clause 3 is of a LoRA that does not compete
    found = compete(attention, own, rivals, gamma)
    assert torch.allclose(found, compete_by_loops(attention, own, rivals, gamma), atol=1e-6)
    assert (found[:, 1] == 1).all() and found.amax() <= 1 and found.amin() >= 0


def test_a_place_that_no_rival_is_attended_to_from_is_everybodys():
    attention = torch.tensor([[[0.0, 0.5], [0.0, 0.2], [0.3, 0.0]]])
    assert compete(attention, (0, 1, 2, None), (0, 1), 2.0)[0, :, 0].tolist() == [1, 1, 1, 1]


def test_operations_of_a_step():
    """On a fast GPU they take as long as the host needs to ask for them: an attention per call that is read, two per
    size of these calls, nine per step, however many LoRAs there are."""
    q, k, members = rand(2, 4, 6, 8), rand(2, 4, 11, 8, seed=1), torch.ones(2, 3, 5)
    values = clause_values(members, 11, slice(0, 5), q)
    with torch.no_grad(), Operations() as asked:
        shares = [clause_shares(q, k, values, 3) for _ in range(5)]
    assert len(asked.names) == 5, asked.names
    with torch.no_grad(), Operations() as asked:
        found = clause_attention(shares)
    assert asked.names == ["cat", "mean"]
    for own, rivals, most in (((0, 1), (0, 1, 2), 7), ((0, 1, None, 2) * 3, (0, 1, 2), 9), ((2, 0, 1), (2, 0, 1), 9)):
        with torch.no_grad(), Operations() as asked:
            compete(found.unflatten(-1, (2, 3)), own, rivals, 2.0)
        assert len(asked.names) <= most, (own, asked.names)


def test_calls_that_are_read_count_alike():
    """However many are summed together: the mean of their means."""
    q, k, members = rand(2, 4, 6, 8), rand(2, 4, 11, 8, seed=1), torch.ones(2, 3, 5)
    values = clause_values(members, 11, slice(0, 5), q)
    calls = [clause_shares(q * n, k, values, 3) for n in (1, 2, 3)]
    each = torch.stack([clause_attention([call]) for call in calls])
    assert each.dtype == torch.float32 and torch.allclose(clause_attention(calls), each.mean(dim=0), atol=1e-7)


def test_a_clause_wins_where_it_is_attended_to_most():
    """Of its own maximum: a clause of few words is not drowned by a long one."""
    attention = torch.tensor([[[0.02, 0.01], [0.3, 0.6]]])
    found = compete(attention, (0, 1), (0, 1), 2.0)
    assert torch.allclose(found, torch.tensor([[[1.0, 0.25], [0.25, 1.0]]]))


def test_places_that_nobody_is_attended_from_are_everybodys():
    found = compete(torch.tensor([[[0.0, 1.0], [0.0, 0.5]]]), (0, 1), (0, 1), 2.0)
    assert found[0, :, 0].tolist() == [1.0, 1.0] and not found.isnan().any()
    assert compete(torch.zeros(1, 2, 3), (0, 1), (0, 1), 2.0).tolist() == [[[1.0] * 3] * 2]
    assert compete(torch.rand(1, 1, 3), (0,), (), 2.0).tolist() == [[[1.0] * 3]]


@pytest.mark.parametrize("grid", [(4, 5), (2, 4, 5)], ids=["picture", "film"])
def test_contrast(grid):
    whole, without = rand(2, 3, *grid), rand(4, 2, 3, *grid, seed=1)
    found = contrast(whole, without)
    assert found.shape == (2, 4, *grid)
    height, width = grid[-2:]
    for b in range(2):
        for c in range(4):
            apart = (without[c, b] - whole[b]).square().mean(0).sqrt().reshape(-1, height, width)
            for frame, plane in enumerate(apart):
                for i in range(height):
                    for j in range(width):
                        near = plane[max(i - 1, 0):i + 2, max(j - 1, 0):j + 2]
                        assert abs(found[b, c].reshape(-1, height, width)[frame, i, j] - near.mean()) < 1e-6


def test_clauses_of_a_prompt():
    found = clauses_of(6, [(0, 1), (), (3,)], [(2,), (4, 9)], [False, False, True])
    assert found.own == (0, None, 1) and found.rivals == (0, 2, 3) and found.everywhere == (False, True, True)
    assert found.members.tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert found.words.tolist() == [[1, 1, 0, 0, 0, 0], [1] * 6, [0, 0, 0, 1, 0, 0]]
    attention = torch.rand(1, 4, 2, 2)
    places = found.places(attention, 2.0)
    assert (places[:, 1:] == 1).all() and torch.equal(places[:, :1], compete(attention, (0,), (0, 2, 3), 2.0))


def steps(total: int) -> list[Step]:
    return [Step(index, total, 1 - index / total) for index in range(total)]


def test_when_a_run_looks():
    """Once: in an evaluation of its own before the first step; every step: again in each. Where LoRAs start later, the
    steps before say where."""
    for mode in MODES:
        routes = Routes(Routing(mode))
        assert [routes.probes(step) for step in steps(4)] == [True] * 4
        routes.found = True
        assert not any(routes.probes(step) for step in steps(4))
        assert all(routes.reads(step) is (mode == "every step") for step in steps(4))
    late = Routes(Routing("every step", start=0.5))
    assert [late.acts(step) for step in steps(4)] == [False, False, True, True]
    assert [late.probes(step) for step in steps(4)] == [False, False, True, True] and late.reads(steps(4)[0])
    once = Routes(Routing("once", start=0.5))
    assert [once.reads(step) for step in steps(4)] == [True, True, False, False]
    once.found = True
    assert once.reads(steps(4)[0])  # the latest before they act is the best
    assert Routing(start=0.99).first(3) == 2 and Routing(start=0.05).first(9) == 0
    assert Routing(start=0.05).first(10) == 1  # half a step is a step


@pytest.mark.parametrize("wrong", [{"mode": "often"}, {"gamma": -1.0}, {"gamma": float("nan")}, {"start": 1.0},
                                   {"start": -0.1}])
def test_options_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=f"Routing: {next(iter(wrong))}"):
        Routing(**wrong)
