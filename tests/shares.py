"""Which cases of a test run on a release, and in what order files of tests are given to processes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Sequence

import pytest


def one_of(items: Sequence[pytest.Item], share: int, release: str, whole: Collection[str] = ()) -> list[pytest.Item]:
    """Of the cases of every test one of `share`, rounded up; by lot, which is drawn by their names and the release.

    whole   files and tests of which every case stays: "test_a", "test_a::test_of_it"
    """
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)

    def stays(item: pytest.Item) -> bool:
        test = item.nodeid.partition("[")[0].rpartition("::")[2]
        return item.path.stem in whole or f"{item.path.stem}::{test}" in whole

    def lot(item: pytest.Item) -> bytes:
        return hashlib.sha256(f"{release} {item.nodeid}".encode()).digest()

    kept = {id(item) for same in cases.values() for item in sorted(same, key=lot)[:-(-len(same) // share)]}
    return [item for item in items if id(item) in kept or stays(item)]


def longest_first(items: Sequence[pytest.Item], long: Sequence[str]) -> list[pytest.Item]:
    """The items with those of the files (stems) in `long` ahead, in the order of `long`; a file's own order stays."""
    ahead = {name: place for place, name in enumerate(long)}
    return sorted(items, key=lambda item: ahead.get(item.path.stem, len(ahead)))
