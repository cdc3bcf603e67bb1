"""What the long runs of the tests found: one JSON line per case, so that a run that was stopped goes on where it was.

A line holds for the code that it was found with: after a change of the pack or of the run's own files its case is made
again, unless --keep says that older findings count as well. tests/REPORT.md is made of these lines. Processes that take
a share of the cases each (--share) write a file each; what reads them joins all files of a part.

Standard library only.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .environments import ROOT, say

OUT = ROOT / "tests" / "out"
CODE = ("kernels", "methods", "engine", "host", "nodes", "testbed")
EVERYTHING = "*"
MADE = {"out", "demo", "__pycache__"}
"""Folders of what is made here."""
Found = tuple[str, dict[str, Any]]
"""What became of a case in a few words that others share, and more to be kept of it."""
TOLD = 50
"""Cases between two lines that say how far a run is."""
LONGEST = 600
"""Characters that are kept of an error."""


@cache
def fingerprint(*tests: str) -> str:
    """Of all that the pack and those files of tests/ are made of, or of the whole folder for EVERYTHING: a change makes
    earlier findings old."""
    if EVERYTHING in tests:
        paths = {path for path in ROOT.rglob("*") if path.is_file() and path.name != "REPORT.md" and not any(
            part.startswith(".") or part in MADE for part in path.relative_to(ROOT).parts)}
    else:
        paths = {path for folder in CODE for path in (ROOT / folder).rglob("*.py")} | {ROOT / "__init__.py"}
        paths |= {path for pattern in tests for path in (ROOT / "tests").glob(pattern)}
    whole = hashlib.sha256()
    for path in sorted(paths):
        whole.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:12]


def call() -> str:
    """How the run was started, as far as it differs from the defaults."""
    given, out = list(sys.argv[1:]), []
    while given:
        argument = given.pop(0)
        if argument in ("--out", "--share", "--minutes"):
            given[:1] = []
        elif argument != "--keep":
            out.append(argument)
    return " ".join(out)


@cache
def commit() -> str:
    """The commit of this folder, with a + where files differ from it; of a copy that has not its own history what
    LORA_ENSEMBLE_COMMIT says."""
    if told := os.environ.get("LORA_ENSEMBLE_COMMIT"):
        return told
    try:
        said = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"], cwd=ROOT,
                              capture_output=True, text=True)
    except OSError:
        return "unknown"
    return said.stdout.strip() or "unknown"


def machine() -> str:
    """What a finding was made on, and with how many of its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} with {cores} cores, {platform.system()}, Python {platform.python_version()}"


def host_version() -> str:
    """Of the ComfyUI under test, by name."""
    folder = os.environ.get("COMFYUI_UNDER_TEST")
    if not folder:
        return "no ComfyUI"
    try:
        text = (Path(folder).expanduser() / "comfyui_version.py").read_text(encoding="utf-8")
        return "ComfyUI " + text.partition('__version__ = "')[2].partition('"')[0]
    except OSError:
        return "ComfyUI"


class TimeOver(Exception):
    """A case that was begun and has no time to end: it is not found out."""


class Share(NamedTuple):
    """One of `whole` parts of the cases, counted from 1."""

    which: int = 1
    whole: int = 1

    @classmethod
    def read(cls, text: str) -> Share:
        """Of `K/N`. Raises ValueError."""
        which, whole = text.split("/")
        share = cls(int(which), int(whole))
        if not 1 <= share.which <= share.whole:
            raise ValueError(text)
        return share

    def of(self, cases: Iterable[str], together: Callable[[str], Hashable] = lambda case: case) -> list[str]:
        """Every `whole`th of the cases; those of which `together` says the same stay in one share."""
        groups: dict[Hashable, list[str]] = {}
        for case in cases:
            groups.setdefault(together(case), []).append(case)
        mine = {case for group in list(groups.values())[self.which - 1::self.whole] for case in group}
        return [case for case in cases if case in mine]


