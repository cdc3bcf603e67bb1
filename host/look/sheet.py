"""The sheet that every picture of figures is drawn on, and its blocks of text and of pictures.

    sheet([Text("..."), Stack(...), Beside((Lines(...), Bars(...)))], "Title")

Blocks stand one below the other. A block is told its width, says how high it is, and draws itself; chart.py has the
charts. Everything has a name beside it, so that no colour has to be known, and no text is smaller than 13 pixels, so
that a sheet 1024 wide can be read as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .heat import coloured, overlay
from .letters import fitted, font, measure, wrapped
from .theme import LIGHT, Theme

WIDTH, MARGIN, GAP = 1024, 28, 24
"""Of a sheet, of its border, and between two blocks, in pixels."""
SMALL, BODY, HEAD, TITLE = 13, 15, 18, 26
"""Sizes of text."""
Place = tuple[int, int]


class Block(Protocol):
    """A part of a sheet."""

    def height(self, width: int) -> int:
        """In pixels, where it may be so wide."""

    def draw(self, on: Image.Image, theme: Theme, at: Place, width: int) -> None:
        """Draw it with its upper left corner there."""


def sheet(blocks: Sequence[Block], title: str, note: str = "", theme: Theme = LIGHT) -> Image.Image:
    """A picture of blocks under a title, with a line about them all."""
    room = WIDTH - 2 * MARGIN
    blocks = [Title(title, note), *blocks]
    heights = [block.height(room) for block in blocks]
    on = Image.new("RGB", (WIDTH, 2 * MARGIN + sum(heights) + GAP * (len(blocks) - 1)), theme.paper)
    y = MARGIN
    for block, height in zip(blocks, heights, strict=True):
        block.draw(on, theme, (MARGIN, y), room)
        y += height + GAP
    return on


def as_image(picture: Image.Image) -> Tensor:
    """A picture as an IMAGE [1, height, width, 3] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]


@dataclass(frozen=True)
class Title:
    """The sheet's own name, and a line about it."""

    text: str
    note: str = ""

    def height(self, width: int) -> int:
        return 34 + (20 if self.note else 0)

    def draw(self, on: Image.Image, theme: Theme, at: Place, width: int) -> None:
        pen = ImageDraw.Draw(on)
        pen.text(at, fitted(pen, self.text, width, TITLE), theme.ink, font(TITLE))
        pen.text((at[0], at[1] + 36), fitted(pen, self.note, width, BODY), theme.faint, font(BODY))


@dataclass(frozen=True)
class Text:
    """Lines of text, each wrapped; of one at most `most` lines are shown."""

    text: str
    head: str = ""
    most: int = 6

    def height(self, width: int) -> int:
        return 21 * len(self._lines(width)) + (28 if self.head else 0)

    def draw(self, on: Image.Image, theme: Theme, at: Place, width: int) -> None:
        pen, (x, y) = ImageDraw.Draw(on), at
        if self.head:
            pen.text((x, y), fitted(pen, self.head, width, HEAD), theme.ink, font(HEAD))
            y += 28
        for line in self._lines(width):
            pen.text((x, y), line, theme.ink, font(BODY))
            y += 21

    def _lines(self, width: int) -> list[str]:
        return [line for part in self.text.splitlines() for line in wrapped(measure(), part, width, BODY, self.most)]


@dataclass(frozen=True)
class Figures:
    """A few numbers that tell most: (number, what it is)."""

    figures: Sequence[tuple[str, str]]

    def height(self, width: int) -> int:
        return 74

    def draw(self, on: Image.Image, theme: Theme, at: Place, width: int) -> None:
        pen, (x, y), each = ImageDraw.Draw(on), at, (width + 12) // max(len(self.figures), 1)
        for k, (number, what) in enumerate(self.figures):
            left = x + k * each
            pen.rounded_rectangle((left, y, left + each - 13, y + 73), 6, theme.panel)
            pen.text((left + 14, y + 10), fitted(pen, number, each - 40, 28), theme.ink, font(28))
            pen.text((left + 14, y + 48), fitted(pen, what, each - 40, SMALL), theme.faint, font(SMALL))


class Cell(NamedTuple):
    """A picture with a title above it and lines below it, each of which may take two."""

    title: str
    picture: Image.Image
    lines: Sequence[str] = ()


