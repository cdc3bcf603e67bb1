"""Tensors that outlive the block of a model in which they are made: ComfyUI's compiler of later releases must look away
there, or it gives their memory out again. A stand-in for its switch, which none of the tested releases has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import comfy
import pytest
import torch
from lora_ensemble.engine.cache import FeatureCache
from lora_ensemble.engine.positions import Places
from lora_ensemble.engine.program import Programs
from lora_ensemble.host.compose import attention
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec
from torch import nn

from .builders import composite, lora, merge, sample, shapes, three
from .caches import cached
from .kinds import EVERYWHERE
from .models import base
from .test_routed import prompt, routed, specs


@pytest.fixture
def looked_away(monkeypatch) -> list[int]:
    """Not empty while the compiler looks away."""
    open_: list[int] = []

    @contextmanager
    def pause_malloc_graph():
        open_.append(1)
        yield
        open_.pop()

    stand_in = getattr(comfy, "model_prefetch", None) or type("prefetch", (), {})()
    monkeypatch.setattr(comfy, "model_prefetch", stand_in, raising=False)
    monkeypatch.setattr(stand_in, "pause_malloc_graph", pause_malloc_graph, raising=False)
    return open_


@pytest.fixture
def watch(monkeypatch, looked_away) -> Callable[[object, str], list[bool]]:
    """`watch(owner, name)` -> whether the compiler looked away, per call of that function inside a layer of a model."""
    inside: list[int] = []
    call = nn.Module.__call__

    def calling(module, *args, **kwargs):
        inside.append(1)
        try:
            return call(module, *args, **kwargs)
        finally:
            inside.pop()

    monkeypatch.setattr(nn.Module, "__call__", calling)

    def watching(owner: object, name: str) -> list[bool]:
        function, seen = getattr(owner, name), []

        def watched(*args, **kwargs):
            if inside:
                seen.append(bool(looked_away))
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)
        return seen

    return watching


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_features_of_the_branch_cache(family, loras, looked_away, watch):
    model = composite(base(family), three(base(family), loras))
    kept, put = [], FeatureCache.put
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FeatureCache, "put", lambda *args: kept.append(bool(looked_away)) or put(*args))
        sample(cached(model), family, steps=3)
    assert kept == [True] * 6 and not looked_away


def test_converted_factors_and_gains(loras, watch):
    """Factors of a bank in another dtype than the layer's inputs, the bias that an OFT needs, gains of several rows."""
    model = base("SD15")
    layers = shapes(model, lambda name: "attn2" in name)
    state = model.model.state_dict()
    oft = {f"lora_unet_{layer.replace('.', '_')}.{end}": value for layer in layers for end, value in
           EVERYWHERE["OFT"](state[f"diffusion_model.{layer}.weight"], lambda *shape, size=1.0: size * torch.randn(
               *shape, generator=torch.Generator().manual_seed(1))).items()}
    ensemble = [LoRASpec(loras(lora(layers, 1, 4)), 0.8, 0), LoRASpec(loras(lora(layers, 2, 6)), 0.5, 0),
                LoRASpec(loras(oft), 0.7, 0)]
    made = [watch(Programs, name) for name in ("_once", "_factors", "_program")]
    sample(composite(model, ensemble))
    assert all(seen and all(seen) for seen in made)


def test_places_and_attention(loras, watch):
    model = base("Flux")
    ours = routed(model, specs(model, loras))
    made = [watch(Places, "keep"), watch(Programs, "_program"), watch(attention, "clause_attention")]
    sample(ours, "Flux", prompt("Flux"), cfg=1.0)
    assert all(seen and all(seen) for seen in made)
    assert record_of(ours).problems == []


def test_nothing_is_asked_of_the_compiler_once_all_is_made(loras, looked_away, watch, monkeypatch):
    """Not a call per layer and step: only while programs are made."""
    model, asked = base("SD15"), []
    before = comfy.model_prefetch.pause_malloc_graph
    monkeypatch.setattr(comfy.model_prefetch, "pause_malloc_graph", lambda: asked.append(1) or before())
    ours = merge(model, three(model, loras))
    counts = []
    sample(ours, steps=3, callback=lambda *_: counts.append(len(asked)))
    assert counts[0] > 0 and counts == [counts[0]] * 3
