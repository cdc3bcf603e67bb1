"""What the last run of a MODEL did: where each LoRA acted, as a picture, and the record as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ...engine.record import RunRecord
from ..compose.composition import KEY, Placed, places_of, record_of
from .heat import overlay
from .letters import fitted, font, wrapped

WIDTH, MARGIN, GAP, LINE = 1024, 24, 16, 20
COLUMNS, CELLS, PROBLEMS = 4, 24, 8
"""Maps side by side, and at most on one sheet; lines of what a run could not do as asked."""
INK, PAPER, FAINT = "#222222", "#FFFFFF", "#666666"
NEVER = ("This MODEL has not been sampled yet. Connect the MODEL that the sampler got, and the LATENT that came out of "
         "that sampler.")
WITHOUT = ("No method of this pack is on this MODEL, so there is nothing to report. Connect the MODEL that the sampler "
           "got, behind the method node. What Merge writes into the weights in mode 'baked' leaves no record.")
NOWHERE = ("No LoRA was confined to a place in this run: each acted on the whole picture whenever its method let it. "
           "Routed LoRAs, the input 'place' of the other methods, and masks confine LoRAs.")


@dataclass(frozen=True)
class Cell:
    """One map of the sheet.

    lora    its number, from 0
    title   its name, and the picture and frame where there are several
    words   what was found of its words
    share   of the picture that it acts on, in [0, 1]
    map     [height, width] in [0, 1]
    under   the picture below it [height, width, 3] in [0, 1], if there is one
    """

    lora: int
    title: str
    words: str
    share: float
    map: np.ndarray
    under: np.ndarray | None = None


def report(model, images: Tensor | None = None) -> tuple[Tensor, str]:
    """(a sheet [1, height, width, 3] in [0, 1], JSON) of the last run of a MODEL.

    images   [pictures or all of their frames, height, width, 3], to lay maps over

    The text is `RunRecord.as_dict`, with `words`: per method that confines its LoRAs and has looked for words, what was
    found of each LoRA's in each prompt. Where there was no run, both say so.
    """
    record, places = record_of(model), places_of(model)
    if record is None:
        reason = NEVER if model.get_attachment(KEY) is not None else WITHOUT
        return _tensor(draw(None, [], reason)), json.dumps({"problems": [reason]})
    sections = [(f"Where the LoRAs acted at the end of the run ({len(placed.names)} LoRAs)", cells_of(placed, images))
                for placed in places]
    return _tensor(draw(record, sections, "" if sections else NOWHERE)), as_json(record, places)


def as_json(record: RunRecord, places: Sequence[Placed]) -> str:
    """The record and the words that were found, one step per line and names in their own letters."""
    found = record.as_dict()
    steps = ",\n  ".join(json.dumps(step) for step in found.pop("steps"))
    words = [list(placed.found) for placed in places]
    rest = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
                       for key, value in {**found, "words": words}.items())
    return f'{{{rest},\n "steps": [\n  {steps}\n]}}'


def cells_of(placed: Placed, images: Tensor | None = None) -> list[Cell]:
    """The maps of one method's LoRAs: picture by picture, LoRA by LoRA; of films the first frame and the middle one."""
    maps = placed.maps if placed.maps.ndim == 5 else placed.maps.unsqueeze(2)
    pictures, loras, frames = maps.shape[:3]
    shown = sorted({0, frames // 2})
    cells = []
    for picture in range(pictures):
        for frame in shown:
            under = None if images is None else _picture(images, picture, pictures, frame, frames)
            where = [f"picture {picture + 1}"] if pictures > 1 else []
            where += [f"frame {frame + 1} of {frames}"] if frames > 1 else []
            for i in range(loras):
                whole, here = maps[picture, i], maps[picture, i, frame].float().numpy()
                title = ", ".join([f"{i + 1}  {placed.names[i]}", *where])
                cells.append(Cell(i, title, _words(placed, i, whole), float(whole.float().mean()), here, under))
    return cells


def draw(record: RunRecord | None, sections: Sequence[tuple[str, Sequence[Cell]]], message: str = "") -> Image.Image:
    """The sheet: what was run, a section of maps per method, and what could not be done as asked. At most CELLS maps
    are drawn, and it says how many are not."""
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    room = WIDTH - 2 * MARGIN
    left, parts = CELLS, []
    for title, cells in sections:
        shown = list(cells[:left])
        left -= len(shown)
        cut = "" if len(shown) == len(cells) else f"; {len(cells) - len(shown)} of {len(cells)} maps are not shown"
        parts.append((title + cut, _rows(shown)))
    told = record.problems if record is not None else []
    notes = [line for problem in told[:PROBLEMS] for line in wrapped(probe, f"- {problem}", room, 14, 2)]
    notes += [f"- and {len(told) - PROBLEMS} more in the text"] if len(told) > PROBLEMS else []
    said = wrapped(probe, message, room, 16, 6)
    height = MARGIN * 2 + LINE * 3 + sum(2 * LINE + sum(_height(row) for row in rows) for _, rows in parts)
    height += LINE * (len(said) + 1 + (len(notes) + 2 if notes else 0))
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    pen, y = ImageDraw.Draw(sheet), MARGIN
    pen.text((MARGIN, y), "Ensemble Report", INK, font(22))
    if parts:
        _scale(sheet, pen, (WIDTH - MARGIN - 200, y))
    y += LINE + 10
    if record is not None:
        pen.text((MARGIN, y), fitted(pen, _run(record), room, 15), FAINT, font(15))
    y += LINE + 10
    for line in said:
        pen.text((MARGIN, y), line, INK, font(16))
        y += LINE
    for title, rows in parts:
        pen.text((MARGIN, y), title, INK, font(16))
        y += LINE + 8
        for row in rows:
            for k, cell in enumerate(row.cells):
                _cell(sheet, pen, cell, (MARGIN + k * (row.width + GAP), y), row.width)
            y += _height(row)
    if notes:
        pen.text((MARGIN, y), "What was not done as asked", INK, font(16))
        for line in notes:
            y += LINE
            pen.text((MARGIN, y), line, INK, font(14))
    return sheet


@dataclass(frozen=True)
class _Row:
    cells: tuple[Cell, ...]
    width: int


def _rows(cells: list[Cell]) -> list[_Row]:
    """Rows of equal cells; the LoRAs of one picture are not parted where a row has room for them."""
    each = 1 + max((cell.lora for cell in cells), default=0)
    columns = each * min(COLUMNS // each, -(-len(cells) // each)) if each <= COLUMNS else COLUMNS
    width = (WIDTH - 2 * MARGIN - GAP * (max(columns, 2) - 1)) // max(columns, 2)
    groups = [cells] if each <= COLUMNS else [cells[k:k + each] for k in range(0, len(cells), each)]
    return [_Row(tuple(group[k:k + columns]), width) for group in groups for k in range(0, len(group), columns)]


def _size(cell: Cell, width: int) -> tuple[int, int]:
    """Of the drawn map, in pixels: no higher than the cell is wide."""
    height, across = cell.map.shape
    scale = width / max(height, across)
    return max(round(across * scale), 1), max(round(height * scale), 1)


def _height(row: _Row) -> int:
    return max(_size(cell, row.width)[1] for cell in row.cells) + 4 * LINE + GAP


def _cell(sheet: Image.Image, pen: ImageDraw.ImageDraw, cell: Cell, at: tuple[int, int], width: int) -> None:
    (x, y), size = at, _size(cell, width)
    pen.text((x, y), fitted(pen, cell.title, width, 14), INK, font(14))
    sheet.paste(overlay(cell.map, size, cell.under), (x, y + LINE))
    y += LINE + size[1] + 4
    pen.text((x, y), f"{100 * cell.share:.0f} % of the picture", INK, font(14))
    for line in wrapped(pen, cell.words, width, 13, 2):
        y += LINE - 2
        pen.text((x, y), line, FAINT, font(13))


def _scale(sheet: Image.Image, pen: ImageDraw.ImageDraw, at: tuple[int, int]) -> None:
    """The ramp, as it looks over grey."""
    x, y = at
    sheet.paste(overlay(np.linspace(0, 1, 200, dtype=np.float32)[None], (200, 14)), (x, y))
    for share, text, anchor in ((0, "not here", "la"), (1, "in full", "ra")):
        pen.text((x + 200 * share, y + 18), text, FAINT, font(13), anchor=anchor)


def _run(record: RunRecord) -> str:
    """One line about the whole run."""
    calls, rows = (sum(getattr(step, name) for step in record.steps) for name in ("calls", "rows"))
    methods = ", ".join(record.methods) or "no method"
    ended = "" if record.finished else "; the run did not finish"
    return f"{methods}: {len(record.steps)} steps, {rows} predictions in {calls} evaluations of the model{ended}"


def _words(placed: Placed, i: int, maps: Tensor) -> str:
    """What was found of a LoRA's words in all prompts. `found` has the LoRAs in order, prompt by prompt."""
    own = placed.found[i::len(placed.names)]
    words = ", ".join(dict.fromkeys(f'"{text}"' for each in own for text in each["words"]))
    if any(placed.masked[i:i + 1]):
        return f"in its mask; its words: {words}" if words else "in its mask"
    if words:
        return words
    why = next((each["why"] for each in own if each["why"]), "")
    everywhere = "everywhere" if (maps == 1).all() else ""
    return ": ".join(part for part in (everywhere, why) if part)


def _picture(images: Tensor, picture: int, pictures: int, frame: int, frames: int) -> np.ndarray:
    """The picture below a map: of films, the frame at the same share of the film. Fewer pictures serve for all."""
    each = max(len(images) // pictures, 1)
    first = min(picture * each, len(images) - each)
    at = first + (round(frame * (each - 1) / (frames - 1)) if frames > 1 else 0)
    return images[at].float().cpu().numpy()


def _tensor(sheet: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(sheet, dtype=np.float32) / 255)[None]
