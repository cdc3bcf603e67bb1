"""Layers that the host never calls: LoRAs on them would have no effect. In every family that can be built small, given
all that it takes, they are those that stand here with a reason; one that a new release adds fails here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import comfy.ops
import pytest
import torch
import torch.nn.functional as F
from lora_ensemble.engine.geometry import geometry_of
from lora_ensemble.host.compose import fused
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.methods.counted import counted
from torch import nn

from .any_model import any_model
from .blocks import Transformer, noise
from .builders import lora, merge, sample, shapes
from .disturbed import skipped_where_older
from .models import FAMILIES, base
from .small import extra, like, references
from .small_video import CLIP, SMALL, nothing_left  # noqa: F401
from .test_fused import int8
from .test_parity_families import NAME, drawn

UNCALLED = {
    "ACE-Step": {
        r"transformer_blocks\.0\.cross_attn\.(add_[qkv]_proj|to_add_out)":
            "the host computes its cross attention by to_q, to_k, to_v and to_out alone",
        r"projectors\.\d\.\d": "for training: they compare a block's tokens with another model's",
    },
    "Trellis 2": {r"img2shape(_512)?\..*": "of the stages after this one"},
    "Trellis 2 shape": {r"(img2shape_512|structure_model)\..*": "of the stages before this one"},
    "Hunyuan3D 2.1": {
        r"t_embedder\.cond_proj": "for a guidance that no node of the host gives, and whose width would not fit",
    },
}
"""Family -> its linear layers and convolutions that no call runs through, and why."""

UNROUTED = {
    "HiDream": {r".*\.ff_i\.gate": "a mixture of experts multiplies by this matrix itself: no linear layer"},
    "Hunyuan3D 2.1": {r".*\.moe\.gate": "a mixture of experts multiplies by this matrix itself: no linear layer"},
    "Wan Animate": {r"motion_encoder\..*": "classes of its own, which scale their weights in every call"},
    "Ideogram 4": {"embed_image_indicator": "an embedding"},
    "Wan S2V": {"trainable_cond_mask": "an embedding, whose rows are added without a call"},
    "HunyuanVideo 1.5": {"cond_type_embedding": "an embedding"},
    "HunyuanVideo 1.5 SR": {"cond_type_embedding": "an embedding"},
    "Stable Cascade B": {r"up_upscalers\.0\.1": "a transposed convolution"},
    "Anima": {r"llm_adapter\.embed": "an embedding"},
    "ACE-Step": {"lyric_embs": "an embedding"},
    "ACE-Step 1.5": {r"decoder\.proj_out\.1": "a transposed convolution"},
    "Stable Audio": {"timestep_features": "frequencies of the time, a class of its own"},
}
"""Family -> its modules with a matrix as weight that cannot be routed, called or not, and what they are."""

WIDE = dict(reference_latent=(16, 1, 8, 8), control_video=(16, 3, 8, 8), reference_motion=(16, 19, 8, 8))
FURTHER = {
    "OmniGen 2": SMALL["OmniGen 2 edit"],
    "Boogu": SMALL["Boogu edit"],
    "Wan S2V": like(SMALL["Wan S2V"], "after a film", extra(**WIDE), (16, 3, 8, 8)),
    "Wan Animate": like(SMALL["Wan Animate"], "with a face", extra(face_pixel_values=(3, 1, 512, 512))),
    "Wan Dancer": like(SMALL["Wan Dancer"], "at 15 fps", lambda rows: {"fps": 15, **extra(clip_fea_ref=CLIP)(rows)}),
    "Hunyuan3D 2.1": like(SMALL["Hunyuan3D 2.1"], "enough tokens for all experts", latent=(16, 64)),
    "TripoSplat": like(SMALL["TripoSplat"], "with a picture", references((8, 2, 2))),
}
"""Family -> a second call, with what the first has not or cannot have beside its own."""

CONNECTED = {"LTX-2": {}, "LTX 2.5": dict(connector_attention_head_dim=24, audio_connector_attention_head_dim=12)}
"""Family whose layers for the prompt the host runs before any call -> what makes them fit, as in its checkpoints."""


folds = pytest.mark.skipif(not hasattr(comfy.ops, "linear_input_act"), reason="this ComfyUI folds nothing")


def built(name: str) -> nn.Module:
    return like(SMALL[name], name, **CONNECTED.get(name, {})).build()


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose weight has two or more dimensions."""
    return {name: module for name, module in model.named_modules()
            if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.ndim >= 2}


