"""Which steps of a run see a term that is extrapolated at the others: spread over the run, and moved to where a model
beside a cache runs whole."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

DENSER = 0.5
"""By what share distances between evaluated steps are shorter at the ends, and longer in the middle, than their mean;
0.6 gives the same steps in runs of 8 to 50 (testbed/README.md)."""


def spread_steps(total: int, evaluated: int, widest: int) -> tuple[int, ...]:
    """The steps that see a term when it is to be seen `evaluated` times in `total` steps: the first two, which give it
    a slope, the last, and others no farther than `widest` from one to the next, close together at both ends and
    farther apart in between, where a term changes least.

    n = evaluated - 2 distances lead from step 1 to the last, the i-th point at (total - 2) w(i / n) with
    w(u) = u - a sin(2 pi u) / (2 pi): distances grow from 1 - a times their mean at the ends to 1 + a times in the
    middle; a = DENSER, or what `widest` and steps that are one apart leave of it.

    2 + (total - 2) / widest <= evaluated <= total, or all steps.
    """
    if evaluated >= total or total < 3:
        return tuple(range(total))
    count = evaluated - 2
    mean = (total - 2) / count
    a = max(min(DENSER, widest / mean - 1, 1 - 1 / mean), 0.0)
    shares = (i / count - a * math.sin(2 * math.pi * i / count) / (2 * math.pi) for i in range(count + 1))
    return (0, *(1 + round((total - 2) * share) for share in shares))


def steps_among(planned: Sequence[int], whole: Collection[int], served: int, widest: int) -> tuple[int, ...]:
    """The steps that see a term in a run whose model runs whole at some steps alone, and at others on what it kept at
    one of them less than `served` steps ago. Seen at another step, the term makes the model run whole once more.

    Planned steps that would do so move to the nearest step that is whole, the earlier of two. The last stays where it
    is, and the planned one that is nearest moves to the last whole step before it. What is then farther apart than
    anything planned there gets a whole step between, and what is farther apart than `widest` any.

    planned: in order, from 0 to the last of the run.
    """
    steps, inner, last = [0], planned[1:-1], planned[-1]
    rides, whole = last not in whole, sorted(step for step in whole if 0 < step < last)
    if rides and whole and last - max((step for step in inner if step in whole), default=-served) >= served:
        nearest = min(inner, key=lambda step: abs(step - whole[-1]), default=None)
        inner = sorted({step for step in inner if step != nearest} | {whole[-1]})
    kept = 0  # the last step that is whole and sees the term
    for step in inner:
        later = [each for each in whole if each > steps[-1]]
        if step not in whole and step - kept >= served and later:
            step = min(later, key=lambda each: abs(each - step))
        if step > steps[-1]:
            steps.append(step)
        kept = step if step in whole else kept
    steps += [last] if last else []
    while True:
        for a, b in zip(steps, steps[1:], strict=False):
            between = [step for step in whole if a < step < b]
            reach = max(d - c for c, d in zip(planned, planned[1:], strict=False) if c < b and a < d)
            if b - a > (min(reach, widest) if between else widest):
                steps = sorted([*steps, min(between or range(a + 1, b), key=lambda step: abs(2 * step - a - b))])
                break
        else:
            return tuple(steps)
