"""What is set in vain is said on the node: every rule, against a run in which the setting changes nothing."""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import replace
from types import SimpleNamespace

import lora_ensemble
import pytest
import torch
from comfy_api.latest import io
from comfy_execution.utils import CurrentNodeContext
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.host.guidance.apply import KEY as GUIDANCE
from lora_ensemble.host.guidance.apply import guidance_record_of
from lora_ensemble.nodes.baselines import LoRAEnsembleComposite, LoRAEnsembleMerge, LoRAEnsembleSwitch
from lora_ensemble.nodes.cache import LoRAEnsembleBranchCache
from lora_ensemble.nodes.cmlora import LoRAEnsembleCMLoRA
from lora_ensemble.nodes.ensembles import LoRAEnsembleLoRA
from lora_ensemble.nodes.guidance import LoRAEnsembleAdaptiveGuidance
from lora_ensemble.nodes.klora import LoRAEnsembleESTLoRA, LoRAEnsembleKLoRA
from lora_ensemble.nodes.levels import LoRAEnsembleNoiseLevels
from lora_ensemble.nodes.loratorio import LoRAEnsembleLoRAtorio
from lora_ensemble.nodes.routed import LoRAEnsembleRouted
from lora_ensemble.nodes.said import say
from lora_ensemble.nodes.unused import _RULES, unused

from .builders import lora, same, sample, three
from .models import base
from .test_routed import HALF, MARKS, prompt, rests, specs

NODES = {node.__name__: node for node in asyncio.run(asyncio.run(lora_ensemble.comfy_entrypoint()).get_node_list())}


def defaults(node) -> dict:
    return {part.id: part.default for part in node.define_schema().inputs if getattr(part, "default", None) is not None}


def another(part: io.Input) -> object:
    """A value of an input that is not its default."""
    if isinstance(part, io.Combo.Input):
        return next(option for option in part.options if option != part.default)
    if isinstance(part, io.Boolean.Input):
        return not part.default
    return part.max if part.default != part.max and part.max < 1000 else part.default + 1


@pytest.mark.parametrize("name", _RULES)
def test_no_setting_is_named_that_stands_as_it_comes(name):
    assert unused(NODES[name].define_schema(), defaults(NODES[name])) == []


CASES = [
    (LoRAEnsembleCMLoRA, {"order": "async"}, ("boundary", "threshold", "steps_per_lora")),
    (LoRAEnsembleCMLoRA, {"order": "async", "cache_age": 3}, ("c1", "c2")),
    (LoRAEnsembleCMLoRA, {}, ("order",)),
    (LoRAEnsembleCMLoRA, {"order": "Switch-A"},
     ("boundary", "threshold", "dominance", "decay", "c1", "c2", "cache_depth", "dominant_full", "features",
      "cache_age")),
    (LoRAEnsembleCMLoRA, {"order": "offline", "cache_depth": 0},
     ("threshold", "steps_per_lora", "dominant_full", "features", "cache_age")),
    (LoRAEnsembleCMLoRA, {"cache_age": 1}, ("cache_depth", "dominant_full", "features")),
    (LoRAEnsembleCMLoRA, {"order": "online"}, ("boundary", "steps_per_lora")),
    (LoRAEnsembleCMLoRA, {"dominance": 1.0}, ("boundary", "decay")),
    (LoRAEnsembleLoRAtorio, {"temperature": 0.0}, ("temperature_unit", "patch_size", "upsampling", "similarity")),
    (LoRAEnsembleLoRAtorio, {"top_k": 1},
     ("temperature", "temperature_unit", "upsampling", "reweigh_every")),
    (LoRAEnsembleLoRAtorio, {"top_k": 1, "selection": "patch"}, ("temperature", "temperature_unit")),
    (LoRAEnsembleLoRAtorio, {"top_k": 0}, ("selection", "recheck_every")),
    (LoRAEnsembleLoRAtorio, {"top_k": 3}, ("selection", "recheck_every")),
    (LoRAEnsembleBranchCache, {"schedule": "CMLoRA", "interval": 2}, ("interval",)),
    (LoRAEnsembleBranchCache, {"interval": 1}, ("depth",)),
    (LoRAEnsembleBranchCache, {"budget": 0.5}, ("interval", "depth")),
    (LoRAEnsembleAdaptiveGuidance, {"mode": "extrapolate"},
     ("threshold", "space", "decision", "ramp_steps", "read_back")),
    (LoRAEnsembleAdaptiveGuidance, {"mode": "extrapolate", "tolerance": 0.1}, ("saving",)),
    (LoRAEnsembleAdaptiveGuidance, {"mode": "threshold"}, ("saving", "tolerance", "if_different")),
]


