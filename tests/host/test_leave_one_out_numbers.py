"""What leave-one-out says of mean squares, by hand."""

from __future__ import annotations

from math import nan

import pytest
import torch
from lora_ensemble.host.look.leave_one_out import _Study, measured_steps


def study(count: int) -> _Study:
    """Of LoRAs whose mean squares at each of two steps and places are random."""
    ours = _Study([(0, k) for k in range(count)], frozenset((0, k) for k in range(count)))
    generator = torch.Generator().manual_seed(1)
    ours.steps = [0, 3]
    ours.own = [torch.rand(len(ours.lefts), 2, 3, generator=generator) for _ in ours.steps]
    ours.whole = [torch.rand((), generator=generator) for _ in ours.steps]
    return ours


@pytest.mark.parametrize("count", [1, 3])
def test_numbers_and_maps(count):
    """Of one LoRA, what it does is what all do."""
    ours = study(count)
    shares, parts = ours.numbers()
    maps = ours.map_of_each()
    assert len(shares) == len(parts) == len(maps) == count and len(ours.lefts) == (count + 1 if count > 1 else 1)
    for i in range(count):
        for k in range(2):
            own, every = ours.own[k][i].double().mean(), ours.own[k][-1].double().mean()
            assert shares[i][k] == pytest.approx(float((own / ours.whole[k]) ** 0.5), rel=1e-5)
            assert parts[i][k] == pytest.approx(float((own / every) ** 0.5), rel=1e-5)
        want = sum((own[i].double() / own[-1].double().mean()) ** 0.5 for own in ours.own) / 2
        assert torch.allclose(maps[i].double(), want, rtol=1e-5)


def test_of_a_run_that_measured_nothing():
    ours = study(2)
    ours.forget()
    assert ours.numbers() == ([[], []], [[], []]) and ours.map_of_each().shape == (2, 1, 1)
    assert not ours.without_numbers()


@pytest.mark.parametrize("which", ["own", "whole"])
def test_steps_in_which_a_prediction_is_none_are_dropped(which):
    ours = study(2)
    kept = ours.own[1]
    assert not ours.without_numbers() and ours.steps == [0, 3]
    getattr(ours, which)[0] = getattr(ours, which)[0] * nan
    assert ours.without_numbers() and ours.steps == [3] and ours.own[0] is kept and len(ours.whole) == 1


def test_where_nothing_does_anything_there_is_nothing():
    ours = study(2)
    ours.own = [own * 0 for own in ours.own]
    assert ours.numbers() == ([[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2) and not ours.map_of_each().any()


@pytest.mark.parametrize("total", [1, 2, 7, 20, 50])
def test_steps_that_are_measured(total):
    found = sorted(measured_steps(total))
    assert found[0] == 0 and found[-1] == total - 1 and len(found) <= total
    gaps = {b - a for a, b in zip(found, found[1:], strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1
