"""What the testbed's sampler, its training and its measurements ask of a model: the same of both bodies."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, nn

from ..engine.positions import Segments

See = Callable[[Tensor, Tensor, slice], None]
"""(q of the picture's places, k of all that they attend to, where among these the text's tokens lie)"""


class Body(nn.Module):
    """A model that predicts the velocity of a flow, with its text encoder `text`, as one thing to train and to store.

    latent   channels, height and width of the latents that it draws
    grid     height and width in places of its attention
    length   tokens of a text
    """

    latent: tuple[int, int, int]
    grid: tuple[int, int]
    length: int
    text: nn.Module

    @property
    def net(self) -> nn.Module:
        """The module whose layers LoRAs act on."""
        raise NotImplementedError

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """int64 [n, tokens]"""
        raise NotImplementedError

    def velocity(self, x: Tensor, sigma: Tensor, context: Tensor, see: See | None = None) -> Tensor:
        """Of x [n, *latent] at sigma [n], asked for what the text encoder says in context [n, tokens, width]. `see` is
        shown every attention from picture to text."""
        raise NotImplementedError

    def targets(self) -> dict[str, nn.Module]:
        """The layers below `net` that LoRAs are trained on, by name."""
        raise NotImplementedError

    def locate(self, layer: str, tokens: int) -> Segments | None:
        """What the tokens of a layer are, for gains by place and word (engine/positions.py)."""
        raise NotImplementedError

    @staticmethod
    def lessons(rng: np.random.Generator, count: int) -> tuple[Tensor, list[str]]:
        """Latents of random scenes and their captions, for the training of the base."""
        raise NotImplementedError

    def contexts(self, prompts: Sequence[str]) -> Tensor:
        return self.text(self.tokenize(prompts).to(next(self.parameters()).device))