@pytest.mark.parametrize(("node", "settings", "names"), CASES,
                         ids=lambda case: case.__name__ if isinstance(case, type) else None)
def test_what_is_named_changes_no_picture(node, settings, names, loras, caplog):
    model = base("SD15")
    fixed = {"model": model} | ({"ensemble": three(model, loras)} if "ensemble" in
                                {part.id for part in node.define_schema().inputs} else {})
    given = defaults(node) | settings
    reference = sample(node.execute(**fixed, **given).args[0], steps=4)
    parts = {part.id: part for part in node.define_schema().inputs}
    for name in names:
        value = another(parts[name])
        with caplog.at_level(logging.WARNING, "lora_ensemble"):
            caplog.clear()
            made = node.execute(**fixed, **given | {name: value}).args[0]
        assert [line for line in caplog.messages if f": {name} is not used" in line], (name, value)
        assert torch.equal(sample(made, steps=4), reference), name


@pytest.mark.parametrize(("node", "settings", "name"), [
    (LoRAEnsembleCMLoRA, {"order": "offline"}, "boundary"), (LoRAEnsembleCMLoRA, {"order": "online"}, "threshold"),
    (LoRAEnsembleCMLoRA, {"order": "Switch-A"}, "steps_per_lora"), (LoRAEnsembleLoRAtorio, {"top_k": 2}, "selection"),
    (LoRAEnsembleLoRAtorio, {"top_k": 1}, "similarity"), (LoRAEnsembleLoRAtorio, {"top_k": 1}, "patch_size"),
    (LoRAEnsembleLoRAtorio, {"top_k": 1, "selection": "patch"}, "patch_size"),
    (LoRAEnsembleCMLoRA, {"order": "online"}, "boundary"),
    (LoRAEnsembleCMLoRA, {"order": "online"}, "features"), (LoRAEnsembleCMLoRA, {"order": "async"}, "cache_age"),
    (LoRAEnsembleBranchCache, {"schedule": "uniform"}, "interval"), (LoRAEnsembleBranchCache, {}, "budget"),
    (LoRAEnsembleBranchCache, {"schedule": "forecast"}, "interval"),
    (LoRAEnsembleBranchCache, {"schedule": "uniform", "interval": 0}, "depth"),
    (LoRAEnsembleAdaptiveGuidance, {"mode": "threshold"}, "threshold"),
    (LoRAEnsembleAdaptiveGuidance, {"mode": "extrapolate"}, "saving"),
    (LoRAEnsembleAdaptiveGuidance, {"mode": "extrapolate", "tolerance": 0.1}, "decision"),
])
def test_what_is_used_is_not_named(node, settings, name):
    part = next(part for part in node.define_schema().inputs if part.id == name)
    assert unused(node.define_schema(), defaults(node) | settings | {name: another(part)}) == []


