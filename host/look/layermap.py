"""Who acts where and when: layers of the model against the progress of a run, as a picture and as data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite, log2

import numpy as np
from PIL import Image, ImageDraw

from ...methods import method_title
from ...methods.selection import Selection
from ...methods.windows import Window
from ..compose.composition import KEY
from .chart import Series, Stack
from .letters import fitted, font
from .sheet import Place
from .theme import BLUE, GREEN, LIGHT, ORANGE, PINK, RED, SKY, Theme, rgb

WARM = (ORANGE, RED, PINK, "#8C564B")  # subjects; told apart from the styles by colour-blind eyes too
COOL = (BLUE, SKY, GREEN, "#6A5ACD")  # styles
MARGIN, LABELS, MAP, GAP, RATIOS, SHARES, LINE = 24, 190, 720, 56, 300, 90, 24
WIDTH = MARGIN + LABELS + MAP + GAP + RATIOS + MARGIN
OCTAVES = 3  # the ratio's axis ends at 1/8 and 8


@dataclass(frozen=True)
class LayerMap:
    """Layers in the order of the model, with who acts where.

    title    the method and its rule
    names    of the LoRAs
    sides    per LoRA, whether it is a subject
    layers   their names
    ratios   per layer, score of its subject / score of its style; infinite where only one side acts
    acting   [layers, points]: the number of the LoRA that acts, at equal distances of progress from 0 to 1; -1: none,
             since their windows in time are shut
    rivals   per layer, the numbers of that subject and that style, None where a side has none
    """

    title: str
    names: tuple[str, ...]
    sides: tuple[bool, ...]
    layers: tuple[str, ...]
    ratios: tuple[float, ...]
    acting: np.ndarray
    rivals: tuple[tuple[int | None, int | None], ...]

    def as_json(self) -> str:
        """The same as text. `acts`: [from, to, number of the LoRA] along the progress; `ratio`: of the LoRAs with the
        numbers `subject` and `style`, null where only one side has this layer. `acts` has null for no LoRA."""
        def number(i: int) -> float:
            return round(i / self.acting.shape[1], 3)

        layers = []
        for name, ratio, (subject, style), row in zip(self.layers, self.ratios, self.rivals, self.acting, strict=True):
            ends = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
            acts = [[number(a), number(b), int(row[a]) if row[a] >= 0 else None]
                    for a, b in zip(ends, ends[1:], strict=False)]
            layers.append({"layer": name, "ratio": round(ratio, 4) if isfinite(ratio) else None, "subject": subject,
                           "style": style, "acts": acts})
        shares = [round(float((self.acting == i).mean()), 4) if layers else 0.0 for i in range(len(self.names))]
        loras = [{"name": name, "side": "subject" if side else "style", "share": share}
                 for name, side, share in zip(self.names, self.sides, shares, strict=True)]
        # One layer per line, and names in their own letters: the text is for people as well.
        rows = ",\n  ".join(json.dumps(layer) for layer in layers)
        return (f'{{"method": {json.dumps(self.title)},\n "loras": {json.dumps(loras, ensure_ascii=False)},\n '
                f'"layers": [\n  {rows}\n]}}')

    def colours(self) -> list[str]:
        """One per LoRA: warm for subjects, cool for styles."""
        counts, out = {True: 0, False: 0}, []
        for side in self.sides:
            palette = WARM if side else COOL
            out.append(palette[counts[side] % len(palette)])
            counts[side] += 1
        return out


def layer_map(model, points: int = MAP) -> LayerMap:
    """The map of a MODEL on which K-LoRA or EST-LoRA is the last method of its kind.

    Raises ValueError for a MODEL without one.
    """
    composition = model.get_attachment(KEY)
    found = [each for each in composition.applied if isinstance(each.method, Selection)] if composition else []
    if not found:
        raise ValueError("LoRA Layer Map: neither K-LoRA nor EST-LoRA is on this model. Connect the MODEL output of "
                         "one of these nodes, or an ensemble, to see what K-LoRA would do with it.")
    method, names = found[-1].method, found[-1].names
    contest = method.contest
    place = {name: i for i, (name, _) in enumerate(model.model.diffusion_model.named_modules())}
    order = sorted(range(len(contest.layers)), key=lambda i: place.get(contest.layers[i], len(place)))
    columns = [_column(method, found[-1].windows, u) for u in np.linspace(0, 1, points)]
    acting = np.array(columns, dtype=np.int64).reshape(points, len(order)).T[order]
    least = "at least" if contest.subject_ties else "more than"
    heading = f"{method_title(type(method).__name__)}: the subject acts while its ratio is {least} {method.rule}"
    return LayerMap(heading, names, contest.sides, tuple(contest.layers[i] for i in order),
                    tuple(contest.ratios[i] for i in order), acting,
                    tuple((contest.subjects[i], contest.styles[i]) for i in order))


def _column(method: Selection, windows: Sequence[Window], progress: float) -> list[int]:
    """Who acts at each layer at one progress, among the LoRAs whose windows are open."""
    may = tuple(i for i in range(len(method.strengths)) if not windows or windows[i].gain(progress))
    return [-1 if i is None else i for i in method.contest.among(may).acting(method.scale(progress))]


def draw(of: LayerMap, theme: Theme = LIGHT) -> Image.Image:
    """The map, the share of layers per LoRA above it, and the ratios beside it."""
    row = max(2, min(24, 900 // max(len(of.layers), 1)))
    height = row * len(of.layers)
    left, top = MARGIN + LABELS, MARGIN + LINE * (3 + len(of.names)) + SHARES
    sheet = Image.new("RGB", (WIDTH, top + height + 3 * LINE), theme.paper)
    pen, colours = ImageDraw.Draw(sheet), of.colours()
    pen.text((MARGIN, MARGIN), of.title, theme.ink, font(18))
    _legend(pen, of, colours, theme)
    _shares(sheet, of, colours, theme, (left, top - SHARES - LINE // 2))
    palette = np.array([rgb(colour) for colour in (*colours, theme.paper)], dtype=np.uint8)
    if height:
        pixels = palette[of.acting].repeat(row, axis=0)
        sheet.paste(Image.fromarray(pixels).resize((MAP, height), Image.Resampling.NEAREST), (left, top))
    for percent in (0, 25, 50, 75, 100):
        x = left + MAP * percent / 100
        pen.line((x, top + height, x, top + height + 5), theme.ink)
        pen.text((x, top + height + 7), f"{percent} %", theme.ink, font(13), anchor="ma")
    pen.text((left + MAP / 2, top + height + LINE + 4), "progress of the run", theme.ink, font(14), anchor="ma")
    _blocks(pen, of, theme, (left, top), row)
    _ratios(pen, of, colours, theme, (left + MAP + GAP, top), row)
    return sheet


def _legend(pen: ImageDraw.ImageDraw, of: LayerMap, colours: list[str], theme: Theme) -> None:
    """A line per LoRA: its number as in the text, which tells names apart that the font has no letters for."""
    for i, (name, side, colour) in enumerate(zip(of.names, of.sides, colours, strict=True)):
        y = MARGIN + LINE * (i + 1) + 8
        share = 100 * float((of.acting == i).mean()) if of.layers else 0
        pen.rectangle((MARGIN, y + 2, MARGIN + 28, y + 16), colour)
        rest = f"   ({'subject' if side else 'style'}, {share:.0f} % of layers and time)"
        room = WIDTH - 2 * MARGIN - 38 - pen.textlength(f"{i}   {rest}", font(15))
        pen.text((MARGIN + 38, y), f"{i}   {fitted(pen, name, room, 15)}{rest}", theme.ink, font(15))


def _shares(sheet: Image.Image, of: LayerMap, colours: list[str], theme: Theme, at: Place) -> None:
    """A stacked strip: at each progress, which part of the layers each LoRA has, subjects above styles."""
    pen = ImageDraw.Draw(sheet)
    pen.text((at[0] - 10, at[1] + SHARES / 2 - 8), "share of layers", theme.ink, font(14), anchor="ra")
    if of.layers:
        order = sorted(range(len(of.names)), key=lambda i: of.sides[i])
        strip = [Series("", (of.acting == i).mean(axis=0).tolist(), colours[i]) for i in order]
        Stack("", strip, tall=SHARES - LINE).panel(sheet, theme, at, MAP)


def _blocks(pen: ImageDraw.ImageDraw, of: LayerMap, theme: Theme, at: Place, row: int) -> None:
    """Names of the model's sections and numbers of their blocks, each where there is room for it."""
    (left, top), start, below = at, 0, -99
    for section, members in groupby(of.layers, key=lambda name: name.split(".")[0]):
        members = list(members)
        y = top + row * start
        if y - below >= 15:
            pen.line((MARGIN, y, left - 1, y), theme.grid)
            pen.line((left + MAP, y, left + MAP + GAP + RATIOS, y), theme.grid)
            pen.text((MARGIN, y + 2), section.replace("_", " "), theme.ink, font(14))
            below = y
        last, line, end = -99, start, y + row * len(members)
        for block, inner in groupby(members, key=_block):
            count = len(list(inner))
            y = top + row * line
            if block is not None:
                pen.line((left - 8, y, left - 1, y), theme.grid)
                if y + 14 <= end and (y - last >= 14 and count * row >= 10 or y - last >= 28):
                    pen.text((left - 12, y), block, theme.ink, font(12), anchor="ra")
                    last = y
            line += count
        start += len(members)


