"""LoRA Spectrum through the real host: each LoRA alone, its class, and what comes out of the node."""

from __future__ import annotations

from dataclasses import replace

import comfy.sample
import comfy.utils
import numpy as np
import pytest
import torch
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.host.look import spectrum
from lora_ensemble.host.look.spectrum import Profile, Sampling, plot, profiles, report, with_measured_roles
from lora_ensemble.host.look.theme import LIGHT, rgb
from lora_ensemble.kernels.spectrum import high_share, radial_amplitude, radial_bins
from lora_ensemble.nodes.spectrum import LoRAEnsembleSpectrum
from lora_ensemble.tests.devices import Plain

from .builders import lora, merge, shapes, three
from .models import FAMILIES, base


def sampling(family: str = "SD15", size: int = 8, steps: int = 3) -> Sampling:
    kind = FAMILIES[family]
    return Sampling(kind.cond(11), kind.cond(12), torch.zeros_like(kind.noise(1, size)), 1, steps, 3.0, "euler",
                    "normal")


def test_the_latent_of_each_lora_alone_is_measured(loras):
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    found = profiles(model, (*ensemble, LoRASpec("muted", 0.0, 1.0)), sampling())
    assert [profile.name for profile in found] == ["base model", *(spec.name for spec in ensemble)]
    bins, how = radial_bins(8, 8), sampling()
    noise = comfy.sample.prepare_noise(how.latent, how.seed, None)
    for profile, alone in zip(found, (model, *(merge(model, (spec,)) for spec in ensemble)), strict=True):
        seen = []
        with torch.inference_mode():
            comfy.sample.sample(alone, noise, 3, 3.0, "euler", "normal", how.positive, how.negative, how.latent, seed=1,
                                callback=lambda step, x0, x, total, seen=seen: seen.append(x.clone()))
        want = [high_share(radial_amplitude(x, bins)).item() for x in seen]
        assert profile.shares == pytest.approx(want, rel=1e-4)
        late = sum(profile.shares[1:]) / sum(found[0].shares[1:]) - 1
        assert profile.change == pytest.approx(late, abs=1e-6)
    assert len({profile.shares for profile in found}) == 4


