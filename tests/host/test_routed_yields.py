"""A style that yields to a background in its weights, in the host's own models."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.nodes.routed import LoRAEnsembleRouted
from torch import Tensor

from .builders import file_of, lora, same, sample, shapes
from .models import base
from .test_routed import prompt, routed

ROLES = ("background", "style", "character")
FAMILY = pytest.mark.parametrize("family", ["SD15", "Flux"])


def ensemble_of(model, loras, roles=ROLES) -> list[LoRASpec]:
    layers, words = shapes(model), ("ohwx", "field", "sks")
    return [LoRASpec(loras(lora(layers, k + 1, 4)), 0.6, 0, words=typed, role=role)
            for k, (typed, role) in enumerate(zip(words, roles, strict=True))]


def freed_by_hand(file: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file without what its deltas see in the directions that another's see, found from the dense deltas."""
    out = dict(file)
    for key in (key for key in file if key.endswith("lora_down.weight")):
        down, theirs = (each[key].double().flatten(1) for each in (file, other))
        up = other[key.replace("lora_down", "lora_up")].double().flatten(1)
        _, values, right = torch.linalg.svd(up @ theirs, full_matrices=False)
        seen = right[:min(int((values > 1e-4 * values[0]).sum()), right.shape[1] // 2)]
        out[key] = (down - (down @ seen.T) @ seen).view_as(file[key]).float()
    return out


@FAMILY
def test_a_style_is_what_is_left_of_it(family, loras):
    """As if its file held nothing in the directions of the background's; all other LoRAs are as they were."""
    model = base(family)
    ensemble, conds = ensemble_of(model, loras), prompt(family)
    ground, style, other = ensemble
    instead = LoRASpec(loras(freed_by_hand(file_of(style), file_of(ground))), 0.6, 0, words="field", role="style")
    ours = routed(model, ensemble, yields=True)
    found = sample(ours, family, conds, steps=2)
    wanted = sample(routed(model, [ground, instead, other]), family, conds, steps=2)
    same(found, wanted, sample(model, family, conds, steps=2))
    before = sample(routed(model, ensemble), family, conds, steps=2)
    assert not torch.allclose(found, before, atol=1e-3) and record_of(ours).problems == []


@pytest.mark.parametrize("roles", [("auto", "style", "character"), ("background", "auto", "character")])
def test_nobody_else_yields(roles, loras):
    model = base("SD15")
    ensemble, conds = ensemble_of(model, loras, roles), prompt()
    ours = routed(model, ensemble, yields=True)
    found, wanted = (sample(each, "SD15", conds, steps=1) for each in (ours, routed(model, ensemble)))
    assert torch.equal(found, wanted) and record_of(ours).problems == []


def test_another_role_is_another_bank(loras):
    """Guard: banks are shared by nodes with the same files, also with those of the tests above."""
    model = base("SD15")
    ensemble, conds = ensemble_of(model, loras), prompt()
    first = sample(routed(model, ensemble, yields=True), "SD15", conds, steps=1)
    changed = [ensemble[0], LoRASpec(ensemble[1].name, 0.6, 0, words="field", role="auto"), ensemble[2]]
    second = sample(routed(model, changed, yields=True), "SD15", conds, steps=1)
    assert torch.equal(second, sample(routed(model, changed), "SD15", conds, steps=1))
    assert not torch.equal(first, sample(routed(model, ensemble), "SD15", conds, steps=1))


def test_what_cannot_yield_is_told_of(loras):
    """A background that changes other layers than the style does."""
    model = base("SD15")
    layers = shapes(model)
    halves = {name: shape for name, shape in layers.items() if "input" in name}, {
        name: shape for name, shape in layers.items() if "output" in name}
    ensemble = [LoRASpec(loras(lora(half, k, 4)), 0.6, 0, words=words, role=role) for k, (half, words, role) in
                enumerate(zip(halves, ("ohwx", "field"), ("background", "style"), strict=True))]
    ours = routed(model, ensemble, yields=True)
    sample(ours, "SD15", prompt(), steps=1)
    line, = record_of(ours).problems
    assert "cannot yield" in line and ensemble[1].name in line and ensemble[0].name in line


@pytest.mark.host_api
def test_the_node_has_it_on(loras):
    model = base("SD15")
    ensemble, conds = tuple(ensemble_of(model, loras)), prompt()
    pictures = [sample(LoRAEnsembleRouted.execute(model, ensemble, "once", 2.0, 0.0, "", **options).args[0], "SD15",
                       conds, steps=1) for options in ({}, {"style_yields": True}, {"style_yields": False})]
    assert torch.equal(pictures[0], pictures[1]) and not torch.allclose(pictures[0], pictures[2], atol=1e-4)
