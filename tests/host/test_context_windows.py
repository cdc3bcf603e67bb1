"""Places of LoRAs in context windows: each window has the frames of the masks and words that it holds, and the frame
that it is anchored to."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from inspect import signature
from math import prod

import comfy.context_windows
import pytest
import torch
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.loratorio import LoRAtorio

from .builders import composite, lora, merge, same, sample, shapes, stock
from .disturbed import skipped_where_older
from .models import base
from .started import STARTED, guided_with_sound, node
from .test_masks import LAST, bare, pair
from .test_routed import MARKS, prompt, rests, routed, specs

OVER = {"Wan": (2, 1), "SD15": (0, 5)}
"""Family -> (the dimension that windows are over, pictures of a batch)."""


def windowed(model, family: str, schedule: str = "standard_static"):
    windows, model = comfy.context_windows, model.clone()
    if not OVER[family][0] and "causal_window_fix" not in signature(windows.IndexListContextHandler).parameters:
        pytest.skip("windows over a batch stop this ComfyUI itself")
    model.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule(schedule), windows.get_matching_fuse_method("pyramid"),
        context_length=2, context_overlap=1, dim=OVER[family][0])
    return model


@pytest.mark.parametrize("schedule", ["standard_static", "looped_uniform", "batched"])
@pytest.mark.parametrize("family", OVER)
def test_a_mask_for_each_frame(family, schedule, loras):
    """The first frames have the LoRA, the last ones nothing of it."""
    model, (dim, batch) = base(family), OVER[family]
    frames = torch.zeros(3 if dim else batch, 16, 16)
    frames[:2] = 1
    specs = pair(model, loras, LAST[family], (frames, None))[:1]
    ours, alone, plain = (sample(windowed(each, family, schedule), family, batch=batch, steps=1).transpose(0, dim)
                          for each in (merge(model, specs), stock(model, bare(specs)), model))
    same(ours[:2], alone[:2], plain[:2], 1e-4)
    assert torch.equal(ours[2:], plain[2:]) and not torch.equal(alone[2:], plain[2:])


def test_pictures_of_a_batch_do_not_see_each_other(loras):
    """So they are the same whatever window they are in."""
    model, batch = base("SD15"), OVER["SD15"][1]
    ours = routed(model, specs(model, loras), mode="once", trust=False)
    want = sample(ours, "SD15", prompt(), batch=batch, steps=3)
    maps = places_of(ours)[0].maps
    cut, plain = windowed(ours, "SD15"), sample(model, "SD15", prompt(), batch=batch, steps=3)
    same(sample(cut, "SD15", prompt(), batch=batch, steps=3), want, plain)
    assert record_of(cut).problems == []
    torch.testing.assert_close(places_of(cut)[0].maps, maps, rtol=1e-3, atol=1e-3)


def test_trust_is_not_measured_over_a_batch(loras):
    model = base("SD15")
    ours = windowed(routed(model, specs(model, loras), trust=True), "SD15")
    assert torch.isfinite(sample(ours, "SD15", prompt(), batch=5)).all()
    (problem,) = record_of(ours).problems
    assert "context windows over a batch" in problem


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("mode", ["once", "every step"])
def test_words_of_a_film_are_looked_for_in_every_window(mode, trust, loras):
    """Where a window was not looked into, its LoRAs would act everywhere."""
    model = base("Wan")
    ours = windowed(routed(model, specs(model, loras), mode=mode, trust=trust), "Wan")
    assert torch.isfinite(sample(ours, "Wan", prompt("Wan"), steps=3)).all()
    assert [step.rows for step in record_of(ours).steps] == [6, 4, 4] and record_of(ours).problems == []
    maps = places_of(ours)[0].maps
    assert maps.shape[2] == 3 and (maps.flatten(3).amin(-1) < 0.9).all()


def test_stand_in_words_of_a_film_are_looked_for_in_every_window(loras):
    """What was found in one window stays. Guard: the stand-in's own prompt knows of none."""
    model, other = base("Wan"), prompt("Wan", MARKS, 30)
    ours, likewise = (windowed(routed(model, specs(model, loras), mode="once"), "Wan") for _ in range(2))
    sample(ours, "Wan", prompt("Wan", lora_ensemble_probe=other[0]), steps=1)
    sample(likewise, "Wan", other, steps=1)
    assert torch.equal(places_of(ours)[0].maps, places_of(likewise)[0].maps)
    assert (places_of(ours)[0].maps.flatten(3).amin(-1) < 0.9).all() and record_of(ours).problems == []


