"""Models that make picture and sound together: ComfyUI packs both latents into one, and every part is mixed as a
latent of its own. The classes are those of 0.28.0; a release that lacks them skips."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.context_windows
import pytest
import torch
from lora_ensemble.host.compose.composition import KEY, outcome_of, record_of
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.host.guidance.apply import guidance_record_of
from lora_ensemble.host.look.spectrum import Sampling, profiles
from lora_ensemble.kernels.nested import pack_weights, unpack
from lora_ensemble.kernels.spectrum import high_share, radial_amplitude, radial_bins
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.nodes.calibration import LoRAEnsembleCalibrateGuidance
from lora_ensemble.nodes.guidance import LoRAEnsembleAdaptiveGuidance
from lora_ensemble.tests.test_patches import reference_cosine, reference_softmin
from torch import Tensor

from .builders import composite, lora, merge, method, same, sample, shapes
from .caches import cached, steps_of
from .models import FAMILIES, Family, base
from .watched import watched

nested = pytest.importorskip("comfy.nested_tensor", reason="this ComfyUI has no packed latents")


@dataclass(frozen=True)
class Packed(Family):
    """A family with several latents: `parts` [C, *size] each."""

    parts: tuple[tuple[int, ...], ...] = ()

    def noise(self, batch: int = 1, size: int = 8, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        return nested.NestedTensor([torch.randn(batch, *part, generator=g) for part in self.parts])


FILM, SOUND = (16, 3, 6, 4), (8, 6, 16)
LTXAV = Packed("LTXAV", "LTXAV", dict(
    image_model="ltxav", in_channels=16, cross_attention_dim=48, attention_head_dim=24, num_attention_heads=2,
    caption_channels=24, num_layers=6, audio_in_channels=128, audio_cross_attention_dim=24, audio_attention_head_dim=12,
    audio_num_attention_heads=2, audio_out_channels=128, connector_attention_head_dim=12,
    connector_num_attention_heads=2, connector_num_layers=1), 16, 48, parts=(FILM, SOUND))
SPLAT = Packed("TripoSplat", "TripoSplat", dict(
    image_model="triposplat", q_token_length=12, in_channels=16, model_channels=32, cond_channels=24, out_channels=16,
    num_blocks=2, num_refiner_blocks=1, num_head_channels=16, cond2_channels=8), 16, 24, parts=((12, 16), (1, 5)))


@pytest.fixture(params=["LTXAV", "TripoSplat"])
def family(request, monkeypatch) -> str:
    return register(request.param, monkeypatch)


@pytest.fixture
def film(monkeypatch):
    return base(register("LTXAV", monkeypatch))


def register(name: str, monkeypatch) -> str:
    monkeypatch.setitem(FAMILIES, name, {"LTXAV": LTXAV, "TripoSplat": SPLAT}[name])
    return name


def drawn(model, family: str = "LTXAV", **options) -> list[Tensor]:
    """What a KSampler makes of an empty latent, part by part."""
    empty = FAMILIES[family].noise(options.get("batch", 1))
    latent = nested.NestedTensor([torch.zeros_like(part) for part in empty.unbind()])
    return sample(model, family, latent=latent, **options).unbind()


def files(model, loras, count: int = 3) -> list[LoRASpec]:
    layers = shapes(model, lambda name: name.startswith(("transformer_blocks.", "blocks.")))
    return [LoRASpec(loras(lora(layers, seed, 4)), 0.7, 0) for seed in range(1, count + 1)]


def loratorio(model, ensemble, **options):
    return method(model, ensemble, lambda strengths: LoRAtorio(strengths, **options))


def cmlora(model, ensemble, **options):
    return method(model, ensemble, lambda strengths: CMLoRA(strengths, **options))


def same_parts(ours, reference, plain, tolerance: float = 1e-3) -> None:
    for found, wanted, ground in zip(ours, reference, plain, strict=True):
        same(found, wanted, ground, tolerance)


def test_features_are_those_of_a_pass(film, loras):
    """Two guidances of LTX's, each an evaluation more with parts of the model switched off, of which one begins later.
    What they add up to does not go by their order. Guard: the options in `identity_of_pass`, without which the first
    one's features are the second one's once it is the second."""
    nodes = pytest.importorskip("comfy_extras.nodes_lt")
    if not hasattr(nodes, "LTXVSpatioTemporalGuidance"):
        pytest.skip("this ComfyUI has no such guidance")

    def late(model):
        return nodes.LTXVSpatioTemporalGuidance.execute(model, 2.0, "1,2,3", 0.2, 1.0).args[0]

    def ever(model):
        return nodes.LTXVModalityGuidance.execute(model, 3.0, 0.0, 1.0).args[0]

    model = cached(merge(film, files(film, loras)), interval=4)
    same_parts(drawn(ever(late(model)), steps=4, cfg=1.0), drawn(late(ever(model)), steps=4, cfg=1.0),
               drawn(film, steps=4, cfg=1.0), 1e-4)


def test_the_layout_is_the_hosts():
    import comfy.utils

    parts = [part for part in LTXAV.noise(2).unbind()]
    packed, found = comfy.utils.pack_latents(parts)
    assert [tuple(shape[1:]) for shape in found] == [FILM, SOUND]
    assert all(torch.equal(a, b) for a, b in zip(unpack(packed, (FILM, SOUND)), parts, strict=True))
    weights = [part[None, :, :1] for part in parts]
    full = comfy.utils.pack_latents([w[0].expand(-1, shape[0], *w.shape[3:])
                                     for w, shape in zip(weights, (FILM, SOUND), strict=True)])[0]
    assert torch.equal(pack_weights(weights, (FILM, SOUND))[0], full)


@pytest.mark.parametrize("make", [lambda m, e: loratorio(m, e, recenter_lambda=1.0),
                                  lambda m, e: loratorio(m, e, recenter_lambda=1.0, top_k=2, upsampling="bilinear"),
                                  lambda m, e: cmlora(m, e, order="online"), composite],
                         ids=["LoRAtorio", "of a pool", "CMLoRA", "Composite"])
def test_identical_loras_are_the_single_lora(make, family, loras):
    model = base(family)
    one = files(model, loras, 1)
    plain, single = drawn(model, family, steps=3), drawn(merge(model, one), family, steps=3)
    same_parts(drawn(make(model, one * 3), family, steps=3), single, plain)
    same_parts(drawn(make(model, one), family, steps=3), single, plain)


def reference(step, call, kappa: float, b: int) -> list[Tensor]:
    """Weights of picture b, per part [N, 1, *size], by the formulas in float64: video frame by frame."""
    vectors = [unpack(call.x - p, call.parts) for p in call.predictions[0]]
    out = []
    for k in range(len(call.parts)):
        base, loras = vectors[-1][k][b].double(), torch.stack([v[k][b] for v in vectors[:-1]]).double()
        frames = base.unbind(1) if base.ndim == 4 else (base,)
        planes = loras.unbind(2) if base.ndim == 4 else (loras,)
        found = []
        for frame, others in zip(frames, planes, strict=True):
            w = reference_softmin(reference_cosine(frame.numpy(), others.numpy(), 2), kappa * step.index)
            found.append(torch.from_numpy(w.repeat(2, 1).repeat(2, 2)[:, :frame.shape[-2], :frame.shape[-1]]))
        out.append(torch.stack(found, dim=1) if base.ndim == 4 else found[0])
    return out


def test_each_part_has_weights_of_its_own(film, loras):
    """Of the real model's predictions, two pictures in a batch; they sum to 1 at every element."""
    ours, seen = watched(film, files(film, loras), kappa=2.0)
    drawn(ours, steps=3, batch=2)
    assert [step.index for step, *_ in seen] == [0, 1, 2]
    for step, call, weights in seen:
        assert call.parts == (FILM, SOUND) and call.x.shape[1] == 1
        torch.testing.assert_close(weights.sum(dim=0), torch.ones_like(call.x), atol=1e-5, rtol=0)
        for b in range(2):
            for part, want in zip(unpack(weights, call.parts), reference(step, call, 2.0, b), strict=True):
                for channel in (0, -1):
                    torch.testing.assert_close(part[:, b, channel].double(), want, atol=1e-4, rtol=0)
    film_share, sound_share = record_of(ours).steps[-1].notes["Watched"]["weights"]
    assert sum(film_share) == pytest.approx(1, abs=1e-5) and sum(sound_share) == pytest.approx(1, abs=1e-5)
    assert film_share != pytest.approx(sound_share, abs=1e-4)


