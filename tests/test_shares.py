"""Which cases run on a release, and in what order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from lora_ensemble.tests.conftest import LONG
from lora_ensemble.tests.shares import longest_first, one_of

COUNTS = {"test_a::one": 1, "test_a::three": 3, "test_b::seven": 7, "test_c::thirty": 30}
ITEMS = [SimpleNamespace(nodeid=f"tests/{test.replace('::', '.py::')}[{k}]", path=Path(test.split("::")[0] + ".py"))
         for test, count in COUNTS.items() for k in range(count)]


def counts(items) -> list[int]:
    return [sum(f"::{test.split('::')[1]}[" in item.nodeid for item in items) for test in COUNTS]


def test_a_share_of_every_test_and_never_none():
    assert counts(one_of(ITEMS, 3, "0.28.0")) == [1, 1, 3, 10]
    assert counts(one_of(ITEMS, 3, "0.28.0", {"test_b"})) == [1, 1, 7, 10]
    assert counts(one_of(ITEMS, 3, "0.28.0", {"test_a::three", "test_b::thirty"})) == [1, 3, 3, 10]
    assert one_of(ITEMS, 1, "0.28.0") == ITEMS


def test_a_share_depends_on_names_and_the_release_alone():
    """Every process must find the same; more tests beside it change nothing; releases take others."""
    here = one_of(ITEMS, 3, "0.28.0")
    assert [item for item in ITEMS if item in here] == here  # in order
    assert one_of(ITEMS[::-1], 3, "0.28.0") == here[::-1]
    assert one_of(ITEMS[4:], 3, "0.28.0") == here[2:]
    assert set(map(id, here[5:])) != set(map(id, one_of(ITEMS, 3, "0.3.64")[5:]))


def test_long_files_come_first():
    found = [item.path.stem for item in longest_first(ITEMS, ("test_c", "test_unknown", "test_b"))]
    assert found == ["test_c"] * 30 + ["test_b"] * 7 + ["test_a"] * 4
    assert longest_first(ITEMS, ()) == ITEMS


def test_the_long_files_exist():
    known = {path.stem for path in Path(__file__).parent.rglob("test_*.py")}
    assert set(LONG) <= known and len(set(LONG)) == len(LONG)
