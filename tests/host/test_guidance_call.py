"""What is put into the slots of other nodes' formulas during one call, and taken out again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lora_ensemble.host.guidance.call import CFG, PRE_CFG, GuidedCall, guarded, put_in
from lora_ensemble.methods.guidance.session import Need

X, C, U = (torch.full((2, 4, 2, 2), value) for value in (5.0, 1.0, 3.0))
DONE_FIRST = SimpleNamespace(weigh=lambda c: torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))


def doubled(args: dict) -> list:
    """A node that shapes guidance, and writes into predictions."""
    args["conds_out"][0] *= 2
    return [args["conds_out"][0], args["conds_out"][1] * 2]


def test_slots_are_as_they_were_after_a_call_however_it_ends():
    """In the dict itself, which nodes keep things in; with what nodes put there meanwhile."""
    options = {PRE_CFG: [doubled], "other": 1}
    with pytest.raises(RuntimeError), put_in(options, {PRE_CFG: None, CFG: doubled}):
        assert options == {CFG: doubled, "other": 1}
        options["memory"] = 2
        raise RuntimeError
    assert options == {PRE_CFG: [doubled], "other": 1, "memory": 2}


def test_a_finished_picture_comes_out_conditional_whatever_nodes_make_of_it():
    call = GuidedCall(Need(None), None, X)
    slots = guarded({PRE_CFG: [doubled]}, call, DONE_FIRST)
    assert slots.keys() == {PRE_CFG} and len(slots[PRE_CFG]) == 3
    outs = [C.clone(), U.clone()]
    for node in slots[PRE_CFG]:
        outs = node({"conds_out": outs})
    assert torch.equal(call.c, C)
    for out, other in zip(outs, (2 * C, 2 * U), strict=True):
        assert torch.equal(out[:1], C[:1]) and torch.equal(out[1:], other[1:])


def test_nor_what_a_formula_makes_of_it():
    """It returns what is to be taken from the noisy latent. Where no node shapes guidance nothing is put in."""
    call = GuidedCall(Need(None), None, X)
    slots = guarded({CFG: lambda args: args["input"] * 0 + 7}, call, DONE_FIRST)
    slots[PRE_CFG][0]({"conds_out": [C, U]})
    out = slots[CFG]({"input": X})
    assert torch.equal(out[:1], (X - C)[:1]) and (out[1:] == 7).all()
    assert guarded({}, call, DONE_FIRST) == {} == guarded({PRE_CFG: []}, call, DONE_FIRST)
