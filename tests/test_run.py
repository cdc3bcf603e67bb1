"""What `run.py test` runs on which ComfyUI."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from lora_ensemble.tools import commands
from lora_ensemble.tools.comfyui import Host
from lora_ensemble.tools.commands import ROOT, Summary, deeper_runs, front_end_runs, newest, pytest_runs
from lora_ensemble.tools.environments import child_env
from lora_ensemble.tools.report import NORMAL, PARTS, SUITES, page
from lora_ensemble.tools.results import Results


def host(version: str, tools: str | None = None) -> Host:
    return Host(Path(f"/comfy/{version}"), version, Path("python"), tools and Path(tools))


def test_versions_are_numbers():
    assert host("0.33.0").number > host("0.28.0").number > host("0.3.64").number > host("unknown").number


def test_of_two_folders_of_the_newest_the_first_is_used():
    named, found, old = host("0.33.0"), host("0.33.0"), host("0.3.64")
    assert newest([old, named, found])[0] is named and newest([]) == []
    named.path = Path("/named/0.33.0")
    assert {env["COMFYUI_UNDER_TEST"] for _, _, env in deeper_runs([named, found, old])} == {str(named.path)}


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
    assert ("--crossed" in first[1]) == (not everything)
    assert all(command[-2:] == ["-k", "parity"] for command in found.values())
    assert str(Path("/tools")) in found["0.33.0"] and str(Path("/tools")) not in found["0.28.0"]
    assert all(env["OMP_NUM_THREADS"] == "1" for _, _, env in (first, *others))


@pytest.mark.parametrize("jobs", [1, 2, 4])
@pytest.mark.parametrize("everything", [False, True])
def test_a_share_beside_another_run_has_one_process(everything, jobs):
    runs = pytest_runs(Path("base"), [host("0.3.64"), host("0.33.0")], everything, [], jobs)
    assert [command[command.index("-n") + 1] for _, command, _ in runs] == [
        str(jobs), str(jobs), str(1 if jobs == 2 and not everything else jobs)]


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


def test_long_runs_are_shared_out_to_as_many_processes_as_they_have_use_for():
    shares: dict[str, list[str]] = {}
    for _, command, _ in deeper_runs([host("0.33.0")], night=1000, jobs=12):
        module = next(part for part in command if part.startswith("lora_ensemble.tests."))
        shares.setdefault(module.rpartition(".")[2], []).append(command[command.index("--share") + 1])
    assert {name: len(some) for name, some in shares.items()} == {
        part.module: min(part.shares or 12, 12) for part in PARTS}
    assert shares["inject"] == [f"{share}/12" for share in range(1, 13)]
    assert all("--share" not in command for _, command, _ in deeper_runs([host("0.33.0")], jobs=1))
    titles = [title for title, _, _ in deeper_runs([host("0.33.0")], jobs=2)]
    assert len(titles) == len(set(titles)) == 2 * len(PARTS)


def test_processes_side_by_side(tmp_path):
    """Two that wait for each other end only beside each other; one that fails fails the whole."""
    program = ("import pathlib, sys, time\nmine, other = map(pathlib.Path, sys.argv[1:3])\nmine.touch()\n"
               "for _ in range(600):\n    if other.exists(): break\n    time.sleep(0.05)\nelse: sys.exit(1)\n"
               "sys.exit(3 if mine.name == 'b' else 0)")
    ways = [tmp_path / "a", tmp_path / "b"]
    summary = Summary()
    summary.run_beside([(f"{one.name} on x", [sys.executable, "-c", program, str(one), str(other)], dict(os.environ))
                        for one, other in (ways, ways[::-1])], jobs=2)
    assert summary.failed
    assert sorted(line.split(" on")[0] for line in summary.lines) == ["  FAILED (exit 3) b", "  ok     a"]


@pytest.mark.parametrize(("arguments", "beside"), [
    (["--jobs", "2"], [2]), (["--jobs", "1"], []), (["--jobs", "4"], []), (["--jobs", "2", "-k", "parity"], []),
    (["--jobs", "2", "--record"], [])])
def test_on_two_cores_two_releases_are_tested_at_once(arguments, beside, monkeypatch):
    """Each run once, in either way; those with chosen tests one after the other, for their lines are read, and those
    whose lines are kept."""
    began, together = [], []
    monkeypatch.setattr(commands, "prepare", lambda options: (Path("base"), [host("0.33.0"), host("0.28.0")]))
    monkeypatch.setattr(Summary, "run", lambda self, title, command, env=None: began.append(title))
    monkeypatch.setattr(Summary, "run_beside", lambda self, runs, jobs, ends=0: (
        together.append(jobs), began.extend(title for title, *_ in runs)))
    assert commands.main(["test", *arguments], "") == 0
    assert together == beside and len(began) == len(set(began)) == 4


def test_child_processes_keep_what_python_compiles(monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert "PYTHONDONTWRITEBYTECODE" not in child_env() and child_env()["PATH"] == os.environ["PATH"]


def test_no_process_is_begun_when_the_time_is_over(tmp_path):
    summary, program = Summary(), f"import sys; open({str(tmp_path / 'told')!r}, 'w').write(' '.join(sys.argv[1:]))"
    runs = [("some on x", [sys.executable, "-c", program], dict(os.environ))]
    summary.run_beside(runs, 1, time.monotonic())
    assert summary.failed and summary.lines == ["  NOT RUN some on x: the time is over"] and not [*tmp_path.iterdir()]
    summary.run_beside(runs, 1, time.monotonic() + 120)
    name, minutes = (tmp_path / "told").read_text().split()
    assert name == "--minutes" and 1.9 < float(minutes) <= 2


def test_an_interpreter_as_it_is_keeps_the_callers_paths(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    one = host("0.33.0")
    assert "PYTHONPATH" not in one.env()
    one.as_it_is = True
    assert one.env(OMP_NUM_THREADS="1").items() >= {
        "PYTHONPATH": "/somewhere", "OMP_NUM_THREADS": "1", "COMFYUI_UNDER_TEST": str(one.path)}.items()


def test_the_demo_takes_one_thread_everywhere_and_shows_what_it_does_at_once(monkeypatch, tmp_path):
    """More threads spin on a machine that has other work; a pipe would keep the lines back."""
    ran = []
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    monkeypatch.setattr(commands, "prepare", lambda options: (Path("python"), [host("0.33.0")]))
    monkeypatch.setattr(Summary, "run", lambda self, title, command, env: ran.append((title, env)))
    monkeypatch.setattr(Summary, "close", lambda self, base, hosts: 0)
    assert commands.run_demo(None) == 0
    assert len(ran) == 2 and all(env["OMP_NUM_THREADS"] == env["PYTHONUNBUFFERED"] == "1" for _, env in ran)


def test_other_front_ends_on_the_newest():
    found = [("1.45.21", Path("/fe/old")), ("1.58.1", Path("/fe/new"))]
    runs = list(front_end_runs([host("0.3.64"), host("0.33.0", "/tools")], found))
    assert [title.split(" on ")[0] for title, _, _ in runs] == ["front end 1.45.21", "front end 1.58.1"]
    for (_, command, env), (_, folder) in zip(runs, found, strict=True):
        files = [Path(part) for part in command if part.endswith(".py") and part.startswith("tests/")]
        assert [path.name for path in files] == ["test_front_end.py", "test_panel.py"]
        assert all((ROOT / path).is_file() for path in files)
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


def test_the_normal_run_is_kept_by_its_name_and_stands_for_no_other(tmp_path):
    def run(part: str) -> Summary:
        summary = Summary(results=Results(SUITES.module, ("test_run.py",), folder=tmp_path), part=part)
        summary.run("some tests at /comfy/0.33.0", [sys.executable, "-c", "print('3 passed')"])
        return summary

    assert not run(NORMAL).lines[0].endswith("before") and run(NORMAL).lines[0].endswith("before")
    text = page("--page", tmp_path)
    assert f"| some tests{NORMAL} | 3 passed |" in text and "the normal run alone" in text
    assert not run("").lines[0].endswith("before")
    assert "the normal run alone" not in page("--page", tmp_path)


@pytest.mark.parametrize(("options", "kept"), [([], None), (["--record"], NORMAL), (["--record", "-k", "one"], None),
                                               (["--all"], "")])
def test_which_calls_keep_what_the_tests_come_to(options, kept, monkeypatch):
    found = []
    monkeypatch.setattr(commands, "prepare", lambda chosen: (Path(sys.executable), []))
    monkeypatch.setattr(commands, "write", lambda option: "nowhere")
    monkeypatch.setattr(Summary, "run", lambda self, *_: found.append(None if self.results is None else self.part))
    monkeypatch.setattr(Summary, "run_beside", lambda *_: None)
    commands.main(["test", "--jobs", "1", *options], "")
    assert set(found) == {kept} and len(found) == 2  # ruff, and the tests without ComfyUI
