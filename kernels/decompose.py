"""Weight-decomposed adapters (DoRA, arXiv 2402.09353): a delta, and a magnitude of its own per output or per input."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude_scale(magnitude: Tensor, weight: Tensor, delta: Tensor, of_changed: bool = False
                    ) -> tuple[Tensor, bool]:
    """The factor that gives `weight + delta` the learned magnitude, and whether it acts on outputs.

    Semantics: s = magnitude / (norm + eps). A magnitude with one entry per output is divided by the row norms of
    `weight` *before* the delta; one with one entry per input by the column norms of `weight + delta`. That
    difference is the host loader's, kept because files are trained and previewed against it. With `of_changed` outputs
    go by the norms of `weight + delta` as well, as in the paper.

    Shape: weight and delta [out, in, *k] -> s [out] (True) or [in] (False). Norms in fp32; eps is the machine epsilon
    of the weight's dtype.
    """
    on_output = magnitude.shape[0] == weight.shape[0]
    eps = torch.finfo(weight.dtype).eps
    if on_output:
        norm = torch.linalg.vector_norm((weight + delta if of_changed else weight).float().flatten(1), dim=1)
    else:
        norm = torch.linalg.vector_norm((weight + delta).float().transpose(0, 1).flatten(1), dim=1)
    return magnitude.float().flatten() / (norm + eps), on_output
