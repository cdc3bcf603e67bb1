#!/usr/bin/env python3
"""LoRA Ensemble in three commands, on a machine with Python 3.10 or newer and a package index.

    python3 run.py demo     compose the testbed's LoRAs with every method; writes pictures and a table to demo/out/
    python3 run.py test     every test that this machine can run
    python3 run.py bench    the goals of speed, one JSON line per result and a table

Standard library only. Environments are made once, outside the tree, and reused while their requirements stay the same.
Each ComfyUI that is found takes part in a process of its own, with the interpreter it already has or one made for it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent
PYTHONS = ((3, 10), (3, 14))  # oldest and newest version that the pinned torch has wheels for

TORCH = ["torch==2.13.0"]
TRIO = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]  # the newest three that fit together
TOOLS = ["numpy", "safetensors>=0.4.2", "pillow", "pytest>=8", "ruff>=0.9"]
# What ComfyUI releases ask for alike: kept beside torch, so that the layer of each release stays small. A hint, no
# more: what a release needs in another version goes into its own layer.
COMMON = ["torchsde", "einops", "transformers>=4.50.3", "sentencepiece", "aiohttp>=3.11.8", "pyyaml", "scipy", "tqdm",
          "psutil", "alembic", "SQLAlchemy>=2", "av>=16", "requests", "kornia>=0.7.1", "spandrel", "pydantic~=2.0",
          "pydantic-settings~=2.0", "PyOpenGL>=3.1.8"]  # fmt: skip
COMFYUI_URL, COMFYUI_TAG = "https://github.com/comfyanonymous/ComfyUI", "v0.28.0"


class Stop(Exception):
    """Ends the run with a message for the person who started it."""


def say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def load_pack(name: str = "lora_ensemble") -> ModuleType:
    """Import this folder as the package `name`, whatever the folder is called, without putting it on sys.path."""
    if name not in sys.modules:
        where = {"submodule_search_locations": [str(ROOT)]}
        spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", **where)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


# --- environments ---------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """The folder for environments: outside the tree, the platform's usual place for caches."""
    home = Path.home()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "lora-ensemble"


def child_env(**extra: str) -> dict[str, str]:
    """The environment for child processes: nothing of the caller's Python setup leaks in."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    return env | {"PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"} | extra


def venv_python(folder: Path) -> Path:
    return folder / "Scripts" / "python.exe" if sys.platform == "win32" else folder / "bin" / "python"


def ask(python: Path, code: str) -> str:
    """What `python -c code` prints."""
    result = subprocess.run([str(python), "-c", code], capture_output=True, text=True, env=child_env())
    if result.returncode:
        raise Stop(f"{python} failed:\n{result.stderr.strip()}")
    return result.stdout.strip()


def site_packages(python: Path) -> Path:
    return Path(ask(python, "import sysconfig; print(sysconfig.get_paths()['purelib'])"))


def pip(python: Path, arguments: Sequence[str], log: Path) -> None:
    """pip install into `python`'s environment; downloads are shown, everything is kept in `log`."""
    command = [str(python), "-m", "pip"]
    if subprocess.run([*command, "--version"], capture_output=True, env=child_env()).returncode:
        command = [sys.executable, "-m", "pip", "--python", str(python)]  # an environment made without pip
    command += ["install", "--progress-bar", "off", "--disable-pip-version-check", "--no-input", *arguments]
    with log.open("a", encoding="utf-8", buffering=1) as out:
        out.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   errors="replace", env=child_env())
        tail: list[str] = []
        for line in process.stdout:
            out.write(line)
            tail = [*tail[-29:], line]
            if re.match(r"\s*Downloading .* MB\)|Installing collected", line):
                say("    " + line.strip()[:110])
    if process.wait():
        raise Stop(f"pip failed (exit {process.returncode}); the whole log is in {log}\n{''.join(tail)}")


