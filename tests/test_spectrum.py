"""The radial spectrum against a transcription in numpy float64, for every size of latent."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from lora_ensemble.kernels.spectrum import high_share, late_change, radial_amplitude, radial_bins
from lora_ensemble.methods.frequency import frequency_class

TOLERANCE = 2e-5
"""The kernel computes in fp32; the reference reads the same, possibly rounded, input."""


def reference(x: np.ndarray) -> np.ndarray:
    """A^ of a map [h, w]: ring by ring over the shifted spectrum."""
    h, w = x.shape
    amplitude = np.abs(np.fft.fftshift(np.fft.fft2(x)))
    ky, kx = np.meshgrid(np.fft.fftshift(np.fft.fftfreq(h, 1 / h)), np.fft.fftshift(np.fft.fftfreq(w, 1 / w)),
                         indexing="ij")
    unit = min(h, w)
    radius = np.floor(np.sqrt((kx * (unit / w)) ** 2 + (ky * (unit / h)) ** 2)).astype(int)
    rings = np.array([amplitude[radius == r].mean() for r in range(radius.max() + 1)])
    return rings / rings.max()


def share(profile: np.ndarray, h: float = 0.2) -> float:
    return profile[math.ceil(h * (len(profile) - 1)):].mean()


def profile(x: torch.Tensor) -> torch.Tensor:
    return radial_amplitude(x, radial_bins(*x.shape[-2:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (9, 9), (8, 13), (17, 12), (64, 64), (96, 128), (160, 160), (31, 160)],
                         ids=str)
def test_amplitude_is_the_formula(size, dtype):
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = profile(x)
    for b in range(2):
        want = reference(x[b].double().mean(dim=0).numpy())
        np.testing.assert_allclose(got[b].numpy(), want, atol=TOLERANCE)
        assert high_share(got)[b].item() == pytest.approx(share(want), abs=TOLERANCE)


def test_on_squares_it_is_the_papers_radius():
    """int(sqrt(kx^2 + ky^2)); 0.2 R_max is 9 of 45 for a 64 x 64 latent."""
    x = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(1))
    amplitude = np.abs(np.fft.fftshift(np.fft.fft2(x[0].double().mean(dim=0).numpy())))
    k = np.arange(64) - 32
    radius = np.sqrt(k[:, None] ** 2 + k[None] ** 2).astype(int)
    rings = np.array([amplitude[radius == r].mean() for r in range(46)])
    got = profile(x)[0].numpy()
    np.testing.assert_allclose(got, rings / rings.max(), atol=TOLERANCE)
    assert high_share(profile(x)).item() == pytest.approx((rings / rings.max())[9:].mean(), abs=TOLERANCE)


@pytest.mark.parametrize("h", range(8, 161))
def test_no_bin_is_empty_and_every_share_is_finite(h):
    """Every side from 8 to 160, square, tall and wide."""
    for w in {h, 8, 168 - h}:
        bins = radial_bins(h, w)
        assert torch.isfinite(bins).all()
        torch.testing.assert_close(bins.sum(dim=0), torch.ones(bins.shape[1]), atol=1e-5, rtol=0)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = high_share(radial_amplitude(torch.randn(1, 4, h, w).to(dtype), bins))
            assert found.dtype == torch.float32 and 0 < found.item() <= 1


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (128, 32)], ids=str)
def test_equal_frequencies_fall_into_one_bin_on_any_latent(size):
    """Fault of the released code: on latents that are not square, distances of raw indexes mix frequencies."""
    h, w = size
    for period in (4, 8, 16):
        tall, wide = (torch.cos(2 * math.pi * torch.arange(side) / period) for side in size)
        waves = tall[:, None].expand(1, 4, h, w), wide[None].expand(1, 4, h, w)
        assert [profile(wave).argmax().item() for wave in waves] == [min(size) // period] * 2


def test_the_transform_stays_on_its_device():
    """Fault of the released code: in every step the latent goes to the CPU and is transformed there."""
    x = torch.empty(1, 4, 64, 64, device="meta")
    assert high_share(radial_amplitude(x, radial_bins(64, 64, x.device))).device.type == "meta"


def test_a_constant_has_no_high_frequencies_and_noise_has_all():
    assert high_share(profile(torch.full((1, 4, 32, 32), 3.0))).item() < 1e-6
    assert high_share(profile(torch.zeros(1, 4, 32, 32))).item() == 0
    noise = profile(torch.randn(1, 4, 128, 128, generator=torch.Generator().manual_seed(2)))
    assert high_share(noise).item() == pytest.approx(noise.mean().item(), abs=0.05)


def test_fine_detail_has_a_higher_share_than_smooth_shapes():
    smooth = torch.linspace(0, 2 * math.pi, 64).sin()[None, None, :, None].expand(1, 4, 64, 64)
    fine = torch.linspace(0, 40 * math.pi, 64).sin()[None, None, :, None].expand(1, 4, 64, 64)
    assert high_share(profile(fine)) > 2 * high_share(profile(smooth))


def test_video_frames_are_averaged_and_sequences_have_a_spectrum():
    video = torch.randn(2, 4, 3, 16, 12, generator=torch.Generator().manual_seed(3))
    bins = radial_bins(16, 12)
    plain = torch.stack([(torch.fft.rfft2(video[:, :, f].mean(dim=1), norm="ortho").abs().flatten(-2) @ bins)
                         for f in range(3)]).mean(dim=0)
    torch.testing.assert_close(radial_amplitude(video, bins), plain / plain.amax(dim=-1, keepdim=True))
    sequence = torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(4))
    found = radial_amplitude(sequence, radial_bins(1, 50))
    assert found.shape == (2, 26) and torch.isfinite(found).all()


def test_a_device_without_fourier_transforms(monkeypatch):
    x, bins, transform, calls = torch.randn(2, 4, 16, 12), radial_bins(16, 12), torch.fft.rfft2, []

    def lacking(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise NotImplementedError("Could not run 'aten::_fft_r2c'")
        return transform(*args, **kwargs)

    want = radial_amplitude(x, bins)
    monkeypatch.setattr(torch.fft, "rfft2", lacking)
    assert torch.equal(radial_amplitude(x, bins), want) and len(calls) == 2


def test_a_fault_of_the_device_is_not_hidden(monkeypatch):
    """Guard: out of memory is a RuntimeError, and so is a failing kernel; only where it lacks the CPU helps."""
    def failing(*args, **kwargs):
        raise RuntimeError("cuFFT error: CUFFT_INTERNAL_ERROR")

    monkeypatch.setattr(torch.fft, "rfft2", failing)
    with pytest.raises(RuntimeError, match="cuFFT"):
        radial_amplitude(torch.randn(2, 4, 16, 12), radial_bins(16, 12))


def test_a_change_is_a_ratio_of_means_with_its_error():
    """Against the textbook formula, over the second half of the run; one picture has no error."""
    ground = torch.tensor([[9.0, 9.0, 9.0], [0.4, 0.2, 0.6], [0.6, 0.2, 0.4]])
    own = torch.tensor([[1.0, 1.0, 1.0], [0.2, 0.1, 0.4], [0.3, 0.1, 0.2]])
    a, b = own[1:].double().mean(0).numpy(), ground[1:].double().mean(0).numpy()
    ratio = a.mean() / b.mean()
    error = np.sqrt(((a - ratio * b) ** 2).sum() / 2 / 3) / b.mean()
    assert late_change(own, ground) == pytest.approx((ratio - 1, error))
    assert error > 0 and late_change(own[:, :1], ground[:, :1]) == pytest.approx((-0.5, 0.0))


@pytest.mark.parametrize(("change", "error", "found"), [(-0.3, 0.1, "low"), (0.3, 0.1, "high"), (-0.3, 0.2, "unsure"),
                                                        (0.09, 0.0, "unsure"), (-0.11, 0.0, "low")])
def test_a_class_needs_more_than_the_margin_and_two_errors(change, error, found):
    assert frequency_class(change, error) == found
