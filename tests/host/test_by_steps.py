"""Widgets that are left to the number of steps, on real nodes and runs: what comes of it is said; numbers stay."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from comfy.sampler_helpers import convert_cond
from lora_ensemble.host.compose.apply import with_cache
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import KEY, record_of
from lora_ensemble.host.compose.prompts import shares_of
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.guidance.apply import guidance_record_of
from lora_ensemble.host.look.report import report
from lora_ensemble.host.words.marked import WITHOUT
from lora_ensemble.methods.prompt import PromptTokens
from lora_ensemble.methods.schedule import BySteps, NonUniform, Uniform
from lora_ensemble.nodes.baselines import LoRAEnsembleSwitch
from lora_ensemble.nodes.cache import LoRAEnsembleBranchCache
from lora_ensemble.nodes.cmlora import LoRAEnsembleCMLoRA
from lora_ensemble.nodes.klora import LoRAEnsembleKLoRA
from lora_ensemble.nodes.loratorio import LoRAEnsembleLoRAtorio
from lora_ensemble.tests.devices import Plain
from lora_ensemble.tests.workflows import ROOT

from .builders import composite, sample, three
from .caches import steps_of
from .guidance_tools import ag
from .models import base
from .test_routed import prompt, rests, specs
from .text_encoders import clip

CMLORA = ["offline", 0.6, 0.4, 0.0, "none", 2, 3, "every_step", 5, 0]
LORATORIO = [2, 10.0, "steps", 0.5, "nearest", "noise", 0, "image", 1]
"""Widget values as workflows of 0.1.0 hold them."""


def method_of(model):
    return model.get_attachment(KEY).applied[-1].method


def made(node, model, ensemble, *values, **later):
    return node.execute(model, tuple(ensemble), *values, **later).args[0]


def defaults(node) -> dict:
    """The widgets of a node that was just put down."""
    types = node.INPUT_TYPES()
    return {name: spec[1]["default"] for part in ("required", "optional") for name, spec in types[part].items()
            if "default" in spec[1]}


def new(node, model, ensemble):
    return node.execute(model, tuple(ensemble), **defaults(node)).args[0]


def with_roles(ensemble, *roles):
    return [replace(spec, role=role) for spec, role in zip(ensemble, roles, strict=True)]


@pytest.mark.parametrize("steps", [4, 8])
def test_what_was_chosen_is_in_the_record_and_in_the_report(steps, loras):
    model = base("SD15")
    ensemble = with_roles(three(model, loras), "character", "style", "background")
    for node, said in ((LoRAEnsembleSwitch, f"Switch: {steps} steps, 3 LoRAs: steps_per_lora is 1"),
                       (LoRAEnsembleLoRAtorio, f"LoRAtorio: {steps} steps: the inverse temperature rises to 70")):
        composed = new(node, model, ensemble)
        sample(composed, steps=steps)
        assert record_of(composed).chosen == [said] and record_of(composed).problems == []
        picture, text = report(composed, torch.zeros(1))
        assert json.loads(text)["chosen"] == [said]
        record_of(composed).chosen.clear()
        assert report(composed, torch.zeros(1))[0].shape[1] < picture.shape[1], "the sheet has a section for it"


@pytest.mark.parametrize(("steps", "said"), [(8, "do not serve, so few steps differ too much"), (12, "serve 2 steps")])
def test_the_age_of_cmloras_cache_goes_by_the_steps(steps, said, loras):
    """Off in few steps, to the bit; a number is that number; without the input, as saved before, the paper's."""
    model = base("SD15")
    ensemble = with_roles(three(model, loras), "character", "style", "background")
    composed, values = new(LoRAEnsembleCMLoRA, model, ensemble), CMLORA[:-1] + [1]
    head = f"CMLoRA: {steps} steps, 3 LoRAs: "
    out = sample(composed, steps=steps)
    assert record_of(composed).chosen == [f"{head}c1 is 2, c2 is 3", f"{head}cached features {said}"]
    ages = [max(step["ages"]) for step in steps_of(composed)] if steps > 9 else [0]
    assert max(ages) == (1 if steps > 9 else 0)
    if steps <= 9:
        whole = LoRAEnsembleCMLoRA.execute(model, tuple(ensemble), **defaults(LoRAEnsembleCMLoRA) | {"cache_depth": 0})
        assert torch.equal(out, sample(whole.args[0], steps=steps))
    for later, oldest in (({}, 8), ({"cache_age": 4}, 3)):
        given = made(LoRAEnsembleCMLoRA, model, ensemble, *values, **later)
        sample(given, steps=steps)
        assert record_of(given).chosen == [] and max(age for step in steps_of(given) for age in step["ages"]) <= oldest
    assert given.get_attachment(KEY).cache == CacheSpec(max_age=4, depth=1, whose="The cache of CMLoRA")


