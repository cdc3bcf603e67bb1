"""Where the LoRAs of a batch of pictures act: what methods/routed.py asks, read from the testbed's own model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..engine.positions import Places, Segment, Segments
from ..kernels.branch import Step
from ..kernels.routing import clause_attention, contrast
from ..methods.routed import Clauses, Routes, Routing, clauses_of
from .model import LATENT, UNet
from .scene import BY_NAME
from .text import LENGTH

GRID = (LATENT[1] // 2, LATENT[2] // 2)
BLOCKS = ("down_attn", "mid_attn", "up_attn")


def clauses(prompt: str) -> list[tuple[str, range]]:
    """The comma clauses of a prompt, each with the positions of its words."""
    found, at = [], 0
    for clause in (part for part in prompt.split(",") if part.strip()):
        count = len(clause.split())
        found.append((clause.strip(), range(at, at + count)))
        at += count
    return found


def without(prompt: str) -> list[str]:
    """The prompt without each of its clauses."""
    parts = [clause for clause, _ in clauses(prompt)]
    return [", ".join(parts[:k] + parts[k + 1:]) for k in range(len(parts))]


def of_prompt(prompt: str, names: Sequence[str]) -> Clauses:
    """The clauses of a prompt for LoRAs of these concepts: a LoRA's is the one that holds its rare word."""
    found = clauses(prompt)
    own = [next((k for k, (clause, _) in enumerate(found) if name in clause.split()), None) for name in names]
    return clauses_of(LENGTH, [() if k is None else found[k][1] for k in own],
                      [span for k, (_, span) in enumerate(found) if k not in own],
                      [BY_NAME[name].category == "style" for name in names])


def located(layer: str, tokens: int) -> Segments:
    """What the tokens of a layer are."""
    if ".attn2.to_k" in layer or ".attn2.to_v" in layer:
        return (Segment("text", tokens),)
    return (Segment("picture", tokens, (1, *GRID)),) if "attn" in layer or ".ff" in layer else ()


class Routed:
    """The places of a batch of pictures while it is drawn.

    routings   per picture, None where its LoRAs act everywhere
    prompts    of each picture
    loras      per picture, which adapters of the bank are its LoRAs, and `names` their concepts
    count      adapters in the bank
    """

    def __init__(self, routings: Sequence[Routing | None], prompts: Sequence[str], loras: Sequence[Sequence[int]],
                 names: Sequence[Sequence[str]], count: int):
        self.routes = [None if routing is None else Routes(routing) for routing in routings]
        self.loras, self.prompts = loras, prompts
        self.clauses = [of_prompt(prompt, own) for prompt, own in zip(prompts, names, strict=True)]
        n, most = len(prompts), max(len(c.members) for c in self.clauses)
        self.maps = torch.ones(n, count, *GRID)
        self.words = torch.ones(2 * n, count, LENGTH)  # of the prompts, then of the negatives beside them
        self.members = torch.zeros(n, most, LENGTH)
        for i, (found, route, own) in enumerate(zip(self.clauses, self.routes, loras, strict=True)):
            self.members[i, :len(found.members)] = found.members
            if route is not None:
                self.words[i, list(own)] = found.words
                self.words[n + i, list(own)] = found.words
        self._places: dict[tuple, Places] = {}

    def places(self, pictures: Sequence[int], texts: Sequence[int]) -> Places:
        """Of a batch whose rows belong to these pictures and texts."""
        key = tuple(pictures), tuple(texts)
        if key not in self._places:
            self._places[key] = Places(self.maps.clone(), pictures, self.words.clone(), texts, located)
        else:
            self._places[key].update(self.maps, self.words)
        return self._places[key]

    def probing(self, step: Step) -> list[int]:
        """Pictures whose places must be found before this step's evaluation."""
        return [i for i, route in enumerate(self.routes) if route is not None and route.probes(step)]

    def reading(self, step: Step) -> list[int]:
        """Pictures whose attention is read in this step's evaluation."""
        return [i for i, route in enumerate(self.routes) if route is not None and route.reads(step)]

    def contrasting(self, step: Step) -> list[int]:
        """Those of `probing` that are to be found by contrast."""
        return [i for i in self.probing(step) if self.routes[i].routing.mode == "contrast"]

    def acts(self, picture: int, step: Step) -> bool:
        return self.routes[picture] is None or self.routes[picture].acts(step)

    def found(self, picture: int, attention: Tensor) -> None:
        """Attention to the clauses of a picture's prompt, [clauses or more, h, w]."""
        route, known = self.routes[picture], self.clauses[picture]
        maps = known.places(attention[None, :len(known.members)], route.routing.gamma)[0]
        self.maps[picture, list(self.loras[picture])] = torch.nn.functional.interpolate(
            maps[None], GRID, mode="bilinear")[0] if maps.shape[1:] != GRID else maps
        route.found = True

    def contrasted(self, picture: int, whole: Tensor, parts: Tensor) -> None:
        """Predictions of the base for a prompt, and without each of its clauses: [C, h, w], [clauses, C, h, w]."""
        apart = torch.nn.functional.adaptive_avg_pool2d(contrast(whole[None], parts[:, None]), GRID)[0]
        spans = [span for _, span in clauses(self.prompts[picture])]
        members = self.clauses[picture].members
        order = [next(k for k, span in enumerate(spans) if row[span[0]]) for row in members]
        self.found(picture, apart[order])


@contextmanager
def attention(unet: UNet, rows: Sequence[int], members: Tensor, blocks: Sequence[str] = BLOCKS
              ) -> Iterator[list[Tensor]]:
    """While open, the attention of the batch's `rows` to the clauses of their prompts is collected: per block
    [rows, clauses, *GRID]. members [rows, clauses, tokens]."""
    found: list[Tensor] = []

    def observe(q: Tensor, k: Tensor) -> None:
        found.append(clause_attention(q[rows], k[rows], members, slice(0, LENGTH)).unflatten(-1, GRID))

    layers = [getattr(unet, block).attn2 for block in blocks]
    for layer in layers:
        layer.observe = observe
    try:
        yield found
    finally:
        for layer in layers:
            del layer.observe


def concept_names(loras: Sequence[int]) -> tuple[str, ...]:
    """Of adapters of a bank that holds one LoRA per concept, in their order."""
    names = list(BY_NAME)
    return tuple(names[i] for i in loras)


