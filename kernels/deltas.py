"""Dense deltas of the adapter kinds that are not a plain product of two factors (LyCORIS, arXiv 2309.14859).

Every function returns the delta without scale and gain, in the dtype of its inputs; the caller reshapes it to the
weight it belongs to. Factor names follow the files: `*_a` is the left factor, `*_b` the right one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product up @ down by factors of which none is lost in half precision.

    Semantics: (up * s, down / s) with s the power of two next to the largest entry of down, so that nothing is rounded;
    both as they are, unless that entry is far from 1. A file may hold up 1000 times too small and down 1000 times too
    large: fine for a weight, to which only their product is added, but not for the activation between the two.
    Shape: up [out, r], down [r, in, *k]; up is in fp32 where it was changed.
    """
    largest = down.float().abs().amax().item()
    if 2**-10 < largest < 4 or largest == 0:
        return up, down
    exponent = math.frexp(largest)[1]
    return up.float() * 2.0**exponent, down.float() * 2.0**-exponent


def tucker_down(down: Tensor, mid: Tensor) -> Tensor:
    """Fold the core of a Tucker-decomposed convolution into its input factor.

    Semantics: out[r, i, *k] = sum_q mid[r, q, *k] down[q, i]. The core's spatial part stays, so that the branch is
    again one convolution followed by a pointwise map. Shape: down [q, in, 1...], mid [r, q, *k] -> [r, in, *k].
    """
    return torch.einsum("rq...,qi->ri...", mid, down.flatten(1))


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rebuild a convolution from Tucker factors: out[o, i, *k] = sum_pq core[p, q, *k] a[p, o] b[q, i].

    Shape: core [p, q, *k], a [p, out], b [q, in] -> [out, in, *k].
    """
    return torch.einsum("pq...,po,qi->oi...", core, a, b)


def hadamard(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor,
             t1: Tensor | None = None, t2: Tensor | None = None) -> Tensor:
    """LoHa: (w1_a w1_b) * (w2_a w2_b), elementwise product of two low-rank matrices.

    Shape: w*_a [out, r], w*_b [r, in] -> [out, in]. With cores t1, t2 [r, r, *k] the two factors are rebuilt by
    `tucker` from w*_a [r, out] and w*_b [r, in] instead.
    """
    if t1 is not None and t2 is not None:
        return tucker(t1, w1_a, w1_b) * tucker(t2, w2_a, w2_b)
    return (w1_a @ w1_b) * (w2_a @ w2_b)


def hadamard_factors(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> tuple[Tensor, Tensor]:
    """LoHa as an ordinary product: (up, down) with up @ down = (w1_a w1_b) * (w2_a w2_b), of rank r1 r2.

    Semantics: up[o, p r2 + q] = w1_a[o, p] w2_a[o, q], down[p r2 + q, i] = w1_b[p, i] w2_b[q, i].
    Shape: w1_a [out, r1], w1_b [r1, in], w2_a [out, r2], w2_b [r2, in] -> [out, r1 r2], [r1 r2, in].
    """
    up = w1_a.unsqueeze(2) * w2_a.unsqueeze(1)
    down = w1_b.unsqueeze(1) * w2_b.unsqueeze(0)
    return up.flatten(1), down.flatten(0, 1)


def kronecker(w1: Tensor, w2: Tensor) -> Tensor:
    """LoKr: the Kronecker product of a small matrix w1 [p, q] with w2 [s, t, *k] -> [p s, q t, *k]."""
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - 2)), w2.contiguous())
