"""The second body as the testbed's sampler and trainings see it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from ...engine.positions import Segment, Segments
from ..body import Body, See
from ..model import encode
from .model import LATENT, Flux, start
from .render import render
from .scene import sample
from .text import LENGTH, TopicText, meaningless, sparse_caption, tokenize

BARE = 0.3
"""How often a rare word stands alone in captions, for the base, which learns to pass over it, and for LoRAs."""


READ = ("double_blocks.1", "single_blocks.0")
"""The blocks whose attention says best where words are, by pictures of two characters: what ComfyUI's model of this
class is read at, too (`host/families/attention.py`)."""


class JointBase(Body):
    """The transformer and its text encoder."""

    latent, grid, length = LATENT, (LATENT[1] // 2, LATENT[2] // 2), LENGTH

    def __init__(self) -> None:
        super().__init__()
        self.flux, self.text = start(Flux()), TopicText()

    @property
    def net(self) -> Flux:
        return self.flux

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        return tokenize(prompts)

    def velocity(self, x: Tensor, sigma: Tensor, context: Tensor, see: See | None = None) -> Tensor:
        text = context.shape[1]

        def observer(block: str, q: Tensor, k: Tensor) -> None:
            if block in READ:
                see(q[:, :, text:], k, slice(0, text))

        return self.flux(x, sigma, context, context.mean(1), None if see is None else observer)

    def targets(self) -> dict[str, nn.Module]:
        """Attention and feed-forward of every block, of text and picture."""
        return {name: module for name, module in self.flux.named_modules()
                if isinstance(module, nn.Linear) and "_blocks." in name and not name.endswith(".lin")}

    def locate(self, layer: str, tokens: int) -> Segments | None:
        picture = Segment("picture", LATENT[1] * LATENT[2] // 4, (1, LATENT[1] // 2, LATENT[2] // 2))
        if ".txt_" in layer:
            return (Segment("text", tokens),)
        if ".img_" in layer:
            return (picture,) if tokens == picture.count else None
        if layer.startswith("single_blocks.") and tokens > picture.count:
            return Segment("text", tokens - picture.count), picture
        return None

    @staticmethod
    def lessons(rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
        scenes = sample(rng, count)
        captions = [sparse_caption(rng, scenes.words(row), meaningless(rng), BARE) for row in range(count)]
        return encode(render(scenes)), captions
