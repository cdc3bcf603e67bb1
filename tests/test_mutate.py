"""The faults that tests/mutate.py makes are faults, and the tests that it runs are those of the file."""

from __future__ import annotations

import ast
from functools import cache

import pytest
from lora_ensemble.tests import mutate
from lora_ensemble.tests.mutate import (
    EQUIVALENT,
    FLOORS,
    ROOT,
    Fault,
    chosen,
    compiles,
    covering,
    faults,
    imported,
    seen,
)

CODE = '''"""A file."""
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import x


def f(a: int = 1) -> int:
    """A function."""
    if a < 2 and not a:
        raise ValueError("a" * 3)
    b = -a + max(a, 1)
    b *= 2
    log.warning("b %d", b + 1)
    return b
'''


def changed(tmp_path, monkeypatch) -> list[tuple[str, str]]:
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    path = tmp_path / "changed.py"
    path.write_text(CODE, encoding="utf-8")
    assert all(compiles(fault) for fault in faults(path))
    return sorted((fault.key[1], fault.key[2]) for fault in faults(path))


def test_what_is_changed(tmp_path, monkeypatch):
    """Nothing of texts, annotations and messages."""
    assert changed(tmp_path, monkeypatch) == sorted([
        ("1", "2"), ("1", "2"), ("2", "3"), ("2", "3"), ("<", "<="), ("and", "or"), ("not", ""), ("-", ""), ("+", "-"),
        ("max", "min"), ("a < 2 and not a", "True"), ("a < 2 and not a", "False"), ("b *= 2", "pass")])


@pytest.fixture(scope="module")
def known():
    return cache(faults)


@pytest.fixture
def read_once(known, monkeypatch):
    """Each file of the pack, for all tests."""
    monkeypatch.setattr(mutate, "faults", known)


@pytest.mark.usefixtures("read_once")
def test_faults_of_a_seed_are_the_same_and_differ_from_what_was():
    assert list(map(str, chosen(40, 3))) == list(map(str, chosen(40, 3))) != list(map(str, chosen(40, 4)))
    assert {fault.path.relative_to(ROOT).parts[0] for fault in chosen(200, 0)} == set(FLOORS)
    for fault in chosen(40, 5):
        text = fault.path.read_text(encoding="utf-8")
        assert text[fault.start:fault.end] == fault.old != fault.new
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(text[:fault.start] + fault.new + text[fault.end:]))


@pytest.mark.usefixtures("read_once")
def test_what_is_called_equivalent_is_a_fault_that_is_not_made(monkeypatch):
    every = {fault.at for name in {name for name, *_ in EQUIVALENT} for fault in faults(ROOT / name)}
    assert set(EQUIVALENT) <= every, "its line is another one now: look at it again"
    first, *others = chosen(6, 0)
    monkeypatch.setattr(mutate, "EQUIVALENT", {first.at: "why"})
    assert chosen(5, 0) == others


def test_the_nearest_covering_a_file():
    graph = {path: imported(path) for top in (*FLOORS, "nodes", "tests") for path in (ROOT / top).rglob("*.py")}
    tests = covering(ROOT / "kernels" / "patches.py", graph, False, 5)
    assert tests[0] == "tests/test_patches.py" and all("host" not in test for test in tests)
    tests = covering(ROOT / "host" / "compose" / "weights.py", graph, True, 5)
    assert tests[0] == "tests/host/test_weights.py" and not any("server" in test for test in tests)
    assert len(tests) == 5
    for changed, test in (("host/compose/routes.py", "routed_trust"), ("host/guidance/apply.py", "two_runs_guidance")):
        assert f"tests/host/test_{test}.py" in covering(ROOT / changed, graph, True, 14), "a like name"
    line = "bank = Bank(_yielding(loaded) if yields else [lora.parsed.layers for lora in loaded.loras], names,"
    assert "tests/host/test_routed_yields.py" in covering(ROOT / "host/compose/ensemble_bank.py", graph, True, 4, line)


@pytest.mark.parametrize(("new", "found"), [("+", False), ("-", True)])
def test_a_fault_is_seen_by_a_test_that_fails(tmp_path, monkeypatch, new, found):
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    (tmp_path / "changed.py").write_text("def f(a):\n    return a + 1\n", encoding="utf-8")
    (tmp_path / "test_code.py").write_text("from code_of import f\n\ndef test_f():\n    assert f(1) == 2\n",
                                           encoding="utf-8")
    (tmp_path / "code_of.py").write_text("from importlib import util\nspec = util.spec_from_file_location('c', "
                                         f"{str(tmp_path / 'changed.py')!r})\nm = util.module_from_spec(spec)\n"
                                         "spec.loader.exec_module(m)\nf = m.f\n", encoding="utf-8")
    (tmp_path / "run.py").write_text("import runpy, sys\nsys.argv = sys.argv[3:]\n"
                                     "runpy.run_module('pytest', run_name='__main__', alter_sys=True)\n",
                                     encoding="utf-8")
    at = len("def f(a):\n    return a ")
    fault = Fault(tmp_path / "changed.py", at, at + 1, "+", new, 2, 14)
    assert seen(fault, tmp_path, ["test_code.py"], 60) == found
    assert (tmp_path / "changed.py").read_text(encoding="utf-8").endswith("a + 1\n")


def test_a_fault_keeps_its_name_as_long_as_its_line_is_the_same(tmp_path, monkeypatch):
    """What was found of it counts for later code as well, and not for a like fault in another line."""
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    path = tmp_path / "kernels" / "one.py"
    path.parent.mkdir()

    def names(text: str) -> dict[str, str]:
        path.write_text(text)
        return {fault.name: str(fault) for fault in mutate.chosen(100, 0)}

    before = names("def f(a):\n    return a < 1\n\n\ndef g(a):\n    return a < 1\n")
    after = names("TOLD = 'x'\n\n\ndef f(a):\n    return a < 1\n\n\ndef g(a):\n    return a < 1\n")
    assert set(before) == set(after) and len(before) == 4 and set(before.values()).isdisjoint(after.values())
    assert {"kernels/one.py return a < 1: < -> <=", "kernels/one.py return a < 1 (2): < -> <="} < set(before)
    assert set(before).isdisjoint(names("def f(a):\n    return a < 11\n"))
