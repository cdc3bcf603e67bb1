"""Which settings are named as not used beside which others, one node after the other; `test_unused.py` shows by
pictures that they are not."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.nodes.unused import unused, unused_of
from lora_ensemble.tests.workflows import EXAMPLES, load

from .test_unused import NODES, another, defaults

GROUND, FIGURE = ((LoRASpec("x", 1.0, 1.0, role),) for role in ("background", "character"))
OF_A_CURVE = "space ramp_steps read_back"
OF_CACHES = "dominant_full features cache_age"
VALUES = {"coeffs": object(), "blocks": "0.2-0.6"}
"""Of inputs that say no range."""
CASES = [
    *((node, settings, names) for node in ("AdaptiveGuidance", "AdaptiveGuider", "KSampler") for settings, names in (
        ({"mode": "threshold"}, "coeffs if_different saving tolerance"),
        ({"mode": "saving"}, "threshold tolerance"), ({"mode": "saving", "tolerance": 0.1}, "threshold"),
        ({"mode": "LinearAG"}, f"threshold saving tolerance decision min_guided_steps {OF_A_CURVE}"),
        ({"mode": "extrapolate"}, f"threshold coeffs if_different decision {OF_A_CURVE}"),
        ({"mode": "extrapolate", "tolerance": 0.1}, f"threshold coeffs if_different saving {OF_A_CURVE}"))),
    ("CMLoRA", {"order": "offline"}, "threshold steps_per_lora"),
    ("CMLoRA", {"order": "online"}, "steps_per_lora"),
    ("CMLoRA", {"order": "online", "c1": 2, "c2": 3}, "boundary steps_per_lora"),
    ("CMLoRA", {"order": "online", "c1": 2}, "steps_per_lora"),
    ("CMLoRA", {"order": "online", "c2": 3}, "steps_per_lora"),
    ("CMLoRA", {"order": "offline", "c1": 2, "c2": 3}, "threshold steps_per_lora"),
    ("CMLoRA", {"order": "async"}, "boundary threshold steps_per_lora"),
    ("CMLoRA", {"order": "Switch-A"}, f"threshold dominance decay c1 c2 cache_depth {OF_CACHES}"),
    ("CMLoRA", {"order": "Switch-A", "cache_depth": 0}, f"threshold dominance decay c1 c2 {OF_CACHES}"),
    ("CMLoRA", {"order": "offline", "cache_depth": 0}, f"threshold steps_per_lora {OF_CACHES}"),
    *(("CMLoRA", {"order": "async", **settings}, names) for settings, names in (
        ({}, "boundary threshold steps_per_lora"), ({"cache_age": 5}, "boundary threshold steps_per_lora c1 c2"),
        ({"cache_age": 5, "dominant_full": "on_refresh"}, "boundary threshold steps_per_lora"),
        ({"cache_age": 5, "decay": "halving"}, "boundary threshold steps_per_lora"),
        ({"cache_depth": 0}, f"boundary threshold steps_per_lora c1 c2 {OF_CACHES}"))),
    ("CMLoRA", {"dominance": 1.0}, "decay threshold steps_per_lora"),
    ("CMLoRA", {"dominance": 1.5}, "threshold steps_per_lora"),
    ("CMLoRA", {"order": "online", "ensemble": (*GROUND, *FIGURE)}, "steps_per_lora"),
    ("CMLoRA", {"order": "online", "ensemble": GROUND}, "boundary threshold steps_per_lora"),
    ("CMLoRA", {"order": "online", "ensemble": FIGURE}, "boundary threshold steps_per_lora"),
    ("LoRAtorio", {"top_k": 0}, "selection recheck_every"),
    ("LoRAtorio", {"top_k": 1}, "temperature temperature_unit upsampling reweigh_every"),
    ("LoRAtorio", {"top_k": 1, "selection": "patch"}, "temperature temperature_unit"),
    ("LoRAtorio", {"top_k": 2}, ""),
    ("LoRAtorio", {"top_k": 2, "ensemble": (*GROUND, *FIGURE, *GROUND)}, ""),
    ("LoRAtorio", {"top_k": 2, "ensemble": (*GROUND, *FIGURE)}, "selection recheck_every"),
    ("LoRAtorio", {"top_k": 2, "temperature": 0.0, "ensemble": (*GROUND, *FIGURE)},
     "selection recheck_every temperature_unit patch_size upsampling similarity"),
    ("LoRAtorio", {"temperature": 0.0, "top_k": 0},
     "selection recheck_every temperature_unit patch_size upsampling similarity"),
    ("LoRAtorio", {"temperature": 0.0, "top_k": 2}, "temperature_unit"),
    ("BranchCache", {"budget": 0.5}, "interval depth"), ("BranchCache", {"budget": 0.5, "interval": 1}, "depth"),
    ("BranchCache", {"schedule": "uniform"}, ""),
    ("BranchCache", {"schedule": "CMLoRA"}, "interval"),
    ("BranchCache", {"schedule": "CMLoRA", "interval": 0}, ""),
    ("BranchCache", {"schedule": "CMLoRA", "interval": 1}, ""),
    ("BranchCache", {"schedule": "uniform", "interval": 1}, "depth"),
    ("Routed", {"gamma": 0.5}, ""), ("Routed", {"gamma": 0.0}, "mode blocks trust"),
    ("Routed", {"mode": "contrast"}, "blocks"),
]


def named(lines: list[str]) -> set[str]:
    """Each once: two reasons for one setting are one too many."""
    names = [found[1] for line in lines if (found := re.match(r"(\w+) (is|are) not used: ", line))]
    assert len(set(names)) == len(names), lines
    return set(names)


@pytest.mark.parametrize(("node", "settings", "names"), CASES)
def test_each_setting_that_is_changed_in_vain_is_named(node, settings, names):
    if f"LoRAEnsemble{node}" not in NODES:
        pytest.skip("this ComfyUI does not have what the node needs")
    node = NODES[f"LoRAEnsemble{node}"]
    schema, given = node.define_schema(), defaults(node) | settings
    assert named(unused(schema, given)) - settings.keys() == set()
    found = set()
    for part in schema.inputs:
        if part.id not in settings and (part.id in given or part.id in VALUES):
            changed = given | {part.id: VALUES.get(part.id) or another(part)}
            found |= {part.id} & named(unused(schema, changed))
    assert found == set(names.split())


def chained(workflow: dict, key: str) -> tuple[LoRASpec, ...]:
    """The LoRAs of a chain of `LoRA (Ensemble)` in API format."""
    given = workflow[key]["inputs"]
    if "lora_name" not in given:
        return ()
    before = chained(workflow, given["ensemble"][0]) if "ensemble" in given else ()
    return (*before, LoRASpec(given["lora_name"], given["strength_model"], given["strength_clip"], given["role"],
                              words=given.get("words", ""), mask=object() if "mask" in given else None))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_sets_nothing_in_vain(path):
    workflow = load(path)
    for node in workflow.values():
        if node["class_type"] not in NODES:
            continue
        given = {name: object() if isinstance(value, list) else value for name, value in node["inputs"].items()}
        if "ensemble" in given and "lora_name" not in given:
            given["ensemble"] = chained(workflow, node["inputs"]["ensemble"][0])
        assert not unused(NODES[node["class_type"]].define_schema(), given), node["class_type"]


@pytest.mark.parametrize("node", ["AdaptiveGuider", "KSampler"])
def test_without_a_negative_there_is_nothing_to_save(node):
    node = NODES[f"LoRAEnsemble{node}"]
    for cfg in (1.0, 1.5):
        lines = unused(node.define_schema(), defaults(node) | {"cfg": cfg})
        assert lines == ["at cfg 1 no negative is evaluated, so there is nothing to save"] * (cfg == 1)


@pytest.mark.parametrize(("spec", "words", "clip", "names"), [
    (LoRASpec("x", 1.0, 1.0), False, False, ""),
    (LoRASpec("x", 1.0, 0.5), True, False, "clip"), (LoRASpec("x", 1.0, 0.5), True, True, ""),
    (LoRASpec("x", 1.0, 1.0, words="cat"), False, True, "words"),
    (LoRASpec("x", 1.0, 1.0, words="cat"), True, True, ""),
    (LoRASpec("x", 1.0, 1.0, "always", words="cat"), True, True, "words"),
    (LoRASpec("x", 1.0, 1.0, "always"), False, True, ""),
    (LoRASpec("x", 1.0, 1.0, fade=0.1), True, True, "fade"),
    (LoRASpec("x", 1.0, 1.0, fade=0.1, start=0.2), True, True, ""),
    (LoRASpec("x", 1.0, 1.0, fade=0.1, end=0.8), True, True, ""),
    (LoRASpec("x", 1.0, 1.0, "always", mask=object()), True, True, "mask"),
    (LoRASpec("x", 1.0, 1.0, mask=object()), True, True, ""),
])
def test_of_a_row(spec, words, clip, names):
    assert named(unused_of(spec, words, clip)) == set(names.split())
    if spec.words and spec.role != "always":  # what is left open is not named
        assert named(unused_of(replace(spec, words=""), words, clip)) == set()


@pytest.mark.parametrize(("node", "settings", "said"), [
    ("BranchCache", {}, True), ("CMLoRA", {}, True), ("CMLoRA", {"cache_depth": 0}, False),
    ("CMLoRA", {"order": "Switch-A"}, False), ("Switch", {}, False)])
def test_a_cache_that_another_takes_the_place_of(node, settings, said):
    node = NODES[f"LoRAEnsemble{node}"]
    for cache in (object(), None):
        model = SimpleNamespace(get_attachment=lambda key, cache=cache: SimpleNamespace(cache=cache, policy="rule"))
        lines = unused(node.define_schema(), defaults(node) | settings | {"model": model})
        assert ["the cache that an earlier node" in line for line in lines] == [True] * (said and cache is not None)
