"""Prompts that take turns during a run (Conditioning Set Timestep Range): each has the places of its own words, from
when it comes to act."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import pytest
import torch
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.methods.prompt import PromptTokens
from torch import Tensor

from .builders import sample, schedule
from .models import FAMILIES, base
from .test_routed import MARKS, prompt, rests, routed, specs

STEPS, TURN = 8, 4
EARLY, LATE = dict(start_percent=0.0, end_percent=0.5), dict(start_percent=0.5, end_percent=1.0)
BASE = {"once": dict(mode="once"), "every step": dict(mode="every step"), "contrast": dict(mode="contrast")}


def prompts(options: dict, seeds=(11, 14), marks=(MARKS, MARKS)) -> list[list]:
    """A CONDITIONING for each, with what contrast compares it with."""
    def without(seed: int) -> dict:
        return {"lora_ensemble_without": rests(MARKS, [prompt("SD15", None, seed + k)[0] for k in (20, 21, 22)])}

    more = without if options["mode"] == "contrast" else lambda seed: {}
    return [prompt("SD15", mark, seed, **more(seed)) for seed, mark in zip(seeds, marks, strict=True)]


def ranged(conds: list[list]) -> list:
    return [[text, {**options, **span}] for cond, span in zip(conds, (EARLY, LATE), strict=True)
            for text, options in cond]


def one_step(model, step: int, x: Tensor, positive: list) -> Tensor:
    """The prediction for the noisy latent x, as a run that begins with this step makes it."""
    found, inner = [], model.get_model_object("model_sampling")
    sigmas = schedule(model, STEPS)[step:step + 2]
    latent = model.model.process_latent_out(inner.inverse_noise_scaling(sigmas[0], x))
    with torch.inference_mode():
        comfy.sample.sample_custom(model, torch.zeros_like(x), 3.0, comfy.samplers.sampler_object("euler"), sigmas,
                                   positive, FAMILIES["SD15"].cond(12), latent, disable_pbar=True,
                                   callback=lambda _, x0, *rest: found.append(x0))
    return found[0]


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("how", BASE)
def test_each_prompt_is_drawn_as_if_it_were_alone(how, trust, loras):
    """Guard: `RoutedLoRAs.meet`. The places of a prompt that has yet to act are not known, and are no reason for the
    negative to have LoRAs everywhere; once it does, they are looked for, and how far LoRAs are trusted."""
    model = base("SD15")
    ensemble, (first, second) = specs(model, loras), prompts(BASE[how])
    ours, seen, alone = routed(model, ensemble, trust=trust, **BASE[how]), {}, []
    sample(ours, "SD15", ranged([first, second]), steps=STEPS,
           callback=lambda step, x0, x, total: seen.update({step: (x0.clone(), x.clone())}))
    record = record_of(ours)
    more = 4 if how == "contrast" else 1
    assert [step.rows for step in record.steps] == [2 + more, 2, 2, 2, 2 + more, 2, 2, 2] and record.problems == []
    assert all(0 < share < 1 for step in record.steps for share in step.notes["Merge"]["places"])
    sample(routed(model, ensemble, trust=trust, **BASE[how]), "SD15", first, steps=STEPS,
           callback=lambda step, x0, x, total: alone.append(x0.clone()))
    for step in range(TURN):
        assert torch.equal(seen[step][0], alone[step])
    found, x = seen[TURN]
    torch.testing.assert_close(found, one_step(routed(model, ensemble, trust=trust, **BASE[how]), TURN, x, second),
                               rtol=1e-4, atol=1e-4)


def test_words_of_a_later_prompt_alone_are_nowhere_before(loras):
    """And are not missing."""
    model = base("SD15")
    one, two = (PromptTokens(text, 5, ((0, 4, (0, 1)), (6, 9, (2, 3)))) for text in ("ohwx, cat", "sks,  dog"))
    first, second = prompts(BASE["once"], marks=(one, two))
    ours = routed(model, specs(model, loras), mode="once")
    sample(ours, "SD15", ranged([first, second]), steps=STEPS)
    places = [step.notes["Merge"]["places"] for step in record_of(ours).steps]
    assert all(early > 0 and late == 0 for early, late in places[:TURN])
    assert all(early == 0 and late > 0 for early, late in places[TURN:]) and record_of(ours).problems == []
