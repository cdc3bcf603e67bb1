"""The commands of run.py: demo, test and bench."""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .comfyui import COMFYUI_TAG, Host, find_hosts, prepare
from .environments import ROOT, Stop, child_env, front_end, say
from .report import NORMAL, PARTS, SUITES, write
from .results import EVERYTHING, Results

PYTHONS = ((3, 10), (3, 14))  # oldest and newest version that the pinned torch has wheels for
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For models so small that more threads wait for each other longer than they compute."""
NIGHT = 1000
"""Prompts in each cache mode with --soak."""
WORKERS = min(os.cpu_count() or 1, 8)
"""Test processes at once, if --jobs says nothing. Each takes 1 to 2 GB, and from eight on the longest file of tests
sets the time of the suite."""

CROSSED = 9
"""On the newest release tests of all combinations of several things run one of so many, or as few as leave each thing a
case; those in `SHOWN_ELSEWHERE` of tests/shares.py a share of their own, there and without ComfyUI; all with --all."""
SHARE = 8
"""On older releases each parametrised test runs one of so many of its cases: others on each, all of them with --all."""


@dataclass
class Summary:
    """What was run, what was not and why; `close` prints it and gives the exit code.

    results   where it is given: what has passed with this code is not run again, and the last line of what is run is
              kept
    part      of the whole that is run, which no finding of the whole is to be taken for
    """

    lines: list[str] = field(default_factory=list)
    failed: bool = False
    results: Results | None = None
    part: str = ""

    def run(self, title: str, command: Sequence[str | Path], env: dict[str, str] | None = None) -> bool:
        say(f"\n=== {title}")
        case = title.partition(" at ")[0] + self.part
        if self.results is not None and self.results.done(case):
            self.lines.append(f"  ok     {title}, before")
            return True
        started = time.monotonic()
        command, env = [str(part) for part in command], env or child_env()
        if self.results is None:
            code = subprocess.run(command, cwd=ROOT, env=env).returncode
        else:
            code, last = _told(command, env)
            became = f"{last.strip(' =')}{'' if code == 0 else f' (FAILED, exit {code})'}"
            self.results.add(case, became, code == 0, time.monotonic() - started)
        self._ended(title, code, started)
        return code == 0

    def run_beside(self, runs: Iterable[tuple[str, Sequence[str], dict[str, str]]], jobs: int, ends: float = math.inf
                   ) -> None:
        """(title, command, environment) of long runs, `jobs` at a time, those ahead first; each is told how many
        minutes are left until `ends`, and none is begun then."""
        def one(title: str, command: Sequence[str], env: dict[str, str]) -> None:
            started = time.monotonic()
            minutes = [] if ends == math.inf else ["--minutes", f"{(ends - started) / 60:.3f}"]
            if started >= ends:
                self.lines.append(f"  NOT RUN {title}: the time is over")
                self.failed = True
                return
            say(f"\n=== {title}")
            code, _ = _told([*command, *minutes], env, "" if jobs == 1 else f"[{title.partition(' on ')[0]}] ")
            self._ended(title, code, started)

        with ThreadPoolExecutor(jobs) as pool:
            waiting = [pool.submit(one, *run) for run in runs]
            try:
                for future in waiting:
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)  # where somebody stops it, what has begun is stopped as well

    def _ended(self, title: str, code: int, started: float) -> None:
        state = "ok    " if code == 0 else f"FAILED (exit {code})"
        self.lines.append(f"  {state} {title}, {time.monotonic() - started:.0f} s")
        self.failed |= code != 0

    def close(self, base: Path, hosts: Sequence[Host]) -> int:
        say("\nSummary")
        for line in self.lines:
            say(line)
        say(f"  base   {base}")
        for host in hosts:
            say(f"  host   {host}: {host.note}, {host.python}")
        if not hosts:
            say("  NOT RUN: everything that needs ComfyUI, for none was used. Name one with --comfyui PATH or")
            say("           COMFYUI_PATH, or let --clone-comfyui fetch the official release.")
        return int(self.failed)


def _told(command: Sequence[str], env: dict[str, str], head: str = "") -> tuple[int, str]:
    """(exit code, last line that is not empty) of a command whose lines are shown as they come, `head` before each."""
    last = ""
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          encoding="utf-8", errors="replace") as process:
        for line in process.stdout:
            say(head + line.rstrip())
            last = line.strip() or last
    return process.returncode, last


def with_pack(python: Path, *arguments: str | Path, tools: Path | None = None) -> list[str]:
    """The command that runs a module in another interpreter, with the pack importable."""
    return [str(part) for part in (python, ROOT / "run.py", "_with", tools or "-", *arguments)]


def pytest_runs(base: Path, hosts: Sequence[Host], everything: bool, more: Sequence[str], jobs: int = WORKERS
                ) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """(title, command, environment) of every run of pytest: the newest ComfyUI first, with all tests; on older ones
    a share of those of its API, or all as well. `more` goes to pytest."""
    def pytest(processes: int) -> list[str]:
        """The tests of one file share models and references, and stay in one process."""
        return ["pytest", "-n", str(processes), "--dist", "loadfile"]

    normal = [] if everything else ["--crossed", str(CROSSED)]
    yield ("tests without ComfyUI", with_pack(base, *pytest(jobs), "tests", "--ignore", "tests/host", *normal, *more),
           child_env(**ONE_THREAD))
    latest = max((host.number for host in hosts), default=())
    for host in sorted(hosts, key=lambda host: host.number, reverse=True):
        whole = everything or host.number == latest
        marked = normal if whole else ["-m", "host_api", "--one-of", str(SHARE)]
        # A share is so small that beside another run a second process would take longer to start than it saves.
        processes = jobs if whole or at_once(jobs) == 1 else 1
        yield (f"{'tests' if whole else 'tests of the API'} on {host}",
               with_pack(host.python, *pytest(processes), "tests/host", *marked, *more, tools=host.tools),
               host.env(**ONE_THREAD))


def at_once(jobs: int) -> int:
    """How many runs of pytest there are at once, each with `jobs` processes: two on two cores, where one computes while
    the other waits for servers, browsers and its last file. On more cores the memory would not be there."""
    return 2 if jobs == 2 else 1


def newest(hosts: Sequence[Host]) -> list[Host]:
    """The newest release alone; of several folders of it the one that was named, or found, first."""
    return [max(hosts, key=lambda host: host.number)] if hosts else []


def deeper_runs(hosts: Sequence[Host], keep: bool = False, night: int | None = None, jobs: int = 1
                ) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """(title, command, environment) of every run that is longer than a test may be, on the newest ComfyUI.

    night   prompts of the soak, None: as many as it has by itself
    jobs    processes that each part is shared out to, or as many as it has use for
    """
    for host in newest(hosts):
        for part in PARTS:
            arguments = [f"lora_ensemble.tests.{part.module}", *(["--keep"] if keep else [])]
            if night and part.module == "soak":
                arguments += ["--count", str(night)]
            whole = min(jobs, part.shares or jobs)
            for share in range(1, whole + 1):
                shared = ["--share", f"{share}/{whole}"] if whole > 1 else []
                yield (f"{part.title}{f', {share} of {whole}' if shared else ''} on {host}",
                       with_pack(host.python, *arguments, *shared, tools=host.tools), host.env(**ONE_THREAD))


FRONT_ENDS = ("1.45.21", "")
"""Releases of the front end that --all opens the templates in, beside the installed one: that of ComfyUI 0.28, and the
newest."""


def front_end_runs(hosts: Sequence[Host], found: Sequence[tuple[str, Path]]
                   ) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """(title, command, environment) for each (version, folder) of a front end, on the newest ComfyUI."""
    for host in newest(hosts):
        for version, folder in found:
            yield (f"front end {version} on {host}",
                   with_pack(host.python, "pytest", "tests/host/test_front_end.py", "tests/host/test_panel.py",
                             tools=host.tools),
                   host.env(**ONE_THREAD, FRONT_END_UNDER_TEST=str(folder)))


def run_test(options: argparse.Namespace) -> int:
    if options.page:
        say(f"written: {write('--page')}")
        return 0
    ends = time.monotonic() + 60 * options.minutes
    base, hosts = as_they_are(options) if options.as_it_is else prepare(options)
    long = options.all or options.report
    whole = (long or options.record) and not options.rest  # chosen tests are no suite
    summary = Summary(results=Results(SUITES.module, (EVERYTHING,), options.keep) if whole else None,
                      part="" if options.all else NORMAL)
    runs = [] if options.report else [*pytest_runs(base, hosts, options.all, options.rest, options.jobs)]
    if options.as_it_is:
        summary.lines.append("  NOT RUN with --as-it-is: ruff, other front ends")
    elif not options.report:
        summary.run("ruff", [base, "-m", "ruff", "check", "."])
    if options.all and hosts and not options.as_it_is:
        runs += front_end_runs(hosts, [front_end(base, version) for version in FRONT_ENDS])
    try:
        if (together := at_once(options.jobs)) > 1 and summary.results is None and not options.rest:
            summary.run_beside(runs, together)
        else:
            for title, command, env in runs:
                summary.run(title, command, env)
        summary.results = None  # the long runs keep their own
        if long:
            night = NIGHT if options.soak else None
            summary.run_beside(deeper_runs(hosts, options.keep, night, options.jobs), options.jobs, ends)
    finally:
        if long:  # also of what there is when somebody stops it
            say(f"\nwritten: {write('--all' if options.all else '--report')}")
    if hosts and not options.all:
        summary.lines += ["  NOT RUN but with --all: of tests that cross several things what leaves each thing a case, "
                          "and of",
                          "           some what other cases show; on older releases of a test's cases all but one of "
                          f"{SHARE},",
                          "           and what does not touch their API"]
    return summary.close(base, hosts)


def as_they_are(options: argparse.Namespace) -> tuple[Path, list[Host]]:
    """This interpreter for everything, with what it has."""
    base, hosts = Path(sys.executable), find_hosts(options.comfyui)
    for host in hosts:
        host.python, host.note, host.as_it_is = base, "this interpreter as it is", True
    return base, hosts


def run_demo(options: argparse.Namespace) -> int:
    base, hosts = prepare(options)
    out = ROOT / "demo" / "out"
    out.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    command = with_pack(base, "lora_ensemble.testbed.demo", out)
    summary.run("demo, standalone sampler", command, child_env(**ONE_THREAD))
    for host in hosts:
        command = with_pack(host.python, "lora_ensemble.tests.host_demo", out, tools=host.tools)
        summary.run(f"demo on {host}", command, host.env(**ONE_THREAD))
    code = summary.close(base, hosts)
    say(f"  files  {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return code


def run_bench(options: argparse.Namespace) -> int:
    """The goals of speed on the newest ComfyUI that was named or found; with --sets also quality."""
    summary, env = Summary(), None
    if options.as_it_is:
        base, hosts = as_they_are(options)
        env = dict(os.environ)
    else:
        base, hosts = prepare(options)
    hosts = newest(hosts)
    if options.sets:
        quality = ["lora_ensemble.benchmarks.quality", "--sets", options.sets, "--device", options.device]
        summary.run("quality", with_pack(base, *quality), env)
    for host in hosts:
        goals = with_pack(host.python, "lora_ensemble.benchmarks.goals", "--device", options.device, *options.rest)
        summary.run(f"speed on {host}", goals, host.env())
    return summary.close(base, hosts)


COMMANDS = {"demo": run_demo, "test": run_test, "bench": run_bench}


def main(arguments: Sequence[str], description: str) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="run.py", description=description,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--comfyui", metavar="PATH", nargs="+", action="extend", default=[], help="the ComfyUI to use")
    parser.add_argument("--clone-comfyui", action="store_true", help=f"fetch ComfyUI {COMFYUI_TAG} and use it")
    parser.add_argument("--without-comfyui", action="store_true", help="use none, even if there is one")
    parser.add_argument("--all", action="store_true", help="test: every test on every ComfyUI, in three\n"
                        "front ends, with all damaged files, workflows and faults;\nhours; writes tests/REPORT.md; "
                        "goes on where it was stopped")
    parser.add_argument("--report", action="store_true", help="test: of --all the long runs alone, and the page")
    parser.add_argument("--page", action="store_true", help="test: run nothing, write the page of what has been found")
    parser.add_argument("--record", action="store_true", help="test: keep what the tests come to, for the page")
    parser.add_argument("--soak", action="store_true", help=f"test: with --all or --report, {NIGHT} prompts in each\n"
                        "of ComfyUI's cache modes")
    parser.add_argument("--keep", action="store_true", help="test: what --all found with earlier code counts, too")
    parser.add_argument("--jobs", type=int, default=WORKERS, help="test: processes at once, by default as many as\n"
                        "there are cores, eight at most; each takes 1 to 2 GB")
    parser.add_argument("--minutes", type=float, default=math.inf, help="test: after so long no long run and no\n"
                        "case of one is begun")
    parser.add_argument("--sets", help="bench: also the quality of so many LoRA sets (480 are all)")
    parser.add_argument("--as-it-is", action="store_true", help="test, bench: with this interpreter, making no\n"
                        "environment")
    parser.add_argument("--device", default="cpu", help="bench: cpu (default) or cuda")
    options, options.rest = parser.parse_known_args(arguments)
    if options.rest and options.command == "demo":
        parser.error(f"unknown: {' '.join(options.rest)}")
    try:
        if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
            here, first, last = ("%d.%d" % version for version in (sys.version_info[:2], *PYTHONS))
            raise Stop(f"Python {here} has no wheels of the pinned torch; use one from {first} to {last}.")
        return COMMANDS[options.command](options)
    except Stop as stop:
        sys.exit(f"\n{stop}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
