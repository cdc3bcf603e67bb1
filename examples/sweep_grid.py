"""What a sweep draws: the cells of a grid, each a workflow of its own, and what became of them."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from .kept_pictures import keep, kept
from .picture_grid import Cell as Shown
from .picture_grid import save_grids
from .queue_prompt import Problem, place_of, value_of

KIND = "class_type"
FACTS = ("seconds", "evaluations", "worker", "problems")


@dataclass(frozen=True)
class Axis:
    """One `--vary`: what it is called, the inputs that get its values, and these."""

    name: str
    places: tuple[tuple[str, str], ...]
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Cell:
    """One picture of a sweep.

    values    one per axis
    workflow  in API format
    kinds     nodes whose class is not that of the file: their inputs are fitted to it by what the server says
    """

    values: tuple[Any, ...]
    workflow: dict[str, Any]
    kinds: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """All that it is made of: other settings are another cell, the same settings the same, in whichever sweep."""
        return hashlib.sha256(json.dumps(self.workflow, sort_keys=True).encode()).hexdigest()[:16]


def axis_of(workflow: dict[str, Any], text: str) -> Axis:
    """`NODE.INPUT=VALUES`, or `NODE.INPUT+NODE.INPUT=VALUES` for several inputs that have the same value. Raises
    Problem."""
    target, equals, listed = text.partition("=")
    try:
        if not equals:
            raise Problem("expected NODE.INPUT=VALUE,VALUE")
        places = tuple(place_of(workflow, each.strip(), (KIND,)) for each in target.split("+"))
        return Axis(target, places, values_of(listed))
    except Problem as problem:
        raise Problem(f"--vary {text}: {problem}") from None


def values_of(text: str) -> tuple[Any, ...]:
    """Values separated by commas, `1..4` for whole numbers in a row, or a JSON list, for texts with commas in them."""
    if text.startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise Problem(f"this is no JSON list: {error}") from None
    elif span := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", text.strip()):
        values = list(range(int(span[1]), int(span[2]) + 1))
    else:
        values = [value_of(each.strip()) for each in text.split(",")]
    if not values or any(value == "" for value in values):
        raise Problem("a value is missing")
    known = [json.dumps(value, sort_keys=True) for value in values]
    if twice := [value for value in dict.fromkeys(known) if known.count(value) > 1]:
        raise Problem(f"{twice[0]} is there twice")
    return tuple(values)


def cells_of(workflow: dict[str, Any], axes: Sequence[Axis]) -> list[Cell]:
    """Every combination, the last axis running fastest. Raises Problem where two axes have the same input."""
    places = [place for axis in axes for place in axis.places]
    if twice := [place for place in dict.fromkeys(places) if places.count(place) > 1]:
        raise Problem(f"two values are given for {'.'.join(twice[0])}")
    cells = []
    for values in product(*(axis.values for axis in axes)):
        changed, kinds = deepcopy(workflow), []
        for axis, value in zip(axes, values, strict=True):
            for node, name in axis.places:
                if name != KIND:
                    changed[node]["inputs"][name] = value
                elif changed[node][KIND] != value:
                    changed[node][KIND] = value
                    kinds.append(node)
        cells.append(Cell(values, changed, tuple(kinds)))
    return cells


class Book:
    """The folder of a sweep: `pictures/`, `table.csv` and `grid.png`. A cell is done when its picture is there."""

    def __init__(self, out: Path, axes: Sequence[Axis], cells: Sequence[Cell]):
        self.out, self.axes, self.cells = out, axes, cells
        self.failed: dict[str, str] = {}
        (out / "pictures").mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        return self.out / "pictures" / f"{key}.png"

    def left(self) -> list[Cell]:
        """The cells that are still to be drawn, those that have failed among them."""
        return [cell for cell in self.cells if not self.path(cell.key).is_file()]

    def enter(self, key: str, found: dict[str, Any]) -> None:
        """What became of a cell: its `picture` and `facts`, or the `problem` with it."""
        if "problem" in found:
            self.failed[key] = found["problem"]
        elif not self.path(key).is_file():
            keep(self.path(key), found["picture"], found["facts"])

    def save(self) -> list[Path]:
        """Write the table, a row for each cell that was drawn or has failed, and the sheets, as far as it came."""
        table = self.out / "table.csv"
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([axis.name for axis in self.axes] + ["file", *FACTS])
            for cell in self.cells:
                path = self.path(cell.key)
                facts = kept(path) if path.is_file() else {"problems": self.failed.get(cell.key, "")}
                if path.is_file() or facts["problems"]:
                    writer.writerow([*map(shown, cell.values), path.relative_to(self.out).as_posix()
                                     if path.is_file() else "", *(facts.get(name, "") for name in FACTS)])
        wide = len(self.axes[-1].values)
        rows = [self.cells[i:i + wide] for i in range(0, len(self.cells), wide)]
        titles = [[f"{short(axis)} {shown(value)}" for axis, value in zip(self.axes[:-1], row[0].values, strict=False)]
                  for row in rows]
        columns = [f"{short(self.axes[-1])} {shown(value)}" for value in self.axes[-1].values]
        shows = [[Shown(self.path(cell.key), self.failed.get(cell.key, "")) for cell in row] for row in rows]
        return [table, *save_grids(columns, titles, shows, self.out)]


def short(axis: Axis) -> str:
    """The name of an axis on a sheet: its input; for classes nothing, since they speak for themselves."""
    return "" if axis.places[0][1] == KIND else axis.places[0][1]


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
