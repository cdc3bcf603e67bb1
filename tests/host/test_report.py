"""The report of a run: its maps pixel by pixel, its text, and what it says where there is nothing to show."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from lora_ensemble.engine.record import RunRecord
from lora_ensemble.host.compose.apply import apply_method, with_cache
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import Placed, places_of, record_of
from lora_ensemble.host.files.ensemble import Mask
from lora_ensemble.host.look.heat import COVER, GREY, RAMP, coloured, overlay
from lora_ensemble.host.look.panel import shown
from lora_ensemble.host.look.report import CELLS, NEVER, NOWHERE, PROBLEMS, WITHOUT, draw, maps_of
from lora_ensemble.host.look.sheet import WIDTH
from lora_ensemble.host.look.story import charts, costs_of, says
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.schedule import Uniform
from lora_ensemble.methods.switch import Switch
from lora_ensemble.nodes.klora import LoRAEnsembleKLoRA
from lora_ensemble.nodes.report import LoRAEnsembleReport
from PIL import ImageDraw

from .builders import composite, method, plain, sample, three
from .guidance_tools import extrapolated
from .models import base
from .test_leave_one_out import adaptive
from .test_routed import HALF, prompt, routed, specs

HOT, COLD = ((COVER * np.array(RAMP[k]) + (1 - COVER) * GREY).round() for k in (-1, 0))
FOUND = ({"lora": "a.safetensors", "words": ["ohwx woman with red hair"], "tokens": 5, "why": ""},
         {"lora": "b.safetensors", "words": [], "tokens": 0, "why": "its words are not in the prompt"})
NAMES = ("a.safetensors", "b.safetensors")
LATENT = {"samples": torch.zeros(1, 4, 8, 8)}


@pytest.mark.parametrize("make", [lambda loras: method(base("SD15"), three(base("SD15"), loras), Merge),
                                  lambda loras: extrapolated(base("SD15"), saving=0.3)])
def test_a_latent_of_no_known_run_is_said(make, loras):
    """Guard: the report was of the last run, whatever latent it got, and did not say so. Where there is one run alone,
    it is that one's, however its latent was changed."""
    model = make(loras)
    left = [sample(model, steps=2 + k) for k in range(2)]

    def said(latent: torch.Tensor) -> bool:
        text = LoRAEnsembleReport.execute(model, {"samples": latent}).args[2]
        return any("no run of it is known" in line for line in json.loads(text)["problems"])

    assert [said(each) for each in left] == [False, False] and said(left[0] + 1)
    once = make(loras)
    latent, model = sample(once, steps=2), once
    assert not said(latent) and not said(latent + 1)


def halves(pictures: int = 1, frames: int = 0) -> torch.Tensor:
    """The first LoRA on the left, the second everywhere."""
    maps = torch.zeros(pictures, 2, *([frames] if frames else []), 8, 12)
    maps[:, 0, ..., :6], maps[:, 1] = 1, 1
    return maps


def drawn(sheet, colour: np.ndarray) -> np.ndarray:
    """Where a sheet has a colour, [height, width]."""
    return (np.abs(np.asarray(sheet, dtype=np.float64) - colour) <= 1.5).all(axis=-1)


# --- heat ---


def test_the_ramp_grows_brighter_for_every_eye():
    colours = coloured(np.linspace(-0.5, 1.5, 101))
    assert (colours[0] == RAMP[0]).all() and (colours[-1] == RAMP[-1]).all()
    brightness = coloured(np.linspace(0, 1, 101)) @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(brightness) > 0).all()


def test_a_map_is_hot_where_it_is_1():
    sheet = np.asarray(overlay(halves()[0, 0].numpy(), (120, 80)))
    assert sheet.shape == (80, 120, 3)
    assert drawn(sheet, HOT)[:, :50].all() and drawn(sheet, COLD)[:, 70:].all()