@pytest.mark.parametrize("mode", ["once", "contrast"])
@pytest.mark.parametrize("name", ["Wan, picture", "Wan, sound, next part"])
def test_what_stands_in_for_a_prompt_is_cut_to_the_window(name, mode, loras):
    """Its start picture, control film and sound, as the host cuts the prompt's own; its text is its own."""
    case, texts = STARTED[name], []
    model = case.model()
    with skipped_where_older(name):
        case.drawn(windowed(model, "Wan"))
    layers = {key: shape for key, shape in shapes(model).items() if key == LAST["Wan"]}
    ensemble = [LoRASpec(loras(lora(layers, seed)), 0.8, 0, words=words) for seed, words in ((1, "ohwx"), (2, "sks"))]
    others = [case.prompt(20 + k, lora_ensemble_prompt=MARKS)[0] for k in range(3)]
    more = {"lora_ensemble_probe": others[0]} if mode == "once" else {"lora_ensemble_without": rests(MARKS, others)}
    ours = windowed(routed(model, ensemble, mode=mode, trust=False), "Wan")

    def see(_, args, kwargs):
        texts.append(kwargs["context"])

    with model.model.diffusion_model.register_forward_pre_hook(see, with_kwargs=True):
        case.drawn(ours, lora_ensemble_prompt=MARKS, **more)
    assert record_of(ours).problems == [] and (places_of(ours)[0].maps.flatten(3).amin(-1) < 0.9).all()
    read = {tuple(row.flatten()[:3].tolist()) for text in texts for row in text}
    assert {tuple(cond.flatten()[:3].tolist()) for cond, _ in others[:1 if mode == "once" else 3]} <= read


@pytest.mark.parametrize("smaller", [1, 2])
def test_frames_of_a_film_with_sound(smaller, loras):
    """LTX-2 with its own node: each frame has its own mask in every window, and guides beside it have none, whatever
    their size."""
    case = replace(STARTED["LTX-2, small guides"], begin=partial(guided_with_sound, smaller=smaller))
    model, size = case.model(), (128, 7, 4, 4)
    layers = {key: shape for key, shape in shapes(model).items() if key == "proj_out"}

    def film(one) -> torch.Tensor:
        (cut,) = node("nodes_context_windows", "LTXVContextWindowsNode", model=one, context_length=9, context_overlap=8,
                      context_schedule="standard_static", fuse_method="pyramid", freenoise=False)
        return case.drawn(cut)[:, :prod(size)].unflatten(1, size)[:, :, :3]

    masks = torch.stack([torch.ones(4, 4), torch.zeros(4, 4), torch.eye(4)])
    spec = LoRASpec(loras(lora(layers, 1)), 0.8, 0)
    plain, alone = film(model), film(stock(model, [spec]))
    ours = merge(model, [replace(spec, mask=Mask(masks))])
    same(film(ours), plain + masks * (alone - plain), plain, 1e-4)
    assert record_of(ours).problems == []


MIXED = {"LoRAtorio": LoRAtorio, "CMLoRA": lambda strengths: CMLoRA(strengths, (True, False), caching=False)}


@pytest.mark.parametrize("family", OVER)
def test_predictions_are_mixed_by_the_masks_of_their_window(family, loras):
    """Guard: a window's predictions have as many frames, or pictures, as it, and masks those of all."""
    model, (dim, batch) = base(family), OVER[family]
    frames = torch.zeros(3 if dim else batch, 16, 16)
    frames[1:] = 1
    (spec, _) = pair(model, loras, LAST[family], (frames, None))
    ours, alone, plain = (sample(windowed(each, family), family, batch=batch, steps=1, cfg=1.0).transpose(0, dim)
                          for each in (composite(model, [spec]), stock(model, bare([spec])), model))
    same(ours[1:], alone[1:], plain[1:], 1e-4)
    assert (ours[:1] - plain[:1]).abs().max() < 1e-4 * (alone[:1] - plain[:1]).abs().max()


@pytest.mark.parametrize("make", ["LoRAtorio", "CMLoRA"])
def test_places_of_words_in_windows_where_predictions_are_mixed(make, loras):
    model = base("Wan")
    ours = windowed(routed(model, specs(model, loras), MIXED[make]), "Wan")
    assert torch.isfinite(sample(ours, "Wan", prompt("Wan"), steps=3)).all()
    assert record_of(ours).problems == [] and (places_of(ours)[0].maps.flatten(3).amin(-1) < 0.9).all()
