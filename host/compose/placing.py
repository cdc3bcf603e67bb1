"""What a node says of where its LoRAs act."""

from __future__ import annotations

from dataclasses import dataclass

from ...methods.prompt import LoRAWords
from ...methods.routed import Routing

PLACES = ("masks", "words", "everywhere")
"""Where LoRAs act: in their masks where they have one; where their words are, or in their masks; everywhere."""


@dataclass(frozen=True)
class Placing:
    """What a method node says of places: one of PLACES, how words are found, and which share of the model's attention
    is read, from 0 (its first blocks) to 1; None: as its family has it. `own_words`: whether LoRAs change the text
    encoder for their own words alone."""

    where: str = "masks"
    routing: Routing = Routing()
    blocks: tuple[float, float] | None = None
    own_words: bool = False


@dataclass(frozen=True)
class Routed:
    """How the places of a method's LoRAs are found.

    words        of every LoRA of the ensemble, whose rows a prompt counts
    active       which of them take part: the method's LoRAs, in its order
    everywhere   per LoRA of the method whether it acts at all places
    blocks       see `Placing`
    """

    routing: Routing
    words: tuple[LoRAWords, ...]
    active: tuple[int, ...]
    everywhere: tuple[bool, ...]
    blocks: tuple[float, float] | None = None
