"""Which rows of a batch belong to which branch, worked out once per distinct batch layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.branch import Branch
from .transfer import on_device


@dataclass(frozen=True)
class Group:
    """Rows of one branch: a run [start, stop) of the batch, or scattered indexes."""

    branch: Branch
    rows: tuple[int, ...]

    @property
    def is_run(self) -> bool:
        return self.rows[-1] - self.rows[0] + 1 == len(self.rows)


class Rows:
    """The groups of one batch layout, in order of their first row; rows of the base model are in none.

    A layer may see more entries than the batch has rows (frames folded into the batch): entry e then belongs to row
    e // (entries / rows), which is how models fold.
    """

    def __init__(self, branches: Sequence[Branch]):
        self.count = len(branches)
        members: dict[Branch, list[int]] = {}
        for row, branch in enumerate(branches):
            if not branch.is_base:
                members.setdefault(branch, []).append(row)
        self.groups = tuple(Group(branch, tuple(rows)) for branch, rows in members.items())
        self.uniform = len(self.groups) == 1 and len(self.groups[0].rows) == self.count
        self._index: dict[tuple[Group, torch.device], Tensor] = {}

    def fold(self, entries: int) -> int | None:
        """Entries per row, or None where `entries` is no multiple of the number of rows."""
        return entries // self.count if entries and entries % self.count == 0 else None

    def index(self, group: Group, device: torch.device) -> Tensor:
        """The rows of a scattered group as a tensor, copied to the device once."""
        key = (group, device)
        if key not in self._index:
            self._index[key] = on_device(group.rows, device)
        return self._index[key]

    def parts(self, y: Tensor, x: Tensor) -> Iterator[tuple[Branch, Tensor, Tensor, Group | None]]:
        """(branch, rows of y, rows of x, group to write back or None). A run is a view of y: writing is enough. Rows of
        a scattered group are copies: hand them to `write_back` after."""
        if self.uniform:
            yield self.groups[0].branch, y, x, None
            return
        fold = self.fold(y.shape[0])
        for group in self.groups:
            if group.is_run:
                first, length = group.rows[0] * fold, len(group.rows) * fold
                yield group.branch, y.narrow(0, first, length), x.narrow(0, first, length), None
            else:
                index = self.index(group, y.device)
                pick = [t.unflatten(0, (self.count, fold)).index_select(0, index).flatten(0, 1) for t in (y, x)]
                yield group.branch, pick[0], pick[1], group

    def write_back(self, y: Tensor, group: Group, part: Tensor) -> None:
        """Put the changed copies of a scattered group back into y."""
        folded = y.unflatten(0, (self.count, y.shape[0] // self.count))
        folded[self.index(group, y.device)] = part.unflatten(0, (len(group.rows), -1))
