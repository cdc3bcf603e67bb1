"""Where a layer's tokens lie: the order of text, picture and the rest in every stream of the host's model families.

A family has two parts: the streams of a call, worked out from the shapes of its inputs, and which layer sees which of
them. The families themselves stand in `token_pictures` and `token_films`. Text is counted as the model gets it: the
host pads the prompt of Flux 2 in front to 512 tokens before the call, Anima's behind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from .row_order import family_entry
from .token_films import FILMS
from .token_pictures import PICTURES
from .token_streams import ROW, Family, ModelInputs, Streams, Tokens, resized

FAMILIES = {**PICTURES, **FILMS}


@dataclass(frozen=True)
class CallTokens:
    """The tokens of one call of the diffusion model."""

    order: TokenOrder
    streams: Streams

    def segments(self, layer: str, tokens: int) -> Tokens | None:
        """What a layer that sees so many tokens sees, in order. Empty: it sees no tokens but what stands for a whole
        row or moment (times, pooled text). None: it is not known.

        `tokens` counts everything but entries and channels: the product of all dimensions of the layer's output but
        the first and that of the channels. A family whose layers have no batch (`TokenOrder.axis` 0) has them in the
        first dimension.
        """
        stream = self.order.stream(layer)
        if stream == ROW:
            return ()
        found = {segments for segments in self.streams.get(stream, ()) if sum(s.count for s in segments) == tokens}
        if not found and stream == "img":
            return resized(self.streams, tokens)
        if len({tuple(replace(s, source="") for s in segments) for segments in found}) != 1:
            return None
        # Texts of one length that only their source tells apart: the first one's words are the prompt's.
        return min(found, key=lambda segments: [s.source for s in segments])


class TokenOrder:
    """The token order of one diffusion model.

    axis  the first dimension of tokens: 1, or 0 where the model takes one row only and has no dimension for it
    """

    def __init__(self, diffusion_model: nn.Module, family: Family):
        self._root, self._family, self._streams = diffusion_model, family, {}
        self.axis = family.axis

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern, str]]:
        return [(re.compile(pattern), stream) for stream, pattern in self._family.layers]

    def stream(self, layer: str) -> str | None:
        """The name of the stream that a layer sees."""
        if layer not in self._streams:
            self._streams[layer] = next((s for pattern, s in self._patterns if pattern.fullmatch(layer)), None)
        return self._streams[layer]

    def begin(self, x: Tensor | list[Tensor], conds: Mapping[str, object]) -> CallTokens:
        """The tokens of a call. `x` and `conds` are what the diffusion model is called with: the latent, or several,
        and all that it takes by name (context, ref_latents and the like)."""
        return CallTokens(self, self._family.streams(self._root, ModelInputs(x, conds)))


def token_order(diffusion_model: nn.Module) -> TokenOrder | None:
    """The token order of a diffusion model; None: its family is not known, and all of a row takes one gain."""
    family = family_entry(diffusion_model, FAMILIES)
    return None if family is None else TokenOrder(diffusion_model, family)
