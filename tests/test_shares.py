"""Which cases run on a release, and in what order."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from lora_ensemble.tests import shares
from lora_ensemble.tests.conftest import LONG
from lora_ensemble.tests.shares import EVERY_CASE, SHOWN_ELSEWHERE, longest_first, one_of, places, some_tests, taken

ALONE, PAIRED = pytest.mark.parametrize("n", range(7)).mark, pytest.mark.parametrize("a, b", [(1, 2)] * 6).mark


def case(test: str, marks=(), **values):
    file, name = test.split("::")
    told = {"callspec": SimpleNamespace(params=values)} if values else {}
    key = f"[{'-'.join(map(str, values.values()))}]" if values else ""
    return SimpleNamespace(nodeid=f"tests/host/{file}.py::{name}{key}", path=Path(f"tests/host/{file}.py"), **told,
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
    assert counts(one_of(ITEMS, 3, own={"test_b": 1})) == [1, 7, 6, 4]
    assert counts(one_of(ITEMS, 3, own={"test_b::six": 1, "test_c::seven": 1})) == [1, 3, 6, 4]
    assert counts(one_of(ITEMS, 3, least=2, own={"test_b::six": 2, "test_b": 7})) == [1, 1, 3, 6]
    assert counts(one_of(ITEMS, 2, least=2)) == [1, 7, 6, 6]
    assert one_of(ITEMS, 1) == ITEMS


def test_tests_with_shares_of_their_own_take_turns():
    """Two tests of one file with the same axis have all its values together."""
    both = [case(f"test_b::{name}", [ALONE], n=n) for name in ("one", "other", "third") for n in range(7)]
    kept = one_of(both, 1, own={"test_b::one": 2, "test_b::third": 2})
    assert [item.nodeid.rpartition("::")[2] for item in kept if "other" not in item.nodeid] == [
        *(f"one[{n}]" for n in (0, 2, 4, 6)), *(f"third[{n}]" for n in (1, 3, 5))] and len(kept) == 14


@pytest.mark.parametrize("which", [0, 1, 2])
def test_every_value_of_crossed_axes_stays(which):
    for kept in (one_of(CROSSED, 2, which), one_of(CROSSED, 9, which, least=2)):
        values = [item.callspec.params for item in kept]
        assert {each["a"] for each in values} == set(range(6)) and {each["page"] for each in values} == {"x", "y"}


@pytest.mark.parametrize("which", range(4))
def test_as_few_as_leave_every_value_a_case(which):
    """Whatever axis is the longest, and of two axes no more than that has values."""
    for lengths in ((5, 3), (3, 5), (4, 4), (2, 7, 3), (1, 6), (3, 3, 3, 3)):
        marks = [pytest.mark.parametrize(f"x{k}", range(n)).mark for k, n in enumerate(lengths)]
        every = [case("test_d::axes", marks, **{f"x{k}": value for k, value in enumerate(values)})
                 for values in product(*map(range, lengths))]
        kept = [item.callspec.params for item in one_of(every, 99, which, least=2)]
        assert len(kept) == len(every) // sorted(lengths)[-2]
        for k, n in enumerate(lengths):
            assert {values[f"x{k}"] for values in kept} == set(range(n))


def test_what_a_run_takes(monkeypatch):
    """All; the normal run on the newest release; a share on an older one, whatever the normal run's tests have."""
    monkeypatch.setitem(EVERY_CASE, "test_b::six", 1)
    monkeypatch.setitem(SHOWN_ELSEWHERE, "test_b::seven", 7)
    monkeypatch.setattr(shares, "OURS", {"test_b"})
    assert taken(ITEMS, 1, 1, 0) == ITEMS
    assert counts(taken(ITEMS, 9, 1, 0)) == [1, 1, 6, 6]
    without = [SimpleNamespace(**vars(item) | {"path": Path("tests", item.path.name)}) for item in ITEMS]
    kept = [item.nodeid for item in taken(without, 9, 1, 0)]
    assert kept == [item.nodeid for item in [*ONE, SEVEN[0], *SIX, *CROSSED]]
    assert counts(taken(ITEMS, 1, 3, 0)) == [1, 3, 0, 4] and counts(taken(ITEMS, 1, 3, 1)) == [1, 0, 6, 4]


def test_some_tests_of_a_file_and_never_none():
    for share in (2, 9):
        assert counts(some_tests(ITEMS, {"test_a", "test_b"}, share)) == [1, 7, 0, 12]
        assert counts(some_tests(ITEMS, {"test_a", "test_b"}, share, 1)) == [1, 0, 6, 12]
    assert some_tests(ITEMS, {"test_a", "test_b"}, 1) == some_tests(ITEMS, set(), 9) == ITEMS


def test_named_tests_exist():
    """In the tests' own words: a test that is called otherwise now would have all its cases, or a share, unseen."""
    here = Path(__file__).parent
    for name in {*EVERY_CASE, *SHOWN_ELSEWHERE, *shares.OURS}:
        file, _, test = name.partition("::")
        texts = [path.read_text(encoding="utf-8") for path in (here / f"{file}.py", here / "host" / f"{file}.py")
                 if path.is_file()]
        assert any(f"def {test}(" in text if test else True for text in texts), name


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
