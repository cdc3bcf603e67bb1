"""The hands of a sweep: drawing a cell on a server, and a headless ComfyUI that is started for it.

Standard library alone, like `queue_prompt.py`: this part runs on the machines that draw.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .kept_pictures import measured
from .queue_prompt import Problem, Unreachable, call, fetched, finished, speaking_to
from .server_nodes import defaults, inputs_of

Outcome = dict[str, Any]
"""`picture` (a file's bytes) and `facts` of a cell that was drawn, or the `problem` with one that cannot be drawn."""


def drawn(server: str, cell, timeout: float, node: str = "") -> Outcome:
    """Draw a cell on a server. Raises Unreachable where the server is lost, and nothing else: what is wrong with the
    cell is its outcome.

    node   whose picture is taken; else the first that is saved, or previewed
    """
    try:
        with speaking_to(server, timeout):
            workflow = alone(fitted(server, cell.workflow, cell.kinds), cell.key)
            entry = finished(server, workflow, timeout, tell=lambda _: None)
            images = pictures_of(entry, node)
            if not images:
                raise Problem(f"node {node} has no picture" if node else "the workflow saves and previews no picture")
            return {"picture": fetched(server, images[0]), "facts": measured(entry) | {"worker": server}}
    except Unreachable:
        raise
    except Problem as problem:
        return {"problem": str(problem)}


def pictures_of(entry: dict[str, Any], node: str) -> list[dict[str, str]]:
    """The images of a run, saved ones before previews."""
    found = [image for name, output in entry["outputs"].items() if node in ("", name)
             for image in output.get("images", ())]
    return sorted(found, key=lambda image: image["type"] != "output")


def fitted(server: str, workflow: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    """A workflow some of whose nodes have got another class: they keep the inputs that it has, and get the others as a
    new node begins with them. Raises Problem."""
    workflow = dict(workflow)
    for node in kinds:
        kind = workflow[node]["class_type"]
        info = json.loads(call(server, f"/object_info/{kind}"))
        if kind not in info:
            raise Problem(f"The server has no node '{kind}'.")
        known = inputs_of(info, kind)
        inputs = {name: value for name, value in workflow[node]["inputs"].items() if name in known}
        workflow[node] = {**workflow[node], "inputs": defaults(info, kind) | inputs}
    return workflow


def alone(workflow: dict[str, Any], key: str) -> dict[str, Any]:
    """The workflow with files of its own: servers that share a folder must not count in it together."""
    def named(inputs: dict[str, Any]) -> dict[str, Any]:
        prefix = inputs.get("filename_prefix")
        return {**inputs, "filename_prefix": f"{prefix}_{key}"} if isinstance(prefix, str) else inputs

    return {node: {**entry, "inputs": named(entry["inputs"])} for node, entry in workflow.items()}


class Headless:
    """A ComfyUI without a browser, on a free port of this machine.

    comfyui    its folder; its models, and everything else but what is written, are taken from there
    python     its interpreter
    folder     where it writes: pictures, settings and `server.log`
    arguments  further ones of its command line
    """

    def __init__(self, comfyui: str, python: str, folder: str, arguments: str = ""):
        self.comfyui, self.python, self.arguments = Path(comfyui).expanduser(), python or sys.executable, arguments
        self.folder, self.process, self.address = Path(folder).absolute(), None, ""

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, timeout: float = 600.0) -> None:
        """Raises Problem where it does not come up."""
        if not (self.comfyui / "main.py").is_file():
            raise Problem(f"There is no ComfyUI in {self.comfyui} on {socket.gethostname()}.")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for name in ("output", "temp", "user"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        command = [self.python, "main.py", "--port", str(port), "--disable-auto-launch"]
        command += [f"--{name}-directory={self.folder / name}" for name in ("output", "temp", "user")]
        command += [f"--database-url=sqlite:///{self.folder / 'user' / 'comfyui.db'}", *shlex.split(self.arguments)]
        log = self.folder / "server.log"
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, cwd=self.comfyui, stdin=subprocess.DEVNULL, stdout=file,
                                            stderr=subprocess.STDOUT,
                                            env={**os.environ, "PYTHONIOENCODING": "utf-8"})
        self.address = f"127.0.0.1:{port}"
        until = time.monotonic() + timeout
        while self.runs and time.monotonic() < until:
            try:
                with speaking_to(self.address, 60):
                    call(self.address, "/system_stats")
                return
            except Unreachable:
                time.sleep(0.25)
        code = self.process.poll()
        self.stop()
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise Problem(f"ComfyUI did not start ({f'exit code {code}' if code is not None else f'{timeout:.0f} s'}); "
                      f"{log} ends with\n{end}")

    def stop(self) -> None:
        if self.runs:
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Worker:
    """A server and the hand that draws with it: what a cluster starts on each of its places.

    A server that is lost is started anew when the next cell comes, which is the same one if the cluster tries again.
    """

    def __init__(self, start: Callable[[], Headless], timeout: float, node: str, name: str):
        self.server, self.timeout, self.node, self.name = start(), timeout, node, name
        self.server.start()

    def ready(self) -> str:
        return self.server.address

    def draw(self, cell) -> tuple[str, Outcome]:
        """(the cell's key, what became of it). Raises Unreachable where the server is lost."""
        if not self.server.runs:
            self.server.start()
        try:
            found = drawn(self.server.address, cell, self.timeout, self.node)
        except Unreachable:
            self.server.stop()
            raise
        if "facts" in found:
            found["facts"]["worker"] = self.name
        return cell.key, found

    def stop(self) -> None:
        self.server.stop()
