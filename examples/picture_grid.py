"""Pictures side by side on a sheet: lines of text beside each row, a name above each column. Needs Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from ..host.look.letters import fitted, font, wrapped

SIDE, LABEL, GAP, LINE, TEXT = 320, 220, 8, 20, 15
"""The longer side of a picture, the room for the lines beside a row, and of text."""
ROWS = 24
"""On one sheet: viewers refuse pictures of any height."""
INK, PAPER, FAINT, EMPTY = "#222222", "#FFFFFF", "#666666", "#EEEEEE"


@dataclass(frozen=True)
class Cell:
    """Where a picture is, and what is said in its place where there is none."""

    path: Path
    problem: str = ""


def save_grids(columns: Sequence[str], titles: Sequence[Sequence[str]], cells: Sequence[Sequence[Cell]],
               out: Path) -> list[Path]:
    """Write `grid.png`, and `grid_2.png` and so on where there are more than ROWS rows; what an earlier run left of
    further ones is removed.

    titles   the lines beside each row
    """
    paths = []
    for start in range(0, len(cells), ROWS):
        paths.append(sheet_path(out, len(paths) + 1))
        draw_sheet(columns, titles[start:start + ROWS], cells[start:start + ROWS]).save(paths[-1])
    number = len(paths) + 1
    while sheet_path(out, number).is_file():
        sheet_path(out, number).unlink()
        number += 1
    return paths


def sheet_path(out: Path, number: int) -> Path:
    return out / ("grid.png" if number == 1 else f"grid_{number}.png")


def draw_sheet(columns: Sequence[str], titles: Sequence[Sequence[str]],
               cells: Sequence[Sequence[Cell]]) -> Image.Image:
    """One sheet: the columns' names above, each row's lines at the left."""
    width, height = cell_size(cells)
    sheet = Image.new("RGB", (GAP + LABEL + (width + GAP) * len(columns),
                              2 * GAP + LINE + (height + GAP) * len(cells)), PAPER)
    pen = ImageDraw.Draw(sheet)
    lefts = [GAP + LABEL + (width + GAP) * i for i in range(len(columns))]
    for left, name in zip(lefts, columns, strict=True):
        pen.text((left, GAP), fitted(pen, name, width, TEXT), INK, font(TEXT))
    for k, (lines, row) in enumerate(zip(titles, cells, strict=True)):
        top = 2 * GAP + LINE + (height + GAP) * k
        for i, line in enumerate(lines[:height // LINE]):
            text = fitted(pen, line, LABEL - GAP, TEXT)
            pen.text((GAP, top + LINE * i), text, INK if i else FAINT, font(TEXT))
        for left, cell in zip(lefts, row, strict=True):
            if cell.path.is_file():
                with Image.open(cell.path) as picture:
                    sheet.paste(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (left, top))
                continue
            pen.rectangle((left, top, left + width - 1, top + height - 1), EMPTY)
            said = wrapped(pen, cell.problem or "not drawn yet", width - 2 * GAP, TEXT, max(1, height // LINE - 1))
            for i, line in enumerate(said):
                pen.text((left + GAP, top + GAP + LINE * i), line, FAINT, font(TEXT))
    return sheet


def cell_size(cells: Sequence[Sequence[Cell]]) -> tuple[int, int]:
    """Width and height of all cells, in the proportions of the first picture that there is."""
    for cell in (cell for row in cells for cell in row if cell.path.is_file()):
        with Image.open(cell.path) as picture:
            scale = SIDE / max(picture.size)
            return max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return SIDE, SIDE
