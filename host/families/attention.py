"""Which attention of a model joins its picture and its text, and which of those say best where words are.

Known from the token order of the family (`token_order`): a call whose queries hold the picture and whose keys hold the
text, in one stream or across two. What is neither (a refiner of the text, the picture's own attention) is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor

from torch import nn

from .row_order import family_entry
from .token_streams import Streams, Tokens, resized

MOST = 12
"""Attention calls that are read per evaluation, spread evenly over the share of them that is asked for."""


@dataclass(frozen=True)
class Joint:
    """One attention call that joins text and picture.

    picture   (from, to): where the picture's places are among the queries
    text      (from, to): where the prompt's tokens are among the keys
    grid      (frames, height, width) of the places
    """

    picture: tuple[int, int]
    text: tuple[int, int]
    grid: tuple[int, ...]


def joint(root: nn.Module, streams: Streams, queries: int, keys: int) -> Joint | None:
    """What an attention call of a diffusion model with so many queries and keys joins; None where it does not join
    text and picture, or where sizes do not tell. `streams` are those of the evaluation."""
    if family_entry(root, PICTURE_FIRST):
        streams = {**streams, "joint": tuple(img + txt for img in streams["img"] for txt in streams["txt"])}
    known = {tokens for each in streams.values() for tokens in each}
    if queries == keys:
        found = {(tokens, tokens) for tokens in known if _size(tokens) == keys
                 and _has(tokens, "picture") and _has(tokens, "text")}
        if any(_size(tokens) == keys and _has(tokens, "picture") and not _has(tokens, "text") for tokens in known):
            found = set()
    else:
        pictures = [own for own in known if _size(own) == queries and _has(own, "picture") and not _has(own, "text")]
        pictures = pictures or [own for own in [resized(streams, queries)] if own is not None]
        texts = [own for own in known if _size(own) == keys and _has(own, "text") and not _has(own, "picture")]
        found = {(own, other) for own in pictures for other in texts}
    places = {Joint(_where(own, "picture"), _where(other, "text"),
                    next(segment.grid for segment in own if segment.kind == "picture")) for own, other in found}
    return places.pop() if len(places) == 1 else None


def chosen(root: nn.Module, count: int, share: tuple[float, float] | None = None) -> tuple[int, ...]:
    """Which of a model's `count` joining calls to read, by their number: those of `share`, from 0 (its first) to 1
    (its last), of the family where it is None; at most MOST."""
    first, last = share or family_entry(root, SHARES) or (0.0, 1.0)
    start, stop = min(floor(first * count), count - 1), max(ceil(last * count), 1)
    start, span = min(start, stop - 1), max(stop - min(start, stop - 1), 1)
    wanted = min(span, MOST)
    return tuple(dict.fromkeys(start + int((k + 0.5) * span / wanted) for k in range(wanted)))


PICTURE_FIRST = dict.fromkeys(("lens.model.LensTransformer2DModel", "joyimage.model.JoyImageTransformer3DModel",
                               "genmo.joint_model.asymm_models_joint.AsymmDiTJoint"), True)
"""Families without layers that see text and picture in one, and whose attention joins them the other way round."""

SHARES: Mapping[str, tuple[float, float]] = {
    "flux.model.Flux": (0.2, 0.6),
    "chroma.model.Chroma": (0.2, 0.6),
    "qwen_image.model.QwenImageTransformer2DModel": (0.2, 0.6),
    "modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper": (0.2, 0.6),
    "lumina.model.NextDiT": (0.2, 0.6),
    "krea2.model.SingleStreamDiT": (0.2, 0.6),
    "wan.model.WanModel": (0.2, 0.6),
}
"""By module below comfy.ldm and class: the part of a model's joining calls that is read. The first blocks of deep
transformers hardly know the picture yet, and the last ones are about detail; elsewhere all are read. Chosen on the
testbed's second body, where it doubles the pictures that show both of two characters; not yet held against checkpoints
of full size."""


def _size(tokens: Tokens) -> int:
    return sum(segment.count for segment in tokens)


def _has(tokens: Tokens, kind: str) -> bool:
    return any(segment.kind == kind for segment in tokens)


def _where(tokens: Tokens, kind: str) -> tuple[int, int]:
    """Of the first segment of a kind."""
    at = 0
    for segment in tokens:
        if segment.kind == kind:
            break
        at += segment.count
    return at, at + segment.count
