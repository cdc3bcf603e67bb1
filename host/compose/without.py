"""LoRAs that are left out of single pictures of a batch, to see what they do: their gains are 0 in every branch of
these pictures, and all else is as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from ...kernels.branch import Branch, without

Silenced = frozenset[tuple[int, int]]
"""LoRAs that do nothing: (applied method, place in it) each."""


class AnotherBatch(RuntimeError):
    """The pictures of a run cannot be in one batch: the model was called with others, and which of them these are is
    not known, or it takes one at a time."""


@dataclass(frozen=True)
class Without:
    """What is left out, per picture of the run. () leaves nothing out, whatever the batch."""

    pictures: tuple[Silenced, ...] = ()

    def rows(self, k: int, branches: Sequence[Branch], pictures: int) -> list[Branch]:
        """The branch of every row of a batch, of the k-th method: for each of its conds, with their branches, all
        pictures. Raises AnotherBatch."""
        if not self.pictures:
            return [branch for branch in branches for _ in range(pictures)]
        if len(set(self.pictures)) > 1 and pictures != len(self.pictures):
            raise AnotherBatch(f"a node calls the model with a batch of {pictures} pictures in a run of "
                               f"{len(self.pictures)}")
        left = [frozenset(i for method, i in self.pictures[p % len(self.pictures)] if method == k)
                for p in range(pictures)]
        return [silent(branch, each) for branch in branches for each in left]


@lru_cache(maxsize=4096)
def silent(branch: Branch, left: frozenset[int]) -> Branch:
    """A branch in which some LoRAs do nothing."""
    return without(branch, left) if left else branch


class _Run(Protocol):
    without: Without
    probing: bool


@contextmanager
def beside(run: _Run, without: Without) -> Iterator[None]:
    """While open, evaluations are beside the run: with other LoRAs left out, and nothing of them is read or cached."""
    before, run.without, run.probing = (run.without, run.probing), without, True
    try:
        yield
    finally:
        run.without, run.probing = before
