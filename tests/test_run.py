"""What `run.py test` runs on which ComfyUI."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from lora_ensemble.tools.comfyui import Host
from lora_ensemble.tools.commands import ROOT, Summary, deeper_runs, front_end_runs, pytest_runs
from lora_ensemble.tools.report import PARTS, SUITES, page
from lora_ensemble.tools.results import Results


def host(version: str, tools: str | None = None) -> Host:
    return Host(Path(f"/comfy/{version}"), version, Path("python"), tools and Path(tools))


def test_versions_are_numbers():
    assert host("0.33.0").number > host("0.28.0").number > host("0.3.64").number > host("unknown").number


@pytest.mark.parametrize("everything", [False, True])
def test_all_on_the_newest_and_the_api_on_the_others(everything):
    hosts = [host("0.3.64"), host("0.33.0", "/tools"), host("0.28.0")]
    first, *others = pytest_runs(Path("base"), hosts, everything, ["-k", "parity"])
    assert "tests/host" in first[1][first[1].index("--ignore"):] and "COMFYUI_UNDER_TEST" not in first[2]
    found = {Path(env["COMFYUI_UNDER_TEST"]).name: command for _, command, env in others}
    assert list(found) == ["0.33.0", "0.28.0", "0.3.64"]
    for part in ("host_api", "--one-of"):
        assert [part in command for command in found.values()] == [False, not everything, not everything]
    assert ["--crossed" in command for command in found.values()] == [not everything, False, False]
    assert all(command[-2:] == ["-k", "parity"] for command in found.values())
    assert str(Path("/tools")) in found["0.33.0"] and str(Path("/tools")) not in found["0.28.0"]
    assert all(env["OMP_NUM_THREADS"] == "1" for _, _, env in (first, *others))


def test_one_old_comfyui_is_the_newest_there_is():
    _, (title, command, _) = pytest_runs(Path("base"), [host("0.3.64")], False, [])
    assert "host_api" not in command and "ComfyUI 0.3.64" in title
    assert len(list(pytest_runs(Path("base"), [], False, []))) == 1


def test_all_that_takes_long_runs_on_the_newest():
    runs = list(deeper_runs([host("0.3.64"), host("0.33.0", "/tools")]))
    assert [title for title, _, _ in runs] == [f"{part.title} on ComfyUI 0.33.0 at /comfy/0.33.0" for part in PARTS]
    for (_, command, env), part in zip(runs, PARTS, strict=True):
        assert command[-1] == f"lora_ensemble.tests.{part.module}"
        assert (ROOT / "tests" / f"{part.module}.py").is_file() and env["COMFYUI_UNDER_TEST"].endswith("0.33.0")
    assert not list(deeper_runs([]))
    assert all(command[-1] == "--keep" for _, command, _ in deeper_runs([host("0.33.0")], keep=True))
    nights = [command for _, command, _ in deeper_runs([host("0.33.0")], night=1000) if "1000" in command]
    assert len(nights) == 1 and nights[0][-3:] == ["lora_ensemble.tests.soak", "--count", "1000"]


def test_other_front_ends_on_the_newest():
    found = [("1.45.21", Path("/fe/old")), ("1.58.1", Path("/fe/new"))]
    runs = list(front_end_runs([host("0.3.64"), host("0.33.0", "/tools")], found))
    assert [title.split(" on ")[0] for title, _, _ in runs] == ["front end 1.45.21", "front end 1.58.1"]
    for (_, command, env), (_, folder) in zip(runs, found, strict=True):
        assert Path(command[-1]).name == "test_front_end.py" and (ROOT / command[-1]).is_file()
        assert env["COMFYUI_UNDER_TEST"].endswith("0.33.0") and env["FRONT_END_UNDER_TEST"] == str(folder)
    assert not list(front_end_runs([], found))


@pytest.mark.parametrize("code", [0, 3])
def test_the_page_has_the_last_line_of_each_suite_and_what_passed_is_not_run_again(tmp_path, code):
    program = f"print('a' * 9)\nprint('== 3 passed, 1 | 2 ==')\nprint()\nraise SystemExit({code})"
    for again in (False, True):
        summary = Summary(results=Results(SUITES.module, ("test_run.py",), folder=tmp_path))
        assert summary.run("some tests at /comfy/0.33.0", [sys.executable, "-c", program]) == (code == 0)
        assert summary.lines[0].endswith("before") == (again and code == 0)
        assert summary.failed == (code != 0)
    text = page("--all", tmp_path)
    failed = " (FAILED, exit 3)" if code else ""
    assert f"| some tests | 3 passed, 1 / 2{failed} |" in text and "/comfy" not in text
    assert "run.py test --all" in text and (f"`suites` some tests: 3 passed, 1 / 2{failed}" in text) == bool(code)
