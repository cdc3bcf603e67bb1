"""Faults of the disk and of the machine: a full disk, a read-only one, and a process killed while it saves or samples.

Each is a real one: a limit of the system on the size of files, a user without rights, a signal that nothing can catch.
They need a system that can fork; elsewhere they are said not to be there.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import folder_paths
import torch

from ..host.guidance import files
from ..host.guidance.coeffs import GuidanceCoeffs
from ..methods.guidance.adaptive import SPACES
from ..methods.guidance.calibration import Calibration
from .fuzz_api import NAMES, give_loras
from .server import Server
from .workflows import load

NAME = "some/where"
ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65534
NOT_HERE = "this system has no such fault"


def coeffs(calls: int = 200) -> GuidanceCoeffs:
    """Coefficients whose file takes a moment to write."""
    curves = {space: torch.linspace(0.9, 1, calls)[None] for space in SPACES}
    found = Calibration(torch.ones(calls, 2 * calls + 1, dtype=torch.float64).tril(), tuple(range(calls)),
                        torch.ones(calls, dtype=torch.float64), curves)
    return GuidanceCoeffs("a model", "sample_euler", tuple(torch.linspace(14, 0, calls + 1).tolist()), 7.5, found,
                          "a kind")


def in_child(work: Callable[[], int], after: float | None = None) -> int | None:
    """The exit code of a process that does `work`; None where it was killed, `after` seconds from its beginning."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work())
        except BaseException:
            os._exit(99)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def saved(name: str = NAME) -> int:
    """0: saved, 3: refused by a ValueError that says why, 4: by another exception."""
    try:
        files.save(coeffs(), name)
        return 0
    except ValueError as error:
        return 3 if "Guidance coefficients" in str(error) and str(error).count(".") else 4
    except BaseException:
        return 4


class Folder:
    """A folder of coefficients of its own, while open."""

    def __enter__(self) -> Path:
        self.temporary = tempfile.TemporaryDirectory()
        self.before = folder_paths.folder_names_and_paths[files.FOLDER]
        folder_paths.folder_names_and_paths[files.FOLDER] = ([self.temporary.name], {files.ENDING})
        folder_paths.filename_list_cache.clear()
        return Path(self.temporary.name)

    def __exit__(self, *_) -> None:
        folder_paths.folder_names_and_paths[files.FOLDER] = self.before
        folder_paths.filename_list_cache.clear()
        self.temporary.cleanup()


def listed() -> list[str]:
    folder_paths.filename_list_cache.clear()
    return folder_paths.get_filename_list(files.FOLDER)


def limited(size: int) -> str:
    """No file may be larger than `size` bytes: writing fails where it is reached, as on a full disk."""
    if not hasattr(os, "fork"):
        return NOT_HERE
    import resource

    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        return saved()

    with Folder() as folder:
        code = in_child(work)
        assert code == 3, f"exit code {code}"
        left = [path for path in folder.rglob("*") if path.is_file()]
        assert not left and not listed(), f"left behind: {left}"
        assert files.load(files.save(coeffs(), NAME)).found.steps == coeffs().found.steps
    return "refused in words, nothing is left"


def read_only() -> str:
    """A folder without the right to write."""
    if not hasattr(os, "fork"):
        return NOT_HERE
    with Folder() as folder:
        folder.chmod(0o555)

        def work() -> int:
            if os.getuid() == 0:  # to whom rights mean nothing
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            return saved("plain")

        code = in_child(work)
        folder.chmod(0o755)
        assert code == 3, f"exit code {code}"
        assert not list(folder.rglob("*"))
    return "refused in words, nothing is left"


def killed_while_saving(seed: int) -> str:
    """At a moment from a seed, in the middle of many saves: what is listed is whole, and saving goes on."""
    if not hasattr(os, "fork"):
        return NOT_HERE

    def work() -> int:
        while True:
            files.save(coeffs(), NAME)

    with Folder():
        code = in_child(work, random.Random(seed).uniform(0.005, 0.2))
        assert code is None, f"it ended by itself with {code}"
        names = listed()
        empty = [name for name in names if not os.path.getsize(files.path_of(name))]
        assert len(empty) <= 1, f"empty files: {empty}"  # a name that was taken for what was being written
        for name in set(names) - set(empty):
            assert files.load(name).found.steps == coeffs().found.steps
        for name in empty:
            try:
                files.load(name)
            except ValueError as error:
                assert name in str(error)
            else:
                raise AssertionError(f"{name} is empty and was read")
        assert files.load(files.save(coeffs(), NAME)) is not None
    return "what is listed is whole, or an empty file that is refused by name"


def killed_while_sampling(seed: int) -> str:
    """A server that is killed in a run: the next one draws what it drew before."""
    prompt = load(ROOT / "tests" / "host" / "workflows" / "composite.json")
    sampler = prompt["sampler"]["inputs"]
    packs = [ROOT, ROOT / "tests" / "comfy_testbed"]
    pictures = []
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(os.environ["COMFYUI_UNDER_TEST"]), Path(folder), packs)
        give_loras(server)
        for key, name in zip(("lora1", "lora2"), NAMES, strict=False):
            prompt[key]["inputs"]["lora_name"] = name
        for _ in range(2):
            with server:
                sampler["steps"] = 4
                pictures.append(server.images(server.run(prompt))[0])
                sampler["steps"] = 1000
                server.queue(prompt)
                time.sleep(random.Random(seed).uniform(0.3, 2.0))
                assert server.json("/queue")["queue_running"], "the run is over"
                server.process.kill()
                server.process.wait()
    assert pictures[0] == pictures[1], "another picture"
    return "the next server draws the same picture"


DISK: dict[str, Callable[[], str]] = {
    **{f"full after {size} bytes": partial(limited, size) for size in (0, 1, 8, 100, 1000, 100_000, 500_000)},
    "read-only": read_only,
    **{f"killed while saving, {seed}": partial(killed_while_saving, seed) for seed in range(10)},
    **{f"killed while sampling, {seed}": partial(killed_while_sampling, seed) for seed in range(2)},
}
