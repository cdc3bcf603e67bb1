"""What counts as growth in a soak (tests/soak.py)."""

from __future__ import annotations

import random

import pytest
from lora_ensemble.tests.soak import BLOCKS, Slope, grows, slope


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
