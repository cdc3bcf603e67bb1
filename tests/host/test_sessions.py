"""A method that keeps state: what it is told of the run and of every call, and what it may write into the record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import SimpleNamespace

import comfy_extras.nodes_custom_sampler as guiders
import comfy_extras.nodes_pag as nodes_pag
import comfy_extras.nodes_perpneg as nodes_perpneg
import pytest
import torch
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.compose.context import on_latent
from lora_ensemble.host.compose.run import Run
from lora_ensemble.kernels.branch import Branch, one_hot
from lora_ensemble.methods.session import OTHER, POSITIVE, UNCONDITIONAL, Session

from .builders import composite, guided, method, sample, schedule, three
from .models import FAMILIES, base

SD15 = FAMILIES["SD15"]
SPIES: list[Spy] = []


class Spy(Session):
    """Composite that writes down everything it is told."""

    def __init__(self, strengths, facts):
        SPIES.append(self)
        self.strengths, self.facts = strengths, facts
        self.seen: list[tuple[str, int]] = []
        self.calls = []

    def observe(self, step, x):
        self.seen.append(("observe", step.index))

    def branches(self, step):
        self.seen.append(("branches", step.index))
        return tuple(one_hot(self.strengths, i) for i in range(len(self.strengths)))

    def refresh(self, step):
        return tuple(i == step.index for i in range(len(self.strengths)))

    def mix(self, step, call):
        self.seen.append(("mix", step.index))
        self.calls.append(call)
        return [None if p is None else p.mean(dim=0) for p in call.predictions]

    def notes(self):
        return {"mean": self.calls[-1].x.mean(), "led": "a", "shares": [torch.ones(2), 0.5]}


@dataclass(frozen=True)
class Spying:
    strengths: tuple[float, ...]

    def begin(self, facts):
        return Spy(self.strengths, facts)


@pytest.fixture(autouse=True)
def spies():
    SPIES.clear()
    yield SPIES
    SPIES.clear()


@pytest.fixture
def ours(loras):
    return method(base("SD15"), three(base("SD15"), loras), Spying)


def test_a_session_per_run_and_the_picture_of_a_plain_method(ours, loras):
    plain = sample(composite(base("SD15"), three(base("SD15"), loras)), steps=3)
    assert torch.equal(sample(ours, steps=3), plain) and torch.equal(sample(ours, steps=3), plain)
    assert len(SPIES) == 2 and SPIES[0] is not SPIES[1]
    facts = SPIES[0].facts
    assert facts.total == 3 and facts.shape == (1, 4, 8, 8) and facts.sigmas[-1] == 0 and facts.masks == (None,) * 3
    assert len(facts.times) == 3 and facts.times[0] == pytest.approx(1, abs=0.01) and facts.times[1] > facts.times[2]
    assert SPIES[0].seen == [(what, i) for i in range(3) for what in ("observe", "branches", "mix")]


def test_a_call_shows_all_conds_together(ours):
    sample(ours, batch=2)
    call = SPIES[0].calls[0]
    assert call.sides == (POSITIVE, UNCONDITIONAL) and call.x.shape == (2, 4, 8, 8)
    assert [p.shape for p in call.predictions] == [(3, 2, 4, 8, 8)] * 2
    assert call.branches[1] == Branch((0.0, 0.5, 0.0))


def test_no_negative_at_cfg_1(ours):
    sample(ours, cfg=1.0)
    assert SPIES[0].calls[0].predictions[1] is None


def test_notes_are_plain_numbers_when_the_run_is_over(ours):
    sample(ours)
    notes = [step.notes["Spying"] for step in record_of(ours).steps]
    assert [note["led"] for note in notes] == ["a", "a"] and notes[0]["shares"] == [[1.0, 1.0], 0.5]
    assert notes[1]["mean"] == pytest.approx(SPIES[0].calls[1].x.mean().item())
    json.dumps(record_of(ours).as_dict())


def test_what_may_come_from_a_cache_is_known_before_the_model_is_called(ours, monkeypatch):
    fresh, plan = [], Run.plan

    def planned(*args):
        found = plan(*args)
        fresh.append(found.fresh)
        return found

    monkeypatch.setattr(Run, "plan", planned)
    sample(ours)
    assert fresh == [(True, False, False), (False, True, False)]


def test_every_inner_mix_of_chained_methods_sees_all_conds(loras):
    model = base("SD15")
    ensemble = three(model, loras)
    plain = sample(composite(composite(model, ensemble[:2]), ensemble[2:]))
    assert torch.equal(sample(method(composite(model, ensemble[:2]), ensemble[2:], Spying)), plain)
    assert [len(call.predictions) for call in SPIES[0].calls] == [2] * 4, "two outer branches, two steps"
    assert torch.equal(sample(composite(method(model, ensemble[:2], Spying), ensemble[2:])), plain)


def sides(guider, model) -> list[tuple[str, ...]]:
    guided(guider, schedule(model, 1))
    return [call.sides for call in SPIES[0].calls]


def test_sides_of_the_hosts_guiders(ours):
    dual = guiders.Guider_DualCFG(ours)
    dual.set_conds(SD15.cond(1), SD15.cond(2), SD15.cond(3))
    dual.set_cfg(3.0, 2.0)
    assert sides(dual, ours) == [(UNCONDITIONAL, OTHER, POSITIVE)]
    SPIES.clear()
    perp = nodes_perpneg.Guider_PerpNeg(ours)
    perp.set_conds(SD15.cond(1), SD15.cond(2), SD15.cond(3))
    perp.set_cfg(3.0, 1.0)
    assert sides(perp, ours) == [(POSITIVE, UNCONDITIONAL, UNCONDITIONAL)]
    SPIES.clear()
    basic = guiders.Guider_Basic(ours)
    basic.set_conds(SD15.cond(1))
    assert sides(basic, ours)[0][0] == POSITIVE


@pytest.mark.parametrize(("known", "conds", "wanted"), [
    ({}, ["x", "y", "z"], (POSITIVE, UNCONDITIONAL, OTHER)),
    ({"a": POSITIVE}, ["x"], (UNCONDITIONAL,)), ({"a": OTHER}, ["x"], (POSITIVE,)),
    ({"a": POSITIVE, "b": OTHER}, ["b", "xa", None], (OTHER, POSITIVE, OTHER))])
def test_sides_of_conds_that_no_guider_knows(known, conds, wanted):
    """By their places, as in the host's own guidance. One alone beside a positive is a side that the guider lacks."""
    given = [None if cond is None else [{"uuid": name} for name in cond] for cond in conds]
    assert Run.sides(SimpleNamespace(_sides=known), given) == wanted