@dataclass
class Results:
    """The findings of one part, in a file below `folder` that grows by a line per case.

    part    the module in tests/ that makes them
    tests   the files there that its findings depend on, as patterns
    keep    findings of other code count too
    share   of the cases, that this process makes
    ends    when no further case is begun, by time.monotonic()
    """

    part: str
    tests: Sequence[str] = ()
    keep: bool = False
    folder: Path = OUT
    share: Share = Share()
    ends: float = math.inf
    lines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.code = fingerprint(*(self.tests or (f"{self.part}.py",)))
        self.lines = {line["case"]: line for line in read(self.part, self.folder)
                      if self.keep or line["code"] == self.code}

    @classmethod
    def asked(cls, part: str, tests: Sequence[str], chosen: argparse.Namespace) -> Results:
        """As the command line says that `options` has read."""
        return cls(part, tests, chosen.keep, chosen.out, chosen.share, chosen.ends)

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def done(self, case: str) -> bool:
        """Whether there is a finding, other than that it failed."""
        return self.lines.get(case, {}).get("ok", False)

    def add(self, case: str, became: str, ok: bool, seconds: float, **more: Any) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        self.lines[case] = line = {"case": case, "became": became, "ok": ok, "seconds": round(seconds, 3), **more,
                                   "call": call(), "code": self.code, "commit": commit(), "host": host_version(),
                                   "machine": machine(), "when": now}
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("\n" if file.tell() else "") + json.dumps(line))  # a line that a stop cut short ends here

    @property
    def _path(self) -> Path:
        name = self.part if self.share.whole == 1 else f"{self.part}.{self.share.which}-of-{self.share.whole}"
        return self.folder / f"{name}.jsonl"

    def judge(self, cases: Iterable[str], check: Callable[[str], Found],
              after: Callable[[list[str]], None] = lambda cases: None,
              together: Callable[[str], Hashable] = lambda case: case) -> int:
        """Every case of the share that is not done yet, through `check`; an exception is what it may not become.
        Returns the exit code: 0 where all of the share are done. `after` is called between cases, with those since its
        last call, and may fail them by an AssertionError. Cases of which `together` says the same are made by one
        process.
        """
        started, since = time.monotonic(), []
        every = list(cases)
        cases = self.share.of(every, together)
        shared = {} if self.share.whole == 1 else {"shares": self.share.whole}
        left = [case for case in cases if not self.done(case)]
        if len(left) < len(cases):
            say(f"{len(cases) - len(left)} of {len(cases)} are done")
        for number, case in enumerate(left, 1):
            began = time.monotonic()
            if self.left() <= 0:
                break
            try:
                became, more = check(case)
                ok = True
            except TimeOver:
                break
            except Exception as error:
                became, more, ok = _failure(error), {"error": f"{error}"[:LONGEST]}, False
                say(f"{case}: {became}: {error}")
            self.add(case, became, ok, time.monotonic() - began, of=len(every), **shared, **more)
            since.append(case)
            if number % TOLD == 0 or number == len(left):
                self._after(after, since)
                since = []
                say(f"{number} of {len(left)}: {self.told(cases)}, {time.monotonic() - started:.0f} s")
        say(self.told(cases))
        return int(any(not self.done(case) for case in cases))

    def _after(self, after: Callable[[list[str]], None], since: list[str]) -> None:
        try:
            after(since)
        except AssertionError as error:
            say(f"one of {since}: {error}")
            self.add(since[-1], "what comes after it is harmed", False, 0.0, error=f"{error}"[:LONGEST], since=since)

    def told(self, cases: Iterable[str] | None = None) -> str:
        """How many of the cases became what."""
        return told([self.lines[case] for case in (self.lines if cases is None else cases) if case in self.lines])


def _failure(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"FAILED: {type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"


def told(lines: Sequence[dict[str, Any]]) -> str:
    """`n: became what, how often; m failed` of findings."""
    seen = collections.Counter(line["became"] for line in lines if line["ok"])
    parts = ", ".join(f"{count} {became}" for became, count in sorted(seen.items(), key=lambda item: -item[1]))
    return f"{len(lines)}: {parts or 'none'}; {sum(not line['ok'] for line in lines)} failed"


def read(part: str, folder: Path = OUT) -> list[dict[str, Any]]:
    """The last finding of every case, of whatever code, from all files of a part; a line that a stop has cut short is
    passed over."""
    found = []
    for path in (folder / f"{part}.jsonl", *sorted(folder.glob(f"{part}.*-of-*.jsonl"))):
        for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
    return list({line["case"]: line for line in sorted(found, key=lambda line: line.get("when", ""))}.values())


def options(description: str | None, count: int | None = None) -> argparse.ArgumentParser:
    """What every long run takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if count is not None:
        parser.add_argument("--count", type=int, default=count, help=f"cases, {count} of them by default")
        parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--keep", action="store_true", help="findings of earlier code count as well")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the findings")
    parser.add_argument("--minutes", dest="ends", type=lambda text: time.monotonic() + 60 * float(text),
                        default=math.inf, help="begin no case after so long")
    parser.add_argument("--share", type=Share.read, default=Share(), metavar="K/N",
                        help="make the Kth of N shares of the cases alone")
    return parser


def seeds(chosen: argparse.Namespace) -> list[str]:
    return [str(seed) for seed in range(chosen.first, chosen.first + chosen.count)]

