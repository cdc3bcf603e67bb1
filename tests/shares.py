"""Which cases of a test run on a release, and in what order files of tests are given to processes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence, Set

import pytest


def places(cases: Sequence[pytest.Item]) -> list[tuple[int, ...]]:
    """Where each of the cases of one test stands on each of its axes: its `parametrize` marks, and its fixtures with
    parameters."""
    seen: dict[int, list[tuple]] = defaultdict(list)
    found = []
    for item in cases:
        values = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        names = [mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
                 for mark in item.iter_markers("parametrize")]
        together = [tuple(id(values.pop(name.strip())) for name in some) for some in names]
        together += [(id(value),) for value in values.values()]
        for axis, value in enumerate(together):
            if value not in seen[axis]:
                seen[axis].append(value)
        found.append(tuple(seen[axis].index(value) for axis, value in enumerate(together)))
    return found


def one_of(items: Sequence[pytest.Item], share: int, which: int = 0, least: int = 1, whole: Set[str] = frozenset()
           ) -> list[pytest.Item]:
    """Of every test's cases one of `share`, at least one: those on diagonals, where the places on all axes add up to a
    multiple of it. So every value of an axis keeps a case where another axis is as long as `share`.

    which   another number chooses other cases
    least   tests with fewer axes stay as they are
    whole   files and tests that do, too: "test_a", "test_a::test_of_it"
    """
    cases: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept: set[int] = set()
    for name, same in cases.items():
        stem = same[0].path.stem
        stays = not whole.isdisjoint({stem, f"{stem}::{name.rpartition('::')[2]}"})
        chosen = [item for item, where in zip(same, places(same), strict=True)
                  if stays or len(where) < least or (sum(where) + which) % share == 0]
        kept |= {id(item) for item in chosen or same[:1]}
    return [item for item in items if id(item) in kept]


def longest_first(items: Sequence[pytest.Item], long: Sequence[str]) -> list[pytest.Item]:
    """The items with those of the files (stems) in `long` ahead, in the order of `long`; a file's own order stays."""
    ahead = {name: place for place, name in enumerate(long)}
    return sorted(items, key=lambda item: ahead.get(item.path.stem, len(ahead)))
