#!/usr/bin/env python3
"""Queue a workflow on a running ComfyUI, follow it live, and save its images.

    python3 queue_prompt.py workflow.json
    python3 queue_prompt.py workflow.json --server 192.168.1.5:8188 --out pictures --set 6.text="a cat" --set 3.seed=7

The workflow is a file in API format (in ComfyUI: Workflow, Export (API)). `--set NODE.INPUT=VALUE` changes an input
before it is queued. NODE is the node's number, or its title or class where one node alone has it; VALUE is JSON where
it can be read as JSON, else text. Python 3.10 or newer, nothing to install.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import socket
import struct
import sys
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # straight to the server, as the websocket goes


class Problem(Exception):
    """What went wrong, in words for the person at the terminal."""


class Unreachable(Problem):
    """The server does not answer, so that there is no use in asking it for anything else."""


@contextmanager
def speaking_to(server: str, timeout: float) -> Iterator[None]:
    """What goes wrong between here and the server is raised as Unreachable."""
    try:
        yield
    except TimeoutError:
        raise Unreachable(f"Nothing heard from {server} for {timeout:.0f} s.") from None
    except (OSError, ValueError) as error:
        raise Unreachable(f"No ComfyUI reachable at {server}: {error}. "
                          "Start it, or name another HOST:PORT where one runs.") from None


class WebSocket:
    """The receiving half of RFC 6455, which is all that ComfyUI's progress needs."""

    def __init__(self, server: str, path: str, timeout: float) -> None:
        host, _, port = server.rpartition(":")
        self.socket = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout)
        self.stream = self.socket.makefile("rb")
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {server}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        status = self.stream.readline().decode("latin-1").strip()
        if " 101 " not in f"{status} ":
            raise Problem(f"{server} answered '{status}' where a websocket was asked for; is it a ComfyUI?")
        while self.stream.readline().strip():
            pass

    def _read(self, size: int) -> bytes:
        data = self.stream.read(size)
        if len(data) < size:
            raise Unreachable("The server closed the connection.")
        return data

    def _frame(self) -> tuple[int, bool, bytes]:
        first, second = self._read(2)
        size = second & 0x7F
        if size > 125:
            size = struct.unpack(">H", self._read(2))[0] if size == 126 else struct.unpack(">Q", self._read(8))[0]
        return first & 0x0F, bool(first & 0x80), self._read(size)

    def messages(self) -> Iterator[dict[str, Any]]:
        """JSON messages as they come; previews (binary) are skipped, pings answered."""
        kind, parts = 0, []
        while True:
            opcode, last, data = self._frame()
            if opcode == 8:
                raise Unreachable("The server closed the connection.")
            if opcode == 9:
                mask = os.urandom(4)
                payload = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
                self.socket.sendall(bytes([0x8A, 0x80 | len(data)]) + mask + payload)
            if opcode > 2:
                continue
            kind, parts = (opcode, [data]) if opcode else (kind, [*parts, data])
            if last and kind == 1:
                yield json.loads(b"".join(parts))

    def close(self) -> None:
        self.stream.close()
        self.socket.close()


def call(server: str, path: str, data: Any = None) -> bytes:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(f"http://{server}{path}", body, {"Content-Type": "application/json"})
    try:
        with HTTP.open(request, timeout=60) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        if error.code != 400:
            raise Problem(f"{server}{path}: {error}") from None
        raise Problem(refusal(json.load(error))) from None


def refusal(answer: dict[str, Any]) -> str:
    """The server's reasons for not taking a workflow, one line per input."""
    error = answer["error"]
    lines = [f"The server does not take this workflow: {error['message']} {error['details']}".strip()]
    for node, entry in (answer.get("node_errors") or {}).items():
        lines += [f"  node {node} ({entry['class_type']}): {e['message']}: {e['details']}" for e in entry["errors"]]
    return "\n".join(lines)


def load_workflow(path: Path, changes: list[str]) -> dict[str, Any]:
    """The workflow with `--set` applied. Raises Problem for a file that is not one in API format."""
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Problem(f"{path} cannot be read: {error}") from None
    if not isinstance(workflow, dict) or "nodes" in workflow or not all("class_type" in n for n in workflow.values()):
        raise Problem(f"{path} is not in API format. In ComfyUI use Workflow, Export (API).")
    for change in changes:
        target, equals, text = change.partition("=")
        try:
            if not equals:
                raise Problem(f"expected NODE.INPUT=VALUE with a node and an input of {path.name}")
            node, name = place_of(workflow, target)
        except Problem as problem:
            raise Problem(f"--set {change}: {problem}") from None
        workflow[node]["inputs"][name] = value_of(text)
    return workflow


