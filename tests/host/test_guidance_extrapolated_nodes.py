"""Extrapolated guidance beside the host's guidance nodes: the matrix of test_guidance_interop.py in this mode."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.guidance.apply import guidance_record_of as record_of

from .builders import guided, schedule
from .guidance_tools import (
    SD15,
    dual,
    dual_model,
    extrapolated,
    patched,
    perp_neg,
    same,
    sample,
    standing,
    stood_in,
)
from .models import base
from .test_guidance_extrapolated import EIGHT, close, turns
from .test_guidance_interop import LASTING, NAG, SHAPING, both, neighbour
from .test_guidance_passes import node as perp_neg_node
from .test_guidance_passes import sag


@both
@pytest.mark.parametrize("name", [*SHAPING, *LASTING])
def test_neighbours(name, ours_first):
    """Every one sees the pair that the rule says, and nothing of it is changed where nothing is saved."""
    options = dict(steps=8, batch=2)

    def chain(saving: float):
        if ours_first:
            return neighbour(name, extrapolated(base("SD15"), saving))
        return extrapolated(neighbour(name, base("SD15")), saving)

    plain = sample(neighbour(name, base("SD15")), **options)
    assert torch.equal(sample(chain(0.0), **options), plain)
    ours = chain(0.3)
    same(sample(ours, **options), sample(neighbour(name, standing(base("SD15"), EIGHT)), **options), plain)
    assert turns(ours) == EIGHT


@both
@pytest.mark.parametrize("name", NAG)
def test_what_needs_both_sides_in_one_batch_has_them(name, ours_first):
    """NAG is off without the negative beside the prompt, and the two kinds of steps would not fit together."""
    ours = neighbour(name, extrapolated(base("SD15"))) if ours_first else extrapolated(neighbour(name, base("SD15")))
    assert torch.equal(sample(ours, steps=8, batch=2), sample(neighbour(name, base("SD15")), steps=8, batch=2))
    assert any("NAG" in problem and "every step" in problem for problem in record_of(ours).problems)


@both
@pytest.mark.parametrize("name", ["SkipLayerGuidanceDiTSimple", "SkipLayerGuidanceDiT"])
def test_skip_layer_guidance(name, ours_first):
    more = {} if name.endswith("Simple") else {"scale": 3.0, "rescaling_scale": 0.0}

    def slg(model):
        return patched("nodes_slg", name, model, double_layers="0", single_layers="0", start_percent=0.0,
                       end_percent=1.0, **more)

    def chain(saving: float):
        model = base("Flux")
        return slg(extrapolated(model, saving)) if ours_first else extrapolated(slg(model), saving)

    plain = sample(slg(base("Flux")), "Flux", steps=8)
    assert torch.equal(sample(chain(0.0), "Flux", steps=8), plain)
    ours = chain(0.3)
    same(sample(ours, "Flux", steps=8), sample(slg(standing(base("Flux"), EIGHT, True)), "Flux", steps=8), plain)
    assert record_of(ours).evaluations == 13


@both
@pytest.mark.parametrize("name", ["SAG", "Perp-Neg"])
def test_nodes_with_passes_of_their_own(name, ours_first):
    """Their own passes with a negative go on in every step."""
    make = sag if name == "SAG" else lambda model: perp_neg_node(model, 0.8)
    plain = sample(make(base("SD15")), steps=8, batch=2)

    def chain(saving: float):
        return make(extrapolated(base("SD15"), saving)) if ours_first else extrapolated(make(base("SD15")), saving)

    assert torch.equal(sample(chain(0.0), steps=8, batch=2), plain)
    ours = chain(0.3)
    close(sample(ours, steps=8, batch=2), plain, sample(base("SD15"), steps=8, batch=2, cfg=1.0))
    assert turns(ours) == EIGHT


@both
@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_step_caches(name, ours_first):
    """EasyCache keeps outputs of both sides, which must be of one age. LazyCache leaves out whole steps, of which
    guidance knows nothing: what is left of them is extrapolated."""
    def stepping(model):
        return patched("nodes_easycache", f"{name}Node", model, reuse_threshold=0.05, start_percent=0.1,
                       end_percent=0.95, verbose=False)

    def chain(saving: float):
        model = base("SD15")
        return stepping(extrapolated(model, saving)) if ours_first else extrapolated(stepping(model), saving)

    plain = sample(stepping(base("SD15")), steps=20)
    assert torch.equal(sample(chain(0.0), steps=20), plain)
    ours = chain(0.3)
    out, record = sample(ours, steps=20), record_of(ours)
    if name == "EasyCache":
        assert torch.equal(out, plain) and any("EasyCache" in problem for problem in record.problems)
    else:
        assert out.isfinite().all() and record.evaluations < record.full


@pytest.mark.parametrize("make", [dual, lambda model: dual(model, True), perp_neg, dual_model],
                         ids=["DualCFG", "DualCFG nested", "PerpNeg", "DualModel"])
def test_guiders(make, spied):
    """Every negative has a line of its own."""
    sigmas = schedule(base("SD15"), 8)
    plain = guided(make(base("SD15")), sigmas, batch=2)
    assert torch.equal(guided(make(extrapolated(base("SD15"), 0.0)), sigmas, batch=2), plain)
    ours = extrapolated(spied.model)
    out = guided(make(ours), sigmas, batch=2)
    assert turns(ours) == EIGHT
    if make is dual_model:
        close(out, plain, guided(make(base("SD15"), cfg=1.0), sigmas, batch=2))
        return
    assert spied.rows(SD15.cond(11)) == 16 and spied.rows(SD15.cond(12)) == spied.rows(SD15.cond(13)) == 10
    same(out, guided(make(stood_in(base("SD15"), EIGHT, 0 if make is perp_neg else 2)), sigmas, batch=2), plain)


def test_functions_after_guidance_see_a_negative():
    """As other packs' post-CFG functions do: the prompt's prediction less the extrapolated term."""
    seen: list[tuple] = []

    def watch(args):
        seen.append((args["cond_denoised"].clone(), args["uncond_denoised"].clone(), args["denoised"].clone()))
        return args["denoised"]

    model = base("SD15").clone()
    model.set_model_sampler_post_cfg_function(watch)
    sample(extrapolated(model), steps=8)
    assert len(seen) == 8
    for c, u, out in seen:
        assert torch.allclose(out, u + 12.0 * (c - u), atol=1e-4 * out.abs().max()) and not torch.equal(c, u)
