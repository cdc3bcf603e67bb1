"""Where each family is cut: reuse against the model with its deep layers replaced one by one, and what it saves."""

from __future__ import annotations

from contextlib import contextmanager

import comfy.model_management
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import forward_timestep_embed, timestep_embedding
from lora_ensemble.host.families.split_points import BLOCK_LISTS, split_point_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .blocks import TRANSFORMERS, noise
from .models import FAMILIES, base, build
from .small import like
from .small_video import SMALL
from .test_parity_families import ONE_ROW

DEPTH = 2


def flops(call) -> tuple[int, object]:
    with FlopCounterMode(display=False) as counter:
        out = call()
    return counter.get_total_flops(), out


def gain(whole: int, part: int, interval: int = 3) -> float:
    """How many times fewer operations at that interval."""
    return interval * whole / (whole + (interval - 1) * part)


# --- transformers: an independent way to cut them ---------------------------------------------------------------------


def deep_blocks(model: nn.Module, depth: int) -> list[nn.Module]:
    lists = [model.get_submodule(name) for name, _ in BLOCK_LISTS if name in dict(model.named_modules())]
    return [block for blocks in lists for block in blocks][depth:-depth]


def tensors(*values) -> list[Tensor]:
    return [part for value in values for part in (value if isinstance(value, tuple) else (value,))
            if isinstance(part, Tensor)]


@contextmanager
def replaced(blocks: list[nn.Module], make):
    names = ["forward_gen" if hasattr(block, "forward_gen") else "forward" for block in blocks]  # Wan Animate 2
    for block, name in zip(blocks, names, strict=True):
        setattr(block, name, make(block, getattr(block, name)))
    try:
        yield
    finally:
        for block, name in zip(blocks, names, strict=True):
            delattr(block, name)


def streams(inputs: list[Tensor], outputs: list[Tensor]) -> list[int]:
    """For each output of a block the input that it continues: the first of its shape. (Text and picture differ in
    their number of tokens.)"""
    return [next(i for i, tensor in enumerate(inputs) if tensor.shape == out.shape) for out in outputs]


def remembering(memory: dict):
    """Every block notes what it adds to each of its streams."""
    def make(block, forward):
        def note(*args, **kwargs):
            before = [tensor.clone() for tensor in tensors(*args, *kwargs.values())]
            out = forward(*args, **kwargs)
            found = tensors(out)
            memory[block] = [tensor - before[i] for tensor, i in zip(found, streams(before, found), strict=True)]
            return out

        return note

    return make


def recalling(memory: dict):
    """Every block adds what it noted, and computes nothing."""
    def make(block, forward):
        def add(*args, **kwargs):
            found = tensors(*args, *kwargs.values())
            out = [found[i] + added for i, added in zip(streams(found, memory[block]), memory[block], strict=True)]
            return tuple(out) if len(out) > 1 else out[0]

        return add

    return make


NEWER = {name: like(SMALL[name], name, num_layers=24) for name in (
    "LTX 2.5", "MageFlow", "MiniMax H3", "MiniMax H3 references", "Wan Animate 2")}
"""Of families with other blocks or further inputs than those in `blocks`; as many layers as show a gain."""


