"""Where words are: how much each place of a picture attends to the clauses of its prompt, and what of each LoRA acts
there. Everything is computed in fp32 and stays on its device.

A LoRA acts where its own clause is attended to more, of its own maximum, than any other clause of theirs: clauses
without a LoRA compete as well. Ours; masks from attention to a subject's words are FreeFuse's (arXiv 2510.23515).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def clause_values(members: Tensor, keys: int, text: slice, like: Tensor) -> Tensor:
    """What `clause_shares` takes for the values of its keys: which clauses each of them belongs to.

    members    [1 or B, clauses, tokens] in [0, 1]: how far a token of the text belongs to a clause
    text       where the text's tokens lie among the keys
    like       q [..., d], whose dtype and device are taken
    -> [1 or B, 1, keys, clauses or more], the least multiple of d
    """
    clauses, width = members.shape[1], like.shape[-1]
    values = like.new_zeros(len(members), 1, keys, -(-clauses // width) * width)
    values[:, 0, text, :clauses] = members.to(like.device, like.dtype).mT
    return values


def clause_shares(q: Tensor, k: Tensor, values: Tensor, clauses: int, mask: Tensor | None = None,
                  scale: float | None = None) -> Tensor:
    """a_c(h, p) = the softmax over all keys of q k^T * scale in head h, summed over the tokens of clause c.

    It is an attention whose values say which clauses a key belongs to, so that the device's own fused kernels serve and
    nothing of size places x keys is kept.

    q          [B, heads, places, d], those of the picture alone
    k          [B, heads or fewer that divide them, keys, d], of all that is attended to
    values     `clause_values` of so many clauses; the same for all layers whose keys lie alike
    mask       of the attention, broadcasting to [B, heads, places, keys]: True or 0 where a key counts
    -> [B, heads, places, clauses] in the dtype of q, which may be a part of something wider
    """
    batch, heads, _, width = q.shape
    if k.shape[1] != heads:
        k = k.repeat_interleave(heads // k.shape[1], dim=1)
    parts = [F.scaled_dot_product_attention(q, k, part.expand(batch, heads, -1, -1), attn_mask=mask, scale=scale)
             for part in values.split(width, dim=-1)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))[..., :clauses]


def clause_attention(calls: Sequence[Tensor]) -> Tensor:
    """a_c(p), the mean over the heads of calls of attention, of which each has as many. `clause_shares` [B, heads,
    places, clauses] of each -> [B, clauses, places] in fp32."""
    return (calls[0] if len(calls) == 1 else torch.cat(tuple(calls), dim=1)).mean(dim=1, dtype=torch.float32).mT


def contrast(whole: Tensor, without: Tensor) -> Tensor:
    """How far each place departs where a clause is left out of the prompt: the root mean square over channels of the
    difference between two predictions, smoothed over 3 x 3 places.

    whole [B, C, (frames,) h, w], without [clauses, B, C, (frames,) h, w] -> [B, clauses, (frames,) h, w] in fp32
    """
    apart = (without.float() - whole.float()).square().mean(dim=2).sqrt().transpose(0, 1)
    planes = apart.flatten(0, -3)[:, None]
    return F.avg_pool2d(planes, 3, 1, 1, count_include_pad=False)[:, 0].reshape(apart.shape)


def compete(attention: Tensor, own: Sequence[int | None], rivals: Sequence[int], gamma: float) -> Tensor:
    """r_c(p) = a_c(p) / max_p a_c(p) and m_i(p) = (r_own(i)(p) / max_{c in rivals} r_c(p)) ^ gamma, at most 1.

    attention   [B, clauses, *grid], not negative
    own         per LoRA its clause; None: it acts everywhere
    rivals      the clauses that compete
    -> [B, LoRAs, *grid] in fp32. A place that no rival is attended to from is everybody's.
    """
    attention = attention.float()
    tiny = torch.finfo(torch.float32).tiny
    top = attention.flatten(2).amax(dim=-1).clamp_min(tiny)
    relative = attention / top.reshape(*top.shape, *[1] * (attention.ndim - 2))
    if not rivals:
        return relative.new_ones(len(relative), len(own), *relative.shape[2:])
    relative = relative + tiny  # where nothing is attended to, all are as good as the best
    best = _of(relative, rivals).amax(dim=1, keepdim=True)
    if None not in own:
        mine = _of(relative, own)
    else:  # a LoRA that acts everywhere is the best one
        mine = torch.cat([best if clause is None else relative[:, clause:clause + 1] for clause in own], dim=1)
    share = mine / best
    return (share if {None, *own} <= {None, *rivals} else share.clamp(max=1)) ** gamma


def _of(relative: Tensor, clauses: Sequence[int]) -> Tensor:
    """Some clauses, a view where they follow each other."""
    first, count = clauses[0], len(clauses)
    if list(clauses) == list(range(first, first + count)):
        return relative[:, first:first + count]
    return torch.cat([relative[:, clause:clause + 1] for clause in clauses], dim=1)


def outside(energy: Tensor, gains: Tensor, owners: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The mean energy of each adapter outside its places and inside them, [rows, adapters] each; 0 where there is no
    outside, or no inside.

    energy, gains   [entries, adapters, places]: of which the gain in [0, 1] says how far a place is inside
    owners          [entries], the row of each
    """
    def mean(weight: Tensor) -> Tensor:
        total, area = ((weight * each).sum(dim=-1) for each in (energy, torch.ones_like(energy)))
        total, area = (each.new_zeros(rows, each.shape[1]).index_add(0, owners, each) for each in (total, area))
        return total / area.clamp_min(torch.finfo(torch.float32).tiny)

    return mean(1 - gains), mean(gains)


def trust(share: Tensor, low: float, high: float) -> Tensor:
    """How far an adapter may leave its places, in [0, 1]: 1 where `share`, its energy outside them over that inside, is
    at most `low`, 0 from `high` on, and linear in its logarithm between."""
    tiny = torch.finfo(torch.float32).tiny
    return ((math.log(high) - share.clamp_min(tiny).log()) / (math.log(high) - math.log(low))).clamp(0, 1)