def test_a_picture_shows_through_without_its_colours():
    picture = np.zeros((16, 24, 3), dtype=np.float32)
    picture[:8, :, 0] = 1
    red, black = np.asarray(overlay(np.ones((8, 12), dtype=np.float32), (24, 16), picture))[[2, 13], 5].astype(float)
    assert np.ptp(red - black) <= 1 and (red > black).all()
    picture[:] = np.nan
    assert (np.asarray(overlay(np.ones((8, 12), dtype=np.float32), (24, 16), picture)) == black).all()


# --- the sheet ---


def test_each_lora_has_its_map_at_its_place():
    cells = maps_of(Placed(NAMES, halves(), FOUND))
    assert [(cell.lora, cell.title, cell.words, cell.share) for cell in cells] == [
        (0, "a", '"ohwx woman with red hair"', 0.5),
        (1, "b", "everywhere: its words are not in the prompt", 1.0)]
    sheet = draw(RunRecord(["Merge"], [list(NAMES)], finished=True), [("Maps", cells)])
    hot, cold = (drawn(sheet, colour) for colour in (HOT, COLD))
    rows = np.flatnonzero(hot[:, WIDTH * 3 // 4])
    assert len(rows) > 250 and sheet.width == WIDTH
    middle = rows[len(rows) // 2]
    assert hot[middle, 40:200].all() and cold[middle, 300:480].all() and hot[middle, 530:980].all()


@pytest.mark.parametrize(("loras", "pictures"), [(1, 1), (1, 9), (2, 1), (2, 3), (2, 40), (3, 2), (5, 3), (40, 2)])
def test_sheets_are_legible_and_end(loras, pictures):
    names = tuple(f"{'long ' * i}{i}.safetensors" for i in range(loras))
    cells = maps_of(Placed(names, torch.rand(pictures, loras, 8, 8)))
    sheet = draw(RunRecord(["Merge"], [list(names)], problems=["a problem " * 40] * 20), [("Maps", cells)])
    assert sheet.width == WIDTH and 300 < sheet.height < 3600
    blank = (np.asarray(sheet) == 255).all(axis=-1)
    assert blank[:, :20].all() and blank[:, -20:].all() and blank[-10:].all()


def test_a_mask_by_hand_beats_words():
    cells = maps_of(Placed(NAMES, halves(), FOUND, (True, False)))
    assert [cell.words for cell in cells] == ['in its mask; its words: "ohwx woman with red hair"',
                                              "everywhere: its words are not in the prompt"]


def test_what_is_cut_is_said(monkeypatch):
    said = []
    write = ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text",
                        lambda pen, at, text, *rest, **more: (said.append(text), write(pen, at, text, *rest, **more)))
    cells = maps_of(Placed(NAMES, halves(20)))
    record = RunRecord(["Merge"], [list(NAMES)], problems=[f"problem {i}" for i in range(PROBLEMS + 3)])
    draw(record, [("Maps", cells[:4]), ("More", cells)])
    assert "Maps" in said and f"More; {4 + len(cells) - CELLS} of {len(cells)} maps are not shown" in said
    assert "- problem 0" in said and "- and 3 more in the text" in said and f"- problem {PROBLEMS}" not in said
    assert any("did not finish" in line for line in said)


def test_films_show_the_first_frame_and_the_middle_one():
    maps = halves(2, 5)
    maps[:, 0, 2] = 0.25
    images = torch.arange(34.0)[:, None, None, None].expand(-1, 4, 6, 3) / 34
    cells = maps_of(Placed(NAMES, maps), images)
    assert [cell.title for cell in cells[:4]] == [f"{name}, picture 1, frame {frame} of 5" for frame in (1, 3)
                                                  for name in "ab"]
    assert cells[2].map.max() == 0.25 and cells[0].map.max() == 1
    assert [round(float(cell.under.mean()) * 34) for cell in cells[::2]] == [0, 8, 17, 25]
    assert [cell.share for cell in cells[::2]] == [pytest.approx((0.5 * 4 + 0.25) / 5)] * 4


def test_one_picture_serves_all_maps():
    cells = maps_of(Placed(NAMES, halves(3)), torch.full((1, 4, 6, 3), 0.5))
    assert all(float(cell.under.mean()) == 0.5 for cell in cells)


# --- the node ---


def test_a_run_with_words(loras):
    model = base("SD15")
    ours, latent = routed(model, specs(model, loras)), {"samples": torch.zeros(2, 4, 8, 8)}
    sample(ours, "SD15", prompt(), steps=3, batch=2)
    out, image, text = LoRAEnsembleReport.execute(ours, latent, torch.rand(2, 64, 64, 3)).args
    assert out is latent and image.ndim == 4 and image.dtype == torch.float32 and 0 <= image.min() < image.max() <= 1
    found = json.loads(text)
    assert found["finished"] is True and found["problems"] == [] and found["methods"] == ["Merge"]
    assert [each["words"] for each in found["words"][0]] == [["ohwx cat"], ["sks dog"]]
    assert found["evaluations"]["plain"] == found["evaluations"]["whole"] and found["guidance"] is None
    more = ("words", "evaluations", "guidance")
    assert {key: value for key, value in found.items() if key not in more} == record_of(ours).as_dict()
    assert LoRAEnsembleReport.execute(ours, latent).args[1].shape == image.shape


def test_each_of_two_samplers_has_its_own_report(loras):
    """As a picture and its second pass: one MODEL is sampled twice, and the reports are drawn whenever the host comes
    to them. A latent that no run is known to have left is the last one's."""
    model = adaptive(routed(base("SD15"), specs(base("SD15"), loras)))
    first = sample(model, "SD15", prompt(), steps=3)
    second = sample(model, "SD15", prompt(), steps=2, latent=first, denoise=0.5, batch=1)
    for latent, steps in ((first, 3), (second, 2), (first.half(), 3), (torch.zeros_like(first), 2)):
        told = json.loads(LoRAEnsembleReport.execute(model, {"samples": latent}).args[2])
        assert len(told["steps"]) == len(told["guidance"]["steps"]) == steps and told["finished"]


BROKEN = {
    "LoRAtorio": lambda model, loras: method(model, three(model, loras), LoRAtorio),
    "CMLoRA online": lambda model, loras: method(model, three(model, loras), lambda s: CMLoRA(s, order="online")),
    "Routed": lambda model, loras: routed(model, specs(model, loras)),
    "Merge": lambda model, loras: method(model, three(model, loras), Merge),
    "Adaptive Guidance": lambda model, loras: adaptive(model),
    "extrapolated": lambda model, loras: extrapolated(model),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_run_without_numbers_has_a_report(kind, loras):
    """What a user looks for who got a black picture: it says so, and is JSON, as the panel's data are."""
    model = BROKEN[kind](base("SD15"), loras)
    broken = prompt()
    broken[0][0] = torch.full_like(broken[0][0], float("nan"))
    sample(model, "SD15", broken, steps=6)
    _, image, text = LoRAEnsembleReport.execute(model, LATENT).args

    def refused(constant: str) -> None:
        raise AssertionError(constant)

    told = json.loads(text, parse_constant=refused)
    record = record_of(model)
    assert torch.isfinite(image).all() and len((told if record else told["guidance"])["steps"]) == 6
    if record is not None:
        assert ["are no numbers" in line for line in told["problems"]] == [True]
        json.dumps(shown(record, record.methods, ["1"], costs_of(record, None), 6, True), allow_nan=False)


def test_a_run_with_masks_and_another_method(loras):
    model = base("SD15")
    ensemble = specs(model, loras, mask=Mask(HALF))
    ours = apply_method(model, None, tuple(ensemble), plain(lambda s: Switch(s, 1)), "Switch LoRAs")[0]
    sample(ours, "SD15", steps=2)
    (placed,) = places_of(ours)
    assert [cell.words for cell in maps_of(placed)] == ["in its mask"] * 2
    assert json.loads(LoRAEnsembleReport.execute(ours, LATENT).args[2])["words"] == [[]]


@pytest.mark.parametrize("case", ["never", "without", "nowhere"])
def test_nothing_to_show_is_a_picture_and_a_text(case, loras):
    """A red node would keep the latent from what comes behind it."""
    model = base("SD15")
    ours = {"never": lambda: routed(model, specs(model, loras)), "without": lambda: model,
            "nowhere": lambda: composite(model, tuple(specs(model, loras)))}[case]()
    if case == "nowhere":
        sample(ours, "SD15", steps=1)
    latent, image, text = LoRAEnsembleReport.execute(ours, LATENT).args
    assert latent is LATENT and image.shape[2] == WIDTH and image.min() < 0.5
    found = json.loads(text)
    wanted = {"never": [NEVER], "without": [WITHOUT], "nowhere": []}[case]
    assert found["problems"] == wanted and (NOWHERE and found.get("words") == ([] if case == "nowhere" else None))


# --- the story of a run ---


@pytest.mark.parametrize("make", [Composite, lambda s: CMLoRA(s, ("subject",) * 3), Merge,
                                  lambda s: Switch(s, 3)],
                         ids=["composite", "cmlora", "merge", "switch"])
def test_what_was_saved_is_told_against_the_plain_way(make, loras):
    """The slow reference: the same method sampled without a cache and with full guidance."""
    model, steps = base("SD15"), 6
    plainly = method(model, three(model, loras), make)
    sample(plainly, steps=steps, batch=2)
    plain_rows = sum(step.rows for step in record_of(plainly).steps)
    ours = with_cache(adaptive(plainly), CacheSpec(schedule=Uniform(2)))
    sample(ours, steps=steps, batch=2)
    told = json.loads(LoRAEnsembleReport.execute(ours, LATENT).args[2])
    costs = told["evaluations"]
    assert costs["plain"] == plain_rows and costs["whole"] + costs["cached"] == sum(s["rows"] for s in told["steps"])
    assert costs["left_out"] > 0 and costs["cached"] > 0
    assert costs["saved"] == pytest.approx(costs["left_out"] / plain_rows, abs=1e-4)
    assert told["guidance"]["steps"][-1]["negative"] == 0


def test_guidance_alone_has_a_report():
    model = adaptive(base("SD15"))
    sample(model, steps=4)
    _, image, text = LoRAEnsembleReport.execute(model, LATENT).args
    told = json.loads(text)
    assert told["steps"] == [] and told["evaluations"]["plain"] == told["guidance"]["full"] == 8
    assert told["evaluations"]["left_out"] > 0 and image.shape[1] > 300


@pytest.mark.parametrize("kind", ["LoRAtorio", "K-LoRA", "CMLoRA"])
def test_who_led_is_what_the_method_says(kind, loras):
    model = base("SD15")
    ensemble = three(model, loras)
    if kind == "K-LoRA":
        ours = LoRAEnsembleKLoRA.execute(model, ensemble, 1.5, -1.0, "s", "paper", 0, "as applied").args[0]
    else:
        ours = method(model, ensemble, LoRAtorio if kind == "LoRAtorio" else lambda s: CMLoRA(s, ("subject",) * 3))
    sample(ours, steps=4)
    record, shares = record_of(ours), np.array(says(record_of(ours), 0))
    assert shares.shape == (3, 4) and np.allclose(shares.sum(axis=0), 1)
    (notes,) = {name for step in record.steps for name in step.notes}
    for k, step in enumerate(record.steps):
        said = step.notes[notes]
        if kind == "CMLoRA":
            assert shares[:, k].argmax() == said["led"] and shares[said["led"], k] == pytest.approx(said["weight"])
        else:
            given = np.array(said["layers" if kind == "K-LoRA" else "weights"], dtype=float)
            assert np.allclose(shares[:, k], given / given.sum())
    assert len(charts(record, None)) == 2
