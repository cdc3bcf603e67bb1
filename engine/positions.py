"""Where adapters act inside a row: places of the picture and tokens of the text, as gains for the layers of a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .transfer import on_device


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one kind along a layer's token axis.

    kind    text, picture, or other (registers, padding, reference pictures, sound)
    count   tokens
    grid    of a picture: (frames, height, width), frames first and rows of the picture before its columns
    source  of a text that is not the model's first one: its name among the words (`Places`)
    """

    kind: str
    count: int
    grid: tuple[int, ...] = ()
    source: str = ""

    @property
    def places(self) -> tuple[int, ...]:
        """The grid of a picture without frames of its own: those of a film may be entries (`Places.on_grid`)."""
        return self.grid if self.grid[0] > 1 else self.grid[1:]


Segments = tuple[Segment, ...]
Make = Callable[["Tensor | None"], Tensor]
"""(out) -> a tensor, which is `out` where that is one."""
Locate = Callable[[str, int], "Segments | None"]
"""(layer, tokens) -> what these tokens are, in order; empty where they stand for whole rows (times, pooled text); None
where that is not known."""


class Places:
    """Where the adapters of a bank act in one batch. Gains are made once per size and kept; `update` changes what they
    hold and not where they lie, so that whatever was recorded or compiled with them stays right.

    maps      [pictures, adapters, height, width] or [pictures, adapters, frames, height, width], in [0, 1] on any grid:
              how much of an adapter's delta a place gets
    pictures  per row of the batch, its index into maps
    words     [texts, adapters, tokens] or None: the same for each token of the text
    texts     per row, its index into words. A text whose tokens were repeated to the length of another is repeated here
    more      words of further texts of the model, by their source; a text whose source is not here gets all of the
              delta
    locate    what the tokens of a layer are
    beneath   how many adapters of the bank, its first ones, act everywhere: maps and words begin with the next one

    Tokens that are neither picture nor text, and rows of layers that have no tokens, get all of the delta.
    """

    def __init__(self, maps: Tensor, pictures: Sequence[int], words: Tensor | None = None, texts: Sequence[int] = (),
                 locate: Locate = lambda layer, tokens: None, more: Mapping[str, Tensor] | None = None,
                 beneath: int = 0):
        self.beneath, self.locate = beneath, locate
        self.maps, self.pictures, self.texts = self._of_all(maps), tuple(pictures), tuple(texts)
        self.words = None if words is None else self._of_all(words)
        self.more = {source: self._of_all(tensor) for source, tensor in (more or {}).items()}
        self._kept: dict[Hashable, tuple[Tensor, Make, bool]] = {}
        self._indexes: dict[tuple[int, ...], Tensor] = {}

    def update(self, maps: Tensor, words: Tensor | None = None, more: Mapping[str, Tensor] | None = None) -> None:
        """Other maps and words of the same shapes: everything made of the earlier ones is brought up to date in place,
        in the order in which it was made; without other words what is made of them alone stays. This is done in every
        step, and the host asks for each operation."""
        self.maps[:, self.beneath:].copy_(maps)
        if words is not None:
            self.words[:, self.beneath:].copy_(words)
        for source, tensor in (more or {}).items():
            self.more[source][:, self.beneath:].copy_(tensor)
        for tensor, make, of_words in self._kept.values():
            if words is not None or more or not of_words:
                make(tensor)

    def _of_all(self, some: Tensor) -> Tensor:
        """Maps or words with ones for the adapters that act everywhere."""
        return F.pad(some, (0, 0) * (some.ndim - 2) + (self.beneath, 0), value=1.0) if self.beneath else some

    def keep(self, key: Hashable, make: Make, of_words: bool = False) -> Tensor:
        """`make(None)`, made once per key and again, into the same tensor, at each update. of_words: it depends on the
        words and not on the maps."""
        if key not in self._kept:
            self._kept[key] = (make(None), make, of_words)
        return self._kept[key][0]

    def index(self, numbers: Sequence[int]) -> Tensor:
        """Numbers to take entries by, on the maps' device, sent there once: an update sends nothing."""
        key = tuple(numbers)
        if key not in self._indexes:
            self._indexes[key] = on_device(key, self.maps.device, torch.int64)
        return self._indexes[key]

    def on_grid(self, grid: tuple[int, ...], rows: tuple[int, ...]) -> Tensor:
        """Gains of the places of a picture: [entries, adapters, *grid] for entries that belong to `rows`.

        Several entries of one row in succession are its frames, where the grid has none of its own.
        """
        return self.keep(("grid", grid, rows), lambda out: self._on_grid(grid, rows, out))

    def on_tokens(self, segments: Segments, rows: tuple[int, ...]) -> Tensor:
        """Gains of the tokens of a layer: [entries, tokens, adapters]."""
        if len(segments) == 1 and segments[0].kind == "picture":
            return self._of_picture(segments[0], rows)
        return self.keep(("tokens", segments, rows), lambda out: self._on_tokens(segments, rows, out),
                         of_text(segments))

    def _on_grid(self, grid: tuple[int, ...], rows: tuple[int, ...], out: Tensor | None) -> Tensor:
        pictures = self.index([self.pictures[row] for row in rows])
        frames = len(rows) // len(set(rows)) if len(grid) == 2 and self.maps.ndim == 5 else 0
        maps = self._resized((frames, *grid) if frames else grid)
        if not frames:
            return torch.index_select(maps, 0, pictures, out=out)
        found = maps[pictures, :, self.index([sum(r == row for r in rows[:e]) for e, row in enumerate(rows)])]
        return found if out is None else out.copy_(found)

    def _of_picture(self, segment: Segment, rows: tuple[int, ...]) -> Tensor:
        return self.on_grid(segment.places, rows).flatten(2).mT

    def _on_tokens(self, segments: Segments, rows: tuple[int, ...], out: Tensor | None) -> Tensor:
        parts = []
        for segment in segments:
            if segment.kind == "picture":
                part = self._of_picture(segment, rows)
            elif segment.kind == "text" and (known := self._of(segment)) is not None:
                words = known.index_select(0, self.index([self.texts[row] for row in rows]))
                part = words.repeat(1, 1, max(segment.count // words.shape[2], 1)).mT
                if part.shape[1] < segment.count:  # padding behind the text
                    part = F.pad(part, (0, 0, 0, segment.count - part.shape[1]), value=1.0)
                part = part[:, :segment.count]
            else:
                part = self.maps.new_ones(len(rows), segment.count, self.maps.shape[1])
            parts.append(part)
        return torch.cat(parts, dim=1, out=out)

    def _of(self, text: Segment) -> Tensor | None:
        return self.more.get(text.source) if text.source else self.words

    def _resized(self, grid: tuple[int, ...]) -> Tensor:
        """The maps on another grid: averages over areas where it is coarser, linear between places where it is finer.
        Where the grid is of whole patches, the last of which the host fills up, each has the average of its own places.
        """
        maps = self.maps
        if len(grid) == 3 and maps.ndim == 4:
            return self._resized(grid[1:]).unsqueeze(2).expand(-1, -1, grid[0], -1, -1)
        if tuple(maps.shape[2:]) == grid:
            return maps
        patch = tuple(-(-size // tokens) for size, tokens in zip(maps.shape[2:], grid, strict=True))
        if all(-(-size // n) == tokens for size, n, tokens in zip(maps.shape[2:], patch, grid, strict=True)):
            return (F.avg_pool2d if maps.ndim == 4 else F.avg_pool3d)(maps, patch, ceil_mode=True)
        if prod(grid) <= prod(maps.shape[2:]):
            return (F.adaptive_avg_pool2d if maps.ndim == 4 else F.adaptive_avg_pool3d)(maps, grid)
        return F.interpolate(maps, size=grid, mode="bilinear" if maps.ndim == 4 else "trilinear")


def of_text(segments: Segments) -> bool:
    """Whether no place of a picture is among these tokens."""
    return all(segment.kind != "picture" for segment in segments)
