"""The browser that files of tests share."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from lora_ensemble.tests.browser import Browser, BrowserError

KEEP = """new Promise(done => {
  localStorage.setItem('it', 1)
  sessionStorage.setItem('it', 1)
  document.cookie = 'it=1; max-age=1000'
  indexedDB.open('it').onsuccess = event => { event.target.result.close(); done(true) }
})"""
KEPT = """(async () => [localStorage.length, sessionStorage.length, document.cookie,
  (await indexedDB.databases()).length])()"""


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_nothing_stays_of_a_page_that_was_left(browser: Browser, address: str):
    def opened() -> None:
        browser.open(address)
        browser.wait_for("document.readyState === 'complete' && location.protocol === 'http:'")

    opened()
    browser.evaluate(KEEP)
    assert browser.evaluate(KEPT) == [1, 1, "it=1", 1]
    opened()
    assert browser.evaluate(KEPT) == [1, 1, "it=1", 1]
    browser.leave()
    assert browser.evaluate("location.href") == "about:blank"
    opened()
    assert browser.evaluate(KEPT) == [0, 0, "", 0]


def test_an_answer_that_comes_too_late_spoils_nothing_after_it(browser: Browser):
    """Guard: a busy machine makes one call late, and every call after it waits for its time to be over."""
    with pytest.raises(BrowserError, match=r"Runtime.evaluate: no answer from the browser, none in 0.1 s"):
        browser._do(browser._call("Runtime.evaluate", seconds=0.1, awaitPromise=True,
                                  expression="new Promise(done => setTimeout(done, 500))"))
    for _ in range(2):
        assert browser.evaluate("new Promise(done => setTimeout(() => done(7), 600))") == 7


def test_a_browser_that_has_gone_is_not_waited_for(chromium: Browser, tmp_path):
    with Browser(tmp_path, chromium.chromium) as lone:
        assert lone.evaluate("3 + 4") == 7
        lone._process.kill()
        lone._process.wait()
        with pytest.raises((BrowserError, ConnectionError)):
            lone.evaluate("3 + 4")
