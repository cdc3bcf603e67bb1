"""Workflows that version 0.1.0 saved: every value is that of its widget, they run, and they draw what they drew. How
the front end opens them is in `test_golden_pages.py`.

What they drew is in tests/golden, made by that version's own nodes (`tests/golden_pictures.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lora_ensemble.tests import golden_pictures
from lora_ensemble.tests.golden_pictures import FOLDER, GRAPHS, PROMPTS
from lora_ensemble.tests.server import Server
from lora_ensemble.tests.workflows import load
from PIL import Image

from .test_example_workflows import as_api, check_graph, check_prompt, defaults_of_later

PICTURES = sorted((FOLDER / "pictures").glob("*.png"))
GREY_LEVELS = 2.0  # in any pixel: another order of sums, over six steps

each_graph = pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)


def twin(path: Path) -> dict:
    """What the first version sent for a workflow, with the defaults of inputs that came later."""
    prompt = load(FOLDER / "api" / path.name)
    return {key: {"class_type": node["class_type"],
                  "inputs": defaults_of_later(node["class_type"]) | node["inputs"]} for key, node in prompt.items()}


def test_all_of_the_first_version_are_here():
    assert [path.name for path in GRAPHS] == [path.name for path in PROMPTS] and len(GRAPHS) == 21
    assert {path.stem for path in PICTURES} == {path.stem for path in PROMPTS} - {"sd15_spectrum"}


@each_graph
def test_they_agree_with_the_schemas_of_today(path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    check_graph(graph)
    check_prompt(load(FOLDER / "api" / path.name))
    assert as_api(graph) == twin(path)


@pytest.fixture(scope="module")
def with_files(server: Server) -> Iterator[Server]:
    golden_pictures.give_files(server)
    yield server


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_they_draw_what_they_drew(with_files: Server, path: Path):
    found = golden_pictures.drawn(with_files, path)
    if found is None:
        assert path.stem not in {picture.stem for picture in PICTURES}
        return
    with Image.open(FOLDER / "pictures" / f"{path.stem}.png") as picture:
        before = np.asarray(picture, dtype=float)
    assert found.shape == before.shape and found.std() > 5
    assert np.abs(found - before).max() <= GREY_LEVELS
