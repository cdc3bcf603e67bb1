"""Where the tokens that a layer sees come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A run of tokens side by side.

    kind   "text": tokens of the prompt, in its order; "picture": places of the picture or film that is made, in the
           order of `grid`; "other": anything else (reference pictures, registers, padding, sound)
    count  how many
    grid   (frames, height, width) in tokens, for a picture; their product is `count`
    """

    kind: str
    count: int
    grid: tuple[int, ...] = ()
