"""The record of a run: several devices report to it at once, each from a thread of its own."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from lora_ensemble.engine.record import RunRecord, StepRecord

THREADS, TIMES = 4, 100


class Counters(StepRecord):
    """Lets another thread in between reading a counter and writing it."""

    def __getattribute__(self, name: str):
        value = super().__getattribute__(name)
        if name in ("calls", "rows"):
            time.sleep(0)
        return value


def record(step: StepRecord | None = None) -> RunRecord:
    return RunRecord(["Composite"], [["a", "b"]], steps=[step or StepRecord(0, 1.0)])


def test_every_forward_is_counted():
    run = record(Counters(0, 1.0))
    with ThreadPoolExecutor(THREADS) as pool:
        for each in [pool.submit(lambda: [run.count(3) for _ in range(TIMES)]) for _ in range(THREADS)]:
            each.result()
    assert (run.steps[0].calls, run.steps[0].rows) == (THREADS * TIMES, 3 * THREADS * TIMES)


def test_nothing_is_counted_before_the_first_step():
    run = RunRecord([], [])
    run.count(2)
    run.note("cache", {})
    assert run.steps == []


def test_it_is_saved_as_plain_data():
    run = record()
    run.count(2)
    run.note("Composite", {"led": 1})
    saved = json.loads(json.dumps(run.as_dict()))
    assert saved["steps"][0]["rows"] == 2 and saved["steps"][0]["notes"] == {"Composite": {"led": 1}}
    assert set(saved) == {"methods", "adapters", "steps", "problems", "reasons", "finished", "chosen", "before",
                          "whole", "devices", "carried"}


def test_what_is_no_number_is_not_known():
    """Neither a chart nor a page knows NaN, and JSON has no such thing."""
    run = record()
    run.steps.append(StepRecord(1, 0.5))
    run.note("LoRAtorio", {"weights": [torch.tensor([0.25, float("nan")])], "active": (0, 1), "share": float("inf")})
    run.steps.append(StepRecord(2, 0.25, notes={"LoRAtorio": {"share": float("nan")}}))
    assert run.settle() is run.steps[1], "the first of them"
    assert run.steps[1].notes == {"LoRAtorio": {"weights": [[0.25, None]], "active": [0, 1], "share": None}}
    json.dumps(run.as_dict(), allow_nan=False)
    run.steps[1].notes = {"a": torch.tensor(0.5), "b": None}
    assert run.settle() is None and run.steps[1].notes == {"a": 0.5, "b": None}


def test_devices_are_counted_where_several_are_named():
    run = record()
    run.count(1, "cuda:0")
    assert run.devices == {}
    run.devices |= {"cuda:0": 0, "cuda:1": 0}
    run.count(2, "cuda:0")
    run.count(3, "cuda:1")
    assert run.devices == {"cuda:0": 2, "cuda:1": 3} and run.steps[0].rows == 6


def test_the_second_of_a_kind_has_its_place_as_well():
    run = RunRecord(["Merge", "Switch", "Merge"], [[], [], []])
    assert [run.note_key(k) for k in range(3)] == ["Merge", "Switch", "Merge 3"]
