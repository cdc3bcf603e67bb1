"""The browser that files of tests share."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from lora_ensemble.tests.browser import Browser

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
