"""What counts as growth in a soak (tests/soak.py)."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path

import pytest
from lora_ensemble.tests import soak as soaks
from lora_ensemble.tests.soak import BLOCKS, LAST, LEAST, Slope, Worker, grows, slope, soak
from lora_ensemble.tools.results import TimeOver


@pytest.mark.parametrize("growth", [0.0, 0.5, -2.0])
def test_a_slope_and_its_interval(growth):
    """95 of 100 intervals hold what there is, noise of 30 around it."""
    held = 0
    for seed in range(200):
        dice = random.Random(seed)
        found = slope([100 + growth * k + dice.gauss(0, 30) for k in range(320)])
        assert found.low < found.value < found.high
        held += found.low <= growth <= found.high
    assert 0.9 < held / 200 <= 1.0


def test_a_straight_line_is_found_to_the_last_digit():
    found = slope([3.0 * k for k in range(BLOCKS * 7 + 5)])
    assert found == pytest.approx((3.0, 3.0, 3.0))
    with pytest.raises(ValueError, match="too few"):
        slope([1.0] * (BLOCKS - 1))


def test_growth_is_more_than_the_stock_loaders_and_the_floor():
    assert grows(Slope(5, 4, 6), Slope(1, 0, 2), 3.0)
    assert not grows(Slope(5, 4, 6), Slope(4, 3, 5), 3.0), "as the stock loaders grow"
    assert not grows(Slope(5, 4, 6), Slope(0, 0, 0), 4.5), "below the floor"
    assert not grows(Slope(5, -1, 11), Slope(0, 0, 0), 0.0), "by chance"


@pytest.mark.parametrize("made", [LEAST - 1, LEAST, LEAST + 50, LEAST + 100])
def test_a_night_that_has_to_end_says_how_far_it_came(monkeypatch, made):
    """And nothing at all of the first hundred prompts. Without a server: `made` prompts that each take a second."""
    seconds = iter(range(made + int(LAST) - 1, -1, -1))
    monkeypatch.setattr(soaks, "Server", lambda *_, **__: nullcontext())
    monkeypatch.setattr(Worker, "prepare", lambda self: None)
    monkeypatch.setattr(Worker, "picture", lambda self: b"the same")
    monkeypatch.setattr(Worker, "one", lambda self, number: [seen.append(1.0) for seen in self.seen.values()])
    with pytest.raises(TimeOver) if made < LEAST else nullcontext():
        text, good = soak(Path(), (), LEAST + 100, left=lambda: next(seconds))
    if made >= LEAST:
        assert good and text.startswith(f"{made} prompts in the time" if made < LEAST + 100 else "per prompt")
