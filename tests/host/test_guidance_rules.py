"""A rule of guidance that the run has never heard of: what a session is promised, on real ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from lora_ensemble.host.guidance.apply import Guidance, apply_guidance, guidance_record_of
from lora_ensemble.kernels.branch import Step
from lora_ensemble.methods.guidance.record import GuidanceRecord
from lora_ensemble.methods.guidance.session import FULL, GuidanceSession, Need
from torch import Tensor

from .builders import composite, guided, schedule, three
from .guidance_tools import SD15, dual, runs, same, sample
from .models import base


class Held(GuidanceSession):
    """Every second step the negative of a picture is left out, and its term of guidance is that of the step before;
    the pictures of a batch take turns."""

    def __init__(self, tell):
        super().__init__(tell)
        self.terms: dict[str, Tensor] = {}
        self.calls: list[str] = []

    def begin(self, step: Step, pictures: int = 1, windowed: bool = False) -> Need:
        self.calls.append("begin")
        self.tell("held")
        return Need(tuple(row for row in range(pictures) if (row + step.index) % 2 == 0)) if step.index else FULL

    def replace(self, name: str, x: Tensor, c: Tensor, sigma: Tensor) -> Tensor:
        return c - self.terms[name]

    def keep(self, x: Tensor, c: Tensor, negatives: Mapping[str, Tensor], sigma: Tensor) -> None:
        self.terms = {name: c - u for name, u in negatives.items()}

    def end(self) -> None:
        self.calls.append("end")

    def summary(self, record: GuidanceRecord) -> None:
        self.calls.append(f"summary, finished: {record.finished}")


SESSIONS: list[Held] = []


def held(model):
    def begin(model, context, tell) -> Held:
        SESSIONS.append(Held(tell))
        return SESSIONS[-1]

    return apply_guidance(model, Guidance("held", begin))


def reference(model):
    """The same on the host's cfg function, with both sides evaluated for every picture."""
    model, state = model.clone(), {"step": -1}

    def cfg(args):
        c, u = args["cond_denoised"], args["uncond_denoised"]
        state["step"] += 1
        turn = torch.tensor([(row + state["step"]) % 2 == 0 or not state["step"] for row in range(len(c))])
        term = state["term"] = torch.where(turn.view(-1, 1, 1, 1), c - u, state.get("term", c - u))
        return args["input"] - (c + (args["cond_scale"] - 1) * term)

    model.set_model_sampler_cfg_function(cfg)
    return model


@pytest.mark.parametrize(("batch", "negative", "predicted"), [(1, [1, 0, 1, 0], [0, 1, 0, 1]),
                                                              (3, [3, 1, 2, 1], [0, 2, 1, 2])])
def test_a_rule_that_predicts(spied, batch, negative, predicted):
    """For whole batches and for some of their pictures: what is left out is what the rule says, and so is the rest."""
    ours, options = held(spied.model), dict(steps=4, batch=batch)
    same(sample(ours, **options), sample(reference(base("SD15")), **options), sample(base("SD15"), **options))
    record = guidance_record_of(ours)
    assert [step.negative for step in record.steps] == negative
    assert [step.predicted for step in record.steps] == predicted
    assert spied.rows(SD15.cond(12)) == sum(negative) and spied.rows(SD15.cond(11)) == 4 * batch
    assert record.full == 8 * batch and record.problems == ["held"], "each problem once"
    assert SESSIONS[-1].calls == ["begin", "end"] * 4 + ["summary, finished: True"]


def test_under_a_composition(loras):
    model = base("SD15")
    composed = composite(model, three(model, loras))
    same(sample(held(composed), steps=4), sample(reference(composed), steps=4), sample(composed, steps=4))


def test_several_negatives_go_by_their_names():
    guided(dual(held(base("SD15"))), schedule(base("SD15"), 4))
    assert set(SESSIONS[-1].terms) == {"negative", "middle"}


def test_a_run_that_fails_is_summed_up():
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(held(base("SD15")), steps=3, callback=stop)
    assert SESSIONS[-1].calls == ["begin", "end", "summary, finished: False"] and not runs()
