"""Faults put into the code from a seed, and whether the tests see them.

    COMFYUI_UNDER_TEST=PATH python run.py _with - lora_ensemble.tests.mutate --count 60

Each fault is one small change of one line of kernels, methods, engine or host: a comparison turned, a sign, a constant
off by one, a condition that always holds, a statement left out. It is made in a copy of this folder, where the tests
run that import the changed file, the nearest first; what fails there must pass without it. A fault that no test sees is
a gap, unless it changes nothing that could be seen: those that were shown to be so are in EQUIVALENT, with the reason.
"""

from __future__ import annotations

import ast
import collections
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..tools.results import Found, Results, TimeOver, options, say

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("kernels", "methods", "engine", "host")
TURNED = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
          ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in"}
SIGNS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*"}
SWAPPED = {"min": "max", "max": "min", "any": "all", "all": "any"}
SAID = {"raise", "warning", "info", "debug", "tell", "_tell", "say", "append"}
"""Statements that only say something are not left out."""
VERDICTS = {True: "seen  ", False: "MISSED", None: "slow  "}
ALIKE, NEAREST, SLOW = 4, 3, ("server", "front_end")
WORD = re.compile(r"\w{4,}")
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
"""What pytest says of a test."""
EQUIVALENT: dict[tuple[str, str, str, str], str] = {
    ("methods/guidance/calibration.py", "self.gram = torch.zeros(0, 0, dtype=torch.float64)", "0", "1"):
        "an empty matrix has no number in it whatever its other side is, and the first paths replace it as a whole",
    ("engine/compiled.py", '_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []',
     'hasattr(torch.Tag, "cudagraph_unsafe")', "True"): "every torch that the tests run on has the tag",
}
"""(file, its line, what stood there, what stands there) -> why nobody could see a difference."""


class Missed(AssertionError):
    """A fault that no test sees."""


@dataclass(frozen=True)
class Fault:
    """A change of a file: `start` to `end` of its text become `new`; `line` and `column` are where it stands.

    text     of that line
    number   how many of the same faults in lines of the same text come before it in the file: so a fault has one name,
             and another where its line is another one, whatever changes around it
    """

    path: Path
    start: int
    end: int
    old: str
    new: str
    line: int
    column: int
    text: str = ""
    number: int = 0

    def __str__(self) -> str:
        return self._told(f":{self.line}:{self.column}")

    @property
    def name(self) -> str:
        return self._told(f" {self.text[:100]}{f' ({self.number + 1})' if self.number else ''}")

    def _told(self, where: str) -> str:
        old, new = (" ".join(text.split())[:60] for text in (self.old, self.new or "(left out)"))
        return f"{_name(self.path, ROOT)}{where}: {old} -> {new}"

    @property
    def key(self) -> tuple[str, str, str]:
        return _name(self.path, ROOT), " ".join(self.old.split()), " ".join(self.new.split())

    @property
    def at(self) -> tuple[str, str, str, str]:
        """The same, with the line that it begins in."""
        name, old, new = self.key
        return name, self.text, old, new


@functools.cache
def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def faults(path: Path) -> list[Fault]:
    """All faults that are made in a file."""
    text = path.read_text(encoding="utf-8")
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = text.splitlines()

    def place(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def span(node: ast.AST) -> tuple[int, int]:
        return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)

    out, before = [], collections.Counter()
    for node, (start, end, new) in _changes(ast.parse(text), span, text):
        fault = Fault(path, start, end, text[start:end], new, node.lineno, start - starts[node.lineno - 1] + 1,
                      lines[node.lineno - 1].strip())
        out.append(replace(fault, number=before[fault.at]))
        before[fault.at] += 1
    return out


