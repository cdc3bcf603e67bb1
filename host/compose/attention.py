"""Reads, while a model runs, how much each place of its picture attends to the clauses of its prompt: through the
host's own seam for attention, chained with whatever another node has put there. Counted is attention to the text alone:
how much of a place's attention the picture itself has, where both are in one, says nothing of whose place it is."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import prod
from uuid import UUID

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.transfer import on_device
from ...kernels.routing import clause_attention, clause_shares, clause_values
from ..families.attention import Joint, joint
from ..families.lasting import lasting
from ..families.token_streams import Streams

OVERRIDE = "optimized_attention_override"
HELD = 2**26
"""Bytes of what calls have given that are held, at most and besides the last, until the calls of one size are summed
together: a host that feeds a fast GPU asks for one operation per call then, and not for four. SDXL at 1024 x 1024 holds
36 MB per picture while its blocks run."""


class AttentionReader:
    """One evaluation's attention to clauses, call by call in the order of the model's blocks.

    root      the diffusion model
    streams   the tokens of the evaluation (families/token_order.py)
    rows      the rows of the batch that are read: those in succession as a slice, others as a tensor
    members   [rows, clauses, tokens of the text as the model gets it]; both on the device of the batch
    wanted    numbers of the joining calls to read; None: all
    made      what was made for other evaluations of the same rows
    """

    def __init__(self, root: nn.Module, streams: Streams, rows: slice | Tensor, members: Tensor,
                 wanted: Sequence[int] | None = None, made: dict[Hashable, Tensor] | None = None):
        self.root, self.streams, self._rows, self._members = root, streams, rows, members
        self._last = int(rows.max()) if isinstance(rows, Tensor) else rows.stop - 1
        self._wanted = None if wanted is None else frozenset(wanted)
        self._joint: dict[tuple[int, int], Joint | None] = {}
        self._made = {} if made is None else made
        self._held: dict[tuple, list[Tensor]] = {}  # by grid, heads and dtype
        self._bytes = 0
        self._means: list[tuple[int, Tensor]] = []  # (calls, their mean) [rows, clauses, frames, height, width]
        self.count = 0
        self.found: list[Tensor] = []  # where all calls are read, of each [rows, clauses, frames, height, width]

    def options(self, options: dict) -> dict:
        """Transformer options under which attention is read."""
        before: Callable | None = options.get(OVERRIDE)

        def override(func: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args, **kwargs) -> Tensor:
            self._see(q, k, heads, _mask(args, kwargs), bool(kwargs.get("skip_reshape", False)), kwargs.get("scale"))
            if before is not None:
                return before(func, q, k, v, heads, *args, **kwargs)
            return func(q, k, v, heads, *args, **kwargs)

        return {**options, OVERRIDE: override}

    def mean(self, wanted: Sequence[int] | None = None) -> Tensor | None:
        """Of those read, or, where all were read, of some of them by their number: [rows, clauses, frames, height,
        width] on the finest of their grids. None where nothing was read."""
        self._settle()
        grids: dict[torch.Size, list[Tensor]] = {}
        for each in self.found if wanted is None else [self.found[k] for k in wanted]:
            grids.setdefault(each.shape[2:], []).append(each)
        means = self._means + [(len(each), torch.stack(each).mean(dim=0)) for each in grids.values()]
        if not means:
            return None
        means.sort(key=lambda each: -prod(each[1].shape[2:]))
        (calls, mean), *others = means
        for more, other in others:
            calls += more
            other = other if other.shape == mean.shape else F.interpolate(other, mean.shape[2:], mode="trilinear")
            mean = torch.lerp(mean, other, more / calls)
        return mean

    def _settle(self) -> None:
        """Sum what is held."""
        for (grid, *_), calls in self._held.items():
            with lasting():
                self._means.append((len(calls), clause_attention(calls).unflatten(-1, grid)))
        self._held.clear()
        self._bytes = 0

    def _see(self, q: Tensor, k: Tensor, heads: int, mask: Tensor | None, split: bool, scale: float | None) -> None:
        queries, keys = (q.shape[2], k.shape[2]) if split else (q.shape[1], k.shape[1])
        if (queries, keys) not in self._joint:
            self._joint[queries, keys] = joint(self.root, self.streams, queries, keys)
        where = self._joint[queries, keys]
        if where is None:
            return
        self.count += 1
        if self._wanted is not None and self.count - 1 not in self._wanted or self._last >= len(q):
            return
        q, k = (t if split else t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
        batch, picture, text = len(q), slice(*where.picture), slice(*where.text)
        with lasting():
            q = self._of(q)[:, :, picture] if where.picture != (0, queries) else self._of(q)
            k = self._of(k)[:, :, text] if where.text != (0, keys) else self._of(k)
            shares = clause_shares(q, k, self._values(q, k.shape[2]), self._members.shape[1],
                                   self._masked(mask, batch, picture, queries, text), scale)
            if self._wanted is None:
                self.found.append(clause_attention([shares]).unflatten(-1, where.grid))
                return
        self._held.setdefault((where.grid, q.shape[1], q.dtype), []).append(shares)
        self._bytes += q.nbytes * -(-shares.shape[-1] // q.shape[-1])  # to which the clauses are padded
        if self._bytes > HELD:
            self._settle()

    def _of(self, tensor: Tensor) -> Tensor:
        """The rows that are read."""
        return tensor[self._rows] if isinstance(self._rows, slice) else tensor.index_select(0, self._rows)

    def _masked(self, mask: Tensor | None, batch: int, picture: slice, queries: int, text: slice) -> Tensor | None:
        """The part of an attention mask that the read rows and places have of the text; it may come without rows, heads
        and queries."""
        if mask is None:
            return None
        while mask.ndim < 4:
            mask = mask.unsqueeze(0) if mask.ndim < 3 else mask.unsqueeze(1)
        if mask.shape[0] == batch:
            mask = self._of(mask)
        mask = mask[..., text] if mask.shape[-1] > 1 else mask
        return mask[:, :, picture] if mask.shape[2] == queries and queries > 1 else mask

    def _values(self, q: Tensor, count: int) -> Tensor:
        """Which clauses the tokens of the text belong to, made once for all calls that are alike. There are as many as
        this call says: padding belongs to no clause."""
        key = (count, q.shape[-1], q.dtype, q.device)
        if key not in self._made:
            members = self._members[..., :count]
            self._made[key] = clause_values(F.pad(members, (0, count - members.shape[-1])), count, slice(0, count), q)
        return self._made[key]


class RowsToRead:
    """Which rows of a batch are read, and what is sent to its device for that: once for all batches that are alike."""

    def __init__(self) -> None:
        self._known: dict[tuple, tuple[slice | Tensor, Tensor, dict[Hashable, Tensor]]] = {}

    def __call__(self, found: Sequence[tuple[int, UUID, Tensor]], pictures: int, device: torch.device
                 ) -> tuple[slice | Tensor, Tensor, dict[Hashable, Tensor]]:
        """`rows`, `members` and `made` of an AttentionReader.

        found   (place in the batch, name, members of its clauses) of the conds that are read
        """
        key = tuple((k, uuid, members.shape) for k, uuid, members in found), pictures, device
        if key not in self._known:
            most = max(len(members) for _, _, members in found)
            members = torch.stack([F.pad(members, (0, 0, 0, most - len(members))) for _, _, members in found])
            rows = [k * pictures + p for k, _, _ in found for p in range(pictures)]
            succession = rows == list(range(rows[0], rows[0] + len(rows)))
            self._known[key] = (slice(rows[0], rows[-1] + 1) if succession else on_device(rows, device),
                                on_device(members.repeat_interleave(pictures, dim=0), device), {})
        return self._known[key]


def _mask(args: tuple, kwargs: dict) -> Tensor | None:
    mask = args[0] if args else kwargs.get("mask")
    return mask if isinstance(mask, Tensor) else None