def test_loras_that_leave_a_method_nothing_to_do():
    one, two = (LoRASpec(name, 1.0, 1.0) for name in "ab")
    off, always = LoRASpec("c", 0.0, 1.0), LoRASpec("d", 1.0, 1.0, "always")

    def lines(node, *ensemble: LoRASpec) -> str:
        return "; ".join(unused(node.define_schema(), {"model": None, "ensemble": ensemble}))

    for node in (LoRAEnsembleSwitch, LoRAEnsembleComposite, LoRAEnsembleCMLoRA, LoRAEnsembleKLoRA,
                 LoRAEnsembleESTLoRA):
        assert "a is the only LoRA to compose" in lines(node, one, off, always)
        assert lines(node, one, two) == ""
    for node in (LoRAEnsembleSwitch, LoRAEnsembleRouted, LoRAEnsembleLoRAtorio):
        assert lines(node, off, always) == ("all LoRAs that act have the role always: they are part of the model, and "
                                            f"{node.define_schema().display_name} has no other to work with")
    assert lines(LoRAEnsembleMerge, always) == lines(LoRAEnsembleMerge, one) == ""
    assert "recenter_lambda and place alone change anything" in lines(LoRAEnsembleLoRAtorio, one, off, always)
    assert lines(LoRAEnsembleLoRAtorio, one, two) == ""
    assert "all model strengths are 0" in lines(LoRAEnsembleMerge, off)
    for node in filter(None, map(NODES.get, ("LoRAEnsembleInfo", "LoRAEnsembleStack"))):
        assert lines(node, off) == "", "it has a line for each LoRA, and LoRA Ensemble may have others in its rows"
    for role, missing in (("character", "style"), ("style", "subject")):
        same = [LoRASpec(name, 1.0, 1.0, role) for name in "ab"]
        assert f"set the role of one to a {missing}" in lines(LoRAEnsembleKLoRA, *same)
        assert lines(LoRAEnsembleSwitch, *same) == ""


@pytest.mark.parametrize(("change", "names"), [
    ({"mask": Mask(HALF)}, {"mode": "contrast", "gamma": 5.0, "blocks": "0.2-0.6", "trust": False}),
    ({"role": "style"}, {"mode": "once", "gamma": 5.0, "blocks": "0.2-0.6", "trust": False, "style_yields": False}),
    ({"role": "background"}, {"style_yields": False})])
def test_what_loras_that_no_word_places_leave_unused(change, names, loras):
    """How words are looked for, where each LoRA has a mask or acts everywhere; and a style that has nobody to yield to.
    """
    model = base("SD15")
    fixed = {"model": model, "ensemble": tuple(specs(model, loras, **change)), **defaults(LoRAEnsembleRouted)}
    conds = prompt("SD15", lora_ensemble_without=rests(MARKS, [prompt("SD15", None, 20 + k)[0] for k in range(3)]))
    assert unused(LoRAEnsembleRouted.define_schema(), fixed) == []
    reference = sample(LoRAEnsembleRouted.execute(**fixed).args[0], positive=conds, steps=2)
    for name, value in names.items():
        (line,) = unused(LoRAEnsembleRouted.define_schema(), fixed | {name: value})
        assert line.startswith(f"{name} is not used")
        other = LoRAEnsembleRouted.execute(**fixed | {name: value}).args[0]
        assert torch.equal(sample(other, positive=conds, steps=2), reference), name
    one, other = fixed["ensemble"]
    both = replace(one, role="style"), replace(other, role="background")
    assert unused(LoRAEnsembleRouted.define_schema(), fixed | {"ensemble": both, "style_yields": False}) == []


def test_words_of_a_lora_that_always_acts():
    given = defaults(LoRAEnsembleLoRA) | {"lora_name": "", "role": "always"}
    assert unused(LoRAEnsembleLoRA.define_schema(), given) == []
    (line,) = unused(LoRAEnsembleLoRA.define_schema(), given | {"words": "ohwx"})
    assert line == "words is not used: role is always: it acts everywhere"