def _changes(tree: ast.AST, span, text: str) -> Iterator[tuple[ast.AST, tuple[int, int, str]]]:
    silent = _said(tree)
    for node in ast.walk(tree):
        if id(node) in silent:
            continue
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in TURNED:
            yield node, (span(node.left)[1], span(node.comparators[0])[0], f" {TURNED[type(node.ops[0])]} ")
        elif isinstance(node, ast.BinOp) and type(node.op) in SIGNS and not isinstance(node.left, ast.JoinedStr):
            between = span(node.left)[1], span(node.right)[0]
            if not set("()") & set(text[slice(*between)]):
                yield node, (*between, f" {SIGNS[type(node.op)]} ")
        elif isinstance(node, ast.BoolOp):
            between = span(node.values[0])[1], span(node.values[1])[0]
            if not set("()") & set(text[slice(*between)]):
                yield node, (*between, " or " if isinstance(node.op, ast.And) else " and ")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
            yield node, (span(node)[0], span(node.operand)[0], "")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            new = str(not node.value) if isinstance(node.value, bool) else str(node.value + 1)
            yield node, (*span(node), new)
        elif isinstance(node, ast.If | ast.IfExp):
            yield node, (*span(node.test), "True")
            yield node, (*span(node.test), "False")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SWAPPED:
            yield node, (*span(node.func), SWAPPED[node.func.id])
        elif isinstance(node, ast.AugAssign) or isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant):
            yield node, (*span(node), "pass")


def _said(tree: ast.AST) -> set[int]:
    """Nodes of annotations, decorators, imports and messages: what no result depends on."""
    silent: set[int] = set()

    def all_of(node: ast.AST | None) -> None:
        if node is not None:
            silent.update(id(part) for part in ast.walk(node))

    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            all_of(node.returns)
            for argument in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs):
                all_of(argument.annotation)
            for decorator in node.decorator_list:
                all_of(decorator)
        elif isinstance(node, ast.AnnAssign):
            all_of(node.annotation)
        elif isinstance(node, ast.ClassDef):
            for decorator in node.decorator_list:
                all_of(decorator)
        elif isinstance(node, ast.Raise | ast.JoinedStr | ast.ImportFrom | ast.Import) or _is_typing(node) or (
                isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in SAID):
            all_of(node)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) \
                and ast.unparse(node.value.func).split(".")[-1] in SAID:
            silent.add(id(node))
    return silent


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


# --- which tests see a file -----------------------------------------------------------------------------------------


def imported(path: Path) -> set[Path]:
    """The files of this folder that a file imports by name."""
    out, package = set(), path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            parts = [*package[:len(package) - node.level + 1], *parts]
        elif parts[:1] == ["lora_ensemble"]:
            parts = parts[1:]
        else:
            continue
        names = [parts, *([*parts, alias.name] for alias in node.names)]
        for name in names:
            for file in (ROOT.joinpath(*name).with_suffix(".py") if name else ROOT / "__init__.py",
                         ROOT.joinpath(*name, "__init__.py")):
                if file.is_file():
                    out.add(file)
    return out


def distances(changed: Path, graph: dict[Path, set[Path]]) -> dict[Path, int]:
    """How many imports lie between each file and the changed one."""
    found, edge, far = {changed: 0}, {changed}, 0
    while edge:
        far += 1
        edge = {path for path, names in graph.items() if names & edge and path not in found}
        found |= dict.fromkeys(edge, far)
    return found


def covering(changed: Path, graph: dict[Path, set[Path]], with_host: bool, most: int, line: str = "") -> list[str]:
    """The test files that import a file: those of its own name first, then those that have rare words of the changed
    line, then those of a like name, then by the shortest way."""
    far = distances(changed, graph)
    tests = [path for path in far if path.name.startswith("test_") and (with_host or "host" not in path.parts)
             and not any(name in path.stem for name in SLOW)]
    wanted = set(WORD.findall(line))
    words = {path: wanted & set(WORD.findall(path.read_text(encoding="utf-8"))) for path in tests}
    files = collections.Counter(word for some in words.values() for word in some)
    rare = {path: sum(1 / files[word] for word in some) for path, some in words.items()}
    nearest = [path for path in sorted(tests, key=lambda path: (-rare[path], path))[:NEAREST] if rare[path]]
    tests.sort(key=lambda path: (changed.stem not in path.stem, path not in nearest, -alike(changed, path), far[path],
                                 "host" in path.parts, path.name))
    return [path.relative_to(ROOT).as_posix() for path in tests[:most]]


def alike(changed: Path, test: Path) -> int:
    """With how many letters, if not few, a word in the name of a test begins as the name of a file does or that of its
    folder: `routes` and `test_routed_trust`, `guidance/apply` and `test_two_runs_guidance`."""
    found = max(len(os.path.commonprefix((name, word))) for name in (changed.stem, changed.parent.name)
                for word in test.stem.split("_")[1:])
    return found if found >= ALIKE else 0