def test_a_perturbed_pass_is_a_call_of_its_own_with_the_same_latent(ours):
    node = nodes_pag.PerturbedAttentionGuidance
    perturbed = (node.execute(ours, 3.0)[0] if hasattr(node, "execute") else node().patch(ours, 3.0)[0])
    sample(perturbed, steps=1)
    first, second = SPIES[0].calls
    assert first.sides == (POSITIVE, UNCONDITIONAL) and second.sides == (POSITIVE,) and first.x is second.x


def test_masks_come_on_the_latents_grid():
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    got = on_latent(mask, (2, 4, 8, 8))
    assert got.shape == (1, 1, 8, 8) and got[0, 0, :4].eq(1).all() and got[0, 0, 4:].eq(0).all()
    assert on_latent(torch.rand(2, 9, 7), (3, 16, 5, 8, 8)).shape == (3, 1, 8, 8)
    assert on_latent(mask[0], (1, 4, 8, 8)).shape == (1, 1, 8, 8) and on_latent(None, (1, 4, 8, 8)) is None
    assert torch.equal(on_latent(4 * mask - 2, (1, 4, 8, 8)), on_latent(mask, (1, 4, 8, 8))), "from 0 to 1 at most"
    assert on_latent(mask, (1, 64, 100)) is None, "sound has no places"