def create_venv(folder: Path) -> None:
    command = [sys.executable, "-m", "venv", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=child_env())
    if result.returncode == 0:
        return
    if importlib.util.find_spec("pip") is None:  # Debian's python3 comes without ensurepip
        raise Stop(f"This Python cannot make virtual environments:\n{result.stdout}{result.stderr}"
                   "Install its venv module (Debian, Ubuntu: apt install python3-venv) and start again.")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([*command, "--without-pip"], check=True, env=child_env())


def environment(kind: str, requirements: Sequence[str], disk: str, below: Path | None = None) -> Path:
    """The interpreter of the virtual environment that holds `requirements`; made if it is not there yet.

    The folder's name carries a hash of the requirements, the Python version and the environment `below`, whose
    packages it sees and which it never changes. A stamp file marks a complete one; without it, it is made anew.
    """
    version = "%d.%d.%d" % sys.version_info[:3]
    key = json.dumps([version, sys.platform, list(requirements), str(below or "")])
    folder = cache_dir() / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    python, stamp, log = venv_python(folder), folder / "complete.json", folder.with_name(f"{folder.name}.log")
    if stamp.is_file():
        say(f"  environment {folder} (made earlier)")
        return python
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free / 2**30
    say(f"  environment {folder}: needs {disk}; {free:.0f} GB free there")
    if free < 2:
        variable = "LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"
        raise Stop(f"Too little disk at {folder.parent}; point {variable} at a larger one.")
    say(f"    {', '.join(requirements)[:400]}")
    started = time.monotonic()
    create_venv(folder)
    log.unlink(missing_ok=True)
    arguments = list(requirements)
    if below:
        # Appended after the environment's own packages; pip counts what lies there as installed and cannot change it.
        (site_packages(python) / "below.pth").write_text(f"{site_packages(below)}\n", encoding="utf-8")
        pinned = ask(below, "from importlib.metadata import version as v\n"
                            "for p in ('torch', 'torchvision', 'torchaudio'): print(p + '==' + v(p))")  # fmt: skip
        (folder / "constraints.txt").write_text(pinned + "\n", encoding="utf-8")
        arguments += ["--constraint", str(folder / "constraints.txt")]
    pip(python, arguments, log)
    if below:
        where = "import torch; print(torch.__file__)"
        if ask(python, where) != ask(below, where):
            raise Stop(f"A requirement brought another torch into {folder}; see {log}")
    stamp.write_text(json.dumps({"python": version, "requirements": list(requirements)}, indent=1), encoding="utf-8")
    say(f"    ready after {time.monotonic() - started:.0f} s")
    return python


def test_tools(base: Path, host: Path) -> Path:
    """A folder with pytest for an environment that is the user's own and stays as it is."""
    version = ask(host, "import sys; print('%d.%d' % sys.version_info[:2])")
    folder = cache_dir() / f"pytest-{version}"
    if not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        say(f"  pytest for Python {version}, beside the ComfyUI's own environment: {folder}, 10 MB")
        pure = ["pytest>=8", "exceptiongroup", "tomli", "colorama"]  # the markers of another Python version, resolved
        target = ["--target", str(folder), "--python-version", version, "--only-binary", ":all:"]
        pip(base, [*target, *pure], folder.with_name(f"{folder.name}.log"))
        (folder / "complete").touch()
    return folder


# --- ComfyUI --------------------------------------------------------------------------------------------------------


@dataclass
class Host:
    """A ComfyUI on this machine, and the interpreter that runs it."""

    path: Path
    version: str
    python: Path | None = None
    tools: Path | None = None  # a folder with pytest, where the environment is the user's own
    note: str = ""

    def __str__(self) -> str:
        return f"ComfyUI {self.version} at {self.path}"

    def env(self) -> dict[str, str]:
        return child_env(COMFYUI_UNDER_TEST=str(self.path))


