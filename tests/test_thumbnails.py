"""The pictures of the example workflows in the template browser: one for each, small, of things that there are."""

from __future__ import annotations

import pytest
from lora_ensemble.tests import host_pictures
from lora_ensemble.tools.thumbnails import FOLDER, LOOKS, ROOT, SIDE, drawn, family, listing, sets, turn
from PIL import Image

EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.json"))
LARGEST = 40 * 1024
COMMAND = "make it with `python3 run.py _with - lora_ensemble.tools.thumbnails NAME`"


def test_every_example_has_a_title():
    """A new example needs a line in `tools/thumbnails.py`, and its picture."""
    assert set(LOOKS) == set(EXAMPLES)
    assert len({(look.title, family(name), look.about) for name, look in LOOKS.items()}) == len(LOOKS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_has_a_picture(name):
    path = FOLDER / f"{name}.jpg"
    assert path.is_file(), COMMAND
    assert path.stat().st_size <= LARGEST
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "JPEG" and picture.size == (SIDE, SIDE)


def test_no_picture_is_left_over():
    assert {path.stem for path in FOLDER.glob("*.jpg")} == set(EXAMPLES)


def test_the_list_of_examples_is_that_of_today():
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == listing(), COMMAND


def test_each_workflow_about_a_method_shows_a_set_of_its_own():
    shown = [(look.methods, look.loras, turn(name)) for name, look in LOOKS.items()]
    assert len(set(shown)) == len(shown)
    for name, look in LOOKS.items():
        assert turn(name) < len(sets(look.loras))
        assert len(sets(look.loras)[turn(name)].loras) == look.loras


def test_sheets_are_pictures_of_the_help_pages():
    for look in LOOKS.values():
        if look.sheet is not None:
            name, (left, top, right, bottom) = look.sheet
            with Image.open(ROOT / "web" / "docs" / f"{name}.png") as whole:
                assert 0 <= left < right <= whole.width and 0 <= top < bottom <= whole.height


def test_every_picture_of_the_pages_is_made_by_a_command():
    """`run.py _with - lora_ensemble.tests.host_pictures`"""
    assert sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.png")) == sorted(host_pictures.NAMES)


def test_a_sheet_needs_no_picture_of_its_own():
    assert drawn([name for name, look in LOOKS.items() if look.sheet is not None]) == {}
