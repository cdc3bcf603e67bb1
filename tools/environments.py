"""Virtual environments: made once, outside the tree, and reused while their requirements stay the same."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTEST = ["pytest>=8", "pytest-xdist>=3.6"]

class Stop(Exception):
    """Ends the run with a message for the person who started it."""


def say(text: str = "") -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


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
    """The environment for child processes: nothing of the caller's Python setup leaks in. They keep what Python has
    compiled: tests start dozens of processes, and each would compile ComfyUI and every test anew."""
    not_ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")
    env = {k: v for k, v in os.environ.items() if k not in not_ours}
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
    folder = cache_dir() / f"pytest-xdist-{version}"
    if not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        say(f"  pytest for Python {version}, beside the ComfyUI's own environment: {folder}, 10 MB")
        pure = [*PYTEST, "exceptiongroup", "tomli", "colorama"]  # the markers of another Python version, resolved
        target = ["--target", str(folder), "--python-version", version, "--only-binary", ":all:"]
        pip(base, [*target, *pure], folder.with_name(f"{folder.name}.log"))
        (folder / "complete").touch()
    return folder


def front_end(base: Path, version: str = "") -> tuple[str, Path]:
    """(version, folder) of a release of ComfyUI's front end, for the server's --front-end-root; without a version the
    newest that the package index has today."""
    folder = cache_dir() / f"front-end-{version or 'newest'}"
    if not version or not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        say(f"  front end {version or 'of today'}: {folder}, 60 MB")
        wanted = f"comfyui-frontend-package{version and f'=={version}'}"
        pip(base, ["--no-deps", "--target", str(folder), wanted], folder.with_name(f"{folder.name}.log"))
        (folder / "complete").touch()
    found = next(folder.glob("comfyui_frontend_package-*.dist-info"))
    return found.name.split("-")[1].removesuffix(".dist"), folder / "comfyui_frontend_package" / "static"
