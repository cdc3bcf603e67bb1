"""What one model call is evaluated with: a branch of each method that is applied to the MODEL."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

from ...kernels.branch import Branch

MOST = 4096
"""Combinations of one model call. Methods in a row multiply theirs, and each is an evaluation of the model."""


def combinations(branches: Sequence[Sequence[Branch]], methods: Sequence[str]) -> tuple[tuple[Branch, ...], ...]:
    """Every combination of the branches of the methods of these names.

    Raises ValueError where that is more than anybody can mean: a few nodes in a row ask for millions.
    """
    count = prod(map(len, branches))
    if count > MOST:
        each = " x ".join(f"{len(some)} ({name})" for some, name in zip(branches, methods, strict=True))
        raise ValueError(f"The methods on this MODEL make {each} = {count:,} combinations of LoRAs, each of them an "
                         f"evaluation of the model in every step; {MOST:,} are the most. Methods in a row multiply "
                         "theirs: put the LoRAs into one ensemble.")
    return tuple(product(*branches))


def any_of(flags: Sequence[Sequence[bool]]) -> tuple[bool, ...]:
    """For every combination, whether one of its branches has its flag up."""
    return tuple(any(each) for each in product(*flags))
