"""One model call of a run with guidance, and what keeps other nodes' formulas right in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...methods.guidance.session import GuidanceSession, Need, Rows

PRE_CFG, CFG, POST_CFG = "sampler_pre_cfg_function", "sampler_cfg_function", "sampler_post_cfg_function"


@dataclass
class GuidedCall:
    """One model call of the sampler.

    need           what the session asked for
    rows           the rows whose negatives are evaluated, None for all: as asked, or all where a part cannot be
    x              the noisy latent, [B, C, ...]
    c              the conditional prediction, once known
    has_negative   whether its negatives were answered for
    shown_whole    the session sees whole predictions before the formula, and not those of its context windows
    added_to       what came of the guidance as far as it goes by a formula of the guider's own, with what nodes add
                   behind guidance; None: none do, or it is not known yet
    """

    need: Need
    rows: Rows | None
    x: Tensor
    c: Tensor | None = None
    has_negative: bool = False
    shown_whole: bool = False
    added_to: Tensor | None = None


UNGUIDED = {PRE_CFG: None, CFG: None}
"""No slot that shapes guidance: some nodes take a missing negative for one of zeros (core's APG then doubles the
picture). What follows guidance stays."""


@contextmanager
def put_in(options: dict, slots: Mapping[str, list | Callable | None]) -> Iterator[None]:
    """The model options of a run with something else in some slots during a call, None for nothing. In the dict itself
    and no copy: some nodes keep in it what they remember from step to step (Momentum Guidance, Sliding Mode Control).
    """
    before = {key: options[key] for key in slots if key in options}

    def put(values: Mapping[str, list | Callable | None]) -> None:
        for key in slots:
            options.pop(key, None)
        options.update({key: value for key, value in values.items() if value is not None})

    put(slots)
    try:
        yield
    finally:
        put(before)


def guarded(options: dict, call: GuidedCall, session: GuidanceSession) -> dict[str, list | Callable]:
    """Slots with which pictures that are no longer guided come out conditional, whatever nodes make of two
    equal predictions: some have a memory (APG's momentum), some divide by the difference (the Perp-Neg node)."""
    if not options.get(PRE_CFG) and CFG not in options:
        return {}

    def note(args: dict) -> list:
        """First before guidance: the conditional prediction as a whole, also where windows made it. A copy, since some
        nodes write into predictions (Skimmed CFG)."""
        call.c = args["conds_out"][0].clone()
        return args["conds_out"]

    def restore(args: dict) -> list:
        """Last before guidance: gives finished pictures their conditional prediction back."""
        done = session.weigh(call.c) == 0
        return [torch.where(done, call.c, out) if isinstance(out, Tensor) else out for out in args["conds_out"]]

    def shape(args: dict) -> Tensor:
        """A node's own formula. The slot is given and returns what is to be taken from the noisy latent."""
        out = formula(args)
        return torch.where(session.weigh(call.c) == 0, (args["input"] - call.c).to(out), out)

    formula = options.get(CFG)
    return {PRE_CFG: [note, *options.get(PRE_CFG, ()), restore], **({CFG: shape} if formula is not None else {})}


def added(options: dict, call: GuidedCall, session: GuidanceSession) -> dict[str, list]:
    """Slots with which what nodes add behind guidance (LTX's further passes, PAG) is added to what is left of it, by a
    guider with a formula of its own as by the host's."""
    if not options.get(POST_CFG):
        return {}

    def before(args: dict) -> Tensor:
        return faded(call.c, args["denoised"], session.weigh(call.c))

    def after(args: dict) -> Tensor:
        call.added_to = args["denoised"]
        return args["denoised"]

    return {POST_CFG: [before, *options[POST_CFG], after]}


def faded(c: Tensor, guided: Tensor, weight: Tensor) -> Tensor:
    """So much of the guidance: between c and what is guided. Where, since a guider's own formula need not be finite
    between equal predictions."""
    return torch.where(weight > 0, torch.lerp(c.to(guided), guided, weight.to(guided)), c.to(guided))


def completed(options: dict, call: GuidedCall, session: GuidanceSession) -> dict[str, list]:
    """Slots with which the session sees the whole predictions that context windows were put together to, and
    puts in the negative that it has, before any node shapes them."""
    def complete(args: dict) -> list:
        c, u, *others = args["conds_out"]
        if not call.has_negative:
            return args["conds_out"]
        if call.rows == ():
            return [c, session.replace("negative", args["input"], c, args["sigma"]), *others]
        session.keep(args["input"], c, {"negative": u}, args["sigma"])
        return [c, session.settle("negative", args["input"], c, u, args["sigma"]), *others]

    return {PRE_CFG: [complete, *options.get(PRE_CFG, ())]}