@dataclass(frozen=True)
class Pictures:
    """Pictures in rows, each as wide as its cell and no higher than that. `ends`: what the two ends of the ramp mean in
    pictures that have one laid over them."""

    cells: Sequence[Cell]
    columns: int
    head: str = ""
    ends: tuple[str, str] | None = None

    def height(self, width: int) -> int:
        return sum(self._row(row, width) for row in self._rows()) + 16 * (len(self._rows()) - 1) + 30 * bool(self.head)

    def draw(self, on: Image.Image, theme: Theme, at: Place, width: int) -> None:
        pen, (x, y), each = ImageDraw.Draw(on), at, self._each(width)
        if self.head:
            pen.text((x, y), fitted(pen, self.head, width - (300 if self.ends else 0), HEAD), theme.ink, font(HEAD))
            y += 30
        if self.ends:
            ramp(on, theme, (x + width, at[1] + 2), self.ends, over_grey=True)
        for row in self._rows():
            tallest = max(self._size(cell, each)[1] for cell in row)
            for k, cell in enumerate(row):
                left, top = x + k * (each + 16), y + 28 + tallest
                pen.text((left, y), fitted(pen, cell.title, each, BODY), theme.ink, font(BODY))
                picture, size = cell.picture, self._size(cell, each)
                on.paste(picture if picture.size == size else picture.resize(size, Image.Resampling.BICUBIC),
                         (left, y + 22))
                for line in self._lines(cell, each):
                    pen.text((left, top), line, theme.faint, font(SMALL))
                    top += 18
            y += self._row(row, width) + 16

    def _each(self, width: int) -> int:
        return (width - 16 * (self.columns - 1)) // self.columns

    def _rows(self) -> list[Sequence[Cell]]:
        return [self.cells[k:k + self.columns] for k in range(0, len(self.cells), self.columns)]

    def _row(self, row: Sequence[Cell], width: int) -> int:
        each = self._each(width)
        lines = max(len(self._lines(cell, each)) for cell in row)
        return 28 + max(self._size(cell, each)[1] for cell in row) + 18 * lines

    def _lines(self, cell: Cell, each: int) -> list[str]:
        return [part for line in cell.lines for part in wrapped(measure(), line, each, SMALL, 2)]

    def _size(self, cell: Cell, each: int) -> tuple[int, int]:
        wide, high = cell.picture.size
        scale = each / max(wide, high)
        return max(round(wide * scale), 1), max(round(high * scale), 1)


@dataclass(frozen=True)
class Beside:
    """Blocks side by side."""

    blocks: Sequence[Block]

    def height(self, width: int) -> int:
        return max(block.height(self._each(width)) for block in self.blocks)

    def draw(self, on: Image.Image, theme: Theme, at: Place, width: int) -> None:
        for k, block in enumerate(self.blocks):
            block.draw(on, theme, (at[0] + k * (self._each(width) + GAP), at[1]), self._each(width))

    def _each(self, width: int) -> int:
        return (width - GAP * (len(self.blocks) - 1)) // len(self.blocks)


@dataclass(frozen=True)
class Legend:
    """Names beside their colours, in as many lines as they take."""

    names: Sequence[tuple[str, str]]

    def height(self, width: int) -> int:
        return 20 * (1 + max((line for line, _, _ in self._places(width)), default=-1))

    def draw(self, on: Image.Image, theme: Theme, at: Place, width: int) -> None:
        pen = ImageDraw.Draw(on)
        for (line, left, name), (_, colour) in zip(self._places(width), self.names, strict=True):
            x, y = at[0] + left, at[1] + 20 * line
            pen.rounded_rectangle((x, y + 3, x + 12, y + 15), 2, colour)
            pen.text((x + 18, y), name, theme.ink, font(SMALL))

    def _places(self, width: int) -> list[tuple[int, int, str]]:
        pen, line, x, out = measure(), 0, 0, []
        for name, _ in self.names:
            name = fitted(pen, name, width - 18, SMALL)
            long = 18 + ceil(pen.textlength(name, font(SMALL)))
            line, x = (line + 1, 0) if x and x + long > width else (line, x)
            out.append((line, x, name))
            x += long + 20
        return out


def ramp(on: Image.Image, theme: Theme, end: Place, ends: tuple[str, str], over_grey: bool = False) -> None:
    """The colours of heat with what their two ends mean, up to a place on the right; as they are, or as they look when
    they are laid over a grey picture."""
    pen, (x, y), wide, (low, high) = ImageDraw.Draw(on), end, 120, ends
    pen.text((x, y), high, theme.faint, font(SMALL), anchor="ra")
    x -= round(pen.textlength(high, font(SMALL))) + 8 + wide
    values = np.linspace(0, 1, wide, dtype=np.float32)[None]
    pure = Image.fromarray(coloured(values.repeat(12, axis=0)).round().astype(np.uint8))
    on.paste(overlay(values, (wide, 12)) if over_grey else pure, (x, y + 2))
    pen.text((x - 8, y), low, theme.faint, font(SMALL), anchor="ra")