@pytest.mark.parametrize("make", [loratorio, composite])
def test_masks_confine_loras_in_the_video(make, film, loras):
    """One step, no guidance: the left half of every frame is one LoRA's, the right half the other's, and the sound is
    what it is without masks."""
    left = torch.zeros(1, 48, 32)
    left[..., :16] = 1
    plain, ensemble = files(film, loras, 2), []
    for spec, mask in zip(plain, (left, 1 - left), strict=True):
        ensemble.append(LoRASpec(spec.name, spec.strength_model, 0, mask=Mask(mask)))
    once = dict(steps=1, cfg=1.0)
    video, sound = drawn(masked := make(film, ensemble), **once)
    ground, free = drawn(film, **once), drawn(make(film, plain), **once)
    for columns, spec in ((slice(0, 2), plain[0]), (slice(2, 4), plain[1])):
        alone = drawn(merge(film, (spec,)), **once)[0]
        same(video[..., columns], alone[..., columns], ground[0][..., columns])
    same(sound, free[1], ground[1])
    assert not record_of(masked).problems


def test_a_mask_without_a_place_is_named(monkeypatch, loras):
    """The latent of TripoSplat is a sequence: there is no region to confine a LoRA to."""
    model = base(register("TripoSplat", monkeypatch))
    spec, other = files(model, loras, 2)
    masked = loratorio(model, (LoRASpec(spec.name, 0.7, 0, mask=Mask(torch.ones(1, 8, 8))), other))
    found = drawn(masked, "TripoSplat", steps=1)
    problem, = record_of(masked).problems
    assert spec.name in problem and "no height and width" in problem
    for part, want in zip(found, drawn(loratorio(model, (spec, other)), "TripoSplat", steps=1), strict=True):
        assert torch.equal(part, want)