def test_values_of_the_first_version_keep_their_meaning(loras):
    """Guard: a saved number is never taken for 'by the number of steps'."""
    model = base("SD15")
    ensemble = three(model, loras)
    switch = method_of(made(LoRAEnsembleSwitch, model, ensemble, 5, "", "paper"))
    assert (switch.steps_per_lora, switch.last) == (5, None)
    led = method_of(made(LoRAEnsembleCMLoRA, model, ensemble, *CMLORA))
    assert (led.c1, led.c2, led.steps_per_lora) == (2, 3, 5)
    torio = method_of(made(LoRAEnsembleLoRAtorio, model, ensemble, *LORATORIO))
    assert (torio.kappa, torio.unit, torio.reweigh_every) == (10.0, "steps", 1)
    for schedule, spec in (("uniform", Uniform(3)), ("CMLoRA", NonUniform(2, 3))):
        cache = LoRAEnsembleBranchCache.execute(model, schedule, 3, 2).args[0].get_attachment(KEY).cache
        assert cache == CacheSpec(spec, depth=2) == cache.at(4)
    for node, values in ((LoRAEnsembleSwitch, [5, "", "paper"]), (LoRAEnsembleCMLoRA, CMLORA),
                         (LoRAEnsembleLoRAtorio, LORATORIO)):
        composed = made(node, model, ensemble, *values)
        sample(composed, steps=4)
        assert record_of(composed).chosen == []


def test_the_subject_ends(loras):
    model = base("SD15")
    ensemble = with_roles(three(model, loras), "style", "character", "object")
    composed = made(LoRAEnsembleSwitch, model, ensemble, 1, "", "paper", ending="subject")
    assert method_of(composed).last == 1 and method_of(made(LoRAEnsembleSwitch, model, ensemble, 1, "2,3,1", "paper",
                                                            ending="in turn")).last is None
    sample(composed, steps=8)
    acting = [[bool(gain) for gain in branch] for step in record_of(composed).steps for (branch,) in step.branches]
    assert [each.index(True) for each in acting] == [0, 1, 2, 0, 1, 2, 0, 1]
    plain = made(LoRAEnsembleSwitch, model, ensemble, 1, "", "paper")
    assert torch.equal(sample(plain, steps=8), sample(composed, steps=8)), "the eighth step was the subject's anyway"
    assert not torch.equal(sample(plain, steps=7), sample(composed, steps=7))
    assert record_of(composed).chosen == [f"Switch: the last 1 step is those of LoRA '{ensemble[1].name}'"]
    with pytest.raises(ValueError, match="Switch LoRAs: ending is 'never'"):
        made(LoRAEnsembleSwitch, model, ensemble, 1, "", "paper", ending="never")


