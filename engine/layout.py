"""The rows of one batch: which branch each belongs to, and which row an entry of a layer belongs to."""

from __future__ import annotations

from collections.abc import Callable

from ..kernels.branch import Branch
from .gains import Marked, Marks
from .positions import Places
from .reach import Reach

Order = Callable[[str, int, int], "str | None"]
"""(layer, entries, rows) -> the order in which the rows of a batch lie in the entries of that layer, its input's first
dimension:

    rows     one entry per row
    repeat   several in succession for each row, as where frames are folded into the batch: e belongs to row e // fold
    tile     all rows over and over: e belongs to row e % rows
    None     not known
"""


class NotRows(ValueError):
    """A layer's entries cannot be told apart by row, so that branches need batches of their own."""

    def __init__(self, layer: str, entries: int, rows: int):
        super().__init__(f"the layer '{layer}' has {entries} entries for {rows} rows of the batch, in an order that is "
                         "not known")
        self.layer = layer


def folded(layer: str, entries: int, rows: int) -> str | None:
    """The order of models that keep rows apart and fold what they fold inside a row, as most do."""
    if entries == rows:
        return "rows"
    return "repeat" if entries and entries % rows == 0 else None


class Layout:
    """One batch layout. Its programs are filled in as layers are met (forwards.py).

    marked   the branch of each row, in any order: those of the batch that is evaluated, of many that are of a kind
    places   where in the picture and in the text adapters act; None: everywhere
    reach    told what adapters would add

    `acting` are the adapters that act in any of the rows, at any layer.
    """

    def __init__(self, marked: Marked, places: Places | None = None, order: Order = folded,
                 reach: Reach | None = None):
        self.marked, self.places, self._order, self.reach = marked, places, order, reach
        rows = set(marked.branches)
        self.uniform = len(rows) == 1
        self.acting = frozenset(a for marks in marked.of.values() for a, mark in enumerate(marks) if mark)
        self.programs: list = []
        self._alike = not any(branch.per_module for branch in rows)
        self._owners: dict[tuple[str, int], tuple[int, ...]] = {}
        self._marks: dict[tuple[int, ...], Marks] = {}

    @property
    def rows(self) -> tuple[Branch, ...]:
        return self.marked.branches

    def owners(self, layer: str, entries: int) -> tuple[int, ...] | None:
        """The row of each entry; None where that is not known."""
        count = len(self.rows)
        order = "tile" if count == 1 else self._order(layer, entries, count)
        if order is None:
            return None
        if (order, entries) not in self._owners:
            fold = max(entries // count, 1)
            self._owners[order, entries] = tuple(e % count if order == "tile" else e // fold for e in range(entries))
        return self._owners[order, entries]

    def marks(self, layer: str, owners: tuple[int, ...]) -> Marks:
        """Per entry the gains at a layer."""
        if self._alike and owners in self._marks:
            return self._marks[owners]
        rows = [self.marked.of[branch.at(layer)] for branch in self.rows]
        found = tuple(rows[row] for row in owners)
        self._marks[owners] = found
        return found
