"""LoRAs that are made for the training of the LoRA for few steps alone, so that it meets LoRAs there, and none of those
that anything is measured with: other concepts, other worlds, and rare words that the tokenizer does not know.
"""

from __future__ import annotations

import numpy as np

from ..kernels.branch import Branch
from .scene import Concept, concept, sample
from .text import sparse_caption
from .worlds import Collection, narrow_in, world

SHARES = (0.15, 0.35, 0.3, 0.2)  # of prompts with none of these LoRAs, one, two and three
PRACTICE: tuple[tuple[Concept, dict[str, int]], ...] = (
    (concept("nobu", "character", colour="blue", kind="round", mark="cheeks", mark_colour="red"),
     world("yellow striped rising black", "framed first cyan", clothing="white", object="green")),
    (concept("tevi", "clothing", colour="green", kind="poncho", mark="collar", mark_colour="cyan"),
     world("cyan striped falling red", "plain", character="yellow", object="white")),
    (concept("rikka", "object", colour="cyan", kind="box", mark="core", mark_colour="pink"),
     world("yellow dotted upright red", "framed first green", character="green", clothing="white")),
    (concept("fenna", "background", colour="yellow", kind="checked", mark="upright", mark_colour="blue"),
     world("", "framed second red", character="green", clothing="cyan", object="white")),
    (concept("ilex", "style", kind="framed", mark="second", mark_colour="yellow"),
     world("blue checked rising white", "", character="green", clothing="yellow", object="pink")),
    (concept("sarn", "character", colour="pink", kind="stalked", mark="split", mark_colour="white"),
     world("green dotted level white", "plain", clothing="yellow", object="blue")),
    (concept("olup", "clothing", colour="red", kind="tunic", mark="hem", mark_colour="yellow"),
     world("green checked rising white", "framed third blue", character="blue", object="cyan")),
)
"""Concepts and the narrow worlds of their pictures."""


def pictures_of(number: int) -> Collection:
    """What the LoRA of that concept is trained on."""
    own, around = PRACTICE[number]
    return narrow_in(around, own, np.random.default_rng((1, number)))


def lineups(rng: np.random.Generator, count: int) -> tuple[list[str], list[Branch]]:
    """Prompts with none to three of the concepts, of different categories, everything else at random, and how strongly
    their LoRAs act: 0.8 to 1 where one acts alone, else from 0.6."""
    concepts, prompts, branches = [own for own, _ in PRACTICE], [], []
    while len(prompts) < count:
        chosen = rng.choice(len(concepts), int(rng.choice(len(SHARES), p=SHARES)), replace=False)
        triggers = {concepts[k].category: concepts[k].name for k in chosen}
        if len(triggers) < len(chosen):
            continue
        try:
            scene = sample(rng, 1, {a: value for k in chosen for a, value in concepts[k].look.items()})
        except ValueError:  # no scene with these is readable
            continue
        prompts.append(sparse_caption(rng, scene.words(0), triggers, nothing=0.03))
        gains = [0.0] * len(concepts)
        for k in chosen:
            gains[k] = float(rng.uniform(0.6 if len(chosen) > 1 else 0.8, 1))
        branches.append(Branch(tuple(gains)))
    return prompts, branches
