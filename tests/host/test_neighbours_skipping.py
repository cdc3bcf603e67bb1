"""Beside nodes that leave out model calls (EasyCache, TeaCache, First Block Cache): they leave out what they do with
ComfyUI's own LoRA loaders, and what they keep of one LoRA is never another's.

docs/neighbours.md is the table of them.
"""

from __future__ import annotations

from functools import partial

import comfy.sample
import comfy.samplers
import pytest
import torch
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.methods.switch import Switch
from torch import Tensor

from .builders import composite, hooked, merge, method, same, sample, schedule, stock, three
from .models import FAMILIES, base
from .neighbour_packs import REAL_SKIPPING
from .neighbours import SKIPPING, easy_cache
from .test_neighbours import said, unloaded  # noqa: F401
from .test_selection import pair

STEPS, TURN = 8, 4


def drawn(model, family: str, conds: tuple = (None, None), callback=None, steps: int = STEPS) -> Tensor:
    return sample(model, family, *conds, steps=steps, callback=callback)


def predicted(model, family: str, step: int, x: Tensor) -> Tensor:
    """What a MODEL makes of the noisy latent x in one step of the schedule."""
    kind, found, inner = FAMILIES[family], [], model.get_model_object("model_sampling")
    sigmas = schedule(model, STEPS)[step:step + 2]
    latent = model.model.process_latent_out(inner.inverse_noise_scaling(sigmas[0], x))
    with torch.inference_mode():
        comfy.sample.sample_custom(model, torch.zeros_like(x), 3.0, comfy.samplers.sampler_object("euler"), sigmas,
                                   kind.cond(11), kind.cond(12), latent, disable_pbar=True,
                                   callback=lambda _, x0, *rest: found.append(x0))
    return found[0]


@pytest.mark.parametrize("name", SKIPPING | REAL_SKIPPING)
def test_one_branch_is_left_out_as_with_the_loaders(name, loras):
    neighbour = (SKIPPING | REAL_SKIPPING)[name]
    family, make, model = neighbour.family, neighbour.make, base(neighbour.family)
    ensemble = three(model, loras)
    plain, wanted = drawn(make(model), family), drawn(make(stock(model, ensemble)), family)
    assert not torch.equal(wanted, drawn(stock(model, ensemble), family)), "it leaves nothing out"
    for ours in (make(merge(model, ensemble)), merge(make(model), ensemble)):
        same(drawn(ours, family), wanted, plain)
        assert not record_of(ours).problems


@pytest.mark.parametrize("name", SKIPPING | REAL_SKIPPING)
def test_another_lora_is_computed_anew(name, loras):
    """Two LoRAs take turns: what a node keeps of the first is not the second's. Guard: `Neighbours.arrange`."""
    neighbour = (SKIPPING | REAL_SKIPPING)[name]
    family, model, seen = neighbour.family, base(neighbour.family), {}
    ensemble = pair(model, loras)
    switch = method(model, ensemble, lambda strengths: Switch(strengths, TURN))
    whole, ours = drawn(switch, family), neighbour.make(switch)
    out = drawn(ours, family, callback=lambda step, x0, x, total: seen.update({step: (x0.clone(), x.clone())}))
    assert not torch.equal(out, whole), "it leaves nothing out"
    assert said(ours, name.split(",")[0], "computed anew")
    found, x = seen[TURN]
    same(found, predicted(stock(model, ensemble[1:]), family, TURN, x), predicted(model, family, TURN, x))


def tells_conds_apart() -> bool:
    """Whether this release's EasyCache keeps the conds of a batch apart."""
    nodes = pytest.importorskip("comfy_extras.nodes_easycache")
    return hasattr(nodes.EasyCacheHolder, "can_apply_cache_diff")


@pytest.mark.parametrize("name", SKIPPING | REAL_SKIPPING)
def test_several_branches(name, loras):
    """A node that tells conds apart tells branches apart; one that tells the sides of guidance is off, and named."""
    neighbour = (SKIPPING | REAL_SKIPPING)[name]
    family, make, model = neighbour.family, neighbour.make, base(neighbour.family)
    kind, ensemble = FAMILIES[family], three(model, loras)
    ours = make(composite(model, ensemble))
    if name == "EasyCache" and tells_conds_apart():
        # It decides by one cond, another one than in the reference: later it may differ.
        conds, steps = (hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble)), 5
        wanted = drawn(make(model), family, conds, steps=steps)
        assert not torch.equal(wanted, drawn(model, family, conds, steps=steps)), "it leaves nothing out"
        same(drawn(ours, family, steps=steps), wanted, drawn(make(model), family, steps=steps))
        assert not record_of(ours).problems
    else:
        out = drawn(ours, family)
        assert said(ours, name.split(",")[0], "not used", "3 branches", "Branch Cache")
        same(out, drawn(composite(model, ensemble), family), drawn(model, family), 1e-5)


def test_what_leaves_out_whole_steps_is_told_of(loras):
    """LazyCache decides before any LoRA has a say."""
    model = base("SD15")
    ensemble = pair(model, loras)
    lazy = partial(easy_cache, node="LazyCacheNode")
    merged = lazy(merge(model, ensemble))
    same(drawn(merged, "SD15"), drawn(lazy(stock(model, ensemble)), "SD15"), drawn(lazy(model), "SD15"))
    assert not record_of(merged).problems
    turns = lazy(method(model, ensemble, lambda strengths: Switch(strengths, 1)))
    drawn(turns, "SD15")
    assert said(turns, "LazyCache", "whole steps", "EasyCache")
