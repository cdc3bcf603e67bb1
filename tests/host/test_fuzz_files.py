"""Damaged files from seeds (tests/fuzz_files.py): a tenth of the 2 000 that its own command makes."""

from __future__ import annotations

import pytest
from lora_ensemble.host.files import patches
from lora_ensemble.tests.fuzz_files import Fuzz

COUNT = 200
SHARE = 20


@pytest.fixture(scope="module")
def fuzz(lora_folder) -> Fuzz:
    return Fuzz(lora_folder)


@pytest.mark.parametrize("first", range(0, COUNT, SHARE))
def test_damaged_files(first, fuzz):
    """Each works as in the stock loader, without the layers that are named as left out, or is refused by its name."""
    found = [fuzz.check(seed)[1] for seed in range(first, min(first + SHARE, COUNT))]
    assert "works" in found and any(became.startswith("refused") for became in found)


def test_the_judge_sees_files_that_nobody_checks(fuzz, monkeypatch):
    monkeypatch.setattr(patches, "_check", lambda *_: None)
    with pytest.raises(Exception):  # noqa: B017  (in the bank, in the sampler, or a picture that differs)
        for seed in range(30):
            fuzz.check(seed)
