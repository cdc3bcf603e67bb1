"""The ComfyUI installations on this machine, each with the interpreter that runs it."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .environments import PYTEST, ROOT, Stop, cache_dir, child_env, environment, say, test_tools, venv_python

TORCH = ["torch==2.13.0"]
TRIO = ["torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0"]  # the newest three that fit together
TOOLS = ["numpy", "safetensors>=0.4.2", "pillow", "ruff>=0.9", *PYTEST]
# What ComfyUI releases ask for alike: kept beside torch, so that the layer of each release stays small. A hint, no
# more: what a release needs in another version goes into its own layer.
COMMON = ["torchsde", "einops", "transformers>=4.50.3", "sentencepiece", "aiohttp>=3.11.8", "pyyaml", "scipy", "tqdm",
          "psutil", "alembic", "SQLAlchemy>=2", "av>=16", "requests", "kornia>=0.7.1", "spandrel", "pydantic~=2.0",
          "pydantic-settings~=2.0", "PyOpenGL>=3.1.8"]  # fmt: skip
COMFYUI_URL, COMFYUI_TAG = "https://github.com/comfyanonymous/ComfyUI", "v0.33.0"


@dataclass
class Host:
    """A ComfyUI on this machine, and the interpreter that runs it."""

    path: Path
    version: str
    python: Path | None = None
    tools: Path | None = None  # a folder with pytest, where the environment is the user's own
    note: str = ""
    as_it_is: bool = False  # nothing was made for it: what the caller's PYTHONPATH names is needed

    def __str__(self) -> str:
        return f"ComfyUI {self.version} at {self.path}"

    @property
    def number(self) -> tuple[int, ...]:
        """The version, to compare; empty where it is unknown."""
        return tuple(int(part) for part in re.findall(r"\d+", self.version))

    def env(self, **extra: str) -> dict[str, str]:
        env = dict(os.environ) if self.as_it_is else child_env()
        return env | {"COMFYUI_UNDER_TEST": str(self.path), **extra}


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
    here = Path(sys.argv[0]).absolute().parent  # where run.py was started: ROOT, or a link to it in custom_nodes
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