def own_python(path: Path) -> Path | None:
    """The interpreter of the environment that belongs to the ComfyUI at `path`, if it has one with torch."""
    candidates = [venv_python(path / name) for name in ("venv", ".venv")]
    if sys.platform == "win32":
        candidates += [folder / "python_embeded" / "python.exe" for folder in (path, path.parent)]
    for python in filter(Path.is_file, candidates):
        probe = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
        if subprocess.run([str(python), "-c", probe], env=child_env(), capture_output=True).returncode == 0:
            return python
        say(f"  {python} has no torch; it is left alone")
    return None


def find_hosts(paths: Iterable[str]) -> list[Host]:
    """Every ComfyUI at `paths`, in COMFYUI_PATH, around this folder, at ~/ComfyUI* and in ~/comfy/, each once."""
    asked = [Path(p).expanduser() for p in paths]
    for path in asked:
        if not (path / "comfyui_version.py").is_file():
            raise Stop(f"No ComfyUI at {path}: that folder has no comfyui_version.py")
    asked += [Path(p) for p in os.environ.get("COMFYUI_PATH", "").split(os.pathsep) if p]
    here = Path(__file__).absolute().parent
    asked += [folder.parent.parent for folder in (here, ROOT) if folder.parent.name == "custom_nodes"]
    asked += [*sorted(Path.home().glob("ComfyUI*")), *sorted(Path.home().glob("comfy/*"))]
    hosts: dict[Path, Host] = {}
    for path in asked:
        version = path / "comfyui_version.py"
        if version.is_file() and (path / "main.py").is_file():
            number = re.search(r"__version__ = [\"'](.+?)[\"']", version.read_text(encoding="utf-8"))
            hosts.setdefault(path.resolve(), Host(path.resolve(), number[1] if number else "unknown"))
    return list(hosts.values())


def clone_comfyui() -> Path:
    folder = cache_dir() / f"ComfyUI-{COMFYUI_TAG[1:]}"
    if not (folder / "main.py").is_file():
        if not shutil.which("git"):
            raise Stop("--clone-comfyui needs git on the PATH.")
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        say(f"  {COMFYUI_URL} {COMFYUI_TAG} into {folder}, about 100 MB")
        command = ["git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--depth", "1"]
        if subprocess.run([*command, "--branch", COMFYUI_TAG, COMFYUI_URL, str(folder)]).returncode:
            raise Stop(f"git could not clone {COMFYUI_URL}")
    return folder


def requirements_of(host: Host) -> list[str]:
    lines = (host.path / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.split("#")[0].strip() for line in lines]
    return [line for line in lines if line and not re.match(r"(torch|torchvision|torchaudio)(?![\w.-])", line)]


def prepare(options: argparse.Namespace) -> tuple[Path, list[Host]]:
    """The base interpreter and the hosts, each with its interpreter."""
    say("Looking for ComfyUI")
    if options.clone_comfyui:
        options.comfyui.append(str(clone_comfyui()))
    hosts = [] if options.without_comfyui else find_hosts(options.comfyui)
    for host in hosts:
        host.python = own_python(host.path)
        say(f"  {host}, {'with its own environment' if host.python else 'without an environment of its own'}")
    if not hosts:
        say("  none" if not options.without_comfyui else "  not looked for (--without-comfyui)")
    say("Preparing environments")
    bare = [host for host in hosts if host.python is None]
    size = "about 1 GB"
    if sys.platform == "linux":
        size = "about 6 GB with PyPI's CUDA build of torch, 1 to 2 GB with a CPU build (for one, set\n" \
               "    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu)"  # fmt: skip
    base = environment("base", [*(TRIO + COMMON if bare else TORCH), *TOOLS], size)
    for host in hosts:
        if host.python is None:
            host.python = environment("comfyui", requirements_of(host), "about 0.6 GB", below=base)
            host.note = "environment made here"
        else:
            host.tools = test_tools(base, host.python)
            host.note = "its own environment"
    return base, hosts


