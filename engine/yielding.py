"""Adapters that yield to others: what their deltas see in the directions that others' see is left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ..kernels.yielding import hidden, yielding
from .adapters import LowRank, Op

Layers = Mapping[str, Sequence[Op]]


def yield_to(adapters: Sequence[Layers], who: Collection[int], to: Collection[int]) -> tuple[list[Layers], int]:
    """The adapters, those of `who` without what they see of each layer's input in the directions of those of `to`, and
    how many layers that altered.

    A plain low-rank delta B A sees its input through the rows of A, which lose their part in the directions that the
    deltas of the others see (kernels/yielding.py). Ops of other kinds stay as they are, and nobody yields to them. Ops
    that stay are the same objects.
    """
    found, changed = list(adapters), set()
    for index in who:
        layers = dict(adapters[index])
        for name, ops in layers.items():
            others = [op for other in to for op in adapters[other].get(name, ()) if type(op) is LowRank]
            layers[name] = [_yielding(op, others) for op in ops]
            changed |= {name} if any(new is not op for new, op in zip(layers[name], ops, strict=True)) else set()
        found[index] = layers
    return found, len(changed)


def _yielding(op: Op, others: Sequence[LowRank]) -> Op:
    seen = [hidden(other.down.flatten(1), other.up) * other.scale for other in others if _meet(op, other)]
    if not seen:
        return op
    return LowRank(op.up, yielding(op.down.flatten(1), seen).view_as(op.down), op.scale, op.span, op.rank)


def _meet(op: Op, other: LowRank) -> bool:
    """Whether both add to some of the same outputs from the same inputs."""
    if type(op) is not LowRank or op.down.shape[1:] != other.down.shape[1:]:
        return False
    inputs, others = (each.span if each.span is not None and each.span[0] == 1 else None for each in (op, other))
    own, theirs = _outputs(op), _outputs(other)
    return inputs == others and own.start < theirs.stop and theirs.start < own.stop


def _outputs(op: LowRank) -> range:
    start = op.span[1] if op.span is not None and op.span[0] == 0 else 0
    return range(start, start + op.up.shape[0])
