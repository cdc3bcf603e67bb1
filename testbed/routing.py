"""Where the LoRAs of a batch of pictures act: what methods/routed.py asks, read from the testbed's own model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..engine.positions import Places
from ..engine.reach import Reach
from ..kernels.branch import Step
from ..kernels.routing import clause_attention, clause_shares, clause_values, contrast
from ..methods.prompt import Found, LoRAWords, PromptTokens, find_clauses, stand_in
from ..methods.prompt_text import without
from ..methods.routed import Clauses, Routes, Routing, clauses_of, loosened, trusted
from .body import Body


@dataclass(frozen=True)
class Placed:
    """Where the LoRAs of a picture act.

    routing      how words are found; None: LoRAs act everywhere but in `masks`
    words        per LoRA what a user would have typed on it
    everywhere   per LoRA whether it acts at all places whatever its words
    masks        per LoRA a map [height, width] of the latent that beats its words, or None
    layers       whether the method is confined in the model's layers; False: where it mixes predictions
    """

    routing: Routing | None = None
    words: tuple[str, ...] = ()
    everywhere: tuple[bool, ...] = ()
    masks: tuple[Tensor | None, ...] = ()
    layers: bool = True


def tokens_of(prompt: str, rows: tuple[tuple[int, int, int], ...] = (), length: int = 0) -> PromptTokens:
    """The prompt and the positions of its words, in a text of so many tokens."""
    words, at = [], 0
    for number, word in enumerate(prompt.split()):
        at = prompt.index(word, at)
        words.append((at, at + len(word.rstrip(",")), (number,) if number < length else ()))
        at += len(word)
    return PromptTokens(prompt, length, tuple(words), rows)


class Routed:
    """The places of a batch of pictures while it is drawn.

    placed    per picture, None where its LoRAs act everywhere
    prompts   of each picture
    loras     per picture, which adapters of the bank are its LoRAs
    count     adapters in the bank
    body      the model that draws them
    """

    def __init__(self, placed: Sequence[Placed | None], prompts: Sequence[str], loras: Sequence[Sequence[int]],
                 count: int, body: Body):
        self.body, length = body, body.length
        self.placed, self.loras = [each or Placed() for each in placed], loras
        self.routes = [None if each.routing is None else Routes(each.routing) for each in self.placed]
        words = [tuple(LoRAWords(str(lora), typed) for lora, typed in zip(own, each.words, strict=False))
                 for own, each in zip(loras, self.placed, strict=True)]
        instead = [stand_in(tokens_of(prompt, length=length), own) for prompt, own in zip(prompts, words, strict=True)]
        self.probes = [prompt if other is None else other[0] for prompt, other in zip(prompts, instead, strict=True)]
        self.fixed = [other is not None for other in instead]
        self._found = [find_clauses(tokens_of(*(other or (prompt, ())), length), own)
                       for prompt, other, own in zip(prompts, instead, words, strict=True)]
        self.clauses = [_clauses(found, each.everywhere, length)
                        for found, each in zip(self._found, self.placed, strict=True)]
        n, most = len(prompts), max(len(each.members) for each in self.clauses)
        self.maps = torch.ones(n, count, *body.latent[1:])
        self._free: list[Tensor | None] = [None] * n
        self.words = torch.ones(2 * n, count, length)  # of the prompts, then of the negatives beside them
        self.members = torch.zeros(n, most, length)
        for i, (found, route, prompt) in enumerate(zip(self.clauses, self.routes, prompts, strict=True)):
            self.members[i, :len(found.members)] = found.members
            if route is not None:
                drawn = _clauses(find_clauses(tokens_of(prompt, length=length), words[i]), self.placed[i].everywhere,
                                 length)
                self.words[i, list(loras[i])] = drawn.words
                self.words[n + i, [lora for lora, own in zip(loras[i], drawn.own, strict=True) if own is not None]] = 0
            self._mask(i)
        device = next(body.parameters()).device  # where the engine makes gains of them
        self.maps, self.words = self.maps.to(device), self.words.to(device)
        self._places: dict[tuple, Places] = {}

    def masks(self, picture: int) -> tuple[Tensor, ...] | tuple[()]:
        """As `RunContext.masks`, for a method that mixes predictions by them; they follow what is found."""
        placed = self.placed[picture]
        if placed.layers or not (placed.masks or placed.routing):
            return ()
        return tuple(self.maps[picture, lora][None, None] for lora in self.loras[picture])

    def places(self, pictures: Sequence[int], texts: Sequence[int]) -> Places:
        """Of a batch whose rows belong to these pictures and texts."""
        key, maps, words = (tuple(pictures), tuple(texts)), self.maps, self.words
        wide = [i for i, each in enumerate(self.placed) if not each.layers]
        if wide:
            maps, words = maps.clone(), words.clone()
            maps[wide], words[wide + [len(self.placed) + i for i in wide]] = 1, 1
        if key not in self._places:
            self._places[key] = Places(maps.clone(), pictures, words.clone(), texts, self.body.locate)
        else:
            self._places[key].update(maps, words)
        return self._places[key]

    def probing(self, step: Step) -> list[int]:
        """Pictures whose places must be found before this step's evaluation."""
        return [i for i, route in enumerate(self.routes) if route is not None and route.probes(step)]

    def reading(self, step: Step) -> list[int]:
        """Pictures whose attention is read in this step's evaluation."""
        return [i for i, route in enumerate(self.routes)
                if route is not None and route.reads(step) and not self.fixed[i]]

    def contrasting(self, step: Step) -> list[int]:
        """Those of `probing` that are to be found by contrast."""
        return [i for i in self.probing(step) if self.placed[i].routing.mode == "contrast"]

    def acts(self, picture: int, step: Step) -> bool:
        return self.routes[picture] is None or self.routes[picture].acts(step)

    def found(self, picture: int, attention: Tensor) -> None:
        """Attention to the clauses of a picture's prompt, [clauses or more, h, w]."""
        known = self.clauses[picture]
        maps = known.places(attention[None, :len(known.members)], self.placed[picture].routing.gamma)
        maps = loosened(F.interpolate(maps, self.body.latent[1:], mode="bilinear"), self._free[picture])
        self.maps[picture, list(self.loras[picture])] = maps[0].to(self.maps)
        self._mask(picture)
        self.routes[picture].found = True

    def reach(self, pictures: Sequence[int], step: Step) -> Reach | None:
        """What listens to an evaluation of the base model for these pictures, a row each; None where nobody asks."""
        asks = any(route is not None and route.routing.trust and (route.probes(step) or not route.acts(step))
                   for route in (self.routes[i] for i in pictures))
        return Reach(self.body.locate, range(self.maps.shape[1])) if asks else None

    def reached(self, pictures: Sequence[int], reach: Reach, places: Places) -> None:
        """The places of these pictures, whose rows come first, are known: let those LoRAs out that do little elsewhere.
        """
        share = reach.share(places)
        for row, i in enumerate(pictures if share is not None else ()):
            if self.routes[i] is not None and self.routes[i].routing.trust and self._free[i] is None:
                own = list(self.loras[i])
                self._free[i] = trusted(share[row, own])[None]
                self.maps[i, own] = loosened(self.maps[i, own][None], self._free[i])[0]
                self._mask(i)

    def without(self, picture: int) -> list[str]:
        """The prompt without each of its clauses, a LoRA's as one."""
        found, text = self._found[picture], self.probes[picture]
        groups = [[(clause.start, clause.end) for clause in own.clauses] for own in found.loras if own.clauses]
        out = []
        for group in (*groups, *([(clause.start, clause.end)] for clause in found.others)):
            less = text
            for start, end in sorted(group, reverse=True):
                less = without(less, start, end)
            out.append(less)
        return out

    def contrasted(self, picture: int, whole: Tensor, parts: Tensor) -> None:
        """Predictions of the base for a prompt, and without each of its clauses: [C, h, w], [clauses, C, h, w]."""
        self.found(picture, contrast(whole[None], parts[:, None])[0])

    def _mask(self, picture: int) -> None:
        for lora, mask in zip(self.loras[picture], self.placed[picture].masks, strict=False):
            if mask is not None:
                self.maps[picture, lora] = mask


def _clauses(found: Found, everywhere: tuple[bool, ...], length: int) -> Clauses:
    return clauses_of(length, [own.tokens for own in found.loras], [clause.tokens for clause in found.others],
                      everywhere)


class Seen:
    """Reads the attention of a batch's `rows` to the clauses of their prompts, of all that to the text: what
    `Body.velocity` shows q and k to.

    members   [rows, clauses, tokens]
    grid      height and width of the places
    """

    def __init__(self, rows: Sequence[int], members: Tensor, grid: tuple[int, int]):
        self._rows, self._members, self._grid = rows, members, grid
        self._found: list[Tensor] = []

    def __call__(self, q: Tensor, k: Tensor, text: slice) -> None:
        q, k = q[self._rows], k[self._rows, :, text]
        values = clause_values(self._members, k.shape[2], slice(0, k.shape[2]), q)
        found = clause_attention([clause_shares(q, k, values, self._members.shape[1])])
        self._found.append(found.unflatten(-1, self._grid))

    def mean(self) -> Tensor:
        """Over all blocks, [rows, clauses, *grid]."""
        return torch.stack(self._found).mean(dim=0)
