"""Charts for sheets: what changes from step to step, and what is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from .heat import coloured
from .letters import fitted, font
from .sheet import HEAD, SMALL, Legend, Place, ramp
from .theme import LIGHT, Theme, contrasting, rgb

FINE = 3
"""Curves are drawn so many times larger and made small again: Pillow's own lines have steps."""
T = TypeVar("T")


class Series(NamedTuple):
    """A line or a layer of a chart. The colour None is that of its place."""

    name: str
    values: Sequence[float | None]
    colour: str | None = None


@dataclass(frozen=True)
class Chart:
    """What charts over steps have in common: a head, a legend, a panel with a scale on the left and steps below it.

    head      what it shows
    series    its lines or layers
    tall      the panel's height
    across    what runs from left to right, and its marks: (place from 0 to 1, text); None: steps from 1 on
    lowest    of the scale
    highest   of the scale; None: as the values have it
    marks     of the scale: (value, text); None: round numbers
    """

    head: str
    series: Sequence[Series]
    tall: int = 150
    across: tuple[str, Sequence[tuple[float, str]] | None] = ("step", None)
    lowest: float | None = 0.0
    highest: float | None = None
    marks: Sequence[tuple[float, str]] | None = None

    LEFT = 52

    def height(self, width: int) -> int:
        return 26 + self._legend(LIGHT).height(width) + 8 + self.tall + 40

    def draw(self, on: Image.Image, theme: Theme, at: Place, width: int) -> None:
        pen, (x, y), legend = ImageDraw.Draw(on), at, self._legend(theme)
        pen.text((x, y), fitted(pen, self.head, width, HEAD - 2), theme.ink, font(HEAD - 2))
        legend.draw(on, theme, (x, y + 26), width)
        x, y, width = x + self.LEFT, y + 34 + legend.height(width), width - self.LEFT
        pen.rectangle((x, y, x + width - 1, y + self.tall - 1), theme.panel)
        low, high = self.scale()
        for value, text in self.marks if self.marks is not None else marks(low, high):
            level = y + self.tall - 1 - round((self.tall - 1) * (value - low) / (high - low))
            pen.line((x, level, x + width - 1, level), theme.grid)
            pen.text((x - 8, level), text, theme.faint, font(SMALL), anchor="rm")
        self.panel(on, theme, (x, y), width)
        name, places = self.across
        for place, text in places if places is not None else step_marks(self.count):
            anchor = "la" if place <= 0 and places else "ra" if place >= 1 and places else "ma"
            pen.text((x + place * (width - 1), y + self.tall + 5), text, theme.faint, font(SMALL), anchor=anchor)
        pen.text((x + width / 2, y + self.tall + 22), name, theme.faint, font(SMALL), anchor="ma")

    def panel(self, on: Image.Image, theme: Theme, at: Place, width: int) -> None:
        """What is between the axes."""
        raise NotImplementedError

    def scale(self) -> tuple[float, float]:
        """(lowest, highest)"""
        known = [value for one in self.series for value in one.values if value is not None]
        low, high = min(known, default=0.0), max(known, default=1.0)
        room = 0.05 * (high - (low if self.lowest is None else self.lowest))  # no curve on the edge
        low = self.lowest if self.lowest is not None else low - room
        high = self.highest if self.highest is not None else high + room
        return low, high if high > low else low + (abs(low) or 1.0)

    def colours(self, theme: Theme) -> list[str]:
        """Of the series."""
        return [one.colour or theme.colour(i) for i, one in enumerate(self.series)]

    @property
    def count(self) -> int:
        """Of the steps."""
        return max((len(one.values) for one in self.series), default=0)

    def _legend(self, theme: Theme) -> Legend:
        return Legend([(one.name, colour) for one, colour in zip(self.series, self.colours(theme), strict=True)
                       if one.name])


