"""Masks of LoRAs as places of the batches that the host evaluates."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...engine.positions import Places, Segments
from ...kernels.nested import unpack
from ...kernels.patches import stacked
from ..families.token_order import token_order

Area = tuple[int, ...] | None
"""(sizes.., offsets..) of a cond's area on the latent, as the host has them; None: all of it."""


class MaskedLoRAs:
    """Where the LoRAs of one method may act in one run. Places are made once per kind of batch and kept.

    masks   per LoRA, as `RunContext.masks`: [pictures or 1, 1, height, width] on the latent's grid, None: everywhere
    tell    called with a sentence where the places of a model are not known
    """

    def __init__(self, masks: Sequence[Tensor | None], tell: Callable[[str], None]):
        self.maps = stacked(masks).squeeze(2).transpose(0, 1)  # [pictures, LoRAs, height, width]
        self._tell = tell
        self._places: dict[Hashable, Places] = {}

    def places(self, root: nn.Module, x: Tensor, conds: Mapping[str, object], areas: Sequence[Area]) -> Places:
        """The places of a batch: for each of its conds (areas, None where it has none) all pictures.

        x, conds   what the model is called with: the part of the latent that the areas hold, and values by name
        """
        shapes = tuple((name, _shape(value)) for name, value in conds.items())
        key = id(root), x.shape, x.device, shapes, tuple(areas)
        if key not in self._places:
            pictures = x.shape[0] // len(areas)
            maps = self.maps if self.maps.shape[0] == 1 else self.maps[:pictures]
            distinct = list(dict.fromkeys(areas))
            cropped = torch.cat([_crop(maps, area) for area in distinct]).to(x.device)
            index = [distinct.index(area) * len(maps) + p % len(maps) for area in areas for p in range(pictures)]
            self._places[key] = Places(cropped, index, locate=self._locate(root, x, conds))
        return self._places[key]

    def _locate(self, root: nn.Module, x: Tensor, conds: Mapping[str, object]
                ) -> Callable[[str, int], Segments | None]:
        order = token_order(root)
        if order is None or order.axis != 1:
            self._tell(f"{type(root).__name__}: where its tokens lie in the picture is not known, so masks of LoRAs "
                       "confine them in its convolutions alone")
            return lambda layer, tokens: ()
        shapes = conds.get("latent_shapes") or ()
        latents = unpack(x, tuple(tuple(shape[1:]) for shape in shapes) if len(shapes) > 1 else ())
        return order.begin(latents if len(latents) > 1 else x, conds).segments


def _crop(maps: Tensor, area: Area) -> Tensor:
    if area is None:
        return maps
    sizes, offsets = area[:len(area) // 2][-2:], area[len(area) // 2:][-2:]
    return maps[..., offsets[0]:offsets[0] + sizes[0], offsets[1]:offsets[1] + sizes[1]]


def _shape(value: object) -> Hashable:
    """What of a conditioning the order of tokens may depend on."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (list, tuple)):
        return tuple(_shape(each) for each in value)
    return value if isinstance(value, (str, int, float, bool)) else None
