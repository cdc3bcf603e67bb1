"""The map of who acts where, as data and as a picture; how alike two pictures look to ComfyUI's vision models."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from lora_ensemble.host.compose.applied import Applied
from lora_ensemble.host.compose.composition import KEY, Composition
from lora_ensemble.host.look.layermap import GAP, LABELS, LINE, MAP, MARGIN, RATIOS, SHARES, LayerMap, draw, layer_map
from lora_ensemble.host.look.theme import DARK, LIGHT, rgb
from lora_ensemble.host.look.vision import similarity
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.selection import Contest, Selection
from lora_ensemble.nodes.klora import LoRAEnsembleESTLoRA
from lora_ensemble.nodes.selection import LoRAEnsembleLayerMap, LoRAEnsembleStyleDiscrepancy
from lora_ensemble.tests.comfy_testbed.vision import CLIP, DINOV2, SIGLIP, load_vision

from .builders import composite, shapes
from .models import base
from .test_selection import klora, method_of, pair


def made(count: int, sides=(True, False)) -> LayerMap:
    """A map of many layers: two of three sections of four layers a block, the first layer its subject's alone."""
    layers = tuple(f"{('down', 'up')[i * 2 // count]}_blocks.{i // 4}.to_{i % 4}" for i in range(count))
    ratios = (float("inf"), *np.geomspace(0.1, 10, count - 1).tolist()) if count else ()
    acting = np.array([[0 if r >= 1.5 * u + 0.5 else 1 for u in np.linspace(0, 1, MAP)] for r in ratios])
    return LayerMap("K-LoRA", ("a.safetensors", "b.safetensors"), sides, layers, ratios,
                    acting.reshape(count, MAP).astype(np.int64),
                    tuple((0, None if np.isinf(ratio) else 1) for ratio in ratios))


# --- data ---


@pytest.mark.parametrize("family", ["SD15", "SDXL", "Flux"])
def test_the_map_says_what_the_method_does(family, loras):
    composed = klora(base(family), pair(base(family), loras))
    method, found = method_of(composed), json.loads(layer_map(composed).as_json())
    assert [lora["side"] for lora in found["loras"]] == ["subject", "style"]
    ratios = dict(zip(method.contest.layers, method.contest.ratios, strict=True))
    assert {entry["layer"] for entry in found["layers"]} == set(ratios)
    for entry in found["layers"]:
        assert entry["ratio"] == pytest.approx(ratios[entry["layer"]], abs=1e-4)
        assert (entry["subject"], entry["style"]) == (0, 1)
        assert len(entry["acts"]) <= 2 and entry["acts"][0][0] == 0 and entry["acts"][-1][1] == 1
        flip = method.flip(ratios[entry["layer"]])
        assert entry["acts"][-1][2] == (0 if flip >= 1 else 1)
        if 0.01 < flip < 0.99:
            assert entry["acts"][0][1] == pytest.approx(flip, abs=3e-3)


def test_layers_come_in_the_order_of_the_model(loras):
    model = base("SD15")
    order = [name for name, _ in model.model.diffusion_model.named_modules() if name in shapes(model)]
    backwards = {name: shapes(model)[name] for name in reversed(order)}
    assert list(layer_map(klora(model, pair(model, loras, backwards))).layers) == order


def test_the_node_takes_a_composed_model_or_an_ensemble(loras):
    model, ensemble = base("SD15"), pair(base("SD15"), loras)
    image, text = LoRAEnsembleLayerMap.execute(klora(model, ensemble)).args
    assert image.ndim == 4 and image.dtype == torch.float32 and 0 <= image.min() < image.max() <= 1
    direct_image, direct = LoRAEnsembleLayerMap.execute(model, ensemble).args
    assert direct == text and torch.equal(direct_image, image)
    est = LoRAEnsembleESTLoRA.execute(model, ensemble, 1.5, 0.25, "energy").args[0]
    rule = json.loads(LoRAEnsembleLayerMap.execute(est).args[1])["method"]
    assert rule.endswith("more than 1.5 u + 0.75") and "at least 1.5 u + 0.5" in text  # who acts where both are equal