@dataclass(frozen=True)
class Stack(Chart):
    """Layers that add up, a column per step: who leads, or what it costs. A layer's name stands in it where it fits."""

    highest: float | None = 1.0
    marks: Sequence[tuple[float, str]] | None = ((0, "0 %"), (0.5, "50 %"), (1, "100 %"))

    def scale(self) -> tuple[float, float]:
        totals = [sum(one.values[i] or 0 for one in self.series) for i in range(self.count)]
        return 0.0, self.highest if self.highest is not None else max(totals, default=0) or 1.0

    def panel(self, on: Image.Image, theme: Theme, at: Place, width: int) -> None:
        pen, (x, y), high, colours = ImageDraw.Draw(on), at, self.scale()[1], self.colours(theme)
        edges = columns(x, width, self.count)
        values = [tuple(one.values[i] for one in self.series) for i in range(self.count)]
        spans: list[list[tuple[int, int]]] = [[] for _ in self.series]
        for i in range(self.count):
            total, below = 0.0, y + self.tall
            gap = edges[i + 1] - edges[i] >= 8 and values[i] != (*values, None)[i + 1]
            left, right = edges[i], max(edges[i + 1] - 1 - gap, edges[i])
            for one, colour, span in zip(self.series, colours, spans, strict=True):
                total += one.values[i] or 0
                top = y + self.tall - round(self.tall * min(total / high, 1))
                if top < below:
                    pen.rectangle((left, top, right, below - 1), colour)
                    if below < y + self.tall and below - top > 3:
                        pen.line((left, below - 1, right, below - 1), theme.panel)
                span.append((top, below))
                below = top
        for one, colour, span in zip(self.series, colours, spans, strict=True):
            self._name(pen, one.name, colour, span, edges)

    def _name(self, pen: ImageDraw.ImageDraw, name: str, colour: str, span: Sequence[tuple[int, int]],
              edges: Sequence[int]) -> None:
        """In the widest place of a layer that is as high as a line of text, where it fits."""
        best, start = (0, 0, 0, 0), 0
        for i in range(self.count + 1):
            end = i == self.count or span[i][1] - span[i][0] < 18
            joined = not end and i > start and min(b for _, b in span[start:i + 1]) - max(
                t for t, _ in span[start:i + 1]) < 18
            if end or joined:
                if i > start:
                    top, below = max(t for t, _ in span[start:i]), min(b for _, b in span[start:i])
                    best = max(best, (edges[i] - edges[start], edges[start], top, below))
                start = i + 1 if end else i
        wide, left, top, below = best
        if name and pen.textlength(name, font(SMALL)) + 10 <= wide:
            pen.text((left + wide / 2, (top + below) / 2), name, contrasting(colour), font(SMALL), anchor="mm")


@dataclass(frozen=True)
class Lines(Chart):
    """Curves.

    bands     per series a (lowest, highest) per step, () for none
    behind    grey columns from 0 to 1, whatever the scale: a name and its values
    ends      curves go from edge to edge, as over progress; False: from middle to middle of their steps
    places    where the values stand from left to right, 0 to 1; None: evenly
    """

    bands: Sequence[Sequence[tuple[float, float]]] = ()
    behind: Series | None = None
    ends: bool = False
    places: Sequence[float] | None = None

    def panel(self, on: Image.Image, theme: Theme, at: Place, width: int) -> None:
        low, high = self.scale()
        tile = on.crop((*at, at[0] + width, at[1] + self.tall)).resize((width * FINE, self.tall * FINE))
        pen = ImageDraw.Draw(tile, "RGBA")

        def x(i: float) -> float:
            if self.places is not None:
                return FINE * (width - 1) * self.places[int(i)]
            return FINE * (width - 1) * (i / max(self.count - 1, 1) if self.ends else (i + 0.5) / max(self.count, 1))

        def y(value: float) -> float:
            return FINE * (self.tall - 1) * (1 - (value - low) / (high - low))

        for i, share in enumerate(self.behind.values if self.behind else ()):
            top = FINE * self.tall * (1 - min(max(share or 0, 0), 1))
            pen.rectangle((x(i - 0.36), top, x(i + 0.36), FINE * self.tall), theme.grid)
        for colour, band in zip(self.colours(theme), self.bands, strict=False):
            edge = [(x(i), y(b)) for i, (_, b) in enumerate(band)]
            edge += [(x(i), y(a)) for i, (a, _) in reversed(list(enumerate(band)))]
            if len(band) > 1:
                pen.polygon(edge, fill=(*rgb(colour), 60))
        for colour, one in zip(self.colours(theme), self.series, strict=True):
            for part in parts([None if v is None else (x(i), y(v)) for i, v in enumerate(one.values)]):
                if len(part) > 1:
                    pen.line(part, colour, 2 * FINE + 1, joint="curve")
                for px, py in part if len(part) == 1 or self.count <= 30 and not self.ends else ():
                    pen.ellipse((px - 7, py - 7, px + 7, py + 7), colour)
        on.paste(tile.reduce(FINE), at)

    def _legend(self, theme: Theme) -> Legend:
        own = super()._legend(theme).names
        return Legend([*own, (self.behind.name, theme.grid)] if self.behind else own)


class Bar(NamedTuple):
    """A name, what it is worth, and what is written behind it."""

    name: str
    value: float
    text: str


