"""Where the LoRAs of one method may act in one run, as places of the batches that the host evaluates."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from uuid import UUID

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...engine.positions import Places, Segments
from ...engine.transfer import on_device
from ...kernels.nested import unpack
from ...kernels.patches import stacked
from ..families.token_order import CallTokens, token_order
from .merging import Merging

Area = tuple[int, ...] | None
"""(sizes.., offsets..) of a cond's area on the latent, as the host has them; None: all of it."""
ContextWindow = tuple[int, tuple[int, ...], int] | None
"""(dimension of the latent, which of it a call has, how many of these stand before the window itself); None: a call has
the whole latent."""
SOURCES = {"encoder_hidden_states_llama3": 2, "encoder_hidden_states_t5": 1}
"""Further texts of a prompt, as models are called with them: which dimension counts their tokens."""


class MaskedLoRAs:
    """LoRAs with masks by hand. Places are made once per kind of batch and kept.

    masks   per LoRA, as `RunContext.masks`: [pictures or 1, 1, (frames,) height, width] on the latent's grid, None:
            everywhere
    tell    called with a sentence where the places of a model are not known
    first   how many LoRAs of their bank come before them, which act everywhere
    """

    def __init__(self, masks: Sequence[Tensor | None], tell: Callable[[str], None], first: int = 0):
        self.first = first
        self.maps = stacked(masks).squeeze(2).transpose(0, 1)  # [pictures, LoRAs, (frames,) height, width]
        self.tell = tell
        self.window: ContextWindow = None  # of the call that goes on
        self.nowhere = False  # whether the layers of the model have no places for LoRAs that are not masked
        self.version = 0  # of the maps, and
        self.texts = 0  # of the words: what was made of earlier ones is brought up to date
        self._places: dict[Hashable, tuple[Places, int, int]] = {}

    def places(self, root: nn.Module, x: Tensor, conds: Mapping[str, object], areas: Sequence[Area],
               uuids: Sequence[UUID | None], merging: Merging) -> Places:
        """The places of a batch: for each of its conds (areas, None where it has none) all pictures.

        x, conds   what the model is called with: the part of the latent that the areas hold, and values by name
        uuids      the caller's own names of the conds
        merging    of tokens, by other nodes, while the model runs
        """
        shapes = tuple((name, _shape(value)) for name, value in conds.items())
        parts = [(self.kind(uuid), area) for uuid, area in zip(uuids, areas, strict=True)]
        key = root, x.shape, shapes, tuple(parts), self.window
        pictures, distinct = x.shape[0] // len(parts), list(dict.fromkeys(parts))
        if key not in self._places:
            maps = self._of_batch(distinct, x, conds)
            words, more = self._texts(distinct, conds, root, x)
            each = len(maps) // len(distinct)
            index = [distinct.index(part) * each + p % each for part in parts for p in range(pictures)]
            texts = [distinct.index(part) for part in parts for _ in range(pictures)]
            places = Places(maps.clone(), index, words, texts, self._locate(root, x, conds, merging), more, self.first)
            self._places[key] = places, self.version, self.texts
        places, version, texts = self._places[key]
        if version != self.version:
            same = texts == self.texts
            words = (None, None) if same else self._texts(distinct, conds, root, x)
            places.update(self._of_batch(distinct, x, conds), *words)
            self._places[key] = places, self.version, self.texts
        return places

    def kind(self, uuid: UUID | None) -> Hashable:
        """What tells the maps of a cond from those of others."""
        return None

    def of(self, kind: Hashable) -> Tensor:
        """The maps of a kind of cond, on the grid of the whole latent."""
        return self.maps

    def text(self, kind: Hashable, root: nn.Module, tokens: int, source: str = "") -> Tensor | None:
        """[LoRAs, tokens of the text as the model gets it]; None: all LoRAs act on all of them.

        source   of a further text of the model, as it is named among what the model is called with
        """
        return None

    def _of_batch(self, kinds: Sequence[tuple[Hashable, Area]], x: Tensor, conds: Mapping[str, object]) -> Tensor:
        dimensions = len(packed[0]) if (packed := _packed(conds)) else x.ndim
        maps = [held(self.of(kind), self.window, dimensions) for kind, _ in kinds]
        return torch.cat([crop(each, area) for each, (_, area) in zip(maps, kinds, strict=True)]).to(x.device)

    def _texts(self, kinds: Sequence[tuple[Hashable, Area]], conds: Mapping[str, object], root: nn.Module, x: Tensor
               ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """(words of the prompts, words of the model's further texts)"""
        found = {}
        for source, axis in (("", 1), *SOURCES.items()):
            text = conds.get(source or "context")
            words = [self.text(kind, root, text.shape[axis], source) for kind, _ in kinds] \
                if isinstance(text, Tensor) else [None]
            if all(each is not None for each in words):
                found[source] = on_device(torch.stack(words), x.device)
        return found.pop("", None), found

    def _locate(self, root: nn.Module, x: Tensor, conds: Mapping[str, object], merging: Merging
                ) -> Callable[[str, int], Segments | None]:
        tokens = call_tokens(root, x, conds)
        if tokens is None:
            self.tell(f"{type(root).__name__}: where its tokens lie in the picture is not known, so LoRAs are confined "
                      "to their places in its convolutions alone")
            return lambda layer, tokens: ()

        def located(layer: str, count: int) -> Segments | None:
            return None if merging.hides(layer) else tokens.segments(layer, count)

        return located


def call_tokens(root: nn.Module, x: Tensor, conds: Mapping[str, object]) -> CallTokens | None:
    """The tokens of a call of the diffusion model with this latent, packed or not, and these values by name."""
    order = token_order(root)
    if order is None:
        return None
    latents = unpack(x, tuple(tuple(shape[1:]) for shape in _packed(conds)))
    return order.begin(latents if len(latents) > 1 else x, conds)


def _packed(conds: Mapping[str, object]) -> Sequence[Sequence[int]]:
    """The shapes of the latents that a call has in one; none where it has one."""
    shapes = conds.get("latent_shapes") or ()
    return shapes if len(shapes) > 1 else ()


def window_of(options: Mapping) -> ContextWindow:
    """The context window of a call, by its transformer options: the host's own, or that of AnimateDiff-Evolved, whose
    frames are a batch."""
    found, other = options.get("context_window"), options.get("ad_params") or {}
    if found is None and other.get("sub_idxs") is not None:
        return 0, tuple(other["sub_idxs"]), 0
    index, anchor = tuple(getattr(found, "index_list", None) or ()), getattr(found, "causal_anchor_index", None)
    before = () if anchor is None or anchor < 0 else (anchor,)
    return (found.dim, (*before, *index), len(before)) if index else None


def of_window(maps: Tensor, window: ContextWindow) -> Tensor:
    """The part of maps [pictures, LoRAs, (frames,) height, width] that a window holds; all where one stands for all."""
    if window is None or maps.shape[window[0]] <= max(window[1]):
        return maps
    return maps.index_select(window[0], on_device(window[1], maps.device, torch.int64))


def held(maps: Tensor, window: ContextWindow, dimensions: int) -> Tensor:
    """The same of a latent of so many dimensions: of maps without frames there is nothing to take for some of them."""
    return maps if window is not None and window[0] and maps.ndim != dimensions else of_window(maps, window)


def for_call(mask: Tensor, window: ContextWindow, x: Tensor) -> Tensor:
    """A mask of the run (`RunContext.masks`) for a call with this latent: of the frames of its window, with ones for
    those that guide its film, and in its size, which a sampler may change on its way (SamplerLCMUpscale)."""
    mask = held(mask, window, x.ndim)
    more = x.shape[2] - mask.shape[2] if mask.ndim == 5 else 0
    mask = F.pad(mask, (0, 0, 0, 0, 0, more), value=1.0) if more > 0 else mask
    return resized(mask, tuple(x.shape[2 - mask.ndim:]))


def crop(maps: Tensor, area: Area, before: int = 2) -> Tensor:
    """The part of maps [.., (frames,) height, width], with so many dimensions before those, that an area holds, in
    place. It may be one of frames, too, and one without them holds all of them."""
    if area is None:
        return maps
    count = min(len(area) // 2, maps.ndim - before)
    sizes, offsets = area[:len(area) // 2][-count:], area[-count:]
    return maps[(..., *(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True)))]


def of_film(values: Tensor, film: int | None) -> Tensor:
    """Of what has a value for each place of a latent [.., (frames,) height, width], the frames of the film
    (`RunContext.film`); all where a place has none."""
    return values[:, :, :film] if values.ndim == 5 else values


def on_grid(mask: Tensor, grid: tuple[int, ...]) -> Tensor:
    """A mask [pictures or 1, 1, (frames,) height, width] for maps of this grid."""
    return mask.unsqueeze(2) if mask.ndim == 4 and len(grid) == 3 else mask


def resized(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Maps on another grid."""
    if tuple(maps.shape[2:]) == grid:
        return maps
    return F.interpolate(maps, grid, mode="bilinear" if len(grid) == 2 else "trilinear")


def _shape(value: object) -> Hashable:
    """What of a conditioning the order of tokens may depend on."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (list, tuple)):
        return tuple(_shape(each) for each in value)
    return value if isinstance(value, (str, int, float, bool)) else None


def values_by_name(conds: Sequence[list[dict] | None]) -> dict[str, object]:
    """What the conds of a call hand to the diffusion model."""
    return {name: getattr(value, "cond", value) for cond in conds for entry in cond or ()
            for name, value in entry.get("model_conds", {}).items()}