def seen(fault: Fault, folder: Path, tests: list[str], seconds: float) -> bool | None:
    """Whether a test fails with the fault in the copy, and passes without it; None where the tests do not end in time.
    """
    place = folder / fault.path.relative_to(ROOT)
    text = place.read_text(encoding="utf-8")
    until = time.monotonic() + seconds
    try:
        for test in tests:  # one after the other: the nearest decides most of them, in its own time
            place.write_text(text[:fault.start] + fault.new + text[fault.end:], encoding="utf-8")
            run = _pytest(folder, test, until)
            if run.returncode in (0, 5):  # 5: no test was chosen
                continue
            place.write_text(text, encoding="utf-8")
            failed = FAILED.search(run.stdout)
            if _pytest(folder, failed[1] if failed else test, until + seconds).returncode in (0, 5):
                return True
        return False
    except (subprocess.TimeoutExpired, ValueError):  # ValueError: no time is left for the next
        return None
    finally:
        place.write_text(text, encoding="utf-8")


def _pytest(folder: Path, test: str, until: float) -> subprocess.CompletedProcess:
    command = [sys.executable, str(folder / "run.py"), "_with", "-", "pytest", "-q", "-x", "--no-header", "-p",
               "no:cacheprovider", test]
    return subprocess.run(command, cwd=folder, capture_output=True, timeout=until - time.monotonic(), text=True,
                          encoding="utf-8", errors="replace", env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})


def compiles(fault: Fault) -> bool:
    text = fault.path.read_text(encoding="utf-8")
    try:
        ast.parse(text[:fault.start] + fault.new + text[fault.end:])
    except SyntaxError:
        return False
    return True


def chosen(count: int, seed: int) -> list[Fault]:
    """Faults of all floors, each file as likely as it is long. Each has its own number from the seed, so that a change
    of one file leaves the choice among the others as it was."""
    every = [fault for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py")) for fault in faults(path)]
    seen: collections.Counter = collections.Counter()
    drawn: list[tuple[bytes, Fault]] = []
    for fault in every:
        key = fault.key
        text = "\0".join([str(seed), *key, str(seen[key])])
        seen[key] += 1
        drawn.append((hashlib.sha256(text.encode()).digest(), fault))
    out: list[Fault] = []
    for _, fault in sorted(drawn, key=lambda pair: pair[0]):
        if len(out) == count:
            break
        if compiles(fault) and fault.at not in EQUIVALENT:
            out.append(fault)
    return out


def main() -> int:
    parser = options(__doc__, 60)
    parser.add_argument("--seed", type=int, default=0, help="another choice of faults")
    parser.add_argument("--files", type=int, default=14, help="test files per fault, at most")
    parser.add_argument("--seconds", type=float, default=1200, help="time that the tests of one fault have")
    chosen_ = parser.parse_args()
    with_host = bool(os.environ.get("COMFYUI_UNDER_TEST"))
    sources = [path for top in (*FLOORS, "nodes", "testbed", "tests") for path in (ROOT / top).rglob("*.py")]
    graph = {path: imported(path) for path in sources}
    found = {fault.name: fault for fault in chosen(chosen_.first + chosen_.count, chosen_.seed)[chosen_.first:]}
    results = Results.asked("mutate", ("**/*.py",), chosen_)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "pack"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "out", ".pytest_cache"))

        def check(case: str) -> Found:
            tests = covering(found[case].path, graph, with_host, chosen_.files, found[case].text)
            seconds = min(chosen_.seconds, results.left())
            was = seen(found[case], copy, tests, seconds) if tests else False
            if was is None and seconds < chosen_.seconds:
                raise TimeOver
            say(f"{VERDICTS[was]} {found[case]}")
            if was is False:
                raise Missed(f"no test sees it, of {len(tests)} files: {found[case]}")
            return ("seen" if was else f"whose tests did not end in {chosen_.seconds:g} s"), {"at": str(found[case])}

        return results.judge(found, check)


if __name__ == "__main__":
    sys.exit(main())
