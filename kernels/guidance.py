"""Algebra of guidance that is skipped or foretold (Castillo et al. 2023, arXiv 2312.12487), or extrapolated.

c and u stand for the prediction with the prompt and with the negative one, in noise or velocity: (x - x0) / sigma.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

CHUNK = 2**20
NOTHING = 1e-9


def similarity_terms(c: Tensor, u: Tensor, x: Tensor | None = None) -> Tensor:
    """Semantics: g[i, j, b] = <v_i, v_j> over all elements of sample b, where v = (c, u), or (x - c, x - u).

    c, u, x: [B, ...] of any floating dtype; the sums are fp32 (half precision saturates near cosine 1).  [2, 2, B].
    Terms of parts of a sample (windows) may be added before `cosine`. No host synchronisation. In four operations,
    since it is done in every step: a GPU computes them in no time, and waits for the host to ask for each.
    """
    sides = torch.stack([c, u])
    sides = (sides if x is None else x - sides).flatten(2).float()
    return (sides[:, None] * sides).sum(-1)


def cosine(terms: Tensor) -> Tensor:
    """Semantics: g[b] = <v_0, v_1> / (|v_0| |v_1|); 1 where both are zero, NOTHING / |v| where the other one is.

    terms: [2, 2, B], as `similarity_terms` has them.  Returns [B], fp32. Every vector counts as having one more
    element, NOTHING: where both are zero that is what they have in common, and else it is lost in the rounding.
    Source: section 4, gamma_t. Unchanged by positive scaling of either side.
    """
    terms = terms + NOTHING**2
    return terms[0, 1] / terms.diagonal().prod(-1).sqrt()


def products(a: Tensor, b: Tensor) -> Tensor:
    """Semantics: p[k, l] = <a_k, b_l>.  a: [K, ...], b: [L, ...] of equal trailing sizes.  Returns float64 [K, L].

    Widened chunk by chunk, so that no float64 copy of the whole features is made.
    """
    a, b = a.flatten(1), b.flatten(1)
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], CHUNK):
        out += a[:, start:start + CHUNK].double() @ b[:, start:start + CHUNK].double().T
    return out


def least_squares(gram: Tensor, cross: Tensor, ridge: float = 1e-6) -> Tensor:
    """Semantics: b = (G + ridge tr(G) / n I)^-1 y, the coefficients of a target on n features; 0 where those are.

    gram: [n, n] = <f_a, f_b>, cross: [n] = <f_a, target>, both float64, added up over all paths.  Returns float64 [n].
    """
    n = gram.shape[0]
    if not gram.diagonal().any():
        return torch.zeros_like(cross)
    identity = torch.eye(n, dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge * gram.diagonal().mean() * identity, cross)


def combine(features: Sequence[Tensor], coefficients: Sequence[float], intercept: float = 0.0) -> Tensor:
    """Semantics: sum_a b[a] f[a] + intercept.  features: n of one shape, coefficients: n.  Returns features' shape and
    dtype; holds no copy of the features, which for a video are gigabytes.

    Source: LinearAG, e^_u(x_t) = sum_i b^c_i e(x_i, c) + sum_{i < t} b^0_i e(x_i, 0).
    """
    out = torch.full_like(features[0], intercept)
    for feature, coefficient in zip(features, coefficients, strict=True):
        out.add_(feature, alpha=coefficient)
    return out


def guided_steps(gamma: Tensor, threshold: float, min_steps: int = 0, ramp_steps: int = 0) -> Tensor:
    """How many steps of each path evaluate the negative: up to the first one, from step min_steps on, with
    gamma >= threshold, and ramp_steps more.

    gamma: [paths, steps].  Returns int64 [paths].
    """
    crossed = gamma >= threshold
    crossed[:, :min_steps] = False
    steps = gamma.shape[1]
    return torch.where(crossed.any(1), (crossed.long().argmax(1) + 1 + ramp_steps).clamp_max(steps), steps)


def threshold_for(gamma: Tensor, saving: float, min_steps: int = 0, ramp_steps: int = 0) -> float:
    """The threshold whose mean saving over the paths is nearest to `saving`, a share of all evaluations (two per step,
    so at most 0.5). It lies in the middle between two similarities that were seen.

    gamma: [paths, steps].  Savings fall as the threshold rises, so few of all that lie between two are tried.
    """
    gamma = gamma.double()
    values = gamma.flatten().unique()
    candidates = torch.cat([values[:1] - 1e-6, (values[1:] + values[:-1]) / 2, values[-1:] + 1e-6]).tolist()
    steps = gamma.shape[1]

    @cache
    def saved(k: int) -> float:
        unguided = steps - guided_steps(gamma, candidates[k], min_steps, ramp_steps).double()
        return float(unguided.mean()) / (2 * steps)

    def first(share: float) -> int:
        """The lowest of them that saves no more than a share."""
        return bisect_left(range(len(candidates) - 1), -share, key=lambda k: -saved(k))

    less = first(saving)
    more = first(saved(less - 1)) if less else less
    return candidates[min(more, less, key=lambda k: abs(saved(k) - saving))]


def line(d0: Tensor, d1: Tensor, t0: Tensor, t1: Tensor, t: Tensor) -> Tensor:
    """Semantics: d[b] = d1[b] + (d1[b] - d0[b]) (t[b] - t1[b]) / (t1[b] - t0[b]), the line through two points at a
    third place; d1[b] where both points are at one place.

    d0, d1: [B, ...] of one floating dtype, which the result has.  t0, t1, t: [B], floating.  No host synchronisation.
    """
    back = torch.nan_to_num((t1 - t) / (t1 - t0), 0.0, 0.0, 0.0)
    return torch.lerp(d1, d0, back.to(d1.dtype).view(-1, *[1] * (d1.ndim - 1)))


def relative_size(apart: Tensor, found: Tensor) -> Tensor:
    """Semantics: m[b] = |apart_b| / |found_b|; 0 where both are zero.  apart, found: [B, ...].  [B], fp32."""
    size = found.flatten(1).float().norm(dim=1)
    return apart.flatten(1).float().norm(dim=1) / size.clamp_min(torch.finfo(size.dtype).tiny)