@contextmanager
def calls(layers: dict[str, nn.Module]) -> Iterator[set[str]]:
    """The names of those whose forward runs while this is open: one of their own, as LoRAs give it to them, in a run in
    which the pack has the host call what it would fold into a product."""
    called: set[str] = set()

    def seen(name: str, forward):
        def own(*args, **kwargs):
            called.add(name)
            return forward(*args, **kwargs)

        return own

    for name, module in layers.items():
        module.forward = seen(name, module.forward)
    fused.call_routed_layers()
    try:
        yield called
    finally:
        fused.as_before()
        for module in layers.values():
            del module.forward


def missed(kind: Transformer, model: nn.Module) -> tuple[set[str], set[str]]:
    """(layers that nothing called, modules that cannot be routed)."""
    layers = matrices(model)
    routed = {name: module for name, module in layers.items() if geometry_of(module)}
    with calls(routed) as called:
        kind.call(model, {})
        if kind.name in FURTHER:
            FURTHER[kind.name].call(model, {})
        if kind.name in CONNECTED:
            with torch.inference_mode():
                model.preprocess_text_embeds(noise(1, 5, 24), unprocessed=True)
    return routed.keys() - called, layers.keys() - routed.keys()


def listed(table: dict, name: str, model: nn.Module) -> set[str]:
    """What a table says of a family; each of its lines is about something."""
    found = {pattern: {layer for layer in matrices(model) if re.fullmatch(pattern, layer)}
             for pattern in table.get(name, ())}
    assert all(found.values()), f"{name} has nothing like {[line for line, layers in found.items() if not layers]}"
    return set().union(*found.values())


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=folds)], ids=["plain", "int8"])
@pytest.mark.parametrize("name", [name for name in SMALL if SMALL[name] not in FURTHER.values()])
def test_every_layer_is_called_or_stands_in_the_list(name, packed):
    model = built(name)
    assert not packed or int8(model, "")
    with skipped_where_older(name):
        found = missed(SMALL[name], model)
        expected = listed(UNCALLED, name, model), listed(UNROUTED, name, model)
    assert found == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_a_sampler_calls_every_layer(name):
    model = base(name)
    layers = matrices(model.model.diffusion_model)
    assert all(geometry_of(layer) for layer in layers.values())
    with calls(layers) as called:
        sample(model, name, steps=1)
    assert called == layers.keys()


def test_a_weight_that_is_used_without_a_call_is_found(monkeypatch):
    """Guard of the tests above: a feed-forward that multiplies by its second weight itself."""
    kind, model = SMALL["Wan"], built("Wan")
    assert missed(kind, model) == (set(), set())
    feed_forward = model.blocks[0].ffn
    monkeypatch.setattr(feed_forward, "forward", lambda x: F.linear(
        F.gelu(feed_forward[0](x), approximate="tanh"), feed_forward[2].weight, feed_forward[2].bias))
    assert missed(kind, model) == ({"blocks.0.ffn.2"}, set())


@folds
def test_a_product_that_the_host_folds_is_found(monkeypatch):
    """Guard of the same: what the host makes of an int8 layer by itself, without the pack's call."""
    kind, model = SMALL["Wan"], built("Wan")
    int8(model, "")
    assert missed(kind, model) == (set(), set())
    monkeypatch.setattr(fused, "call_routed_layers", lambda: None)
    assert missed(kind, model) == ({"blocks.0.ffn.2"}, set())


@pytest.mark.parametrize("name", sorted(UNCALLED.keys() | UNROUTED.keys()))
def test_a_run_says_whose_keys_had_no_effect(name, loras):
    """LoRAs on these layers alone change nothing, and the record names both kinds."""
    with skipped_where_older(name):
        model = any_model(SMALL[name])
        plain, inner = drawn(model, 1, 1.0), model.model.diffusion_model
        never, cannot = listed(UNCALLED, name, inner), listed(UNROUTED, name, inner)
    layers = {f"diffusion_model.{layer}": shape for layer, shape in shapes(model).items() if layer in never | cannot}
    ours = merge(model, [LoRASpec(loras(lora(layers, 1, size=1.0, **NAME)), 0.8, 0.0)])
    assert len(layers) == len(never | cannot) and torch.equal(drawn(ours, 1, 1.0), plain)
    said = [f"{counted(len(never), 'layer')}, ", "never called in this run: what LoRAs change there"] if never else []
    if cannot:
        said += [f"{counted(len(cannot), 'key')} such as", "of a kind that has no routed forward; left out"]
    lines = record_of(ours).problems
    assert len(lines) == bool(never) + bool(cannot) and all(part in "\n".join(lines) for part in said)