def test_one_lora_in_loratorio(loras):
    """All weight is its own whatever is set, and the base's where its mask is grey: there it is as in Composite."""
    model, (one, _) = base("SD15"), specs(base("SD15"), loras)
    one = replace(one, mask=Mask(torch.linspace(0, 1, 64).expand(1, 64, 64)))
    given = defaults(LoRAEnsembleLoRAtorio) | {"model": model, "ensemble": (one,)}
    reference = sample(LoRAEnsembleLoRAtorio.execute(**given).args[0], steps=4)
    for changes in ({"patch_size": 4}, {"temperature": 1.0}, {"temperature_unit": "progress"}, {"top_k": 1},
                    {"upsampling": "bilinear"}, {"similarity": "x0"}, {"reweigh_every": 3}):
        found = sample(LoRAEnsembleLoRAtorio.execute(**given | changes).args[0], steps=4)
        same(found, reference, sample(model, steps=4), 1e-4)
    ours = sample(LoRAEnsembleLoRAtorio.execute(**given | {"recenter_lambda": 1.0}).args[0], steps=4)
    same(ours, sample(LoRAEnsembleComposite.execute(model, (one,)).args[0], steps=4), sample(model, steps=4), 1e-4)
    assert not torch.allclose(ours, reference, atol=1e-3)


def test_a_background_that_is_off_leads_nobody(loras):
    pair = specs(base("SD15"), loras)
    given = defaults(LoRAEnsembleCMLoRA) | {"model": None, "boundary": 0.2}
    for change, told in (({}, 0), ({"strength_model": 0.0}, 1)):
        ensemble = (pair[0], replace(pair[1], role="background", **change), pair[0])
        lines = unused(LoRAEnsembleCMLoRA.define_schema(), given | {"ensemble": ensemble})
        assert sum("boundary is not used: none of the LoRAs, or each" in line for line in lines) == told


@pytest.mark.parametrize("node", [LoRAEnsembleMerge, LoRAEnsembleSwitch, LoRAEnsembleComposite])
def test_a_place_that_changes_nothing_is_named(node, loras):
    """Everywhere without a mask is where LoRAs act by themselves, and those that are always on act there in any case.
    """
    def lines(ensemble: list[LoRASpec], place: str) -> list[str]:
        given = defaults(node) | {"model": model, "ensemble": tuple(ensemble)}
        names = [line for line in unused(node.define_schema(), given | {"place": place}) if "place is not used" in line]
        one, other = (sample(node.execute(**given | {"place": each}).args[0], positive=prompt(), steps=2)
                      for each in (place, "masks"))
        assert torch.equal(one, other) is bool(names)
        return names

    model = base("SD15")
    ensemble = specs(model, loras)
    (line,) = lines(ensemble, "everywhere")
    assert line == "place is not used: no LoRA has a mask, so they act everywhere in any case"
    assert lines(ensemble, "words") == []
    assert lines([replace(ensemble[0], mask=Mask(HALF)), ensemble[1]], "everywhere") == []
    always = [replace(spec, role="always") for spec in ensemble]
    assert lines(always, "words") == ["place is not used: LoRAs of the role always act everywhere"]
    assert lines([*always[:1], ensemble[1]], "words") == []
    masked = [replace(ensemble[0], mask=Mask(HALF)), replace(ensemble[1], role="style")]
    found = lines(masked, "words")  # the others' LoRAs act on their own words in the prompt, too
    assert ["each LoRA has a mask or is a style" in line for line in found] == [True] * (node is LoRAEnsembleComposite)


@pytest.mark.parametrize(("settings", "name", "value"), [
    ({"gamma": 0.0}, "trust", False), ({"gamma": 0.0}, "mode", "contrast"), ({"gamma": 0.0}, "blocks", "0.2-0.6"),
    ({"mode": "contrast"}, "blocks", "0.2-0.6")])
