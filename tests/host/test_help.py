"""Help pages in ComfyUI's own panel, in the language of the page: with their pictures, and inputs as the node shows
them."""

from __future__ import annotations

import pytest
from lora_ensemble.tests.browser import Browser
from lora_ensemble.tests.front_end import FrontEnd
from lora_ensemble.tests.server import Server
from lora_ensemble.tools.languages import LANGUAGES, read

NODE = "LoRAEnsembleRouted"
SELECTED = f"(node => (app.graph.add(node), app.canvas.selectNode(node), true))(LiteGraph.createNode('{NODE}'))"
BUTTON = "document.querySelector('[data-testid=info-button]')"
SHOWN = "document.querySelector('.node-help-content')"
PICTURES = f"Array.from({SHOWN}.querySelectorAll('img'))"
LABELS = "app.graph._nodes.at(-1).widgets.map(widget => widget.label)"


@pytest.fixture(scope="module")
def page(browser: Browser, server: Server) -> FrontEnd:
    return FrontEnd(browser, server, nodes_2=False)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_panel_shows_the_page_of_the_language(page: FrontEnd, language: str):
    page.set("Comfy.Locale", language)
    try:
        page.load()
        page.browser.evaluate(SELECTED)
        page.browser.wait_for(f"!!{BUTTON}")
        page.browser.evaluate(f"({BUTTON}.click(), true)")
        page.browser.wait_for(f"{SHOWN} && {PICTURES}.some(picture => picture.naturalWidth > 0)")
        text, labels = page.browser.evaluate(f"{SHOWN}.innerText"), page.browser.evaluate(LABELS)
        assert text.startswith(read(language)[NODE]["display_name"])
        assert "モード" in labels or "模式" in labels
        assert all(f"{label}（" in text for label in labels)
    finally:
        page.set("Comfy.Locale", "en")  # seen by the page that is loaded next
