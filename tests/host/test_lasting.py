"""Tensors that outlive the block of a model in which they are made: ComfyUI's compiler of later releases must look away
there, or it gives their memory out again. A stand-in for its switch, which none of the tested releases has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass, replace

import comfy
import pytest
import torch
from lora_ensemble.engine.cache import FeatureCache
from lora_ensemble.engine.positions import Places
from lora_ensemble.engine.program import Programs
from lora_ensemble.host.compose import attention, run
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.families import split_points
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.methods.switch import Switch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .builders import Rand, composite, lora, merge, method, sample, shapes, three
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
    made = [watch(Places, "keep"), watch(Programs, "_program"), watch(attention, "clause_shares"),
            watch(attention, "clause_attention")]
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


# --- whatever it is that is kept ------------------------------------------------------------------------------------


class Left(TorchDispatchMode):
    """Finds what the blocks of a model, and what others put around them, leave in memory beside what they hand on, made
    while the compiler did not look away.

    found   the block and the size of each such tensor
    made    how many were made in all
    """

    def __init__(self, root: nn.Module, looked_away: list[int]):
        super().__init__()
        self.root, self._away = root, looked_away
        self.found: list[str] = []
        self.made = 0
        self._inside: list[list[tuple[StorageWeakRef, torch.Size]]] = []
        self._hooks = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self._inside and not self._away:
            given = _storages((args, kwargs))
            self._inside[-1] += [(storage, shape) for storage, shape in _storages(out).values()
                                 if storage.cdata not in given]
        return out

    def __enter__(self):
        for block in self.root.modules():
            self._hooks += [block.register_forward_pre_hook(lambda *_: self._inside.append([]), prepend=True),
                            block.register_forward_hook(self._end, with_kwargs=True)]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*error)

    def _end(self, block, args, kwargs, out) -> None:
        """What a block inside another hands on is the other's to let go; between blocks it is the model's."""
        made = self._inside.pop()
        self.made += len(made)
        handed = _storages((args, kwargs, out))
        alive = [(storage, shape) for storage, shape in made if not storage.expired()]
        self.found += [f"{type(block).__name__} {tuple(shape)}" for storage, shape in alive
                       if storage.cdata not in handed]
        if len(self._inside) > 1:
            self._inside[-1] += [(storage, shape) for storage, shape in alive if storage.cdata in handed]


def _storages(values) -> dict[int, tuple[StorageWeakRef, torch.Size]]:
    """The memory of tensors, views among them, and a shape that it is seen in."""
    leaves = [inner for leaf in tree_leaves(values)
              for inner in tree_leaves(vars(leaf) if is_dataclass(leaf) else leaf)]
    found = [(StorageWeakRef(leaf.untyped_storage()), leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return {storage.cdata: (storage, shape) for storage, shape in found}


def unlike(model, loras) -> list[LoRASpec]:
    """LoRAs of unequal rank, one of a kind that multiplies the layer's output, one that reads its weight."""
    layers = shapes(model, lambda name: name.endswith((".to_q", ".qkv", ".linear1", ".q")))
    state, files = model.model.state_dict(), []
    for kind in ("OFT", "DoRA", "LoHa"):
        files.append({f"diffusion_model.{layer}.{end}": value for layer in layers for end, value in
                      EVERYWHERE[kind](state[f"diffusion_model.{layer}.weight"], Rand(1)).items()})
    return [*three(model, loras), *(LoRASpec(loras(file), 0.7, 0) for file in files)]


def half(model, loras) -> list[LoRASpec]:
    mask = torch.zeros(1, 8, 8)
    mask[..., :4] = 1
    first, *others = unlike(model, loras)
    return [replace(first, mask=Mask(mask)), *others]


MAKES = {
    "merge": lambda model, loras: merge(model, unlike(model, loras)),
    "branches": lambda model, loras: composite(model, unlike(model, loras)),
    "turns": lambda model, loras: method(model, unlike(model, loras), lambda strengths: Switch(strengths, 1)),
    "masks": lambda model, loras: merge(model, half(model, loras)),
    "cache": lambda model, loras: cached(composite(model, unlike(model, loras))),
    "words": lambda model, loras: routed(model, specs(model, loras)),
}
KEPT = {"merge": "program", "branches": "program", "turns": "program", "masks": "program", "cache": "split",
        "words": "attention"}
"""What there is to look away for in each, beside others."""


def left_by(model, family: str, looked_away: list[int]) -> Left:
    with Left(model.model.diffusion_model, looked_away) as left:
        sample(model, family, prompt(family), steps=4)
    assert left.made > 100
    return left


@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize("family", ["SD15", "Flux", "Wan"])
def test_blocks_leave_nothing_behind_that_was_made_unseen(family, make, loras, looked_away):
    """Programs, factors, gains, places, what attention said, features: whatever of a run is still there when a block of
    the model is done was made while the compiler looked away, or before."""
    ours = MAKES[make](base(family), loras)
    assert left_by(base(family), family, looked_away).found == []
    assert left_by(ours, family, looked_away).found == []


@pytest.mark.parametrize("make", MAKES)
def test_it_would_be_seen(make, loras, looked_away, monkeypatch):
    """Without the guard of each thing that is kept, the test above finds it."""
    owner = {"program": run, "split": split_points, "attention": attention}[KEPT[make]]
    monkeypatch.setattr(owner, "lasting", nullcontext)
    assert left_by(MAKES[make](base("Flux"), loras), "Flux", looked_away).found
