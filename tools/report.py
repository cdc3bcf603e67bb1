"""tests/REPORT.md: one page made of what the long runs found (results.py), with what was cut.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from .environments import ROOT
from .results import OUT, commit, machine, read, told

PAGE = ROOT / "tests" / "REPORT.md"
FAILURES = 40
"""Failures of a part that are listed, at most."""
RULE = "| --- | --- | --- |"
"""Below the head of a table of a part's own."""


@dataclass(frozen=True)
class Part:
    """A long run: a module in tests/, what it is about, and how many cases it has (None: as many as it finds).

    each    its cases are few, and each has a row with its own figures
    shares  processes that it has use for, None: as many as there are
    """

    module: str
    title: str
    whole: int | None = None
    each: bool = False
    shares: int | None = None


PARTS = (Part("soak", "a long night (1 000 prompts with --soak)", each=True, shares=5),
         Part("same", "the same picture again", shares=4),
         Part("inject", "faults in a run"),
         Part("mutate", "faults in the code", 60),
         Part("fuzz_files", "damaged LoRA files", 2000),
         Part("fuzz_coeffs", "damaged coefficient files", 1500, shares=2),
         Part("fuzz_api", "damaged API workflows", 700, shares=3))
"""Those ahead have the longest cases, and are begun first."""
SUITES = Part("suites", "the tests as a whole", each=True)
NORMAL = ", without --all"
"""Behind the names of suites that are the normal run's: some of the combinations, and a share on older releases."""


@dataclass(frozen=True)
class Says:
    """What the page says of a part: lines of its table, of what was cut and of what failed. `kept`: of the page as it
    was."""

    rows: list[str]
    cut: list[str]
    failed: list[str]
    kept: bool = False


def page(option: str, folder: Path = OUT, parts: Sequence[Part] = (SUITES, *PARTS), before: str = "") -> str:
    """The page, of all findings that there are; `option` is how the command was called. Of parts without findings it
    has what `before` has, the page as it was: every row names its commit."""
    found = {part: read(part.module, folder) for part in parts}
    said = {part: _found(part, lines) if lines else _said(part, before) for part, lines in found.items()}
    machines, hosts = ({line.get(key, "") for lines in found.values() for line in lines} for key in ("machine", "host"))
    if any(says.kept for says in said.values()):
        was = re.search(r"; found on (.+?); (.+?)\. What a run", before)
        machines, hosts = machines | {*was[1].split(" and ")}, hosts | {*was[2].split(", ")}
    lines = ["# What the tests found", "",
             f"Written by `python3 run.py test {option}` of what `--all` has found, on {date.today()} at commit "
             f"{commit()}; found on {' and '.join(sorted(machines - {''})) or machine()}; "
             f"{', '.join(sorted(hosts - {''})) or 'no ComfyUI'}. What a run does is said at the head of its file in "
             "`tests/`; `python3 run.py test --all --keep` goes on with what is missing here.", "",
             "| run | cases | what became of them | time | commit |", "| --- | --- | --- | --- | --- |"]
    lines += [row for part, says in said.items() if not part.each for row in says.rows]
    for part, says in said.items():
        if part.each and says.rows:
            lines += ["", _heading(part), "", "| | | commit |", RULE, *says.rows]
    lines += ["", "## What was cut", "", *([line for says in said.values() for line in says.cut] or ["Nothing."])]
    lines += ["", "## What failed", "", *([line for says in said.values() for line in says.failed] or ["Nothing."]), ""]
    return "\n".join(lines)


def _heading(part: Part) -> str:
    return f"## {part.title[0].upper()}{part.title[1:]}"


def _found(part: Part, lines: list[dict[str, Any]]) -> Says:
    rows = [f"| {line['case']}{_shared(part, [line])} | {_cell(_became(line))} | {line['commit']} |" for line in lines]
    failed = [f"* `{part.module}` {_cell(line['case'])}: {_cell(_became(line))}" for line in lines if not line["ok"]]
    return Says(rows if part.each else [_row(part, lines)], _cut(part, lines), failed[:FAILURES])


def _said(part: Part, page: str) -> Says:
    """What a page says of a part."""
    def those(start: str) -> list[str]:
        return [line for line in page.splitlines() if line.startswith(start)]

    section = page.partition(f"\n{_heading(part)}\n")[2].partition("\n## ")[0].partition(f"\n{RULE}\n")[2]
    rows = section.split("\n") if part.each else those(f"| {part.title} (`{part.module}")
    rows = [row for row in rows if row]
    if not rows:
        return Says([], [f"* {part.title} (`{part.module}`): not run."], [])
    return Says(rows, those(f"* {part.title} (`{part.module}`)"), those(f"* `{part.module}` "), kept=True)


def _became(line: dict[str, Any]) -> str:
    return line["became"] + (f": {line['error']}" if line.get("error") else "")


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())


def _row(part: Part, lines: list[dict[str, Any]]) -> str:
    asked = part.whole or max(line.get("of", 0) for line in lines)
    seconds = sum(line["seconds"] for line in lines)
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    calls = "; ".join(dict.fromkeys(f"`{part.module} {line['call']}`" for line in lines if line.get("call")))
    return (f"| {part.title} ({calls or f'`{part.module}`'}{_shared(part, lines)}) | {len(lines)} of {asked} | "
            f"{_cell(told(lines).partition(': ')[2])} | {seconds:.0f} s | {commits} |")


def _shared(part: Part, lines: list[dict[str, Any]]) -> str:
    shares = max(line.get("shares", 1) for line in lines)
    return "" if shares == 1 else ", beside others" if part.each else f", in {shares} shares"


def _cut(part: Part, lines: list[dict[str, Any]]) -> list[str]:
    """What is not whole."""
    done, asked = len(lines), part.whole or max(line.get("of", 0) for line in lines)
    if part is SUITES and all(line["case"].endswith(NORMAL) for line in lines):
        return [f"* {part.title} (`{part.module}`): the normal run alone, which takes some of the combinations, and on "
                "older releases a share of the tests of their API."]
    return [f"* {part.title} (`{part.module}`): {asked - done} of {asked} cases are missing."] if done < asked else []


def write(option: str, folder: Path = OUT, path: Path = PAGE) -> Path:
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    path.write_text(page(option, folder, before=before), encoding="utf-8")
    return path
