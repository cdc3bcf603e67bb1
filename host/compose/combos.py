"""What one model call is evaluated with: a branch of each method that is applied to the MODEL, and one of each bank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

from ...engine.adapters import Decomposed
from ...engine.bank import Bank
from ...kernels.branch import Branch

MOST = 4096
"""Combinations of one model call, at most. Methods in a row multiply theirs, and each is an evaluation of the model."""


def combinations(branches: Sequence[Sequence[Branch]], methods: Sequence[str]) -> tuple[tuple[Branch, ...], ...]:
    """Every combination of the branches of the methods of these names.

    Raises ValueError where that is more than anybody can mean: a few nodes in a row ask for millions.
    """
    count = prod(map(len, branches))
    if count > MOST:
        each = " x ".join(f"{len(some)} ({name})" for some, name in zip(branches, methods, strict=True))
        raise ValueError(f"The methods on this MODEL make {each} = {count:,} combinations of LoRAs, each of them an "
                         f"evaluation of the model in every step; {MOST:,} are the most. Methods in a row multiply "
                         "theirs: put the LoRAs into one ensemble.")
    return tuple(product(*branches))


class Joined:
    """Applied methods whose LoRAs one bank serves at once: what is always on, and the method above it.

    methods    which of the applied ones
    adapters   of the bank, per method
    """

    def __init__(self, methods: Sequence[int], applied: Sequence):
        self.methods = tuple(methods)
        self.adapters = [range(applied[k].first, applied[k].first + len(applied[k].names)) for k in methods]
        self._made: dict[tuple[Branch, ...], Branch] = {}

    def branch(self, branches: tuple[Branch, ...], count: int) -> Branch:
        """A branch of each of the methods as one of their bank of `count` adapters, made once; adapters that none of
        the methods has do nothing."""
        if self.adapters == [range(count)]:
            return branches[0]
        if branches not in self._made:
            names = dict.fromkeys(name for branch in branches for name, _ in branch.per_module)
            self._made[branches] = Branch(self._side_by_side([branch.gains for branch in branches], count), tuple(
                (name, self._side_by_side([branch.at(name) for branch in branches], count)) for name in names))
        return self._made[branches]

    def _side_by_side(self, gains: Sequence[tuple[float, ...]], count: int) -> tuple[float, ...]:
        out = [0.0] * count
        for own, some in zip(self.adapters, gains, strict=True):
            out[own.start:own.stop] = some
        return tuple(out)


def together(applied: Sequence) -> list[Joined]:
    """The applied methods, those together that one bank serves at once."""
    groups: list[list[int]] = []
    for k, each in enumerate(applied):
        below = applied[k - 1] if k else None
        if below is not None and below.always and below.bank == each.bank and each.first == len(below.names):
            groups[-1].append(k)
        else:
            groups.append([k])
    return [Joined(group, applied) for group in groups]


def any_of(flags: Sequence[Sequence[bool]]) -> tuple[bool, ...]:
    """For every combination, whether one of its branches has its flag up."""
    return tuple(any(each) for each in product(*flags))


def magnitudes_above(banked: Sequence[Joined], banks: Sequence[Bank]) -> Iterator[tuple[str, str]]:
    """(adapter, layer) of each DoRA on a layer that an earlier method changes: its magnitudes are worked out from the
    weight as the host has it."""
    beneath: set[str] = set()
    for joined, bank in zip(banked, banks, strict=True):
        own = {a for adapters in joined.adapters for a in adapters}
        changed = {name: own & site.adapters for name, site in bank.sites.items()}
        for name, found in changed.items():
            for a in found if name in beneath else ():
                if any(isinstance(op, Decomposed) for op in bank.sites[name].ops(a)):
                    yield bank.names[a], name
        beneath |= {name for name, found in changed.items() if found}
