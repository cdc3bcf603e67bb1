"""The same picture again (tests/same.py): a few of what its command draws, and that its judge sees another picture."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.tests.same import STEPS, Parts


@pytest.fixture(scope="module")
def parts(lora_folder) -> Parts:
    return Parts(lora_folder)


@pytest.mark.parametrize("case", ["cut at 3: Composite", "batch of 3: LoRAtorio", "LoRAs in order 201: Merge",
                                  "LoRAs in order 120: Composite"])
def test_the_same_again(case, parts):
    assert parts.check(case).startswith("the same")


def test_every_method_is_cut_and_drawn_in_a_batch(parts):
    cases = parts.cases()
    for name in parts.makes:
        assert sum(case.endswith(f": {name}") for case in cases) >= STEPS
    assert len(set(cases)) == len(cases)


def test_another_picture_is_seen(parts):
    plain, wanted = torch.zeros(1, 4), torch.ones(1, 4)
    assert parts.same(wanted.clone(), wanted, plain) == "the same to the last bit"
    assert "0.001" in parts.same(wanted * 1.0005, wanted, plain)
    with pytest.raises(AssertionError, match=r"2\.0e-03"):
        parts.same(wanted * 1.002, wanted, plain)
