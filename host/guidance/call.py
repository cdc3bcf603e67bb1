"""One model call of a run with guidance, and what keeps other nodes' formulas right in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...methods.guidance.session import GuidanceSession, Need, Rows

PRE_CFG, CFG = "sampler_pre_cfg_function", "sampler_cfg_function"


@dataclass
class GuidedCall:
    """One model call of the sampler.

    need           what the session asked for
    rows           the rows whose negatives are evaluated, None for all: as asked, or all where a part cannot be
    x              the noisy latent, [B, C, ...]
    c              the conditional prediction, once known
    has_negative   whether its negatives were answered for
    shown_whole    the session sees whole predictions before the formula, and not those of its context windows
    """

    need: Need
    rows: Rows | None
    x: Tensor
    c: Tensor | None = None
    has_negative: bool = False
    shown_whole: bool = False


def unguided(options: dict) -> dict:
    """Model options without what shapes guidance: some nodes take a missing negative for one of zeros (core's APG then
    doubles the picture). What follows guidance stays."""
    return {key: value for key, value in options.items() if key not in (PRE_CFG, CFG)}


def guarded(options: dict, call: GuidedCall, session: GuidanceSession) -> dict:
    """Model options under which pictures that are no longer guided come out conditional, whatever nodes make of two
    equal predictions: some have a memory (APG's momentum), some divide by the difference (the Perp-Neg node)."""
    if not options.get(PRE_CFG) and CFG not in options:
        return options

    def note(args: dict) -> list:
        """First before guidance: the conditional prediction as a whole, also where windows made it."""
        call.c = args["conds_out"][0]
        return args["conds_out"]

    def restore(args: dict) -> list:
        """Last before guidance: gives finished pictures their conditional prediction back."""
        done = session.weigh(call.c) == 0
        return [torch.where(done, call.c, out) if isinstance(out, Tensor) else out for out in args["conds_out"]]

    def shape(args: dict) -> Tensor:
        """A node's own formula. The slot is given and returns what is to be taken from the noisy latent."""
        out = formula(args)
        return torch.where(session.weigh(call.c) == 0, (args["input"] - call.c).to(out), out)

    changed = {**options, PRE_CFG: [note, *options.get(PRE_CFG, ()), restore]}
    formula = options.get(CFG)
    if formula is not None:
        changed[CFG] = shape
    return changed


def completed(options: dict, call: GuidedCall, session: GuidanceSession) -> dict:
    """Model options under which the session sees the whole predictions that context windows were put together to, and
    puts in the negative that it has, before any node shapes them."""
    def complete(args: dict) -> list:
        c, u, *others = args["conds_out"]
        if not call.has_negative:
            return args["conds_out"]
        if call.rows == ():
            return [c, session.replace("negative", args["input"], c, args["sigma"]), *others]
        session.keep(args["input"], c, {"negative": u}, args["sigma"])
        return [c, session.settle("negative", args["input"], c, u, args["sigma"]), *others]

    return {**options, PRE_CFG: [complete, *options.get(PRE_CFG, ())]}
