"""LoRAtorio's selection from a pool: who is evaluated, who takes part, and when all are looked at again."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.session import POSITIVE, UNCONDITIONAL
from lora_ensemble.tests.test_loratorio import FACTS, SHAPE, TOTAL, World, random, step


def evaluated(method: LoRAtorio, world: World, steps: int = TOTAL) -> list[int]:
    """LoRAs evaluated per step (the base not counted), on a latent that stays as it is."""
    session, x, found = method.begin(FACTS), random(*SHAPE, seed=99), []
    for index in range(steps):
        found.append(len(session.branches(step(index))) - 1)
        world.call(session, step(index), x, POSITIVE, UNCONDITIONAL)
    return found


def test_members_not_chosen_lately_are_re_checked_on_a_schedule():
    world = World(5)
    for i in (1, 3):  # these two depart most, in every picture
        world.turns |= {(i, side): 4 * world.turns[i, side] for side in world.base}
    strengths = (1.0,) * 5
    assert evaluated(LoRAtorio(strengths, top_k=2), world) == [5] * TOTAL, "the paper"
    assert evaluated(LoRAtorio(strengths, top_k=2, recheck_every=4), world) == [5, 5, 2, 2, 5, 2, 2, 2, 5, 2]
    assert evaluated(LoRAtorio(strengths, top_k=2, recheck_every=2), world) == [5, 5, 5, 2, 5, 2, 5, 2, 5, 2]
    assert evaluated(LoRAtorio(strengths, top_k=5, recheck_every=4), world) == [5] * TOTAL


@pytest.mark.parametrize("recheck", [1, 4])
def test_a_member_that_is_never_chosen_is_named(recheck):
    world = World(4)
    for i in (1, 3):  # these two depart most, in every picture
        world.turns |= {(i, side): 4 * world.turns[i, side] for side in world.base}
    names, x = [f"LoRA {i}" for i in range(4)], random(*SHAPE, seed=99)
    for top_k, never in ((2, [0, 2]), (4, []), (0, [])):
        session = LoRAtorio((1.0,) * 4, top_k=top_k, recheck_every=recheck).begin(FACTS)
        for index in range(TOTAL):
            world.call(session, step(index), x, POSITIVE, UNCONDITIONAL)
        lines = session.missed(names)
        assert [line.partition(" had no weight in any of the ")[0] for line in lines] == [names[i] for i in never]
        assert all(f"{TOTAL} steps: the 2 that" in line for line in lines)


def test_between_re_checks_the_chosen_are_mixed_as_if_all_had_been_evaluated():
    """As long as the same ones depart most: that is the assumption of every schedule."""
    world, x = World(5), random(*SHAPE, seed=99)
    paper, sparse = (LoRAtorio((1.0,) * 5, top_k=2, recheck_every=r).begin(FACTS) for r in (1, 4))
    for index in range(4):
        a, b = (world.call(s, step(index), x, POSITIVE, UNCONDITIONAL) for s in (paper, sparse))
        torch.testing.assert_close(a, b)


def test_what_any_call_of_a_step_chose_stays_in():
    """Context windows and the pictures of a batch choose for themselves; between re-checks all their choices run."""
    def favouring(lora: int) -> World:
        world = World(4)
        world.turns |= {(lora, side): 5 * world.turns[lora, side] for side in world.base}
        return world

    session, one, two = LoRAtorio((1.0,) * 4, top_k=1, recheck_every=5).begin(FACTS), favouring(1), favouring(3)
    for index in range(3):
        for world in (one, two):
            world.call(session, step(index), random(*SHAPE, seed=50 + index), POSITIVE)
    assert session.notes()["active"] == [1, 3]
