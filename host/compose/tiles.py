"""Parts of the picture that another node hands to the model in the place of the whole: tiles (Tiled Diffusion), one or
several in a batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from .places import Area

TILES = "lora_ensemble_tiles"
"""What transformer options say of a call: for each part of the batch its area in the latent that the host gave."""
UNKNOWN = "a node hands parts of the picture to the model, and where they are in it cannot be told"
LOST = f"{UNKNOWN}: the places of LoRAs are stretched to each of them"
Known = dict[Hashable, tuple[Area, ...]]
"""The areas of the tiles of a call, by its number in an evaluation and the shape of the latent."""
Wrapper = Callable[[Callable, dict], Tensor]
"""A function wrapper, as the host calls it: (the model, what to call it with) -> prediction."""


def with_tiles(wrapper: Wrapper, aside: Callable[[], bool], placed: bool, known: Known) -> Wrapper:
    """A function wrapper whose calls of the model say which tiles of the picture they bring.

    aside    whether the evaluation is none of the sampler's: then the picture is evaluated as a whole
    placed   whether it matters where the tiles are, for places or for features that are kept: they are found by their
             values, which waits for the device
    known    what was found in the evaluations before: there they are looked for first, once for all tiles of a call
    """
    def wrapped(model: Callable, args: dict) -> Tensor:
        given, whole, cut = args["input"], aside(), []

        def call(x: Tensor, timestep: Tensor, **conds) -> Tensor:
            tiles = _tiles(x, given, placed, known, len(cut))
            if tiles is None:
                return model(x, timestep, **conds)
            cut.append(tiles)
            if whole:
                return torch.zeros_like(x)
            options = {**conds.get("transformer_options", {}), TILES: tiles}
            return model(x, timestep, **{**conds, "transformer_options": options})

        out = wrapper(call, args)
        return model(given, args["timestep"], **args["c"]) if whole and cut else out

    return wrapped


def inside(areas: Sequence[Area], tiles: Sequence[Area]) -> list[Area]:
    """Where the conds of a batch lie on the latent, all of one tile after those of another: their areas are areas of
    the latent, and each tile is a piece of its areas. The areas as they are where a tile was not found."""
    if None in tiles:
        return list(areas)
    return [_within(area, tile) for area, tile in zip(areas, tile_of_each(tiles, len(areas)), strict=True)]


def tile_of_each(tiles: Sequence[Area], conds: int) -> list[Area]:
    """The tile that each of the conds of a batch brings, all of one tile after those of another; None without tiles."""
    return [tiles[k * len(tiles) // conds] for k in range(conds)] if tiles else [None] * conds


def _within(area: Area, tile: Area) -> Area:
    """The piece of an area that a tile of it is."""
    if not tile or area is None:
        return tile or area
    return *tile[:2], *(here + there for here, there in zip(area[-2:], tile[2:], strict=True))


def _tiles(x: Tensor, given: Tensor, placed: bool, known: Known, number: int) -> tuple[Area, ...] | None:
    """The areas in `given` of what the call of this number brings, all rows of one tile after those of another; None
    where it brings what was given, or something else altogether. An area is None where it is not found, or not asked
    for, and () where it is all that was given, several times."""
    times, rest = divmod(len(x), len(given))
    if rest or x.shape[1:-2] != given.shape[1:-2] or x.shape == given.shape:
        return None
    if x.shape[1:] == given.shape[1:]:
        return ((),) * times
    if not placed:
        return (None,) * times
    key, tiles = (number, given.shape), x[::len(given)]
    if not _there(tiles, given[0], known.get(key, ())):
        known[key] = tuple(_area(tile, given[0]) for tile in tiles)
    return known[key]


def _there(tiles: Tensor, picture: Tensor, areas: Sequence[Area]) -> bool:
    """Whether all tiles are where they are said to be."""
    if not areas or None in areas:
        return False
    return torch.equal(tiles, torch.stack([picture[..., y:y + high, x:x + wide] for high, wide, y, x in areas]))


def _area(part: Tensor, picture: Tensor) -> Area:
    """Where a picture has these values."""
    high, wide = part.shape[-2:]
    corners = picture[(0,) * (picture.ndim - 2)][:picture.shape[-2] - high + 1, :picture.shape[-1] - wide + 1]
    for y, x in (corners == part.flatten()[0]).nonzero().tolist():
        if torch.equal(picture[..., y:y + high, x:x + wide], part):
            return high, wide, y, x
    return None
