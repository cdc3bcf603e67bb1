"""Guidance that every picture of a batch decides for itself, beside methods that do not care and methods that do."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from lora_ensemble.host.guidance.apply import guidance_record_of
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.loratorio import LoRAtorio

from .builders import composite, method
from .guidance_tools import SD15, ag, gammas, reference, same, sample
from .test_selection import est, klora, pair

OPTIONS = dict(steps=6, batch=3)
APART: dict[str, Callable] = {
    "Composite": composite,
    "K-LoRA": klora,
    "EST-LoRA": est,
    "CMLoRA": lambda model, ensemble: method(model, ensemble, CMLoRA),
    "CMLoRA, online": lambda model, ensemble: method(model, ensemble, lambda s: CMLoRA(
        s, high=(True, False), order="online", threshold=0.9)),
}
"""Methods that mix a picture without a look at the others."""


def parting(curve: list[list[float]]) -> float:
    """A threshold that some pictures of a batch pass in a step in which others do not: of those the one that is
    farthest from any similarity."""
    found = []
    for i in range(1, len(curve)):
        best = [max(g) for g in zip(*curve[:i], strict=True)]
        found += [(high - low, (high + low) / 2) for low, high in pairwise(sorted(best))]
    return max(found)[1]


@pytest.mark.parametrize("name", APART)
def test_a_finished_picture_saves_its_negative(name, spied, loras):
    """The pictures are those of the formula with both sides evaluated for all, under the same LoRAs."""
    ours = APART[name](spied.model, pair(spied.model, loras))
    threshold = parting(gammas(ours, **OPTIONS))
    spied.calls.clear()
    guided = ag(ours, threshold)
    out = sample(guided, **OPTIONS)
    record = guidance_record_of(guided)
    negative = [step.negative for step in record.steps]
    branches = spied.rows(SD15.cond(11)) // 18
    assert any(0 < rows < 3 for rows in negative) and not record.problems
    assert spied.rows(SD15.cond(12)) == branches * sum(negative)
    same(out, sample(reference(ours, threshold), **OPTIONS), sample(ours, **OPTIONS))


def test_a_method_that_looks_at_the_whole_batch_keeps_it(spied, loras):
    """LoRAtorio finds its weights per picture on the positive side: a part of the batch would not fit them."""
    ours = method(spied.model, pair(spied.model, loras), LoRAtorio)
    threshold = parting(gammas(ours, **OPTIONS))
    guided = ag(ours, threshold)
    out = sample(guided, **OPTIONS)
    record = guidance_record_of(guided)
    assert {step.negative for step in record.steps} == {0, 3} or {step.negative for step in record.steps} == {3}
    (problem,) = (text for text in record.problems if "whole batch" in text)
    assert "LoRAtorio" in problem
    same(out, sample(reference(ours, threshold), **OPTIONS), sample(ours, **OPTIONS))
