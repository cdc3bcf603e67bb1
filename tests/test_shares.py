"""Which cases run on a release, and in what order."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from lora_ensemble.tests.conftest import LONG
from lora_ensemble.tests.shares import longest_first, one_of, places

ALONE, PAIRED = pytest.mark.parametrize("n", range(7)).mark, pytest.mark.parametrize("a, b", [(1, 2)] * 6).mark


def case(test: str, marks=(), **values):
    file, name = test.split("::")
    told = {"callspec": SimpleNamespace(params=values)} if values else {}
    key = f"[{'-'.join(map(str, values.values()))}]" if values else ""
    return SimpleNamespace(nodeid=f"tests/{file}.py::{name}{key}", path=Path(f"tests/{file}.py"), **told,
                           iter_markers=lambda name: [mark for mark in marks if mark.name == name])


ONE = [case("test_a::one")]
SEVEN = [case("test_b::seven", [ALONE], n=n) for n in range(7)]
SIX = [case("test_b::six", [PAIRED], a="the same", b=n) for n in range(6)]
CROSSED = [case("test_c::crossed", [PAIRED], a=n, b="the same", page=page) for n, page in product(range(6), "xy")]
ITEMS = [*ONE, *SEVEN, *SIX, *CROSSED]


def counts(items) -> list[int]:
    return [sum(item in items for item in some) for some in (ONE, SEVEN, SIX, CROSSED)]


def test_places():
    """Names of one `parametrize` are one axis; a fixture with parameters is one."""
    assert places(ONE) == [()] and places(SEVEN) == [(n,) for n in range(7)] == [*places(SIX), (6,)]
    assert places(CROSSED) == list(product(range(6), range(2)))


@pytest.fixture(params=["p", "q"])
def page(request):
    return request.param


@pytest.mark.parametrize("first", ["a", "b", "c"])
@pytest.mark.parametrize(("second", "third"), [(0, 1), (1, 1)])
def test_places_of_real_cases(first, second, third, page, request):
    cases = [item for item in request.session.items if item.originalname == request.node.originalname]
    found = places(cases)
    assert {len(where) for where in found} == {3} and len(set(found)) == len(cases)
    for axis, value in enumerate(("second", "first", "page")):
        values = [item.callspec.params[value] for item in cases]
        assert [where[axis] for where in found] == [[*dict.fromkeys(values)].index(each) for each in values]


def test_a_share_of_every_test_and_never_none():
    assert counts(one_of(ITEMS, 3)) == [1, 3, 2, 4] and counts(one_of(ITEMS, 9, 1)) == [1, 1, 1, 1]
    assert counts(one_of(ITEMS, 3, whole={"test_b"})) == [1, 7, 6, 4]
    assert counts(one_of(ITEMS, 3, whole={"test_b::six", "test_c::seven"})) == [1, 3, 6, 4]
    assert counts(one_of(ITEMS, 2, least=2)) == [1, 7, 6, 6]
    assert one_of(ITEMS, 1) == ITEMS


@pytest.mark.parametrize("which", [0, 1, 2])
def test_every_value_of_crossed_axes_stays(which):
    kept = [item.callspec.params for item in one_of(CROSSED, 2, which)]
    assert {values["a"] for values in kept} == set(range(6)) and {values["page"] for values in kept} == {"x", "y"}


def test_shares_with_other_numbers_make_up_the_whole():
    parts = [one_of([*SEVEN, *CROSSED], 3, which) for which in range(3)]
    assert sorted(item.nodeid for part in parts for item in part) == sorted(i.nodeid for i in [*SEVEN, *CROSSED])


def test_long_files_come_first():
    found = [item.path.stem for item in longest_first(ITEMS, ("test_c", "test_unknown", "test_b"))]
    assert found == ["test_c"] * 12 + ["test_b"] * 13 + ["test_a"]
    assert longest_first(ITEMS, ()) == ITEMS


def test_the_long_files_exist():
    known = {path.stem for path in Path(__file__).parent.rglob("test_*.py")}
    assert set(LONG) <= known and len(set(LONG)) == len(LONG)