def test_turns_by_the_prompt(loras):
    """1 - cos of what the prompt's conditioning is without a LoRA's clauses; the second prompt says more by the second
    LoRA. A muted LoRA counts for the rows alone."""
    model = base("SD15")
    marks = PromptTokens("ohwx cat, sks dog, a field, ohwx hat", 5,
                         ((0, 8, (0,)), (10, 17, (1,)), (19, 26, (2,)), (28, 36, (3, 4))))
    first, second = specs(model, loras)
    muted = LoRASpec(first.name, 0, 0, words="a field")

    def conds(seed: int, *weights: float) -> list:
        ((whole, options),) = prompt("SD15", marks, seed)
        others = [[whole + weight * torch.randn_like(whole), {}] for weight in weights]
        return [whole, {**options, WITHOUT: rests(marks, others, ("a field", "ohwx", "sks"))}]

    # In the order of `rests`: the muted one's, the first's two, the second's.
    one, two = conds(11, 9.0, 0.2, 0.1, 0.1), conds(13, 9.0, 0.0, 0.0, 0.6)

    def share(cond: list, *places: int) -> float:
        lacking = [cond[1][WITHOUT][k][1][0] for k in places]
        return sum(1 - torch.nn.functional.cosine_similarity(cond[0].mean(1), rest.mean(1)).item() for rest in lacking)

    shares = max(share(one, 1, 2), share(two, 1, 2)), max(share(one, 3), share(two, 3))
    assert shares[0] < 0.7 * shares[1]
    composed = made(LoRAEnsembleSwitch, model, [muted, first, second], 4, "", "paper", lengths="by the prompt")
    sample(composed, positive=[one, two], steps=12)
    turn = max(1, round(4 * shares[0] / shares[1]))
    assert record_of(composed).chosen == [f"Switch: turns by the prompt: {first.name} {turn}, {second.name} 4"]
    acting = [[bool(gain) for gain in branch].index(True) for step in record_of(composed).steps
              for (branch,) in step.branches]
    assert acting == (([0] * turn + [1] * 4) * 12)[:12] and record_of(composed).problems == []
    for bare in (prompt("SD15", marks), prompt("SD15", None)):
        sample(composed, positive=bare, steps=8)
        assert ["turns have one length" in line for line in record_of(composed).problems] == [True]


def test_what_a_prompt_says_by_words_is_the_text_encoders(loras):
    """The CLIP of the node brings along what the shares are made of."""
    model, plain = base("SD15"), clip("SD1")
    first, second = specs(model, loras, ("woman", "dog"))
    composed, encoder = LoRAEnsembleSwitch.execute(model, (first, second), 0, "", "paper", clip=plain,
                                                   lengths="by the prompt").args
    (entry,) = encoder.encode_from_tokens_scheduled(encoder.tokenize("ohwx woman, a small dog, old house"))
    found = shares_of({"positive": convert_cond([entry])}, composed.get_attachment(KEY).applied[-1].asked)

    def mean(text: str) -> torch.Tensor:
        return plain.encode_from_tokens_scheduled(plain.tokenize(text))[0][0][0].mean(0)

    whole = mean("ohwx woman, a small dog, old house")
    want = [1 - torch.cosine_similarity(whole, mean(rest), dim=0).item()
            for rest in ("a small dog, old house", "ohwx woman, old house")]
    assert found == pytest.approx(want, abs=1e-5) and min(want) > 1e-4
    # A text encoder that leaves its conditionings on a device without float64 (--gpu-only).
    there = [Plain(entry[0]), entry[1] | {WITHOUT: [(span, [Plain(cond), more]) for span, (cond, more) in
                                                    entry[1][WITHOUT]]}]
    assert shares_of({"positive": convert_cond([there])}, composed.get_attachment(KEY).applied[-1].asked) == found


def test_a_class_without_a_lead_is_named(loras):
    model = base("SD15")
    ensemble = with_roles(three(model, loras), "character", "object", "background")
    composed = new(LoRAEnsembleCMLoRA, model, ensemble)
    sample(composed, steps=2)
    assert record_of(composed).problems == [
        f"CMLoRA: the class of backgrounds never led in 2 steps ({ensemble[2].name})"]
    sample(composed, steps=4)
    assert record_of(composed).problems == []
    switched = new(LoRAEnsembleSwitch, model, ensemble)
    sample(switched, steps=2)
    (line,) = record_of(switched).problems
    assert ensemble[2].name in line and "did not act in any of the 2 steps" in line


