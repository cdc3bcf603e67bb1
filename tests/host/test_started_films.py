"""Films that ComfyUI's own nodes start: where tokens lie in the calls that come of it, and that the film is what the
host makes of its own LoRA loaders."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import comfy.samplers
import pytest
import torch
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.merge import Merge
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import noise
from .builders import composite, lora, merge, same, stock
from .disturbed import newest, skipped_where_older, watching
from .moved import Seen, apart, at_place, move, moved, places, size_of  # noqa: F401
from .started import STARTED, Started, node
from .test_attention import joining
from .test_attention import moved as keys
from .test_parity_families import NAME, parts
from .test_routed import MARKS, rests, routed

started = pytest.mark.parametrize("name", STARTED)

class Replayed:
    """What a sampler called the model with, to be called again."""

    def __init__(self, case: Started, model):
        self.calls = []

        def keep(_, args, kwargs):
            self.calls.append((args, kwargs))

        with model.model.diffusion_model.register_forward_pre_hook(keep, with_kwargs=True):
            case.drawn(model)

    def call(self, model: nn.Module, options: dict, rows: int = 1):
        (args, kwargs), = self.calls
        with torch.inference_mode():
            return model(*args, **{**kwargs, "transformer_options": options})


@pytest.mark.usefixtures("apart")
@started
def test_where_tokens_lie(name):
    """Of every layer, and of what attention joins: a place of the film moves its own token, a word of the prompt its
    own; nothing else does. Control films move with it."""
    case = STARTED[name]
    with skipped_where_older(name):
        model = case.model()
        kind = Replayed(case, model)
    root = model.model.diffusion_model
    before = Seen(kind, root)
    *frames, height, width = size = size_of(before.x)
    place, word = (1, height // 2, width - 1), 3

    def reworded(x, conds):
        context = conds["context"].clone()
        context[:, word] += 1
        return x, {**conds, "context": context}

    def both(change):
        after = Seen(kind, root, change)
        return moved(before, after), zip(joining(before), joining(after), strict=True)

    layers, attention = both(move(place))
    for layer, segments, found in layers:
        expected = places(segments, "picture", at_place(size, place))
        assert found == expected, f"{layer}: {sorted(found)} instead of {sorted(expected)}"
    for (where, old, _), (_, new, _) in attention:
        token = where.picture[0] + (place[0] * where.grid[1] + place[1] * where.grid[1] // height) * where.grid[2] \
            + place[2] * where.grid[2] // width
        assert {t for t in keys(old, new) if where.picture[0] <= t < where.picture[1]} == {token}
    layers, attention = both(reworded)
    attention = list(attention)
    for layer, segments, found in layers:
        assert found <= places(segments, "text", lambda segment: word), layer
    assert attention or not newest(), "older releases call some of it without the options"
    for (where, _, old), (_, _, new) in attention:
        assert {t for t in keys(old, new) if where.text[0] <= t < where.text[1]} == {where.text[0] + word}


def layers_of(case: Started, model) -> dict[str, torch.Size]:
    """The layers that a call runs through, by the names of a LoRA file."""
    found, inner = {}, model.model.diffusion_model
    with watching(inner, lambda layer, geometry, x, out: None if geometry.is_norm else found.setdefault(
            f"diffusion_model.{layer}", inner.get_submodule(layer).weight.shape) and None):
        case.drawn(model)
    return found


@started
def test_it_is_what_the_host_makes_of_its_loaders(name, loras):
    """Merged, through masks of ones, and as the mean of each alone; words tell the places of all layers but those of
    sound and of what was before."""
    case = STARTED[name]
    with skipped_where_older(name):
        model = case.model()
        layers = layers_of(case, model)
        plain = case.drawn(model, cfg=3.0)
    specs = [LoRASpec(loras(lora(layers, seed, **NAME)), strength, 0.0) for seed, strength in ((1, 0.8), (2, -0.6))]
    ours = merge(model, [replace(spec, mask=Mask(torch.ones(1, 5, 5))) for spec in specs])
    same(case.drawn(ours, cfg=3.0), case.drawn(stock(model, specs), cfg=3.0), plain, 1e-4)
    mean = sum(case.drawn(stock(model, [spec]), cfg=3.0) for spec in specs) / 2
    same(case.drawn(composite(model, specs), cfg=3.0), mean, plain, 1e-4)
    placed = routed(model, [replace(spec, words=words) for spec, words in zip(specs, ("ohwx", "sks"), strict=True)])
    case.drawn(placed, cfg=3.0, lora_ensemble_prompt=MARKS)
    problems = record_of(ours).problems
    assert [line for line in problems if "audio" not in line and "frame_packer" not in line] == []
    assert places_of(placed)[0].maps.std() > 1e-2 and record_of(placed).problems == problems or not newest()


# --- frames that guide a film stand behind it -----------------------------------------------------------------------

GUIDED, FRAMES, GUIDES, LAST = STARTED["LTX-Video, guides"], 3, 4, "diffusion_model.proj_out"


def pair(model, loras, wanted=lambda layer: layer == LAST, **options) -> list[LoRASpec]:
    layers = {name: shape for name, shape in layers_of(GUIDED, model).items() if wanted(name)}
    return [LoRASpec(loras(lora(layers, seed, **NAME)), strength, 0.0, words=words, **options)
            for seed, strength, words in ((1, 0.8, "ohwx"), (2, 0.6, "sks"))]


def film(model, **marks) -> Tensor:
    """[1, 128, 3, 4, 4] of a latent with the guides behind it."""
    drawn = GUIDED.drawn(model, **marks)
    assert drawn.shape[2] > FRAMES
    return drawn[:, :, :FRAMES]


@pytest.mark.parametrize("make", [merge, composite])
def test_a_mask_for_each_frame_is_of_the_film_alone(make, loras):
    """In the model's last layer, and of predictions."""
    model = GUIDED.model()
    masks = torch.stack([torch.ones(4, 4), torch.zeros(4, 4), torch.eye(4)])
    (spec, _) = pair(model, loras)
    plain, alone = film(model), film(stock(model, [spec]))
    want = plain + masks * (alone - plain)
    same(film(make(model, [replace(spec, mask=Mask(masks))])), want, plain, 1e-4)


