"""Sums of the largest absolute entries of B A, exact: on a processor without holding the product, on a GPU from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

MatrixPart = Tensor | tuple[Tensor, Tensor]
"""A dense matrix of any shape, or the factors (down [r, in, *kernel], up [out, r]) of a product up @ down."""

FIRST_TILE, LARGEST_TILE = 2**16, 2**19  # entries; the largest still lies in a processor's cache


def top_and_total(parts: Sequence[MatrixPart], k: int) -> tuple[float, float]:
    """(sum of the k largest |entries|, sum of all |entries|) of a matrix given in disjoint parts.

    Semantics: (sum(topk(x, min(k, numel))), sum(x)) with x the concatenation of |dense| and |up @ down| of all parts.
    Entries are computed in float32 (float64 for float64 factors), sums of tiles in that, sums of tiles over all in
    float64. Raises ValueError for a negative k.

    A product is formed a tile of rows at a time, rows of large norm first. Once k entries are known, the least of them
    is a bound: by Cauchy-Schwarz |x_ij| <= |up_i| |down_j|, a tile whose norms stay below it is not searched, and of
    the others only the rows that have an entry above it.
    """
    if k < 0:
        raise ValueError(f"top_and_total: k must not be negative, got {k}")
    best, bound, total = None, -1.0 if k else float("inf"), 0.0
    for tile, limit in (each for part in parts for each in _tiles(part, k)):
        total += tile.sum(dim=1).double().sum().item()
        if limit <= bound:
            continue
        if bound >= 0:
            found = tile[tile.amax(dim=1) > bound]
            found = found[found > bound]
        else:
            found = tile.flatten().clone()
        best = found if best is None else torch.cat([best, found])
        if best.numel() >= k:
            best = best.topk(k, sorted=False).values
            bound = best.min().item()
    return 0.0 if best is None else best.double().sum().item(), total


def sums_on_device(parts: Sequence[MatrixPart], k: int, device: torch.device, most: int) -> Tensor:
    """[sum of the k largest |entries|, sum of all |entries|, sum of squares] of a matrix given in disjoint parts.

    Semantics: those of `top_and_total`, and of `energy` for what is no product as well. parts: on `device`. Returns [3]
    in float64 there; the host waits for nothing and asks for a dozen operations per part.

    For a GPU, on which every product is formed whole, or `most` entries of it at a time: 12 bytes for each of them, and
    the room that the search for the largest takes. Products are float64, which no setting of the device rounds as it
    may round float32 (TF32), and the largest entries are sought in float32. Equal matrices give equal numbers.
    """
    sums, found = [torch.zeros(2, dtype=torch.float64, device=device)], []
    for tile in (each for part in parts for each in _wide_tiles(part, most)):
        norm = torch.linalg.vector_norm
        sums.append(torch.stack([norm(tile, 1), norm(tile).square()]))
        entries = tile.float().abs_().flatten()
        found.append(entries.topk(min(k, entries.numel())).values)
    if len(found) > 1:
        found = [torch.cat(found).topk(min(k, sum(each.numel() for each in found))).values]
    total = sums[-1] if len(sums) == 2 else torch.stack(sums).sum(0)
    top = found[0].sum(dtype=torch.float64) if found else total[0]
    return torch.cat([top[None], total])


def _wide_tiles(part: MatrixPart, most: int) -> Iterator[Tensor]:
    """One part in float64, in tiles of about `most` entries."""
    if isinstance(part, Tensor):
        yield from (tile.double() for tile in part.flatten().split(most))
        return
    down, up = part[0].flatten(1).double(), part[1].double()
    yield from (rows @ down for rows in up.split(max(most // down.shape[1], 1)))


def _tiles(part: MatrixPart, k: int) -> Iterator[tuple[Tensor, float]]:
    """(|entries| [rows, columns], an upper limit of them) of one part, tile by tile. A tile is valid until the next."""
    if isinstance(part, Tensor):
        x = part.to(torch.promote_types(part.dtype, torch.float32))
        x = x.flatten(1) if x.ndim > 1 else x.reshape(1, -1)
        for rows in _cuts(*x.shape, k):
            yield x[rows].abs(), float("inf")
        return
    down, up = part
    dtype = torch.promote_types(torch.promote_types(down.dtype, up.dtype), torch.float32)
    down, up = down.to(dtype).flatten(1), up.to(dtype)
    norms, order = torch.linalg.vector_norm(up, dim=1).sort(descending=True)
    limits = (norms * torch.linalg.vector_norm(down, dim=0).amax() * (1 + 1e-5)).tolist()
    up = up[order]
    buffer = up.new_empty(0)
    for rows in _cuts(up.shape[0], down.shape[1], k):
        shape = (rows.stop - rows.start, down.shape[1])
        if buffer.shape != shape:
            buffer = up.new_empty(shape)
        yield torch.mm(up[rows], down, out=buffer).abs_(), limits[rows.start]


def _cuts(rows: int, columns: int, k: int) -> Iterator[slice]:
    """Slices of rows: small tiles first, so that the bound is there early, then larger ones."""
    entries, start = max(FIRST_TILE, 4 * k), 0
    while start < rows:
        stop = min(start + max(entries // columns, 1), rows)
        yield slice(start, stop)
        start, entries = stop, min(2 * entries, LARGEST_TILE)