@pytest.mark.parametrize("name", [*TRANSFORMERS, *NEWER])
def test_transformers(name):
    """Another latent on reuse; two rows where the host takes them. A release that lacks a family skips it."""
    kind, rows = TRANSFORMERS.get(name) or NEWER[name], 1 if name in ONE_ROW else 2
    model, memory, caught = kind.build(), {}, {}
    split, deep = split_point_of(model, DEPTH), deep_blocks(model, DEPTH)
    whole, plain = flops(lambda: kind.call(model, {}, rows=rows))
    with replaced(deep, remembering(memory)):
        assert torch.equal(kind.call(model, split.capture({}, caught), rows=rows), plain)
    assert split.complete(caught) and all(rows in (1, len(value)) for value in caught.values())
    with split.reuse(caught, None, {}) as (_, options):
        part, found = flops(lambda: kind.call(model, options, seed=1, rows=rows))
    with replaced(deep, recalling(memory)):
        expected = kind.call(model, {}, seed=1, rows=rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert (found - plain).abs().max() > 1e-2 * plain.abs().max(), "the latent must matter"
    if name not in ("SD3", "Mochi", "Wan VACE", "Wan Animate 2"):  # shortened; VACE and poses run in every step
        assert gain(whole, part) > 2


@pytest.mark.parametrize("name", [kind.name for kind in TRANSFORMERS.values() if kind.control])
def test_control_residuals_between_blocks_are_fresh(name):
    """Residuals of this step go in between all blocks, and none of those of the step that was cached."""
    kind = TRANSFORMERS[name]
    model, memory, caught = kind.build(), {}, {}
    split, deep = split_point_of(model, DEPTH), deep_blocks(model, DEPTH)
    with replaced(deep, remembering(memory)):
        kind.call(model, split.capture({}, caught), control=kind.control(1, 1))
    with split.reuse(caught, kind.control(1, 100), {}) as (control, options):
        found = kind.call(model, options, seed=1, control=control)
    with replaced(deep, recalling(memory)):
        expected, without = (kind.call(model, {}, seed=1, control=c) for c in (kind.control(1, 100), None))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert (without - expected).abs().max() > 1e-2 * expected.abs().max(), "the residuals must matter"


def test_blocks_that_other_nodes_replaced():
    """Theirs runs inside ours where the block runs, outer or deep, and not where it does not."""
    kind = TRANSFORMERS["Flux"]
    model, calls = kind.build(), []

    def other(name):
        def block(args, extra):
            calls.append(name)
            out = extra["original_block"](args)
            return {**out, "img": out["img"] * 1.01}

        return block

    theirs = {"patches_replace": {"dit": {place: other(place) for place in (
        ("double_block", 0), ("double_block", 7), ("single_block", 9), ("single_block", 37))}, "attn1": {}}}
    plain, caught = kind.call(model, theirs), {}
    calls.clear()
    split = split_point_of(model, DEPTH)
    assert torch.equal(kind.call(model, split.capture(theirs, caught)), plain) and len(calls) == 4
    calls.clear()
    with split.reuse(caught, None, theirs) as (_, options):
        torch.testing.assert_close(kind.call(model, options), plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
    assert calls == [("double_block", 0), ("single_block", 37)]
    assert set(theirs["patches_replace"]["dit"]) == {("double_block", 0), ("double_block", 7), ("single_block", 9),
                                                     ("single_block", 37)}, "the caller's options are left alone"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype, tolerance):
    """The sum over 53 blocks loses no more than one rounding of the result."""
    kind = TRANSFORMERS["Flux"]
    model = kind.build()
    split, caught = split_point_of(model, DEPTH), {}
    half = kind.build().to(dtype)
    half.dtype = dtype

    def call(options):
        with torch.inference_mode():
            return half(noise(1, *kind.latent).to(dtype), torch.full((1,), 0.6), noise(1, *kind.context).to(dtype),
                        transformer_options=options, **{k: v.to(dtype) for k, v in kind.more(1).items()}).float()

    plain = call(split.capture({}, caught))
    assert all(value.dtype == dtype for value in caught.values())
    with split.reuse(caught, None, {}) as (_, options):
        assert (call(options) - plain).norm() < tolerance * plain.norm()


# --- U-Nets: their forward written out --------------------------------------------------------------------------------


def unet(root, x, t, context, y=None, control=None, patch=None, depth=0, deep=None):
    """(prediction, what enters the cut): ComfyUI's UNetModel step by step. With `deep` only the outer blocks run."""
    emb = root.time_embed(timestep_embedding(t, root.model_channels, repeat_only=False))
    emb = emb if y is None else emb + root.label_emb(y)
    control = {name: list(values) for name, values in (control or {}).items()}
    options, cut, h, skips, entered = {}, len(root.output_blocks) - depth, x, [], None

    def add(h, name, wanted=True):
        value = control[name].pop() if control.get(name) else None
        return h + value if wanted and value is not None else h

    for i, block in enumerate(root.input_blocks):
        outer = deep is None or i < depth
        h = forward_timestep_embed(block, h, emb, context, options) if outer else h
        h = add(h, "input", outer)
        skips.append(h)
    if deep is None:
        h = add(forward_timestep_embed(root.middle_block, h, emb, context, options), "middle")
    for i, block in enumerate(root.output_blocks):
        skip = add(skips.pop(), "output", deep is None or i >= cut)
        if deep is not None and i < cut:
            continue
        if i == cut:
            h = h if deep is None else deep.clone()
            entered = h.clone()
        if patch is not None:
            h, skip = patch(h, skip, {"block": ("output", i)})
        size = skips[-1].shape if skips else None
        h = forward_timestep_embed(block, torch.cat([h, skip], dim=1), emb, context, options, size)
    return root.out(h), entered


def t2i_and_controlnet(root, seed: int) -> dict:
    """Residuals of the shapes that this U-Net has, in the order of its own lists."""
    g, shapes = torch.Generator().manual_seed(seed), []
    h = torch.zeros(2, 4, 8, 8)
    with torch.inference_mode():
        emb = torch.zeros(2, root.model_channels * 4)
        for block in root.input_blocks:
            h = forward_timestep_embed(block, h, emb, torch.zeros(2, 5, 32), {})
            shapes.append(h.shape)

    def values(shapes):
        return [torch.randn(shape, generator=g) for shape in shapes]

    return {"input": values(shapes)[::-1], "middle": values(shapes[-1:]), "output": values(shapes)}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(("family", "with_control", "with_patch"), [
    ("SD15", False, False), ("SD15", True, False), ("SD15", True, True), ("SDXL", False, True)])
def test_unets(family, with_control, with_patch, depth, caplog):
    root, kind = base(family).model.diffusion_model, FAMILIES[family]
    y = noise(2, kind.config["adm_in_channels"], seed=3) if kind.pooled else None
    context, t = noise(2, 5, 32, seed=5), torch.tensor([300.0, 300.0])
    x0, x1 = noise(2, 4, 8, 8, seed=0), noise(2, 4, 8, 8, seed=1)

    def patch(h, skip, options):  # as FreeU does: in place, and dependent on the block
        h[:, : h.shape[1] // 2] *= 1 + 0.1 * options["block"][1]
        return h, skip * 0.9

    patches = {"patches": {"output_block_patch": [patch]}} if with_patch else {}
    patch, caught = patch if with_patch else None, {}
    split = split_point_of(root, depth)

    def controls(seed):
        return t2i_and_controlnet(root, seed) if with_control else None

    def call(x, control, options):
        return root(x, t, context=context, y=y, control=control, transformer_options=options)

    with torch.inference_mode():
        plain = call(x0, controls(1), dict(patches))
        assert torch.equal(call(x0, controls(1), split.capture(patches, caught)), plain)
        reference, deep = unet(root, x0, t, context, y, controls(1), patch, depth)
        torch.testing.assert_close(plain, reference, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(caught["h"], deep, rtol=1e-4, atol=1e-4)
        with split.reuse(caught, controls(2), patches) as (control, options):
            found = call(x1, control, options)
        expected, _ = unet(root, x1, t, context, y, controls(2), patch, depth, deep)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert torch.equal(caught["h"], caught["h"].clone()) and not caplog.text, "no residual was refused"
    assert (found - plain).abs().max() > 1e-2 * plain.abs().max()


def test_attention_patches_of_outer_blocks_know_where_they_are():
    """Other packs count transformers: the ones that are skipped count as well."""
    root = base("SD15").model.diffusion_model
    seen, caught = [], {}

    def watch(q, k, v, extra):
        seen.append((extra["block"], extra["transformer_index"]))
        return q, k, v

    options = {"patches": {"attn2_patch": [watch]}}
    arguments = dict(context=noise(1, 5, 32), control=None)
    split = split_point_of(root, 3)
    with torch.inference_mode():
        root(noise(1, 4, 8, 8), torch.ones(1), transformer_options=split.capture(options, caught), **arguments)
        whole = list(seen)
        seen.clear()
        with split.reuse(caught, None, options) as (_, inner):
            root(noise(1, 4, 8, 8), torch.ones(1), transformer_options=inner, **arguments)
    assert seen and set(seen) < set(whole)


# --- what it saves on whole models, counted on tensors without memory -------------------------------------------------

FULL = dict(image_size=32, in_channels=4, out_channels=4, model_channels=320, use_spatial_transformer=True,
            use_temporal_attention=False, legacy=False)
SD15 = dict(FULL, num_res_blocks=[2, 2, 2, 2], channel_mult=[1, 2, 4, 4], transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
            transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], transformer_depth_middle=1, num_heads=8,
            num_head_channels=-1, context_dim=768, use_linear_in_transformer=False, adm_in_channels=None)
SDXL = dict(FULL, num_res_blocks=[2, 2, 2], channel_mult=[1, 2, 4], transformer_depth=[0, 0, 2, 2, 10, 10],
            transformer_depth_output=[0, 0, 0, 2, 2, 2, 10, 10, 10], transformer_depth_middle=10, num_head_channels=64,
            context_dim=2048, use_linear_in_transformer=True, num_classes="sequential", adm_in_channels=2816)


@pytest.fixture
def meta(monkeypatch):
    """ComfyUI's attention asks for free memory, which the meta device does not have."""
    monkeypatch.setattr(comfy.model_management, "get_free_memory",
                        lambda *args, **kwargs: (1 << 40, 1 << 40) if len(args) > 1 or kwargs else 1 << 40)
    return torch.device("meta")


@pytest.mark.parametrize(("family", "config", "size", "depth", "least"), [
    ("SD15", SD15, 64, 2, 2.0), ("SD15", SD15, 64, 1, 2.5), ("SD15", SD15, 64, 3, 1.7), ("SDXL", SDXL, 128, 2, 2.7)])
def test_full_unets_save(family, config, size, depth, least, meta):
    kind = FAMILIES[family]
    root = build(type(kind)(kind.name, kind.kind, config, 4, config["context_dim"]), meta).diffusion_model.eval()
    x, t = torch.empty(1, 4, size, size, device=meta), torch.empty(1, device=meta)
    arguments = dict(context=torch.empty(1, 77, config["context_dim"], device=meta), control=None,
                     y=torch.empty(1, 2816, device=meta) if family == "SDXL" else None)
    split, caught = split_point_of(root, depth), {}
    with torch.inference_mode():
        whole, _ = flops(lambda: root(x, t, transformer_options=split.capture({}, caught), **arguments))
        with split.reuse(caught, None, {}) as (_, options):
            part, _ = flops(lambda: root(x, t, transformer_options=options, **arguments))
    assert gain(whole, part) >= least, gain(whole, part)


@pytest.mark.parametrize(("depth", "least"), [(2, 2.4), (8, 1.6)])
def test_a_full_flux_saves(depth, least, meta):
    """19 double and 38 single blocks of width 3072, 1024 x 1024 pixels, 512 tokens of text."""
    kind = TRANSFORMERS["Flux"]
    config = dict(kind.config, hidden_size=3072, num_heads=24, axes_dim=[16, 56, 56], context_in_dim=4096,
                  vec_in_dim=768)
    kind = type(kind)(kind.name, kind.where, config, (16, 128, 128), (512, 4096),
                      lambda rows: {"y": noise(rows, 768), "guidance": torch.full((rows,), 3.5)}, kind.fields)
    root, caught = kind.build("meta"), {}
    split = split_point_of(root, depth)
    whole, _ = flops(lambda: kind.call(root, split.capture({}, caught), device="meta"))
    with split.reuse(caught, None, {}) as (_, options):
        part, _ = flops(lambda: kind.call(root, options, device="meta"))
    assert gain(whole, part) >= least, gain(whole, part)