def test_what_is_named_changes_no_place(settings, name, value, loras):
    model, given = base("SD15"), defaults(LoRAEnsembleRouted) | settings
    fixed = {"model": model, "ensemble": tuple(specs(model, loras))}
    conds = prompt("SD15", lora_ensemble_without=rests(MARKS, [prompt("SD15", None, 20 + k)[0] for k in range(3)]))
    (line,) = unused(LoRAEnsembleRouted.define_schema(), fixed | given | {name: value})
    assert line.startswith(f"{name} is not used")
    one, other = (LoRAEnsembleRouted.execute(**fixed, **each).args[0] for each in (given, given | {name: value}))
    assert torch.equal(sample(one, positive=conds, steps=3), sample(other, positive=conds, steps=3))


def test_what_takes_the_place_of_an_earlier_node_says_so(loras):
    model = base("SD15")
    ensemble = three(model, loras)

    def lines(node, before, **settings) -> list[str]:
        given = {"model": before, "ensemble": ensemble} | defaults(node) | settings
        return [line for line in unused(node.define_schema(), given) if "takes its place" in line or "twice" in line]

    guided = LoRAEnsembleAdaptiveGuidance.execute(model, **defaults(LoRAEnsembleAdaptiveGuidance)).args[0]
    cached = LoRAEnsembleBranchCache.execute(model, **defaults(LoRAEnsembleBranchCache)).args[0]
    composed = LoRAEnsembleCMLoRA.execute(model, ensemble, **defaults(LoRAEnsembleCMLoRA)).args[0]
    assert ["Adaptive Guidance" in line for line in lines(LoRAEnsembleAdaptiveGuidance, guided)] == [True]
    for before in (cached, composed):
        assert ["cache" in line for line in lines(LoRAEnsembleBranchCache, before)] == [True]
        assert ["cache" in line for line in lines(LoRAEnsembleCMLoRA, before)] == [True]
        assert lines(LoRAEnsembleCMLoRA, before, cache_depth=0) == lines(LoRAEnsembleSwitch, before) == []
        assert lines(LoRAEnsembleAdaptiveGuidance, before) == []
    assert lines(LoRAEnsembleBranchCache, guided) == lines(LoRAEnsembleBranchCache, model) == []


def test_two_guidance_nodes_in_a_row_say_which_one_decides():
    """In one sentence, on the second node and in the record, with what the first was to do."""
    node, model = LoRAEnsembleAdaptiveGuidance, base("SD15")
    first = node.execute(model, **defaults(node) | {"mode": "threshold", "threshold": 0.75}).args[0]
    (line,) = unused(node.define_schema(), {"model": first} | defaults(node))
    policy = first.get_attachment(GUIDANCE).policy
    assert "0.75" in policy and f"({policy})" in line and "alone decides" in line
    second = node.execute(first, **defaults(node)).args[0]
    sample(second, steps=2)
    record = guidance_record_of(second)
    assert [each for each in record.problems if "twice" in each] == [line] and record.policy != policy
    sample(first, steps=2)
    assert not [line for line in guidance_record_of(first).problems if "twice" in line]


@pytest.mark.parametrize("name", ["LoRAEnsembleMerge", "LoRAEnsembleRouted", "LoRAEnsembleStack"])
@pytest.mark.parametrize(("inputs", "taken", "said"), [
    ({}, 1, True), ({}, 0, False), ({"clip": ["1", 1]}, 1, False)])
def test_a_clip_that_is_taken_and_never_came(name, inputs, taken, said, loras, caplog):
    """ComfyUI's own error comes at the prompt, and speaks of the checkpoint. Where that has none, it is right."""
    if name not in NODES:
        pytest.skip("this release cannot show rows")
    prompt = {"5": {"class_type": name, "inputs": inputs}, "6": {"class_type": "X", "inputs": {"clip": ["5", taken]}}}
    hidden = SimpleNamespace(unique_id="5", prompt=prompt, extra_pnginfo=None)
    node = type("Running", (NODES[name],), {"hidden": hidden})
    with caplog.at_level(logging.WARNING):
        node.execute(**defaults(node) | {"model": base("SD15"), "ensemble": three(base("SD15"), loras)})
    assert ("nothing is connected to clip, so nothing comes out at CLIP" in caplog.text) == said


