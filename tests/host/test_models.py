"""The small models of these tests: none of their numbers are what memory happened to hold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .models import FAMILIES, build, randomize
from .small_video import SMALL


@pytest.fixture
def unset() -> Iterator[None]:
    """Memory that nobody has written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_number_of_a_model_is_set(name, unset):
    model = build(FAMILIES[name])
    randomize(model)
    _all_set(model)


@pytest.mark.parametrize("name", SMALL)
def test_every_number_of_a_transformer_is_set(name, unset):
    _all_set(SMALL[name].build())


def _all_set(model: torch.nn.Module) -> None:
    unset = [name for name, value in model.state_dict().items() if not torch.isfinite(value.float()).all()]
    assert not unset
