"""Workflows that version 0.1.0 saved, opened in the real front end: every value is at its widget."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from lora_ensemble.tests.front_end import FrontEnd

from .test_front_end import page  # noqa: F401  (a fixture)
from .test_golden import each_graph, twin


@pytest.mark.parametrize("page", ["classic"], indirect=True)
@each_graph
def test_they_open_with_every_value_at_its_widget(page: FrontEnd, path: Path):  # noqa: F811
    """No node is missing, no widget has the value of another, no wire is lost."""
    graph, said = json.loads(path.read_text(encoding="utf-8")), len(page.complaints())
    page.open_graph(copy.deepcopy(graph), path.stem)
    assert [node.kind for node in page.nodes() if not node.known] == []
    sent = page.browser.evaluate("app.graphToPrompt().then(prompt => JSON.stringify(prompt.output))")
    assert {key: {"class_type": node["class_type"], "inputs": node["inputs"]}
            for key, node in json.loads(sent).items()} == twin(path)
    assert page.complaints()[said:] == []
