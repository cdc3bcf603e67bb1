"""What a model family says of its tokens (see `token_order`), and the inputs of a call that it says it by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ...engine.positions import Segment

Tokens = tuple[Segment, ...]
Streams = dict[str, tuple[Tokens, ...]]
"""Stream -> what its layers may see; more than one where a layer is called for several things, told by their size."""

ROW = "row"
"""The stream of layers that see no tokens."""
ANY_SIZE = "at any size"
"""The stream of a picture that layers may see at other sizes than the family's own, in its proportions: other nodes
shrink it for a while (PatchModelAddDownscale). No layer is named for it."""


@dataclass(frozen=True)
class ModelInputs:
    """The inputs of a diffusion model: its latent or latents, and what it takes by name."""

    x: Tensor | list[Tensor]
    conds: Mapping[str, object]

    def shape(self, part: int = 0) -> tuple[int, ...]:
        """Of the latent, without rows and channels."""
        return tuple((self.x[part] if isinstance(self.x, (list, tuple)) else self.x).shape[2:])

    def text(self, name: str = "context") -> Segment:
        return Segment("text", self.length(name), source="" if name == "context" else name)

    def length(self, name: str) -> int:
        """Tokens of a conditioning [rows, tokens, channels]; 0 where there is none."""
        value = self.conds.get(name)
        return value.shape[1] if isinstance(value, Tensor) else 0

    def others(self, name: str, patch: tuple[int, ...]) -> Tokens:
        """Further latents by name, each as large as it is: one tensor, a list of them, or none."""
        value = self.conds.get(name)
        latents = [value] if isinstance(value, Tensor) else value or []
        return tuple(Segment("other", math.prod(grid(latent.shape[2:], patch))) for latent in latents)


@dataclass(frozen=True)
class Family:
    """streams  (diffusion model, call) -> the streams of the call
    layers      (stream, regular expression for whole layer names); the first that fits
    axis        see `TokenOrder`
    """

    streams: Callable[[nn.Module, ModelInputs], Streams]
    layers: tuple[tuple[str, str], ...]
    axis: int = 1


def grid(size: tuple[int, ...], patch: int | tuple[int, ...]) -> tuple[int, int, int]:
    """(frames, height, width) in tokens of a latent [(frames,) height, width], rounded up as the host pads it."""
    patch = (1, patch, patch) if isinstance(patch, int) else (1, 1, *patch)[-3:]
    return tuple(-(-n // p) for n, p in zip((1, *size)[-3:], patch, strict=True))


def padded(size: tuple[int, ...], patch: int) -> tuple[int, ...]:
    """A size, filled up to whole patches."""
    return tuple(-(-n // patch) * patch for n in size)


def picture(size: tuple[int, ...], patch: int | tuple[int, ...]) -> Segment:
    found = grid(size, patch)
    return Segment("picture", math.prod(found), found)


def resized(streams: Streams, count: int) -> Tokens | None:
    """The picture of ANY_SIZE in so many tokens; None where there is none, or no one size in its proportions."""
    if ANY_SIZE not in streams:
        return None
    ((whole,),) = streams[ANY_SIZE]
    _, height, width = whole.grid
    scale = math.sqrt(count / whole.count)
    grids = [(1, h, count // h) for h in range(max(math.floor(height * scale), 1), math.ceil(height * scale) + 1)
             if count % h == 0 and abs(count // h - width * scale) < 1]
    return (Segment("picture", count, grids[0]),) if len(grids) == 1 else None


def other(count: int) -> Tokens:
    return (Segment("other", count),) if count else ()


def joined(text: Tokens, img: Tokens) -> Streams:
    """Streams of text, of picture, and of both, text first."""
    return {"txt": (text,), "img": (img,), "joint": (text + img,)}