def test_the_map_finds_the_choice_under_another_method(loras):
    model, ensemble = base("SD15"), pair(base("SD15"), loras)
    composed = klora(klora(model, ensemble, alpha=0.3), ensemble)  # the last one of two
    assert "1.5 u + 0.5" in layer_map(composed).title
    assert layer_map(composite(composed, ensemble)).ratios == layer_map(composed).ratios


def test_a_model_without_a_choice_is_refused(loras):
    for model in (base("SD15"), composite(base("SD15"), pair(base("SD15"), loras))):
        with pytest.raises(ValueError, match="neither K-LoRA nor EST-LoRA is on this model. Connect"):
            LoRAEnsembleLayerMap.execute(model)


def test_one_sided_layers_have_no_ratio_and_the_text_is_json():
    model = base("SD15").clone()
    contest = Contest((1.0, 1.0), ("input_blocks.0.0", "out.2"), (0, None), (None, 1), (float("inf"), float("-inf")),
                      (True, False))
    model.set_attachments(KEY, Composition((Applied(Selection(contest, 1.5, 0.5), ("a", "b")), Applied(Merge(()), ()))))
    found = json.loads(layer_map(model).as_json())
    assert [(entry["ratio"], entry["subject"], entry["style"], entry["acts"]) for entry in found["layers"]] == [
        (None, 0, None, [[0.0, 1.0, 0]]), (None, None, 1, [[0.0, 1.0, 1]])]
    assert [lora["share"] for lora in found["loras"]] == [0.5, 0.5]


def test_names_keep_their_letters_in_the_text():
    """The picture's font may lack them."""
    text = replace(made(4), names=("角色/水墨.safetensors", "b.safetensors")).as_json()
    assert "角色/水墨.safetensors" in text and json.loads(text)["loras"][0]["name"] == "角色/水墨.safetensors"


# --- picture ---


