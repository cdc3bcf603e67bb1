"""A real headless ComfyUI for tests and the demo: started in a folder of its own, spoken to over HTTP, always stopped.

    with Server(Path("~/ComfyUI"), base=tmp_path, packs=[ROOT]) as server:
        images = server.images(server.run(prompt))

Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .on_gpu import ARGUMENTS

ROOT = Path(__file__).resolve().parents[1]
PACK = "lora-ensemble"  # the folder in custom_nodes, and the name under which ComfyUI serves the pack's files
FOLDERS = ("custom_nodes", "user", "models/checkpoints", "models/loras", "input", "output", "temp")
HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # 127.0.0.1 is never behind a proxy


class ServerError(RuntimeError):
    """The server did not start, or stopped; carries the end of its log."""


class PromptRefused(RuntimeError):
    """The prompt did not pass validation; `reasons` maps node ids to messages."""

    def __init__(self, answer: dict[str, Any]) -> None:
        self.reasons = {
            node: "; ".join(f"{error['message']}: {error['details']}" for error in entry["errors"])
            for node, entry in (answer.get("node_errors") or {}).items()
        }
        self.answer = answer
        super().__init__(f"{answer['error']['message']} {self.reasons or answer['error']['details']}")


class PromptFailed(RuntimeError):
    """A node raised while the prompt ran; `node_type` and `message` are what a user sees."""

    def __init__(self, details: dict[str, Any]) -> None:
        self.node_type, self.message = details.get("node_type", "?"), details.get("exception_message", "interrupted")
        trace = "".join(details.get("traceback", ()))
        super().__init__(f"{self.node_type}: {self.message}\n{trace}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def link(source: Path, target: Path) -> None:
    """A link where the platform allows one, else a copy; nothing where it is there already: tests share a server."""
    if target.exists() and target.samefile(source):
        return
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except FileExistsError:
        raise  # a copy would go through what is there, perhaps a link, into another file
    except OSError:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", "demo", "__pycache__"))
        else:
            shutil.copy2(source, target)


class Server:
    """A ComfyUI server on 127.0.0.1, with `base` as its base directory; a context manager.

    comfyui: the checkout.  python: its interpreter.  packs: folders for custom_nodes/, by link; the pack itself goes
    in as `lora-ensemble`.  arguments: further ones of ComfyUI's command line.  No other custom node is loaded and
    nothing but Python's compiled files is written into the checkout.
    """

    def __init__(
        self, comfyui: Path, base: Path, packs: Sequence[Path] = (ROOT,), python: Path | str = sys.executable,
        arguments: Sequence[str] = ()
    ) -> None:
        self.arguments = list(arguments)
        self.comfyui, self.base, self.python = Path(comfyui), Path(base), str(python)
        self.log, self.port, self.process = self.base / "server.log", 0, None
        for folder in FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        self.names = [PACK if pack == ROOT else pack.name for pack in packs]
        for pack, name in zip(packs, self.names, strict=True):
            link(pack, self.base / "custom_nodes" / name)

    # --- life ---

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout: float = 600.0) -> None:
        self.port = free_port()
        command = [self.python, "main.py", *ARGUMENTS, "--disable-auto-launch", "--disable-api-nodes"]
        command += ["--port", str(self.port), "--base-directory", str(self.base)]
        command += ["--database-url", f"sqlite:///{self.base / 'user' / 'comfyui.db'}"]
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", *self.names,
                    *self.arguments]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        env |= {"LORA_ENSEMBLE_ROOT": str(ROOT), "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"}
        env.setdefault("OMP_NUM_THREADS", "1")  # models this small lose time with more
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.comfyui, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI ended with exit code {self.process.returncode}\n{self.log_tail()}")
            try:
                self.get("/system_stats")
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
            else:
                return
        raise ServerError(f"ComfyUI did not answer within {timeout:.0f} s\n{self.log_tail()}")

    def stop(self) -> None:
        """End the server: as Ctrl-C would, then by force. Safe to call at any time."""
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM if sys.platform == "win32" else signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def log_tail(self, lines: int = 60) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.is_file() else ""
        return "\n".join(text.splitlines()[-lines:])

    def failed_imports(self) -> list[str]:
        """Custom nodes that ComfyUI could not import, with what it says of them."""
        return re.findall(r".*IMPORT FAILED.*", self.log.read_text(encoding="utf-8", errors="replace"))

    # --- HTTP ---

    def get(self, path: str, **query: str) -> bytes:
        url = f"http://127.0.0.1:{self.port}{urllib.parse.quote(path)}"
        if query:
            url += "?" + urllib.parse.urlencode(query)
        with HTTP.open(url, timeout=60) as answer:
            return answer.read()

    def give_loras(self, files: Iterable[Path]) -> None:
        """Puts files where the server looks for LoRAs."""
        for file in files:
            link(file, self.base / "models" / "loras" / file.name)

    def json(self, path: str, **query: str) -> Any:
        return json.loads(self.get(path, **query))

    def post(self, path: str, **content: Any) -> None:
        """Send a request whose answer does not matter."""
        url = f"http://127.0.0.1:{self.port}{path}"
        HTTP.open(urllib.request.Request(url, data=json.dumps(content).encode()), timeout=60).close()

    def queue(self, prompt: dict[str, Any], workflow: dict[str, Any] | None = None) -> str:
        """Queue an API-format prompt and return its id. Raises PromptRefused.

        workflow   what the front end sends along for the metadata of pictures
        """
        extra = {"extra_data": {"extra_pnginfo": {"workflow": workflow}}} if workflow is not None else {}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/prompt",
            data=json.dumps({"prompt": prompt, **extra}).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with HTTP.open(request, timeout=60) as answer:
                return json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            if error.code == 400:
                raise PromptRefused(json.load(error)) from None
            raise ServerError(f"POST /prompt: {error}\n{self.log_tail()}") from error

    def run(self, prompt: dict[str, Any], timeout: float = 300.0, workflow: dict[str, Any] | None = None
            ) -> dict[str, Any]:
        """Queue a prompt, wait for its end, and return its entry of /history. Raises PromptRefused or PromptFailed."""
        prompt_id = self.queue(prompt, workflow)
        deadline, pause = time.monotonic() + timeout, 0.01
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI died while the prompt ran\n{self.log_tail()}")
            entry = self.json(f"/history/{prompt_id}").get(prompt_id)
            if entry is None:
                time.sleep(pause)
                pause = min(0.1, 1.5 * pause)
                continue
            for name, details in entry["status"]["messages"]:
                if name in ("execution_error", "execution_interrupted"):
                    raise PromptFailed(details)
            return entry
        raise ServerError(f"The prompt took longer than {timeout:.0f} s\n{self.log_tail()}")

    def free(self) -> None:
        """Ask it, as the front end does, to unload models and to keep no results."""
        body = json.dumps({"unload_models": True, "free_memory": True}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/free", data=body,
                                         headers={"Content-Type": "application/json"})
        with HTTP.open(request, timeout=60):
            pass

    def images(self, entry: dict[str, Any], node: str | None = None) -> list[bytes]:
        """The image files that a prompt saved, of one node or of all, fetched from /view; no previews."""
        outputs = entry["outputs"]
        found = [image for key in sorted(outputs) if node in (None, key) for image in outputs[key].get("images", ())
                 if image["type"] == "output"]
        return [self.get("/view", **{key: image[key] for key in ("filename", "subfolder", "type")}) for image in found]
