"""Masks on every family whose places are known: a LoRA on the last layer that sees the picture acts in its half of the
prediction as ComfyUI's own loader has it act everywhere, and nowhere else."""

from __future__ import annotations

from math import prod

import pytest
import torch
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.families.token_order import token_order
from lora_ensemble.host.files.ensemble import LoRASpec, Mask

from .any_model import any_model
from .builders import lora, merge, same, stock
from .disturbed import newest, skipped_where_older, watching
from .moved import WITHOUT
from .small_video import SMALL
from .test_parity_families import NAME, ONE_ROW, drawn, layers_of

OPEN = {"Chroma Radiance", "PixelDiT", "PiD", "Z-Image pixels"}
"""Families that make pixels of tokens behind the last layer whose places are known."""
CALLS = [(1, 1.0), (2, 3.0)]
"""(pictures, cfg)"""
FILM = {"LTX-Video guides": slice(2)}
"""Frames that have places; in what guides them LoRAs act everywhere."""


def last_layer(model) -> str:
    """The last linear layer or convolution of a call that sees places of the picture."""
    kind, inner, found = model.model.kind, model.model.diffusion_model, []

    def begin(_, args, kwargs):
        found.append(token_order(inner).begin(args[0], kwargs))

    def see(layer, geometry, x, out):
        if geometry.is_norm:
            return
        count = prod(out.shape if found[0].order.axis == 0 else out.shape[1:]) // out.shape[geometry.channel]
        segments = found[0].segments(layer, count)
        if geometry.spatial or any(segment.kind == "picture" for segment in segments or ()):
            found.append(layer)

    with inner.register_forward_pre_hook(begin, with_kwargs=True), watching(inner, see):
        kind.call(inner, {})
    return found[-1]


@pytest.mark.parametrize("name", [name for name in SMALL if name not in WITHOUT | OPEN])
def test_each_lora_in_its_half(name, loras):
    kind = SMALL[name]
    if name == "Wan references" and not newest():
        pytest.skip("older releases know no context latents")
    with skipped_where_older(name):
        model = any_model(kind)
        layer = last_layer(model)
    size = (kind.latent[0] if isinstance(kind.latent[0], tuple) else kind.latent)[1:]
    middle = size[-1] // 4 * 2
    left = torch.zeros(1, *size[-2:])
    left[..., :middle] = 1
    weight = {f"diffusion_model.{layer}": model.model.diffusion_model.get_submodule(layer).weight.shape}
    specs = [LoRASpec(loras(lora(weight, seed, **NAME)), strength, 0.0, mask=Mask(mask))
             for seed, strength, mask in ((1, 0.8, left), (2, -0.6, 1 - left))]
    ours = merge(model, specs)
    for call in CALLS[:1] if name in ONE_ROW else CALLS:
        plain, found = drawn(model, *call), drawn(ours, *call)
        alone = [drawn(stock(model, [LoRASpec(spec.name, spec.strength_model, 0.0)]), *call) for spec in specs]
        if found.ndim == 2:  # picture and sound, of which only the picture has places
            frame = prod(kind.latent[0])
            plain, found, *alone = (each[:, :frame].unflatten(1, kind.latent[0]) for each in (plain, found, *alone))
        for one, part in zip(alone, (slice(middle), slice(middle, None)), strict=True):
            where = (slice(None), slice(None), FILM[name], slice(None), part) if name in FILM else (..., part)
            same(found[where], one[where], plain[where], 1e-4)
    assert not record_of(ours).problems


@pytest.mark.parametrize("name", [name for name in SMALL if name not in WITHOUT])
def test_masks_of_ones_change_no_bit(name, loras):
    with skipped_where_older(name):
        model = any_model(SMALL[name])
        layers = layers_of(model)
    files = [(loras(lora(layers, 1, 1, **NAME)), 0.8), (loras(lora(layers, 2, 7, **NAME)), -0.6)]
    everywhere, masked = (merge(model, [LoRASpec(file, strength, 0.0, mask=mask) for file, strength in files])
                          for mask in (None, Mask(torch.ones(1, 5, 7))))
    for call in CALLS[:1] if name in ONE_ROW else CALLS:
        assert torch.equal(drawn(masked, *call), drawn(everywhere, *call))