def test_the_spectrum_is_that_of_the_video(film, loras):
    """CMLoRA's online order and LoRA Spectrum measure its frames."""
    ours = cmlora(film, files(film, loras), order="online")
    drawn(ours, steps=2, seed=1)
    video = LTXAV.noise(1, seed=1).unbind()[0]
    want = high_share(radial_amplitude(video, radial_bins(*FILM[-2:]))).item()
    assert record_of(ours).steps[0].notes["CMLoRA"]["high_share"] == pytest.approx(want, rel=1e-3)
    latent = nested.NestedTensor([torch.zeros_like(part) for part in LTXAV.noise(1).unbind()])
    found = profiles(film, files(film, loras, 1), Sampling(LTXAV.cond(11), LTXAV.cond(12), latent, 1, 2, 3.0, "euler",
                                                           "normal"))
    import comfy.sample

    drawn_noise = comfy.sample.prepare_noise(latent, 1, None).unbind()[0]
    want = high_share(radial_amplitude(drawn_noise, radial_bins(*FILM[-2:]))).item()
    assert found[0].shares[0] == pytest.approx(want, rel=1e-3) and len(found) == 2


def test_context_windows_have_parts_of_their_own(film, loras):
    windows, model = comfy.context_windows, film.clone()
    model.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule("standard_static"), windows.get_matching_fuse_method("pyramid"),
        context_length=2, context_overlap=1, dim=2)
    one = files(film, loras, 1)
    ours, seen = watched(model, one * 3, recenter_lambda=1.0)
    same_parts(drawn(ours, steps=2), drawn(merge(model, one), steps=2), drawn(model, steps=2))
    film_of, sound_of = ({call.parts[k] for _, call, _ in seen} for k in (0, 1))
    # A window of later frames brings the one before it along.
    assert len(seen) == 4 and sound_of == {(8, 4, 16)} and film_of == {(16, 2, 6, 4), (16, 3, 6, 4)}


def test_the_branch_cache(film, loras):
    model = composite(film, files(film, loras))
    plain = drawn(model, steps=4)
    for found, want in zip(drawn(cached(model, 1), steps=4), plain, strict=True):
        assert torch.equal(found, want)
    reusing = cached(model)
    for found, want in zip(drawn(reusing, steps=4), plain, strict=True):
        assert 0 < ((found - want).norm() / want.norm()).item() < 0.5
    assert [step["reused"] for step in steps_of(reusing)] == [0, 6, 6, 0]
    assert not record_of(reusing).problems and film.get_attachment(KEY) is None


def test_guidance_is_calibrated(film):
    """A path is the same whatever it is batched with, and both parts of it count."""
    kind = FAMILIES["LTXAV"]
    alone, together = (LoRAEnsembleCalibrateGuidance.execute(
        film, kind.cond(11), kind.cond(12), {"samples": kind.noise()}, 1, 2, batch, 4, 3.0, "euler", "normal", 1.0,
        False, False).args[0] for batch in (1, 2))
    for space, curves in alone.found.gamma.items():
        assert curves.shape == (2, 4)
        torch.testing.assert_close(together.found.gamma[space], curves, rtol=1e-4, atol=1e-5)
    guided = LoRAEnsembleAdaptiveGuidance.execute(film, "LinearAG", 0.99, 0.3, "noise", "per picture", 1, 0, "late",
                                                  coeffs=alone).args[0]
    sample(guided, "LTXAV", steps=4, latent=kind.noise(), seed=1)
    assert [step.predicted for step in guidance_record_of(guided).steps] == [0, 1, 0, 0]


def test_the_report_is_that_of_the_run_that_made_the_latent(film, loras):
    """Each of two runs of one MODEL is told of by its own latent, of methods and of guidance."""
    kind = FAMILIES["LTXAV"]
    ours = LoRAEnsembleAdaptiveGuidance.execute(
        merge(film, files(film, loras)), "threshold", 1.1, 0.3, "noise", "per picture", 1, 0, "late").args[0]
    first, second = (sample(ours, "LTXAV", steps=steps, latent=kind.noise(2), seed=steps, batch=2) for steps in (2, 3))
    for latent, steps in ((first, 2), (second, 3)):
        assert len(outcome_of(ours, latent).record.steps) == len(guidance_record_of(ours, latent).steps) == steps