def test_loras_without_a_turn_are_named_together(loras):
    """In one line, with the method as users call it."""
    model = base("SD15")
    ensemble = with_roles(three(model, loras), "character", "style", "style")
    switched = new(LoRAEnsembleSwitch, model, ensemble)
    sample(switched, steps=1)
    names = ", ".join(f"'{spec.name}'" for spec in ensemble[1:])
    assert record_of(switched).problems == [f"LoRA {names} did not act in the only step: Switch gave them no turn"]
    weak = replace(ensemble[1], strength_model=0.01)
    chosen = new(LoRAEnsembleKLoRA, model, (ensemble[0], ensemble[1], weak))
    sample(chosen, steps=2)
    assert record_of(chosen).problems == [
        f"LoRA '{weak.name} (row 3)' did not act in any of the 2 steps: K-LoRA gave it no turn"]


@pytest.mark.parametrize("schedule", ["uniform", "CMLoRA"])
def test_the_branch_cache_goes_by_the_steps(schedule, loras):
    """Off in few steps, to the bit; in 20 what interval 3 (and the paper's schedule) does."""
    model = base("SD15")
    composed = composite(model, three(model, loras))
    cached = LoRAEnsembleBranchCache.execute(composed, schedule, 0, 1).args[0]
    assert cached.get_attachment(KEY).cache.schedule == BySteps(schedule == "uniform")
    assert torch.equal(sample(cached, steps=4), sample(composed, steps=4))
    (line,) = record_of(cached).problems
    assert line.startswith("Branch Cache: 4 steps: ") and "nothing is reused" in line
    assert record_of(cached).chosen == []
    given = LoRAEnsembleBranchCache.execute(composed, schedule, 3, 1).args[0]
    assert torch.equal(sample(cached, steps=20), sample(given, steps=20))
    (line,) = record_of(cached).chosen
    assert ("interval is 3" if schedule == "uniform" else "every 2. step, in the middle every 3.") in line
    assert [step["reused"] > 0 for step in steps_of(cached)] == [step["reused"] > 0 for step in steps_of(given)]
    assert record_of(given).chosen == [] == record_of(cached).problems
    off = with_cache(composed, CacheSpec(Uniform(1)))  # nothing is left to the number of steps
    sample(off, steps=4)
    assert record_of(off).problems == []


def test_at_cfg_1_there_is_nothing_to_save():
    model = ag(base("SD15"))
    sample(model, steps=3, cfg=1.0)
    assert guidance_record_of(model).problems == ["Adaptive Guidance: no negative is evaluated at cfg 1, so there is "
                                                  "nothing to save"]
    assert "nothing to save" in guidance_record_of(model).text()
    sample(model, steps=3, cfg=3.0)
    assert guidance_record_of(model).problems == []


AUTO = {LoRAEnsembleSwitch: ["steps_per_lora"], LoRAEnsembleCMLoRA: ["c1", "c2", "steps_per_lora", "cache_age"],
        LoRAEnsembleBranchCache: ["interval"]}
"""Numbers that go by the number of steps where they are 0."""


@pytest.mark.parametrize("node", AUTO, ids=lambda node: node.__name__)
def test_what_0_means_stands_on_the_widget_and_on_its_page(node):
    page = (ROOT / "web" / "docs" / f"{node.__name__}.md").read_text(encoding="utf-8")
    inputs = {part.id: part for part in node.define_schema().inputs}
    for name in AUTO[node]:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        assert inputs[name].min == inputs[name].default == 0
        assert re.search(r"\b0(:| goes by)", inputs[name].tooltip) and re.search(r"\*0\*: (by|as long as)", row), name