def test_a_lora_by_itself():
    schema = LoRAEnsembleLoRA.define_schema()
    given = {"lora_name": "x", "strength_model": 0.0, "strength_clip": 0.0}
    assert unused(schema, given) == ["both strengths are 0: this LoRA does nothing"]
    assert unused(schema, {"lora_name": "x", "ensemble": (LoRASpec("y", 0.0, 1.0),)}) == [], "it has no MODEL"
    assert unused(schema, given | {"strength_clip": 0.5}) == unused(schema, given | {"strength_model": 0.5}) == []
    assert unused(schema, {"lora_name": "x", "role": "always", "mask": torch.ones(1, 8, 8)}) == [
        "mask is not used: role is always: it acts everywhere"]
    assert unused(schema, {"lora_name": "x", "mask": torch.ones(1, 8, 8)}) == []
    assert unused(schema, {"lora_name": "x", "fade": 0.2}) == [
        "fade is not used: start is 0 and end is 1: the LoRA always acts"]
    assert unused(schema, {"lora_name": "x", "fade": 0.2, "end": 0.5}) == []
    schema, chain = LoRAEnsembleNoiseLevels.define_schema(), (LoRASpec("x", 1.0, 1.0),)
    assert len(unused(schema, {"ensemble": chain, "unnamed": "low noise", "low_noise": chain})) == 1
    assert unused(schema, {"ensemble": chain, "unnamed": "low noise"}) == []


def test_a_file_for_few_steps_is_proposed_on_its_node(loras):
    """By its name or by its metadata, while its role is open; a role that somebody chose is theirs."""
    schema, tensors = LoRAEnsembleLoRA.define_schema(), lora({"x": (4, 4)}, 1, 2)
    calls_itself = loras(tensors, "a.safetensors", {"modelspec.title": "SDXL Lightning 4step"})
    is_called, other = loras(tensors, "dmd2_sdxl.safetensors"), loras(tensors, "cat.safetensors")
    for name in (calls_itself, is_called):
        (line,) = unused(schema, {"lora_name": name})
        assert name in line and "role 'always'" in line
        assert unused(schema, {"lora_name": name, "role": "always"}) == unused(schema, {
            "lora_name": name, "role": "style"}) == []
    assert unused(schema, {"lora_name": other}) == []


def test_all_that_a_node_says_stays_on_it(loras, monkeypatch):
    """The front end puts a text in the place of the last one: what was paired, and what is set in vain."""
    sent = []
    server = SimpleNamespace(client_id="c", send_progress_text=lambda text, node, sid: sent.append((node, text)))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=server)))
    high, low = (tuple(LoRASpec(loras({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, f"{name}.safetensors"), 1.0,
                                1.0) for name in names) for names in (("a", "b&"), ("c",)))
    alone = "'b&#38;.safetensors': acts at high noise alone"
    unnamed = "unnamed is not used: low_noise is connected: both chains stay as they are"
    with CurrentNodeContext("prompt", "7"):
        LoRAEnsembleNoiseLevels.execute(high, "low noise", low)
        LoRAEnsembleNoiseLevels.execute(high, "low noise", low)  # the next of a list
    assert sent[-1] == ("7", f"{alone}  \n{unnamed}") and sent[0] == ("7", alone)
    for run, node in (("prompt", "8"), ("another", "8")):
        with CurrentNodeContext(run, node):
            LoRAEnsembleNoiseLevels.execute(high, "both", low)
        assert sent[-1] == ("8", alone), "what was said before was said of another run of a node"
    with CurrentNodeContext("another", "9"):
        for text in ("of its method", "of its rows", "Merge\nof its method\n1 a"):
            say(text)
    assert sent[-1] == ("9", "of its rows  \nMerge  \nof its method  \n1 a"), "LoRA Ensemble says it with its rows"
