"""How far to believe the straight line through the last two values of a feature, by what became of the line before."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**20


def came_true(before: Tensor, last: Tensor, now: Tensor, ahead: float) -> Tensor:
    """Semantics: a[b] = <now - last, last - before>_b / (ahead |last - before|_b^2), from 0 to 1: the share of its
    slope with which the line through `before` and `last` would have come nearest to `now`; 0 where it has no slope.

    before, last, now: [B, ...] of one shape, any floating dtype; the sums are fp32.  ahead: where `now` lies on that
    line, in lengths of the line beyond `last`, above 0.  Returns fp32 [B]. No host synchronisation, and no wide copy of
    whole features.
    """
    dot, square = torch.zeros(2, len(now), device=now.device)
    wide = max(CHUNK // len(now), 1)
    for a, b, c in zip(*(each.reshape(len(now), -1).split(wide, dim=1) for each in (before, last, now)), strict=True):
        slope = b.float() - a.float()
        dot, square = dot + (slope * (c.float() - b.float())).sum(1), square + (slope * slope).sum(1)
    return (dot / (ahead * square).clamp_min(torch.finfo(torch.float32).tiny)).clamp(0, 1)


def damped(last: Tensor, before: Tensor, ahead: float, proven: Tensor | None) -> Tensor:
    """Semantics: last + ahead (1 + a) / 2 (last - before), the line with a slope half-way between its own and the share
    `a` of it that came true of the line before: that is known late, and features settle as noise falls.

    last, before: [B, ...] of one shape and floating dtype, which the result has.  proven: a of `came_true`, [B]; None:
    nothing is known, a = 0.
    """
    if proven is None:
        return torch.lerp(last, before, -ahead / 2)
    weight = -ahead * (1 + proven) / 2
    return torch.lerp(last, before, weight.to(last.dtype).view(-1, *[1] * (last.ndim - 1)))
