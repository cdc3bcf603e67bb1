"""Faults in a run (tests/inject.py): a few of those that its command makes, and that its judge sees what stays."""

from __future__ import annotations

import pytest
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.host.compose import wrappers
from lora_ensemble.host.compose.composition import Composition
from lora_ensemble.tests.inject import Failure, Faults
from lora_ensemble.tests.inject_disk import DISK

SOME = ("Composite", "Routed by words on Flux", "LoRA Layer Map")
FEW = 9


@pytest.fixture(scope="module")
def faults(lora_folder) -> Faults:
    return Faults(lora_folder, SOME)


def test_some_faults_in_a_run(faults):
    cases = [case for case in faults.cases() if not case.startswith("disk")]
    assert len(cases) > 100
    became = {faults.check(case)[0] for case in cases[:FEW]}
    assert "it comes out as it went in" in became
    kinds = {case.partition(": ")[2].split()[0] for case in cases}
    assert kinds == {"out", "device", "interrupt", "neighbour"}


@pytest.mark.parametrize("fault", ["full after 1000 bytes", "read-only", "killed while saving, 1"])
def test_the_disk(fault, faults):
    assert DISK[fault]()


def test_forwards_that_stay_are_seen(faults, monkeypatch):
    monkeypatch.setattr(RoutedForwards, "remove", lambda self: None)
    with pytest.raises(Failure, match="forwards left"):
        faults.check("Composite: neighbour before wrapper APPLY_MODEL")


def test_a_run_that_stays_open_is_seen(faults, monkeypatch):
    end = Composition.end

    def open_still(self, run, finished):
        end(self, run, finished)
        if not finished:
            self.runs.append(run)

    faults.wanted("Composite")
    monkeypatch.setattr(Composition, "end", open_still)
    with pytest.raises(Failure, match="still open"):
        faults.check("Composite: neighbour before wrapper APPLY_MODEL")


def test_another_error_and_a_hidden_one_are_seen(faults, monkeypatch):
    fault, real = "Composite: neighbour before wrapper APPLY_MODEL", wrappers.calc_cond_batch
    faults.wanted("Composite")

    def another(executor, *args):
        try:
            return real(executor, *args)
        except Exception as error:
            raise KeyError("x") from error

    def hidden(executor, model, conds, x, *args):
        try:
            return real(executor, model, conds, x, *args)
        except Exception:
            return [x for _ in conds]

    for wrapper, words in ((another, "comes out as KeyError"), (hidden, "the result is another one")):
        monkeypatch.setattr(wrappers, "calc_cond_batch", wrapper)
        with pytest.raises(Failure, match=words):
            faults.check(fault)


def test_a_fault_that_does_not_happen_is_seen(faults):
    with pytest.raises(Failure, match="did not happen"):
        faults.check("Composite: out of memory at engine/bank.py:1, 1")
