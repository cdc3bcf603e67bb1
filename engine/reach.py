"""How far adapters reach: of what each would add to the layers of a model, how much falls outside its places."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.lowrank import Update
from ..kernels.routing import outside
from .adapters import Bias, part
from .bank import Site
from .geometry import Geometry, plain
from .positions import Locate, Places
from .stack import Stack

Factors = Callable[[Stack], tuple[Tensor, Tensor]]


class Reach:
    """What the adapters of a bank would add in one evaluation without them, place by place.

    The energy of an adapter at a place of a layer is |B A x|^2 at strength 1, over the mean of |W x|^2 of the picture;
    the layers that share a grid are summed. Adapters that depend on the layer's weight (DoRA, OFT, ..) are left out,
    and layers that give zeros alone, to which nothing compares.

    locate     what the tokens of a layer are
    adapters   which of the bank are heard, counted from the first of these
    """

    def __init__(self, locate: Locate, adapters: range):
        self.locate, self.adapters = locate, adapters
        self._sums: dict[tuple[tuple[int, ...], tuple[int, ...]], Tensor] = {}  # by (grid, owners)

    def listen(self, site: Site, geometry: Geometry, owners: tuple[int, ...], y: Tensor,
               factors: Factors) -> Update | None:
        """The update of a layer in this evaluation, which changes nothing; None for one without places of the
        picture.

        owners    the row of each entry
        factors   down and up of a stack, in the dtype of the layer's input
        """
        stretches = [] if geometry.is_norm else self._stretches(site, geometry, y)
        if not stretches:
            return None

        def update(y: Tensor, x: Tensor) -> Tensor:
            energies = self._energies(site, geometry, y, plain(x), factors)
            size = torch.linalg.vector_norm(y, dim=geometry.channel, dtype=torch.float32).square().flatten(1)
            for grid, tokens in stretches:
                mean = size[:, tokens].mean(dim=1)[:, None, None]
                here = energies[:, :, tokens] / mean.masked_fill(mean == 0, torch.inf)
                key = grid, owners
                self._sums[key] = self._sums[key] + here if key in self._sums else here
            return y

        return update

    def share(self, places: Places) -> Tensor | None:
        """[rows, adapters]: the mean energy outside an adapter's places over that inside; 0 for an adapter that acts
        everywhere, infinite where nothing is inside. None where no layer was heard.

        places   of the rows of the evaluation
        """
        rows, found = len(places.pictures), None
        for (grid, owners), energy in self._sums.items():
            gains = places.on_grid(grid, owners).flatten(2).to(energy)
            means = torch.stack(outside(energy, gains, places.index(owners).to(energy.device), rows))
            found = means if found is None else found + means
        if found is None:
            return None
        return torch.where(found[1] > 0, found[0] / found[1].clamp_min(_TINY), torch.inf)

    def _stretches(self, site: Site, geometry: Geometry, y: Tensor) -> list[tuple[tuple[int, ...], slice]]:
        """The parts of a layer's tokens that are places of the picture: (grid, which)."""
        if geometry.spatial in (2, 3):
            grid = tuple(y.shape[2:])
            return [(grid, slice(None))]
        if geometry.spatial or y.ndim < 3:
            return []
        found, at = [], 0
        for segment in self.locate(site.name, y[0].numel() // y.shape[-1]) or ():
            if segment.kind == "picture":
                found.append((segment.places, slice(at, at + segment.count)))
            at += segment.count
        return found

    def _energies(self, site: Site, geometry: Geometry, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """[entries, adapters, places or tokens] in fp32."""
        tokens, first = y[0].numel() // y.shape[geometry.channel], self.adapters.start
        out = y.new_zeros(y.shape[0], len(self.adapters), tokens, dtype=torch.float32)
        for stack in site.stacks:
            down, up = factors(stack)
            hidden = geometry.apply(part(x, stack.slices[0].span, geometry.channel, 1), down)
            hidden = hidden.movedim(geometry.channel, -1).flatten(1, -2).float()
            for each, factor in zip(stack.slices, stack.ups(up), strict=True):
                for slot in (slot for slot in each.slots if slot.adapter in self.adapters):
                    own, start = hidden[..., slot.start:slot.stop], each.ranks.start
                    wide = factor[:, slot.start - start:slot.stop - start].float()
                    out[:, slot.adapter - first] += ((own @ (wide.mT @ wide)) * own).sum(dim=-1)
        for adapter in self.adapters:
            for op in site.ops(adapter):
                if op.additive and not isinstance(op, Bias):
                    added = op.product(part(x, op.span, geometry.channel, 1), geometry)
                    norm = torch.linalg.vector_norm(added, dim=geometry.channel, dtype=torch.float32)
                    out[:, adapter - first] += norm.square().flatten(1)
        return out


_TINY = torch.finfo(torch.float32).tiny