@pytest.mark.parametrize("count", [0, 1, 12, 160, 282, 494, 794])
def test_every_layer_is_a_row_of_the_picture_in_its_loras_colours(count):
    of = made(count)
    picture = np.asarray(draw(of))
    row = max(2, min(24, 900 // max(count, 1)))
    assert picture.shape[0] < 2000 and picture.shape[1] < 1400  # fits a screen, scrolled at most once
    colours = [rgb(colour) for colour in of.colours()]
    left = MARGIN + LABELS
    column = [tuple(pixel) for pixel in picture[:, left + MAP // 2]]
    # The strip of shares lies above the map, after it the axis: the map is the last run of LoRA colours.
    coloured = [y for y, pixel in enumerate(column) if pixel in colours]
    rows = coloured[len(coloured) - row * count:]
    if not count:
        return
    top = rows[0]
    assert rows == list(range(top, top + row * count))
    for layer in range(0, count, max(count // 12, 1)):
        for x in (0, MAP // 3, MAP - 1):
            assert tuple(picture[top + row * layer, left + x]) == colours[of.acting[layer, x]]


def test_colours_tell_sides_and_loras_apart():
    of = made(12, (True, False, True, False, True))
    colours = [rgb(colour) for colour in of.colours()]
    assert len(set(colours)) == 5
    assert all((red > blue) == side for (red, _, blue), side in zip(colours, of.sides, strict=True))


def test_the_strip_shows_the_share_of_layers():
    of = made(60)
    picture, colours = np.asarray(draw(of)), [rgb(colour) for colour in of.colours()]
    x = MARGIN + LABELS + MAP // 4
    top = MARGIN + LINE * (3 + len(of.names)) - LINE // 2
    strip = Counter(tuple(pixel) for pixel in picture[top:top + SHARES - LINE, x])
    share = strip[colours[0]] / (strip[colours[0]] + strip[colours[1]])
    assert share == pytest.approx((of.acting[:, MAP // 4] == 0).mean(), abs=0.03) and 0 < share < 1
    assert strip[colours[0]] + strip[colours[1]] >= SHARES - LINE - 1  # a line between them
    assert tuple(picture[top, x]) == colours[0]


def test_dark_paper_changes_the_paper_alone():
    of = made(12)
    light, dark = (np.asarray(draw(of, theme)) for theme in (LIGHT, DARK))
    assert tuple(dark[2, 2]) == rgb(DARK.paper) and tuple(light[2, 2]) == rgb(LIGHT.paper)
    own = (light == rgb(of.colours()[0])).all(axis=-1)
    assert own.sum() > 1000 and (dark[own] == rgb(of.colours()[0])).all()


def test_bars_have_the_colour_of_the_lora_that_is_larger():
    """Of several subjects or styles, the one that competes at this layer."""
    rivals = ((0, 1), (2, 3), (2, 1), (0, 3))
    of = LayerMap("EST-LoRA", tuple("abcd"), (True, False, True, False), tuple(f"b.{i}.q" for i in range(4)),
                  (4.0, 4.0, 0.25, 0.25), np.zeros((4, MAP), dtype=np.int64), rivals)
    picture, colours = np.asarray(draw(of)), [rgb(colour) for colour in of.colours()]
    middle = MARGIN + LABELS + MAP + GAP + RATIOS // 2
    rows = [y for y in range(len(picture)) if tuple(picture[y, MARGIN + LABELS + MAP - 1]) == colours[0]][-4 * 24:]
    for i, (side, lora) in enumerate(((1, 0), (1, 2), (-1, 1), (-1, 3))):
        assert tuple(picture[rows[24 * i + 8], middle + side * 20]) == colours[lora]


def test_a_long_name_leaves_its_middle_out():
    of = made(12)
    picture = np.asarray(draw(replace(of, names=("a" * 300 + ".safetensors", "b.safetensors"))))
    legend = picture[MARGIN + 24:MARGIN + 48] < 200
    assert not legend[:, -MARGIN:].any(), "cut off at the edge"
    assert legend[:, -MARGIN - 12:].any(), "side and share come after the name, which takes all the room there is"


def test_a_section_without_room_has_no_line_through_another_ones_name():
    of = made(60)
    names = ("img_in", "time_in.in_layer", "txt_in", *of.layers[3:])
    picture = np.asarray(draw(replace(of, layers=names)))
    first = next(y for y, pixel in enumerate(picture[:, MARGIN + 100]) if tuple(pixel) == rgb(LIGHT.grid))
    lines = [y for y in range(first, first + 15) if tuple(picture[y, MARGIN + 100]) == rgb(LIGHT.grid)]
    assert lines == [first]


# --- vision ---


def pictures(seed: int, count: int = 1) -> torch.Tensor:
    return torch.rand(count, 40, 40, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", [CLIP, DINOV2, SIGLIP], ids=lambda config: config["model_type"])
def test_similarity_of_any_vision_model(config):
    vision = load_vision(config)
    a, b = pictures(1), pictures(2)
    (found,) = LoRAEnsembleStyleDiscrepancy.execute(vision, a, b).args
    tokens = [vision.encode_image(each)["last_hidden_state"].detach().double().numpy()[0] for each in (a, b)]
    one, two = (t.mean(axis=0) if config is SIGLIP else t[0] for t in tokens)
    assert found == pytest.approx(one @ two / np.linalg.norm(one) / np.linalg.norm(two), abs=1e-5)
    assert similarity(vision, a, a) == pytest.approx(1.0, abs=1e-5)
    assert similarity(vision, b, a) == pytest.approx(found, abs=1e-6) and found < 1 - 1e-4


@pytest.mark.parametrize(("broken", "name"), [(0, "subject_image"), (1, "style_image")])
def test_a_picture_of_no_numbers_is_named(broken, name):
    """A VAE that fails in half precision gives NaN; EST-LoRA would take it for a choice."""
    images = [pictures(1), pictures(2)]
    images[broken] = images[broken] * float("nan")
    with pytest.raises(ValueError, match=f"of {name}. If that picture is black, its VAE failed"):
        LoRAEnsembleStyleDiscrepancy.execute(load_vision(), *images)


def test_similarity_of_batches_is_the_mean_over_pairs():
    vision = load_vision()
    a, b = pictures(1, 2), pictures(2, 3)
    single = [similarity(vision, a[i:i + 1], b[j:j + 1]) for i in range(2) for j in range(3)]
    assert similarity(vision, a, b) == pytest.approx(np.mean(single), abs=1e-5)
