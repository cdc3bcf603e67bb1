"""The rows of one batch: which branch each belongs to, and which row an entry of a layer belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..kernels.branch import Branch
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

    rows     the branch of each row, in any order
    places   where in the picture and in the text adapters act; None: everywhere
    reach    told what adapters would add

    `acting` are the adapters that act in any of the rows, at any layer.
    """

    def __init__(self, rows: Sequence[Branch], places: Places | None = None, order: Order = folded,
                 reach: Reach | None = None):
        self.rows, self.places, self._order, self.reach = tuple(rows), places, order, reach
        self.uniform = len(set(self.rows)) == 1
        self.acting = frozenset(a for branch in set(self.rows)
                                for gains in (branch.gains, *(gains for _, gains in branch.per_module))
                                for a, gain in enumerate(gains) if gain)
        self.programs: list = []

    def owners(self, layer: str, entries: int) -> tuple[int, ...] | None:
        """The row of each entry; None where that is not known."""
        count = len(self.rows)
        if count == 1:
            return (0,) * entries
        order = self._order(layer, entries, count)
        if order is None:
            return None
        fold = entries // count
        return tuple(e % count if order == "tile" else e // fold for e in range(entries))