@pytest.mark.parametrize(("mode", "make"), [("every step", Composite), ("contrast", Composite), ("contrast", Merge)])
def test_words_are_looked_for_in_the_film_alone(mode, make, loras):
    """Each frame is mixed, or drawn, by its own places."""
    model = GUIDED.model()
    specs = pair(model, loras)
    without = rests(MARKS, [GUIDED.prompt(20 + k)[0] for k in range(3)])
    said = {"lora_ensemble_prompt": MARKS, "lora_ensemble_without": without}
    ours = routed(model, specs, make, mode=mode, trust=False)
    found, plain = film(ours, **said), film(model)
    maps = places_of(ours)[0].maps
    assert maps.shape == (1, 2, FRAMES, 4, 4) and maps.std() > 1e-2 and not torch.allclose(maps[:, :, 0], maps[:, :, 2])
    shares = maps / maps.sum(1, keepdim=True).clamp_min(1) if make is Composite else maps
    want = plain + sum(shares[:, i:i + 1] * (film(stock(model, [spec])) - plain) for i, spec in enumerate(specs))
    same(found, want, plain, 1e-4)


@pytest.mark.parametrize("make", [Merge, Composite])
def test_what_a_film_loses_without_a_clause_is_not_its_sounds(make, loras):
    """Contrast of a latent that has sound and guides behind the film."""
    case = STARTED["LTX-2, small guides"]
    with skipped_where_older("LTX-2"):
        model = case.model()
        layers = layers_of(case, model)
    specs = [LoRASpec(loras(lora(layers, seed, **NAME)), 0.8, 0.0, words=words)
             for seed, words in ((1, "ohwx"), (2, "sks"))]
    ours = routed(model, specs, make, mode="contrast", trust=False)
    without = rests(MARKS, [case.prompt(20 + k)[0] for k in range(3)])
    case.drawn(ours, lora_ensemble_prompt=MARKS, lora_ensemble_without=without)

    def film(seed: int) -> Tensor:
        size = 128, FRAMES + GUIDES, 4, 4
        return case.drawn(model, seed=seed)[:, :prod(size)].unflatten(1, size)[0, :, :FRAMES]

    lost = torch.stack([(film(20 + k) - film(11)).square().mean(0).sqrt() for k in range(3)])
    flat = F.avg_pool2d(lost, 3, 1, 1, count_include_pad=False)
    relative = flat / flat.flatten(1).amax(-1)[:, None, None, None]
    want = (relative / relative.amax(0))[:2] ** 2
    assert record_of(ours).problems == [] and torch.allclose(places_of(ours)[0].maps[0], want, atol=1e-4)


def test_guidance_of_its_own(loras):
    """LTX-2's further passes (a voice as reference, self-attention left out, sound and picture apart) and its two
    scales of guidance: each pass has all branches, mixed before its difference is taken."""
    case = STARTED["LTX-2, small guides"]
    with skipped_where_older("LTX-2"):
        model = case.model()
        layers = layers_of(case, model)
    *prompts, begun = case.begin(case.prompt(11), case.prompt(12), 1)
    latent, always = begun["samples"], {"start_percent": 0.0, "end_percent": 1.0}
    start = type(latent)([noise(*part.shape, seed=1 + k) for k, part in enumerate(latent.unbind())])

    class Voice:
        audio_sample_rate = 8000

        def encode(self, waves: Tensor) -> Tensor:
            return noise(1, 8, 3, 16, seed=77)

    def drawn(one) -> Tensor:
        one, positive, negative = node(
            "nodes_lt", "LTXVReferenceAudio", model=one, positive=prompts[0], negative=prompts[1], audio_vae=Voice(),
            reference_audio={"waveform": torch.zeros(1, 2, 9), "sample_rate": 8000}, identity_guidance_scale=3.0,
            **always)
        (one,) = node("nodes_lt", "LTXVSpatioTemporalGuidance", model=one, scale=1.0, blocks="0", **always)
        (one,) = node("nodes_lt", "LTXVModalityGuidance", model=one, modality_scale=3.0, **always)
        (guider,) = node("nodes_lt", "LTXVDualCFGGuider", model=one, positive=positive, negative=negative,
                         video_cfg=3.0, audio_cfg=7.0)
        with torch.inference_mode():
            return parts(guider.sample(start, latent, comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.0]),
                                       begun["noise_mask"], disable_pbar=True, seed=1))

    specs = [LoRASpec(loras(lora(layers, seed, **NAME)), strength, 0.0) for seed, strength in ((1, 0.8), (2, -0.6))]
    plain, merged, branches = drawn(model), merge(model, specs), composite(model, specs)
    same(drawn(merged), drawn(stock(model, specs)), plain, 1e-4)
    same(drawn(branches), sum(drawn(stock(model, [spec])) for spec in specs) / 2, plain, 1e-4)
    assert [(step.calls, step.rows) for step in record_of(branches).steps] == [(4, 2 * 5)]
    assert record_of(merged).problems == record_of(branches).problems == []