# --- commands -------------------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """What was run, what was not and why; `close` prints it and gives the exit code."""

    lines: list[str] = field(default_factory=list)
    failed: bool = False

    def run(self, title: str, command: Sequence[str | Path], env: dict[str, str] | None = None) -> bool:
        say(f"\n=== {title}")
        started = time.monotonic()
        code = subprocess.run([str(part) for part in command], cwd=ROOT, env=env or child_env()).returncode
        state = "ok    " if code == 0 else f"FAILED (exit {code})"
        self.lines.append(f"  {state} {title}, {time.monotonic() - started:.0f} s")
        self.failed |= code != 0
        return code == 0

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


def with_pack(python: Path, *arguments: str | Path, tools: Path | None = None) -> list[str]:
    """The command that runs a part of this file in another interpreter."""
    return [str(part) for part in (python, ROOT / "run.py", "_with", tools or "-", *arguments)]


def run_test(options: argparse.Namespace) -> int:
    base, hosts = prepare(options)
    summary = Summary()
    summary.run("ruff", [base, "-m", "ruff", "check", "."])
    summary.run("tests without ComfyUI", with_pack(base, "pytest", "tests", "--ignore", "tests/host", *options.rest))
    for host in hosts:
        command = with_pack(host.python, "pytest", "tests/host", *options.rest, tools=host.tools)
        summary.run(f"tests on {host}", command, host.env())
    return summary.close(base, hosts)


def run_demo(options: argparse.Namespace) -> int:
    base, hosts = prepare(options)
    out = ROOT / "demo" / "out"
    out.mkdir(parents=True, exist_ok=True)
    summary = Summary()
    summary.run("demo, standalone sampler", with_pack(base, "lora_ensemble.testbed.demo", out))
    for host in hosts:
        command = with_pack(host.python, "lora_ensemble.tests.host_demo", out, tools=host.tools)
        summary.run(f"demo on {host}", command, host.env())
    code = summary.close(base, hosts)
    say(f"  files  {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return code


def run_bench(options: argparse.Namespace) -> int:
    """The goals of speed on one ComfyUI, the first that was named or found; with --sets also quality."""
    summary, env = Summary(), None
    if options.as_it_is:
        base, hosts = Path(sys.executable), find_hosts(options.comfyui)[:1]
        for host in hosts:
            host.python, host.note = base, "this interpreter as it is"
            env = os.environ | {"COMFYUI_UNDER_TEST": str(host.path)}
    else:
        base, hosts = prepare(options)
    if options.sets:
        quality = ["lora_ensemble.benchmarks.quality", "--sets", options.sets, "--device", options.device]
        summary.run("quality", with_pack(base, *quality))
    for host in hosts[:1]:
        goals = with_pack(host.python, "lora_ensemble.benchmarks.goals", "--device", options.device, *options.rest)
        summary.run(f"speed on {host}", goals, env or host.env())
    return summary.close(base, hosts[:1])


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
        return run_inside("-", f"lora_ensemble.{arguments[1]}", *arguments[2:])
    parser = argparse.ArgumentParser(prog="run.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = {"demo": run_demo, "test": run_test, "bench": run_bench}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--comfyui", metavar="PATH", nargs="+", action="extend", default=[], help="the ComfyUI to use")
    parser.add_argument("--clone-comfyui", action="store_true", help=f"fetch ComfyUI {COMFYUI_TAG} and use it")
    parser.add_argument("--without-comfyui", action="store_true", help="use none, even if there is one")
    parser.add_argument("--sets", help="bench: also the quality of so many LoRA sets (480 are all)")
    parser.add_argument("--as-it-is", action="store_true", help="bench: with this interpreter, making no environment")
    parser.add_argument("--device", default="cpu", help="bench: cpu (default) or cuda")
    options, options.rest = parser.parse_known_args(arguments)
    if options.rest and options.command == "demo":
        parser.error(f"unknown: {' '.join(options.rest)}")
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        raise Stop("Python %d.%d has no wheels of the pinned torch; use 3.10, 3.11 or 3.12." % sys.version_info[:2])
    return commands[options.command](options)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Stop as stop:
        sys.exit(f"\n{stop}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
