#!/usr/bin/env python3
"""LoRA Ensemble in three commands, on a machine with Python 3.10 or newer and a package index.

    python3 run.py demo     compose the testbed's LoRAs with every method; writes pictures and a table to demo/out/
    python3 run.py test     the tests: all of them on the newest ComfyUI found, those of its API on the others
    python3 run.py bench    the goals of speed, one JSON line per result and a table

Standard library only. Environments are made once, outside the tree, and reused while their requirements stay the same.
Each ComfyUI that is found takes part in a process of its own, with the interpreter it already has or one made for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT, NAME = Path(__file__).resolve().parent, "lora_ensemble"


def load_pack() -> ModuleType:
    """Import this folder as the package NAME, whatever the folder is called, without putting it on sys.path."""
    if NAME not in sys.modules:
        where = {"submodule_search_locations": [str(ROOT)]}
        spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py", **where)
        sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[NAME]
            raise
    return sys.modules[NAME]


def run_inside(tools: str, module: str, *arguments: str) -> int:
    """`run.py _with TOOLS MODULE ARGUMENTS`: run a module inside an environment, with the pack importable by name.

    TOOLS is a folder that is searched last, or `-`. Neither this folder nor its parent gets on sys.path: ComfyUI has
    top-level modules of the same names as parts of this pack.
    """
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    if tools != "-":
        sys.path.append(tools)
    load_pack()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["_with"]:
        return run_inside(*arguments[1:])
    if arguments[:1] == ["_module"]:
        return run_inside("-", f"{NAME}.{arguments[1]}", *arguments[2:])
    load_pack()
    commands = importlib.import_module(f"{NAME}.tools.commands")
    return commands.main(arguments, description=__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
