"""The floors of the pack: arrows point down, and nothing in it prints, evaluates text or unpickles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "kernels": set(),
    "methods": {"kernels"},
    "engine": {"kernels"},
    "host": {"kernels", "methods", "engine"},
    "nodes": {"kernels", "methods", "engine", "host"},
    "testbed": {"kernels", "methods", "engine"},
}
"""Folder -> the other folders of the pack that it may import."""

HOST_PACKAGES = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "nodes", "server",
                 "node_helpers"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "subprocess", "socket", "urllib", "requests", "http", "aiohttp"}
PACK = [path for folder in ("kernels", "methods", "engine", "host", "nodes") for path in (ROOT / folder).rglob("*.py")]
by_file = pytest.mark.parametrize("path", sorted([*PACK, ROOT / "__init__.py"]),
                                  ids=lambda path: path.relative_to(ROOT).as_posix())


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, text: str | None = None) -> Iterator[tuple[str, str]]:
    """("pack", floor) for what a file imports of this pack, ("other", top-level package) for all else."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree(path) if text is None else ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (("other", alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield "other", node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from (("pack", ".".join([*base, name]).split(".")[0]) for name in names)


@pytest.mark.parametrize("floor", FLOORS)
def test_arrows_point_down(floor):
    for path in (ROOT / floor).rglob("*.py"):
        for kind, name in imports(path):
            if kind == "pack" and name in FLOORS and name != floor:
                assert name in FLOORS[floor], f"{path.relative_to(ROOT)} imports {name}"


ROOMS = {"files": set(), "families": set(), "words": {"files"}, "compose": {"files", "families", "words"},
         "guidance": {"compose", "files"}, "look": {"guidance", "compose", "files"}}
"""Room of the host -> the other rooms that it may import."""


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_the_host_stand_in_a_row(room):
    paths = list((ROOT / "host" / room).glob("*.py"))
    assert len(paths) > 1
    for path in paths:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module:
                other = node.module.split(".")[0]
                assert other in ROOMS[room], f"{path.relative_to(ROOT)} imports {other}"


def test_every_file_of_the_host_is_in_a_room():
    assert {path.name for path in (ROOT / "host").glob("*.py")} == {"__init__.py"}
    assert {path.name for path in (ROOT / "host").iterdir() if path.is_dir()} - {"__pycache__"} == set(ROOMS)


def test_kernels_import_torch_only():
    standard = {"__future__", "bisect", "dataclasses", "functools", "collections", "typing", "math"}
    for path in (ROOT / "kernels").rglob("*.py"):
        others = {name for kind, name in imports(path) if kind == "other"}
        assert others <= {"torch"} | standard, path.name


def test_only_host_and_nodes_import_comfyui():
    for floor in set(FLOORS) - {"host", "nodes"}:
        for path in (ROOT / floor).rglob("*.py"):
            found = {name for kind, name in imports(path) if kind == "other"} & HOST_PACKAGES
            assert not found, f"{path.relative_to(ROOT)} imports {found}"


def test_the_run_of_guidance_knows_no_rule():
    """It imports what every rule's session answers to, and no rule of its own."""
    for name in ("apply.py", "run.py", "call.py"):
        found = {node.module.rpartition("methods.guidance.")[2]
                 for node in ast.walk(tree(ROOT / "host" / "guidance" / name))
                 if isinstance(node, ast.ImportFrom) and "methods.guidance" in (node.module or "")}
        assert found and found <= {"session", "record"}, name


@by_file
def test_nothing_prints_evaluates_or_unpickles(path):
    calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    called = {function.id for function in calls if isinstance(function, ast.Name)}
    assert not called & {"print", "eval", "exec", "compile", "__import__"}
    assert not {name for kind, name in imports(path) if kind == "other"} & FORBIDDEN_MODULES
    loads = set(map(ast.unparse, calls))
    assert "torch.load" not in loads


@by_file
def test_numbers_go_to_a_device_without_waiting_for_it(path):
    """`torch.tensor(numbers, device=...)` waits until the device has done all that was queued before."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.tensor", "torch.as_tensor"):
            found = {keyword.arg for keyword in node.keywords}
            assert "device" not in found, f"line {node.lineno}: use engine.transfer.on_device"


@by_file
def test_files_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_no_error_of_a_class_of_our_own_leaves_the_pack():
    """The front end shows such an error as the path of its module, which pushes the reason out of sight."""
    own, caught = set(), set()
    for item in (item for path in PACK for item in ast.walk(tree(path))):
        if isinstance(item, ast.ClassDef) and any(
                ast.unparse(above).endswith(("Exception", "Error")) for above in item.bases):
            own.add(item.name)
        elif isinstance(item, ast.ExceptHandler) and item.type is not None:
            caught |= {part.id for part in ast.walk(item.type) if isinstance(part, ast.Name)}
    assert own and own <= caught, own - caught


def test_the_rules_would_notice_a_breach():
    """Relative, absolute and aliased imports are seen alike."""
    text = "from ..nodes import x\nfrom .. import host\nimport comfy.utils as u\nfrom .bank import Bank\n"
    assert sorted(imports(ROOT / "engine" / "example.py", text)) == [
        ("other", "comfy"), ("pack", "engine"), ("pack", "host"), ("pack", "nodes")]