@dataclass(frozen=True)
class Bars:
    """What is compared, a line each, from 0 to the largest."""

    head: str
    bars: Sequence[Bar]

    LINE = 26

    def height(self, width: int) -> int:
        return 30 + self.LINE * len(self.bars)

    def draw(self, on: Image.Image, theme: Theme, at: Place, width: int) -> None:
        pen, (x, y) = ImageDraw.Draw(on), at
        pen.text((x, y), fitted(pen, self.head, width, HEAD - 2), theme.ink, font(HEAD - 2))
        names, texts = (max((pen.textlength(each, font(SMALL)) for each in column), default=0)
                        for column in ([bar.name for bar in self.bars], [bar.text for bar in self.bars]))
        left, right = x + round(min(names, width * 0.35)) + 12, x + width - round(min(texts, width * 0.45)) - 10
        high = max((bar.value for bar in self.bars), default=0) or 1.0
        y += 30
        for i, bar in enumerate(self.bars):
            middle = y + self.LINE * i + self.LINE // 2
            pen.text((left - 12, middle), fitted(pen, bar.name, left - 12 - x, SMALL), theme.ink, font(SMALL),
                     anchor="rm")
            pen.rectangle((left, middle - 8, right, middle + 8), theme.panel)
            if bar.value > 0:
                end = left + max(round((right - left) * min(bar.value / high, 1)), 1)
                pen.rectangle((left, middle - 8, end, middle + 8), theme.colour(i))
            pen.text((right + 10, middle), fitted(pen, bar.text, x + width - right - 10, SMALL), theme.ink, font(SMALL),
                     anchor="lm")


@dataclass(frozen=True)
class HeatRows:
    """A row of colours per series and a column per step, from 0 to `highest`; None stays blank. `ends` says what
    the two ends of the ramp mean."""

    head: str
    rows: Sequence[Series]
    highest: float | None = None
    ends: tuple[str, str] = ("0", "1")

    LINE = 24

    def height(self, width: int) -> int:
        return 34 + self.LINE * len(self.rows) + 22

    def draw(self, on: Image.Image, theme: Theme, at: Place, width: int) -> None:
        pen, (x, y) = ImageDraw.Draw(on), at
        ramp(on, theme, (x + width, y + 3), self.ends)
        pen.text((x, y), fitted(pen, self.head, width - 330, HEAD - 2), theme.ink, font(HEAD - 2))
        known = [value for row in self.rows for value in row.values if value is not None]
        high = self.highest if self.highest is not None else max(known, default=1.0)
        longest = max((pen.textlength(row.name, font(SMALL)) for row in self.rows), default=0)
        left, count = x + round(min(longest, width * 0.35)) + 12, max((len(row.values) for row in self.rows), default=0)
        edges = columns(left, x + width - left, count)
        y += 34
        for k, row in enumerate(self.rows):
            top = y + self.LINE * k
            pen.text((left - 12, top + self.LINE / 2), fitted(pen, row.name, left - 12 - x, SMALL), theme.ink,
                     font(SMALL), anchor="rm")
            pen.rectangle((left, top + 1, x + width - 1, top + self.LINE - 2), theme.panel)
            for i, value in enumerate(row.values):
                if value is not None:
                    colour = tuple(coloured(np.float32(value / (high or 1.0))).round().astype(int).tolist())
                    gap = edges[i + 1] - edges[i] >= 8
                    right = max(edges[i + 1] - 1 - gap, edges[i])
                    pen.rectangle((edges[i], top + 1, right, top + self.LINE - 2), colour)
        for place, text in step_marks(count):
            pen.text((left + place * (x + width - left), y + self.LINE * len(self.rows) + 4), text, theme.faint,
                     font(SMALL), anchor="ma")


def columns(left: int, width: int, count: int) -> list[int]:
    """Where so many columns begin, and the last one ends, in whole pixels."""
    return [left + round(width * i / max(count, 1)) for i in range(count + 1)]


def step_marks(count: int) -> list[tuple[float, str]]:
    """Numbers below so many steps, 16 at most: (place from 0 to 1, text)."""
    every = next(k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if count <= 16 * k)
    shown = range(0, count, every) if every < 5 else (0, *range(every - 1, count, every))
    return [((i + 0.5) / count, str(i + 1)) for i in shown]


def marks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers in a range, three to six: (value, text)."""
    raw = (high - low) / 5
    power = 10.0 ** floor(log10(raw))
    unit = next(k * power for k in (1, 2, 5, 10) if k * power >= raw * 0.999)
    digits = max(-floor(log10(unit) + 1e-9), 0)
    first = -(-low // unit) if abs(low / unit - round(low / unit)) > 1e-6 else round(low / unit)
    return [(k * unit, f"{k * unit:.{digits}f}") for k in range(int(first), int(high / unit + 1e-6) + 1)]


def parts(points: Sequence[T | None]) -> list[list[T]]:
    """The points in a row between those that are missing."""
    out: list[list[T]] = [[]]
    for point in points:
        if point is None:
            out.append([])
        else:
            out[-1].append(point)
    return [part for part in out if part]