def place_of(workflow: dict[str, Any], target: str, more: tuple[str, ...] = ()) -> tuple[str, str]:
    """(node, input) that NODE.INPUT means. Both may have dots in them. Raises Problem.

    more   what counts as an input of every node
    """
    several: list[str] = []
    for at in (i for i, letter in enumerate(target) if letter == "."):
        name, found = target[at + 1:], named(workflow, target[:at])
        found = [node for node in found if name in workflow[node]["inputs"] or name in more]
        if len(found) == 1:
            return found[0], name
        several = several or found
    if several:
        raise Problem(f"several nodes are called so: {', '.join(several)}. Name one by its number.")
    raise Problem("expected NODE.INPUT, with the number, title or class of a node of the workflow and an input of it")


def named(workflow: dict[str, Any], name: str) -> list[str]:
    """The nodes of a number, or else of a title, or else of a class."""
    if name in workflow:
        return [name]
    titled = [node for node, entry in workflow.items() if entry.get("_meta", {}).get("title") == name]
    return titled or [node for node, entry in workflow.items() if entry["class_type"] == name]


def value_of(text: str) -> Any:
    """JSON where it can be read as JSON, else text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def follow(socket_: WebSocket, prompt_id: str, workflow: dict[str, Any], tell: Callable[[str], object]) -> None:
    """Tell which node runs and how far it is, until the prompt ends. Raises Problem when a node fails."""
    node = None
    for message in socket_.messages():
        kind, data = message.get("type"), message.get("data")
        # Nodes send messages of their own, which may hold anything.
        if not isinstance(data, dict) or data.get("prompt_id", prompt_id) != prompt_id:
            continue
        if kind == "executing":
            node = data.get("node")
            if node is None and "prompt_id" in data:
                return
            if node in workflow:
                tell(f"  {node}: {workflow[node]['class_type']}")
        elif kind == "progress":
            tell(f"    {data['value']} of {data['max']}")
        elif kind == "execution_error":
            raise Problem(f"Node {data['node_id']} ({data['node_type']}) failed: {data['exception_message'].strip()}")
        elif kind == "execution_interrupted":
            raise Problem("The run was interrupted on the server.")


def fetched(server: str, image: dict[str, str]) -> bytes:
    """An image file that a prompt left, as its entry of /history names it."""
    query = urllib.parse.urlencode({key: image[key] for key in ("filename", "subfolder", "type")})
    return call(server, f"/view?{query}")


def save_images(server: str, entry: dict[str, Any], out: Path) -> list[Path]:
    """Write the images of an entry of /history to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    saved = []
    for output in entry["outputs"].values():
        for image in output.get("images", ()):
            path = out / Path(image["filename"]).name
            path.write_bytes(fetched(server, image))
            saved.append(path)
    return saved


def finished(server: str, workflow: dict[str, Any], timeout: float,
             tell: Callable[[str], object] = print) -> dict[str, Any]:
    """Queue `workflow`, wait for its end and return its entry of /history. Raises Problem where it fails."""
    client = uuid.uuid4().hex
    live = WebSocket(server, f"/ws?clientId={client}", timeout)  # before queueing, so that no message is missed
    try:
        prompt_id = json.loads(call(server, "/prompt", {"prompt": workflow, "client_id": client}))["prompt_id"]
        tell(f"queued {prompt_id}")
        follow(live, prompt_id, workflow, tell)
    finally:
        live.close()
    return json.loads(call(server, f"/history/{prompt_id}"))[prompt_id]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--server", default="127.0.0.1:8188", help="HOST:PORT (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the images (default: this one)")
    parser.add_argument("--set", dest="changes", metavar="NODE.INPUT=VALUE", action="append", default=[])
    parser.add_argument("--timeout", type=float, default=600, help="seconds of silence before giving up")
    options = parser.parse_args()
    try:
        workflow = load_workflow(options.workflow, options.changes)
        with speaking_to(options.server, options.timeout):
            saved = save_images(options.server, finished(options.server, workflow, options.timeout), options.out)
    except Problem as problem:
        sys.exit(str(problem))
    print("\n".join(f"saved {path}" for path in saved) or "The workflow ran, but it saved no image.")


if __name__ == "__main__":
    main()
