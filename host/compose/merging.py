"""Nodes that merge tokens of a U-Net's self-attention for a while (ToMe): fewer of them, and in another order."""

from __future__ import annotations

import re
from threading import local

from torch import Tensor, nn

PATCH = "attn1_patch"
MERGED = re.compile(r".*\.attn1\.to_(q|out\.0)")
"""The layers that see what such a patch makes of the tokens: queries, and what is computed of them."""


class Merging(local):
    """Whether the layers of the self-attention that runs see merged tokens, of which nobody else knows where in the
    picture they lie. Their number alone says nothing: of four tokens one is left at most, as many as a level of the
    U-Net has. Several devices compute at the same time, each in a thread."""

    def __init__(self):
        self._tokens, self._merged = 0, False

    def watched(self, root: nn.Module, options: dict) -> dict:
        """Transformer options for a call, in which the patches of self-attention are looked at."""
        patches = options.get("patches", {})
        if not patches.get(PATCH) or not hasattr(root, "input_blocks"):  # other models call them with other arguments
            return options
        return {**options, "patches": {**patches, PATCH: [self._before, *patches[PATCH], self._behind]}}

    def hides(self, layer: str) -> bool:
        return self._merged and MERGED.fullmatch(layer) is not None

    def _before(self, q: Tensor, k: Tensor, v: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        self._tokens = q.shape[1]
        return q, k, v

    def _behind(self, q: Tensor, k: Tensor, v: Tensor, options: dict) -> tuple[Tensor, Tensor, Tensor]:
        self._merged = q.shape[1] != self._tokens
        return q, k, v
