"""What the benchmarks make of results: tables, verdicts, medians. Nothing here is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from lora_ensemble.benchmarks import counted, host_time, table
from lora_ensemble.benchmarks.goals import GOALS, PARTS, Goal, every, growth, measured, most_loras
from lora_ensemble.benchmarks.measure import Results, in_turns, spread
from lora_ensemble.methods.schedule import Uniform

CPU = torch.device("cpu")
STAMP = {"date": "2026-01-02", "commit": "abc1234", "torch": "2.11.0", "device": "cpu", "cpu": "a processor",
         "comfyui": "0.33.0"}


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.0123456, "0.0123"), (5.678, "5.68"), (12.34, "12.3"),
                                             (123.4, "123"), (1234.5, "1234"), (-0.5, "-0.500"), (999.9, "1000")])
def test_numbers_have_three_digits(value, text):
    assert table.number(value) == text


def goal_with(values: list[float], most: bool) -> dict:
    goal = Goal("G0", "what it is", "a part", "bench", every("ratio"), 2, most, where={"kind": "this"})
    records = [{"part": "a part", "bench": "bench", "kind": "this", "ratio": value} for value in values]
    others = [{"part": "a part", "bench": "bench", "kind": "that", "ratio": 9.0},
              {"part": "another", "bench": "bench", "kind": "this", "ratio": -9.0},
              {"part": "a part", "bench": "other", "kind": "this", "ratio": -9.0}]
    return goal.judged([*records, *others], "left out")


@pytest.mark.parametrize(("values", "most", "verdict", "measured"), [
    ([3.0, 2.5], False, "met", "2.50 times"), ([3.0, 1.5], False, "missed", "1.50 times"), ([2.0], True, "met", "2.00"),
    ([1.0, 1.5], True, "met", "1.50 times"), ([1.0, 2.5], True, "missed", "2.50 times"), ([], True, "left out", "")])
def test_of_several_results_the_furthest_from_the_goal_counts(values, most, verdict, measured):
    line = goal_with(values, most)
    assert line["verdict"] == verdict and line["measured"].startswith(measured)
    assert line["target"] == f"at {'most' if most else 'least'} 2.00 times"


def test_readers():
    records = [{"n": 1, "ratio": 9.0, "composite_seconds": 2.0}, {"n": 5, "ratio": 4.0, "composite_seconds": 3.0},
               {"n": 5, "ratio": 5.0, "composite_seconds": 3.0}]
    assert most_loras("ratio")(records) == [4.0, 5.0]
    assert growth(records) == [1.5] and growth(records[1:]) == [] and growth([]) == [] == most_loras("ratio")([])


def test_every_goal_has_a_part_and_every_part_a_goal():
    assert {goal.part for goal in GOALS} == set(PARTS)
    assert {f"G{i}" for i in range(1, 16)} <= {goal.name for goal in GOALS}


def test_a_part_that_fails_or_takes_too_long_says_so(tmp_path):
    told = []
    script = tmp_path / "part.py"
    script.write_text("import sys, time\n"
                      "print('{\"bench\": \"one\", \"value\": 1}', 'not a result', sep='\\n', flush=True)\n"
                      "time.sleep(float(sys.argv[1]))\nsys.exit(int(sys.argv[2]))\n", encoding="utf-8")
    assert measured([str(script), "0", "0"], 60, told.append) == ""
    assert measured([str(script), "0", "3"], 60, told.append) == "failed (exit 3)"
    assert told == [{"bench": "one", "value": 1}] * 2
    assert measured([str(script), "60", "0"], 1, told.append) == "stopped after 1 s"


def test_a_part_is_stopped_with_what_it_has_started(tmp_path):
    """A process that keeps the output open would keep the benchmark waiting until it wakes."""
    script, woken = tmp_path / "part.py", tmp_path / "woken"
    sleeper = f"import pathlib, time; time.sleep(60); pathlib.Path({str(woken)!r}).touch()"
    script.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {sleeper!r}])\n",
                      encoding="utf-8")
    assert measured([str(script)], 2, list().append) == "stopped after 2 s"
    assert not woken.exists()


def layer_line(added: float, **stamp) -> str:
    return json.dumps({"bench": "layer", "case": "Merge of 1", "layer": "32x32", "unit": "us", "plain": 6.0,
                       "floor": 4.7, "added": added, "quartiles": [1.0, 2.0], **STAMP, **stamp})


def test_the_tables_of_some_results(tmp_path):
    """The last result of a place counts; each place has a table of its own, which names the commits of its results."""
    file = tmp_path / "results.jsonl"
    lines = [layer_line(14.0), "a line of another kind", layer_line(5.0), layer_line(3.0, date="2026-01-03"),
             layer_line(2.0, commit="abc0000", quick=True), layer_line(7.0, case="Merge of 5", commit="def5678")]
    file.write_text("\n".join(lines), encoding="utf-8")
    text = table.tables(table.read([file]))
    assert text.count("### Host time") == 2 and "+14" not in text and "+2.00" not in text
    first, second = text.split("### Host time")[1:]
    assert "2026-01-02, a processor, torch 2.11.0, ComfyUI 0.33.0, commit abc1234 and def5678\n" in first
    assert "+5.00 us" in first and "+7.00 us" in first
    assert "2026-01-03" in second and "+3.00 us" in second


def test_a_goal_that_was_not_measured_once_more_stays():
    goal = {"bench": "goal", "goal": "G1", "what": "a step", "target": "at least 5", "verdict": "met", **STAMP}
    later = [goal | {"measured": "6 times"}, goal | {"measured": "", "verdict": "not asked for", "commit": "def5678"}]
    text = table.tables(later)
    assert "| 6 times | met |" in text and "def5678" not in text
    assert "| not asked for |" in table.tables(later[1:])
    elsewhere = [*later, later[1] | {"cpu": "another"}, later[1] | {"cpu": "another", "goal": "G2"}]
    text = table.tables(elsewhere)
    assert text.count("| G1 |") == 1 and "| G2 | a step | at least 5 |  | not asked for |" in text


def method_line(way: str, saving: str, seconds: float, **more) -> dict:
    return {"bench": "method", "way": way, "saving": saving, "model": "SD1.5", "size": 256, "dtype": "float32", "n": 2,
            "steps": 5, "seconds": seconds, "first_seconds": 1.5 * seconds / 4, "host": seconds / 8,
            "ratio": seconds / 4, "rows": 10, "rank": 16, "sweep": "", "bytes": 5e8, "bank_bytes": 2e7, **STAMP, **more}


def test_the_table_of_methods():
    records = [method_line("plain model", "none", 4.0), method_line("Merge", "none", 8.0),
               method_line("Merge", "guidance", 6.0), method_line("Routed", "cache", 5.0),
               method_line("Merge", "none", 80.0, rank=4, sweep="rank"), method_line("Merge", "none", 16.0, n=1),
               method_line("Merge", "none", 3.0, model="Wan", frames=2)]
    text = table.tables(records, table.OF_METHODS)
    assert "| SD1.5, 256 x 256, float32, 5 steps | 2 | plain model | 1.00 | x 1.00 | 125 | 0.500 | 10 | 0.52 |" in text
    assert "| 2 | Merge | 2.00 | x 2.00 | 250 | 1.00 | 10 | 0.52 | x 0.75 |  |  |  |" in text and "Routed" not in text
    assert "| 20.0 |" not in text and text.index("| 1 | Merge | 4.00") < text.index("| 2 | plain model")
    assert "| Wan, 256 x 256 x 2 frames, float32, 5 steps |" in text
    busy = [line | {"cpu_seconds": line["seconds"] / 2, "cpu_first_seconds": line["first_seconds"] / 2, "cpu_ratio": 3}
            for line in records]
    assert "| 2 | Merge | 1.00 | x 3.00 | 250 | 0.500 | 10 |" in table.tables(busy, table.OF_METHODS)
    unsaid = {key: value for key, value in records[0].items() if key != "first_seconds"}
    assert "| x 1.00 | 125 |  | 10 |" in table.tables([unsaid], table.OF_METHODS)
    assert not table.tables(records) and table.RESULTS.read_text(encoding="utf-8").count(table.BEGIN) == 1


def test_the_table_of_compiled_models():
    line = {"bench": "compiled", "model": "Flux", "size": 1024, "dtype": "bfloat16", "by_block": True, "n": 5, **STAMP}
    records = [line | {"way": way, "backend": backend, "seconds": seconds, "ratio": ratio, "compile_seconds": 12.0,
                       "graphs": 11} for way, backend, seconds, ratio in (
        ("plain model", "none", 0.2, 1.0), ("plain model", "inductor", 0.1, 1.0), ("Merge", "inductor", 0.15, 1.5))]
    text = table.tables(records)
    assert "with inductor" in text and "cudagraphs" not in text
    assert "| Flux, 1024 x 1024, bfloat16, by block | plain model | 0.200 (x 1.00) | 0.100 (x 1.00) | 12.0, 11" in text
    assert "| Merge of 5 |  | 0.150 (x 1.50) | 12.0, 11 |" in text


def test_the_table_of_operations():
    def line(way: str, n: int, operations: float, saving: str = "none", **more) -> dict:
        return {"bench": "operations", "model": "Wan", "size": 480, "frames": 2, "n": n, "rank": 16, "steps": 20,
                "sweep": "", "way": way, "saving": saving, "rows": 40, "operations": operations,
                "ratio": operations / 4e13, **STAMP, **more}

    records = [line("plain model", 5, 4e13), line("Merge", 5, 5e13), line("Merge", 5, 4e13, "cache"),
               line("plain model", 2, 4e13), line("Merge", 2, 4.5e13), line("Merge", 2, 3e13, "cache"),
               line("Merge", 5, 1e13, "both"), line("Merge", 5, 9e13, steps=40, sweep="steps")]
    text = table.tables(records, table.OF_METHODS)
    assert "| model | way | 2 LoRAs | 5 LoRAs | extrapolated guidance |" in text
    assert "| Wan, 480 x 480 x 2 frames, 20 steps | plain model | 40.0 (x 1.00) | 40.0 (x 1.00) |  |  |  |  |" in text
    assert "| Merge | 45.0 (x 1.12) | 50.0 (x 1.25) |  | x 0.67 / 0.80 | x 0.20 |  |" in text and "90.0" not in text
    assert "| x 0.80 |" in table.tables(records[:3], table.OF_METHODS)


def test_operations_of_a_run_with_cache_and_guidance():
    """20 steps: eight are whole, with both sides; of the others the last alone has its negative."""
    assert counted.with_guidance(20, Uniform(3, first=2), 0.25) == pytest.approx((8 * 2 + 0.25 * (2 + 11)) / 40)
    assert counted.with_guidance(20, Uniform(1), 0.25) == pytest.approx((20 + 8) / 40)


def test_tables_are_written_between_their_markers():
    readme = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    assert table.written(readme, "new") == f"before\n{table.BEGIN}\n\nnew\n\n{table.END}\nafter\n"
    assert table.written(table.written(readme, "x"), "new") == table.written(readme, "new")
    with pytest.raises(ValueError, match="lacks the lines"):
        table.written("no markers", "new")
    assert table.README.read_text(encoding="utf-8").count(table.BEGIN) == 1


def test_the_table_needs_the_standard_library_alone(tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(layer_line(5.0), encoding="utf-8")
    script = Path(table.__file__)
    done = subprocess.run([sys.executable, "-I", "-S", str(script), str(file)], capture_output=True, text=True)
    assert done.returncode == 0 and "Merge of 1" in done.stdout, done.stderr


def test_results_say_where_they_come_from(capsys):
    Results(CPU, comfyui="0.33.0", ranks=[16])("tax", tax=0.0123456, ranks=[4, 8])
    found = table.result(capsys.readouterr().out)
    assert found["bench"] == "tax" and found["tax"] == 0.01235 and found["ranks"] == [4, 8]
    assert {"date", "commit", "torch", "cpu", "comfyui"} <= set(found)


def test_arms_take_turns():
    calls = []
    found = in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, CPU)
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3}
    assert "".join(calls) in ("abbaabba", "baabbaab")
    assert all(seconds.thread >= 0 for times in found.values() for seconds in times)


def test_spread_is_the_median_between_the_quartiles():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (2.0, 3.0, 4.0) and spread([7.0]) == (7.0, 7.0, 7.0)


@pytest.mark.parametrize("name", host_time.CASES)
def test_every_case_runs(name):
    """Each case is as long as it is asked for, and its layers give what its rows say: the benchmark stops otherwise."""
    case = host_time.CASES[name]
    layouts = case.layouts(["0", "1", "2"])
    steps = [next(layouts) for _ in range(4)]
    assert len({len(rows) for rows in steps}) == 1
    assert any(not branch.is_base for rows in steps for branch in rows)
    record = host_time.bench_layer(Results(CPU), name, case, "32x32", 2, CPU)
    assert record["case"] == name and record["rows"] == len(steps[0])
    assert table.host_table([record]).count("\n") == 2


def test_a_layer_that_is_wrong_is_not_timed(monkeypatch):
    """LoRAs that do not act: the check sees it."""
    monkeypatch.setattr(host_time.RoutedForwards, "rows", lambda self, rows: nullcontext())
    with pytest.raises(SystemExit, match="Merge of 1: layer 0 is off by"):
        host_time.bench_layer(Results(CPU), "Merge of 1", host_time.CASES["Merge of 1"], "32x32", 2, CPU)


def test_k_lora_chooses_anew_in_every_step():
    layouts = host_time.CASES["K-LoRA, a choice per layer and step"].layouts([str(i) for i in range(64)])
    assert len({tuple(next(layouts)) for _ in range(50)}) == 50