def test_masks_are_said_to_be_of_no_use(loras, caplog):
    """Guard: they were taken off, and nothing was said; strengths and windows hold."""
    model, (one, *_), how = base("SD15"), three(base("SD15"), loras), sampling()
    given = {"positive": how.positive, "negative": how.negative, "latent_image": {"samples": how.latent}, "seed": 1,
             "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}
    tables = []
    for mask in (None, Mask(torch.zeros(1, 8, 8))):
        caplog.clear()
        tables.append(LoRAEnsembleSpectrum.execute(model, (replace(one, mask=mask),), **given).args[1])
        assert ["masks are not used here" in line for line in caplog.messages] == [True] * (mask is not None)
    assert tables[0] == tables[1]


def test_progress_counts_the_steps_of_all_pictures(loras, monkeypatch):
    model, ensemble, how, seen = base("SD15"), three(base("SD15"), loras), sampling(), []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update", lambda bar, value: seen.append((value, bar.total)))
    LoRAEnsembleSpectrum.execute(model, (*ensemble, LoRASpec("muted", 0.0, 1.0)), how.positive, how.negative,
                                 {"samples": how.latent}, 1, 3, 3.0, "euler", "normal")
    assert seen == [(1, 3 * 4)] * 3 * 4


def test_a_model_that_predicts_no_numbers_is_named(loras):
    model, given = base("SD15"), sampling()
    given.positive[0][0] = torch.full_like(given.positive[0][0], float("nan"))
    with pytest.raises(ValueError, match="LoRA Spectrum: with the base model the model predicts values that are no"):
        profiles(model, three(model, loras), given)


def test_a_file_of_no_use_is_refused_before_anything_is_sampled(loras, monkeypatch):
    wrong = LoRASpec(loras(lora(shapes(base("Flux")), 1)), 1.0, 0.0)
    monkeypatch.setattr(comfy.sample, "sample", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=wrong.name):
        profiles(base("SD15"), (*three(base("SD15"), loras), wrong), sampling())


def test_on_a_device_without_float64(loras, monkeypatch):
    model, ensemble = base("SD15"), three(base("SD15"), loras)[:1]
    found = profiles(model, ensemble, sampling())
    monkeypatch.setattr(spectrum, "high_share", lambda amplitude: Plain(high_share(amplitude)))
    assert profiles(model, ensemble, sampling()) == found


@pytest.mark.parametrize(("family", "size"), [("SD15", 12), ("Flux", 8), ("Wan", 8)])
def test_every_shape_of_latent(family, size, loras):
    kind = FAMILIES[family]
    how = sampling(family, size, steps=2)
    name = loras(lora(shapes(base(family), lambda layer: "block" in layer), 1, 4))
    plot, text, ensemble = LoRAEnsembleSpectrum.execute(
        base(family), (LoRASpec(name, 0.7, 0.0),), how.positive, how.negative, {"samples": how.latent}, 1, 2, 3.0,
        "euler", "normal").args
    assert plot.shape[0] == 1 and plot.shape[3] == 3 and 0 <= plot.min() < plot.max() <= 1
    assert name in text and "base model" in text and [spec.name for spec in ensemble] == [name]
    assert kind.name == family


FOUND = [Profile("base model", "", (0.8, 0.4)), Profile("forest", "auto", (0.8, 0.2), -0.5),
         Profile("robot", "auto", (0.8, 0.5), 0.25), Profile("sea", "style", (0.8, 0.3), -0.25),
         Profile("town", "background", (0.8, 0.4), 0.0)]


def test_only_roles_that_nobody_chose_are_filled_in():
    specs = tuple(LoRASpec(profile.name, 1.0, 1.0, profile.role) for profile in FOUND[1:])
    assert [spec.role for spec in with_measured_roles(specs, FOUND)] == ["background", "auto", "style", "background"]


def test_two_rows_of_one_file_have_a_class_each(loras):
    """Guard: both went by their file, whose name both lines had. One that is off, or always on, is not measured."""
    specs = [LoRASpec("forest", strength, 1.0, role) for strength, role in (
        (0.0, "auto"), (1.0, "auto"), (1.0, "always"), (-0.2, "auto"))]
    assert [spec.role for spec in with_measured_roles(specs, FOUND[:3])] == ["auto", "background", "always", "auto"]
    name = three(base("SD15"), loras)[0].name
    found = profiles(base("SD15"), [LoRASpec(name, 0.8, 0.0), LoRASpec(name, -0.4, 0.0)], sampling())
    assert [profile.name for profile in found[1:]] == [f"{name} (row 1)", f"{name} (row 2)"]


def test_the_report_says_where_role_and_measurement_differ():
    lines = {profile.name: next(line for line in report(FOUND).splitlines() if profile.name in line)
             for profile in FOUND}
    assert "-50 %" in lines["forest"] and "leads late" in lines["forest"] and "agree" not in lines["forest"]
    assert "leads early" in lines["robot"]
    assert "does not agree" in lines["sea"]
    assert "unsure" in lines["town"] and "agree" not in lines["town"]


def test_what_may_be_chance_is_no_class():
    """A change counts where it is beyond the margin and beyond two standard errors; else the role stands."""
    small, shaky, sure = (Profile("a", "auto", (0.8,), change, error)
                          for change, error in ((-0.09, 0.01), (-0.3, 0.2), (-0.3, 0.1)))
    assert [profile.low for profile in (small, shaky, sure)] == [False, False, True]
    assert [profile.unsure for profile in (small, shaky, sure)] == [True, True, False]
    assert Profile("a", "auto", (0.8,), 0.3, 0.1).unsure is False


def test_a_batch_tells_the_error_of_the_change(loras):
    model, ensemble = base("SD15"), three(base("SD15"), loras)[:1]
    kind = FAMILIES["SD15"]
    how = replace(sampling(), latent=torch.zeros_like(kind.noise(3)))
    ground, found = profiles(model, ensemble, how)
    noise, late = comfy.sample.prepare_noise(how.latent, how.seed, None), []
    for one in (merge(model, ensemble), model):
        seen = []
        with torch.inference_mode():
            comfy.sample.sample(one, noise, 3, 3.0, "euler", "normal", how.positive, how.negative, how.latent, seed=1,
                                callback=lambda step, x0, x, total, seen=seen: seen.append(x.clone()))
        shares = torch.stack([high_share(radial_amplitude(x, radial_bins(8, 8))) for x in seen]).double()
        late.append(shares[1:].mean(dim=0))
    own, other = (shares.tolist() for shares in late)
    ratio = sum(own) / sum(other)
    spread = sum((a - ratio * b) ** 2 for a, b in zip(own, other, strict=True)) / 2
    assert found.error == pytest.approx((spread / 3) ** 0.5 / (sum(other) / 3), rel=1e-3) and found.error > 0
    assert found.change == pytest.approx(ratio - 1, abs=1e-5)
    assert ground.change == ground.error == 0
    assert "(error " in report([ground, found]) and "One picture only" not in report([ground, found])
    assert "One picture only" in report(FOUND)
    (alone,) = profiles(model, [replace(ensemble[0], role="always")], how)  # no other LoRA, and so no change
    assert alone.error == 0 and "One picture only" not in report([alone])


def test_an_empty_ensemble_is_refused():
    with pytest.raises(ValueError, match="LoRA Spectrum: the ensemble is empty"):
        profiles(base("SD15"), (), sampling())


def test_the_plot_shows_every_line():
    picture = (plot(FOUND)[0].numpy() * 255).round().astype(int)
    for colour in (LIGHT.neutral, *LIGHT.colours[:4]):
        drawn = (np.abs(picture - rgb(colour)) < 40).all(axis=-1)
        assert drawn[:, 100:].any(axis=0).sum() > 150, colour  # more than its legend; one curve may hide another
    one = plot([Profile("base model", "", (0.5,))])
    assert one.shape[2] == picture.shape[1] and torch.isfinite(one).all()


def test_cfg_is_as_fine_as_a_sampler_s():
    """Guard: a page made 1.8 of 1.75."""
    (cfg,) = [part for part in LoRAEnsembleSpectrum.define_schema().inputs if part.id == "cfg"]
    assert cfg.round == 0.01
