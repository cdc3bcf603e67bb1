"""A headless Chromium for tests, driven over the DevTools protocol: started in a folder of its own, always stopped.

    with Browser(tmp_path, find_chromium()) as browser:
        browser.open("http://127.0.0.1:8188")
        browser.evaluate("document.title")

Needs aiohttp, which every ComfyUI has.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--no-default-browser-check", "--disable-background-networking", "--disable-component-update",
    "--disable-dev-shm-usage", "--disable-extensions", "--hide-scrollbars", "--mute-audio", "--no-proxy-server",
    "--remote-debugging-port=0", "--lang=en-US",
)


class BrowserError(RuntimeError):
    """The browser did not start, or a script raised."""


def find_chromium() -> str | None:
    """The Chromium named in CHROMIUM, else one on the PATH, else None."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab of a headless Chromium with an empty profile in `folder`; a context manager.

    `complaints` collects what the page wrote to the console as an error, and exceptions that nothing caught.
    """

    def __init__(self, folder: Path, chromium: str, size: tuple[int, int] = (1920, 1080)) -> None:
        self.folder, self.chromium, self.size = Path(folder), chromium, size
        self.complaints: list[str] = []
        self._loop, self._numbers, self._waiting = asyncio.new_event_loop(), itertools.count(1), {}
        self._process = self._session = self._socket = self._reader = None

    # --- life ---

    def __enter__(self) -> Browser:
        try:
            self._do(self._start())
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def _start(self) -> None:
        import aiohttp

        profile = self.folder / "profile"
        profile.mkdir(parents=True)
        command = [self.chromium, *FLAGS, f"--user-data-dir={profile}", f"--window-size={self.size[0]},{self.size[1]}",
                   "about:blank"]
        with (self.folder / "browser.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        port = await self._port(profile / "DevToolsActivePort")
        self._session = aiohttp.ClientSession(trust_env=False)
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tab = next(entry for entry in await answer.json() if entry["type"] == "page")
        self._socket = await self._session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0)
        self._reader = asyncio.ensure_future(self._read())
        width, height = self.size
        await self._call("Page.enable")
        await self._call("Runtime.enable")
        await self._call("Log.enable")
        await self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                         mobile=False)

    async def _port(self, file: Path, seconds: float = 60.0) -> int:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise BrowserError(f"{self.chromium} ended with exit code {self._process.returncode}: {self._log()}")
            if file.is_file() and (lines := file.read_text().splitlines()):
                return int(lines[0])
            await asyncio.sleep(0.05)
        raise BrowserError(f"{self.chromium} did not open its port within {seconds:.0f} s: {self._log()}")

    def _log(self) -> str:
        return (self.folder / "browser.log").read_text(encoding="utf-8", errors="replace")[-2000:]

    def stop(self) -> None:
        """End the browser. Safe to call at any time."""
        if self._loop.is_closed():
            return
        if self._reader is not None:
            self._reader.cancel()
        if self._session is not None:
            self._do(self._session.close())
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._loop.close()

    # --- the protocol ---

    def _do(self, task: Any) -> Any:
        return self._loop.run_until_complete(task)

    async def _read(self) -> None:
        async for message in self._socket:
            data = message.json()
            if "id" in data:
                self._waiting.pop(data["id"]).set_result(data)
                continue
            what, about = data["method"], data["params"]
            if what == "Page.javascriptDialogOpening":  # "leave this page?"
                await self._send("Page.handleJavaScriptDialog", accept=True)
            elif what == "Runtime.exceptionThrown":
                details = about["exceptionDetails"]
                self.complaints.append(details.get("exception", {}).get("description") or details["text"])
            elif what == "Runtime.consoleAPICalled" and about["type"] == "error":
                words = [str(part.get("value", part.get("description", ""))) for part in about["args"]]
                self.complaints.append(" ".join(words))
            elif what == "Log.entryAdded" and about["entry"]["level"] == "error":
                self.complaints.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")

    async def _send(self, method: str, **params: Any) -> asyncio.Future:
        number = next(self._numbers)
        self._waiting[number] = answer = self._loop.create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        return answer

    async def _call(self, method: str, seconds: float = 60.0, **params: Any) -> dict[str, Any]:
        answer = await self._send(method, **params)
        await asyncio.wait({answer, self._reader}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():  # one that comes later is let in, and nobody asks for it
            why = f"{self._reader.exception() or 'it has gone'}: {self._log()}" if self._reader.done() else \
                f"none in {seconds:g} s"
            raise BrowserError(f"{method}: no answer from the browser, {why}")
        data = answer.result()
        if "error" in data:
            raise BrowserError(f"{method}: {data['error']['message']}")
        return data["result"]

    # --- what tests ask for ---

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol."""
        return self._do(self._call(method, **params))

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def leave(self) -> None:
        """Closes the page; nothing stays of what it kept."""
        self.open("about:blank")
        self.call("Storage.clearDataForOrigin", origin="*", storageTypes="all")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited. Raises BrowserError where it throws."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True,
                           userGesture=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description") or details["text"])
        return result["result"].get("value")

    def wait_for(self, script: str, seconds: float = 60.0) -> Any:
        """The value of an expression as soon as it is true. Raises BrowserError after `seconds`."""
        deadline, error = time.monotonic() + seconds, None
        while time.monotonic() < deadline:
            try:
                if value := self.evaluate(script):
                    return value
            except BrowserError as raised:  # the page may be on its way
                error = raised
            self._do(asyncio.sleep(0.1))
        raise BrowserError(f"waited {seconds:.0f} s for {script!r}{f': {error}' if error else ''}")

    def pause(self, seconds: float) -> None:
        self._do(asyncio.sleep(seconds))

    def press(self, key: str, text: str = "") -> None:
        """Press and release one key; `text` is what it types."""
        extra = {"text": text} if text else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **extra)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def write(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def click(self, x: float, y: float, times: int = 1) -> None:
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count)

    def picture(self, path: Path) -> Path:
        """The tab as a PNG file."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
        return path
