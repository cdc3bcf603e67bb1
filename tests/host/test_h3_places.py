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
from .blocks import noise
from .builders import composite, file_of, lora, merge, same, shapes, stock
from .disturbed import newest
from .small_checkpoints import model as checkpoint
from .small_video import SMALL
from .test_masks import LEFT, bare
from .test_packed import effects
from .test_parity_families import NAME, drawn, layers_of, parts
from .test_routed import MARKS, rests, routed

NOWHERE = torch.zeros(1, 4, 6)


@pytest.fixture
def h3():
    if "MiniMax H3" not in SMALL or not newest():
        pytest.skip("this ComfyUI has no MiniMax H3")
    return any_model(SMALL["MiniMax H3"])


class Guided:
    """The host's own model with a negative beside the prompt: it evaluates the two one after the other, each in a run
    of tokens as long as its text. A step from pure noise."""

    FILM, SOUND = (24, 2, 4, 6), (32, 2, 5)

    def __init__(self):
        from comfy.nested_tensor import NestedTensor  # which older releases lack

        self.model = checkpoint("MiniMax H3")
        start = [noise(1, *shape, seed=seed) for seed, shape in enumerate((self.FILM, self.SOUND))]
        self.start = NestedTensor(start)
        self.empty = NestedTensor([torch.zeros_like(part) for part in start])

    def film(self, model, cfg: float = 3.0, options: dict | None = None) -> torch.Tensor:
        """[1, 24, 2, 4, 6]"""
        said, other = [[noise(1, 5, 16, seed=11), options or {}]], [[noise(1, 7, 16, seed=12), {}]]
        with torch.inference_mode():
            return comfy.sample.sample(model, self.start, 1, cfg, "euler", "simple", said, other, self.empty, seed=1,
                                       disable_pbar=True).unbind()[0]

    def specs(self, loras, wanted) -> list[LoRASpec]:
        layers = {name: shape for name, shape in shapes(self.model).items() if wanted(name)}
        return [LoRASpec(loras(lora(layers, seed)), strength, 0.0) for seed, strength in ((1, 0.8), (2, 0.6))]


@pytest.fixture
def guided(h3) -> Guided:
    return Guided()


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


# --- with a negative ------------------------------------------------------------------------------------------------


def test_masks_of_ones_are_the_chain_of_loaders_with_a_negative(guided, loras):
    """On both sides of guidance, in all layers but those that prepare the text, which have no places; LoRAs without a
    mask act there as well."""
    specs, plain = guided.specs(loras, lambda name: True), guided.film(guided.model)
    same(guided.film(merge(guided.model, specs)), guided.film(stock(guided.model, specs)), plain, 1e-4)
    there = [spec for spec in guided.specs(loras, lambda name: "token_refiner" not in name and "condition" not in name)]
    ours = merge(guided.model, [replace(spec, mask=Mask(torch.ones(1, 4, 6))) for spec in there])
    same(guided.film(ours), guided.film(stock(guided.model, there)), plain, 1e-4)
    assert record_of(ours).problems == []
    assert [step.rows for step in record_of(ours).steps] == [2]


def test_each_lora_acts_in_its_region_with_a_negative(guided, loras):
    """In the film's last layer, on both sides of guidance: left the first LoRA alone, right the second."""
    specs = guided.specs(loras, lambda name: name.endswith("video_out"))
    masks = LEFT[0], 1 - LEFT[0]
    ours = merge(guided.model, [replace(spec, mask=Mask(mask[None])) for spec, mask in zip(specs, masks, strict=True)])
    plain, found = guided.film(guided.model), guided.film(ours)
    for spec, side in zip(specs, (slice(0, 2), slice(4, 6)), strict=True):  # the middle patch has a half of each
        same(found[..., side], guided.film(stock(guided.model, [spec]))[..., side], plain[..., side], 1e-4)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_loras_act_where_their_words_are_with_a_negative(cfg, guided, loras):
    """base + sum of m_i times what LoRA i does there, on both sides; words are read off the prompt's side alone."""
    specs = guided.specs(loras, lambda name: name.endswith("video_out"))
    ensemble = [replace(spec, words=words) for spec, words in zip(specs, ("ohwx", "sks"), strict=True)]
    ours = routed(guided.model, ensemble)
    marks = {"lora_ensemble_prompt": MARKS}
    plain, found = guided.film(guided.model, cfg), guided.film(ours, cfg, marks)
    alone = [guided.film(stock(guided.model, [spec]), cfg) for spec in specs]
    (placed,) = places_of(ours)
    maps = F.avg_pool3d(placed.maps, (1, 2, 2)).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert record_of(ours).problems == [] and placed.maps.std() > 1e-3
    same(found, plain + sum(maps[:, i:i + 1] * (each - plain) for i, each in enumerate(alone)), plain, 1e-4)
    if cfg > 1:
        again = routed(guided.model, ensemble)
        guided.film(again, 1.0, marks)
        torch.testing.assert_close(places_of(again)[0].maps, placed.maps)


def test_contrast(guided, loras):
    """Of the film, which the sound is packed behind: base + sum of m_i times what LoRA i does there."""
    specs = guided.specs(loras, lambda name: name.endswith("video_out"))
    ensemble = [replace(spec, words=words) for spec, words in zip(specs, ("ohwx", "sks"), strict=True)]
    ours, others = routed(guided.model, ensemble, mode="contrast"), [[noise(1, 5, 16, seed=k), {}] for k in range(3)]
    marks = {"lora_ensemble_prompt": MARKS, "lora_ensemble_without": rests(MARKS, others)}
    plain, found = guided.film(guided.model), guided.film(ours, 3.0, marks)
    (placed,) = places_of(ours)
    maps = F.avg_pool3d(placed.maps, (1, 2, 2)).repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert record_of(ours).problems == [] and placed.maps.std() > 1e-3
    want = plain + sum(maps[:, i:i + 1] * (guided.film(stock(guided.model, [spec])) - plain)
                       for i, spec in enumerate(specs))
    same(found, want, plain, 1e-4)


def test_branches_with_a_negative(guided, loras):
    """Each side of guidance of each branch is a call of its own."""
    specs = guided.specs(loras, lambda name: "token_refiner" not in name and "condition" not in name)
    ours = composite(guided.model, specs)
    alone = [guided.film(stock(guided.model, [spec])) for spec in specs]
    same(guided.film(ours), sum(alone) / 2, guided.film(guided.model), 1e-4)
    assert [(step.calls, step.rows) for step in record_of(ours).steps] == [(4, 4)]