def _block(layer: str) -> str | None:
    parts = layer.split(".")
    return parts[1] if len(parts) > 1 and parts[1].isdecimal() else None


def _ratios(pen: ImageDraw.ImageDraw, of: LayerMap, colours: list[str], theme: Theme, at: Place,
            row: int) -> None:
    """A bar per layer from ratio 1: to the right in the colour of its subject where that is larger, else to the left
    in that of its style. No bar where only one side has the layer."""
    top, middle = at[1], at[0] + RATIOS / 2
    unit, bottom = RATIOS / 2 / OCTAVES, top + row * len(of.layers)
    for octave in range(-OCTAVES, OCTAVES + 1):
        x = middle + unit * octave
        pen.line((x, top, x, bottom), theme.ink if octave == 0 else theme.grid)
        label = f"1/{2**-octave}" if octave < 0 else str(2**octave)
        pen.text((x, bottom + 7), label, theme.ink, font(13), anchor="ma")
    pen.text((middle, bottom + LINE + 4), "ratio, subject / style", theme.ink, font(14), anchor="ma")
    for i, (ratio, (subject, style)) in enumerate(zip(of.ratios, of.rivals, strict=True)):
        if not isfinite(ratio) or subject is None or style is None:
            continue
        length = unit * max(-OCTAVES, min(OCTAVES, log2(ratio) if ratio > 0 else -OCTAVES))
        y, thick = top + row * i, max(row - 1, 1)
        pen.rectangle((min(middle, middle + length), y, max(middle, middle + length), y + thick - 1),
                      colours[subject if length > 0 else style])

