"""MiniMax H3: text, sound and film in one run of tokens, without a dimension for rows. LoRAs act in their masks and
where their words are, on the tokens of the film and of the prompt."""

from __future__ import annotations

from dataclasses import replace

import comfy.sample
import pytest
import torch
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from torch.nn import functional as F

from .any_model import any_model, latent_of, prompt_of
from .builders import file_of, lora, merge, same, stock
from .disturbed import newest
from .small_video import SMALL
from .test_masks import LEFT, bare
from .test_packed import effects
from .test_parity_families import NAME, drawn, layers_of, parts
from .test_routed import MARKS, routed

NOWHERE = torch.zeros(1, 4, 6)


@pytest.fixture
def h3():
    if "MiniMax H3" not in SMALL or not newest():
        pytest.skip("this ComfyUI has no MiniMax H3")
    return any_model(SMALL["MiniMax H3"])


def parts_of(drawn) -> tuple[torch.Tensor, torch.Tensor]:
    """(the film [1, 8, 2, 4, 6], the sound)"""
    film = torch.Size((8, 2, 4, 6))
    return drawn[:, :film.numel()].unflatten(1, film), drawn[:, film.numel():]


def pair(model, loras, wanted, masks) -> list[LoRASpec]:
    layers = {name: shape for name, shape in layers_of(model).items() if wanted(name)}
    return [LoRASpec(loras(lora(layers, seed, **NAME)), strength, 0.0, mask=None if mask is None else Mask(mask))
            for seed, strength, mask in zip((1, 2), (0.8, 0.6), masks, strict=True)]


def test_masks_of_ones_are_the_chain_of_loaders(h3, loras):
    """In all layers, for those of text and sound as well."""
    specs = pair(h3, loras, lambda name: True, (torch.ones(1, 4, 6), torch.ones(2, 8, 8)))
    ours = merge(h3, specs)
    same(drawn(ours, 1, 1.0), drawn(stock(h3, bare(specs)), 1, 1.0), drawn(h3, 1, 1.0), 1e-4)
    assert record_of(ours).problems == []


def test_each_lora_acts_in_its_region_and_nowhere_else(h3, loras):
    """In the film's last layer; a mask for each frame is one for each frame. Sound has no places."""
    masks = torch.stack([LEFT[0], 1 - LEFT[0]]), torch.stack([1 - LEFT[0], torch.zeros(16, 16)])
    specs = pair(h3, loras, lambda name: name.endswith("video_out"), masks)
    alone = [parts_of(drawn(stock(h3, [spec]), 1, 1.0))[0] for spec in bare(specs)]
    plain, sound = parts_of(drawn(h3, 1, 1.0))
    found, heard = parts_of(drawn(merge(h3, specs), 1, 1.0))
    for frame, (lora_left, lora_right) in enumerate(((0, 1), (None, 0))):  # the middle patch has a half of each
        for own, side in ((lora_left, slice(0, 2)), (lora_right, slice(4, 6))):
            here = (slice(None), slice(None), frame, slice(None), side)
            if own is None:
                assert torch.equal(found[here], plain[here])
            else:
                same(found[here], alone[own][here], plain[here], 1e-4)
    assert torch.equal(heard, sound)


def test_film_text_and_sound_in_one_run_of_tokens(h3, loras):
    """In a block: nothing on the film's tokens outside the mask, all of it on those of text (5) and sound (10)."""
    (spec, _) = pair(h3, loras, lambda name: name == "diffusion_model.blocks.0.mlp.fc2", (NOWHERE, None))
    file = file_of(spec)
    (layer,) = {key.rsplit(".lora", 1)[0].removeprefix("diffusion_model.") for key in file}
    up, down = (file[f"diffusion_model.{layer}.lora_{end}.weight"] for end in "BA")
    with effects(merge(h3, [spec]), [layer]) as found:
        drawn(merge(h3, [spec]), 1, 1.0)
    ((_, x, added),) = found
    assert added.shape[0] == 5 + 10 + 12 and (added[15:] == 0).all()
    torch.testing.assert_close(added[:15], 0.8 * x[:15] @ (up @ down).T, rtol=1e-3, atol=1e-4)


def test_loras_act_where_their_words_are(h3, loras):
    """Read off the model's own attention, in the film's last layer: base + sum of m_i times what LoRA i does there."""
    specs = pair(h3, loras, lambda name: name.endswith("video_out"), (None, None))
    ensemble = [replace(spec, words=words) for spec, words in zip(specs, ("ohwx", "sks"), strict=True)]
    ((text, options),) = prompt_of(h3, 11)
    said = [[text, {**options, "lora_ensemble_prompt": MARKS}]]

    def film(model) -> torch.Tensor:
        start = latent_of(model, 1)
        with torch.inference_mode():
            out = comfy.sample.sample(model, start, 1, 1.0, "euler", "simple", said, prompt_of(model, 12), start * 0,
                                      seed=1, disable_pbar=True)
        return parts_of(parts(out))[0]

    ours = routed(h3, ensemble)
    found, plain = film(ours), film(h3)
    alone = [film(stock(h3, [spec])) for spec in bare(specs)]
    (placed,) = places_of(ours)
    maps = F.avg_pool3d(placed.maps, (1, 2, 2)).repeat_interleave(2, -1).repeat_interleave(2, -2)  # of patches
    assert record_of(ours).problems == [] and placed.maps.std() > 1e-3
    want = plain + sum(maps[:, i:i + 1] * (each - plain) for i, each in enumerate(alone))
    same(found, want, plain, 1e-4)
