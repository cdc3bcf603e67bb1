"""LoRAtorio's kernels against a transcription of the formulas in numpy float64, over sizes, dtypes and shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lora_ensemble.kernels.patches import (
    confine,
    most_divergent,
    patch_cosine,
    softmin,
    stacked,
    tiles,
    upsample,
    weighted,
)
from torch import Tensor

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}
"""The kernels compute in fp32 whatever comes in, and the reference reads the same rounded input."""
SIZES = [(8, 8), (9, 8), (15, 23), (64, 64), (97, 160), (160, 160)]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cosine_of(base: Tensor, loras: Tensor, patch: int) -> Tensor:
    return patch_cosine(torch.cat([loras, base[None]]), patch)


def padded(plane: np.ndarray, p: int) -> np.ndarray:
    """Border repeated until p divides both sides."""
    h, w = plane.shape
    return np.pad(plane, ((0, -h % p), (0, -w % p)), mode="edge")


def reference_cosine(base: np.ndarray, loras: np.ndarray, p: int) -> np.ndarray:
    """[C, h, w], [N, C, h, w] -> [N, rows, columns]; 0 where a vector of the place has no direction."""
    planes = np.stack([padded(x.mean(axis=0), p) for x in (base, *loras)])
    _, h, w = planes.shape
    vectors = planes.reshape(-1, h // p, p, w // p, p).transpose(0, 1, 3, 2, 4).reshape(-1, h // p, w // p, p * p)
    norms = np.linalg.norm(vectors, axis=-1)
    products = np.einsum("rcv,nrcv->nrc", vectors[0], vectors[1:])
    known = (norms > 1e-6).all(axis=0)
    return np.where(known, products / np.where(known, norms[0] * norms[1:], 1.0), 0.0)


def reference_softmin(similarity: np.ndarray, inverse_temperature: float) -> np.ndarray:
    powers = np.exp(-inverse_temperature * (similarity - similarity.min(axis=0)))
    return powers / powers.sum(axis=0)


def test_a_mask_without_frames_beside_one_with_frames_is_the_same_in_all():
    still, film = random(1, 1, 4, 6, seed=1), random(2, 1, 3, 4, 6, seed=2)
    for masks, where in (((still, None, film), (0, 2)), ((film, still), (1, 0))):
        found = stacked(masks)
        assert found.shape == (len(masks), 2, 1, 3, 4, 6)
        assert torch.equal(found[where[0]], still[:, :, None].expand(2, 1, 3, 4, 6))
        assert torch.equal(found[where[1]], film)


def test_masks_are_stacked_with_ones_where_there_are_none():
    one, many = torch.rand(1, 1, 4, 3), torch.rand(2, 1, 4, 3)
    found = stacked((one, None, many))
    assert found.shape == (3, 2, 1, 4, 3)
    assert torch.equal(found[0], one.expand(2, -1, -1, -1)) and torch.equal(found[2], many)
    assert torch.equal(found[1], torch.ones(2, 1, 4, 3))



@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("patch", [1, 2, 3, 8])
def test_cosine_and_softmin_are_the_formulas(size, patch, dtype):
    base, loras = random(2, 4, *size, seed=1, dtype=dtype), random(3, 2, 4, *size, seed=2, dtype=dtype)
    got = cosine_of(base, loras, patch)
    assert got.dtype == torch.float32
    for b in range(2):
        want = reference_cosine(base[b].double().numpy(), loras[:, b].double().numpy(), patch)
        np.testing.assert_allclose(got[:, b].numpy(), want, atol=TOLERANCE[dtype])
        weights = softmin(got[:, b], 7.5).numpy()
        np.testing.assert_allclose(weights, reference_softmin(want, 7.5), atol=20 * TOLERANCE[dtype])


def test_a_padded_border_repeats():
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    want = [[[0, 1, 3, 4], [2, 2, 5, 5]], [[6, 7, 6, 7], [8, 8, 8, 8]]]
    assert tiles(x, 2)[0].transpose(-3, -2).flatten(-2).tolist() == want


def test_video_is_frame_by_frame():
    base, loras = random(2, 4, 3, 9, 7, seed=1), random(2, 2, 4, 3, 9, 7, seed=2)
    got = cosine_of(base, loras, 2)
    frames = torch.cat([cosine_of(base[:, :, f], loras[:, :, :, f], 2) for f in range(3)], dim=-2)
    assert torch.equal(got, frames)
    weights = softmin(got, 3.0)
    whole = upsample(weights, (3, 9, 7), 2, "nearest")
    assert whole.shape == (2, 2, 1, 3, 9, 7)
    one = upsample(weights[..., 5:10, :], (9, 7), 2, "nearest")
    assert torch.equal(whole[:, :, :, 1], one), "the second frame's rows are its own"


def test_a_sequence_has_patches_along_its_length():
    base, loras = random(2, 8, 11, seed=1), random(3, 2, 8, 11, seed=2)
    got = cosine_of(base, loras, 4)
    assert got.shape == (3, 2, 1, 3)
    a, b = base[0].mean(0)[:4], loras[1, 0].mean(0)[:4]
    torch.testing.assert_close(got[1, 0, 0, 0], torch.cosine_similarity(a, b, dim=0))
    for mode in ("nearest", "bilinear"):
        weights = upsample(softmin(got, 2.0), (11,), 4, mode)
        assert weights.shape == (3, 2, 1, 11)
        torch.testing.assert_close(weights.sum(dim=0), torch.ones(2, 1, 11))


def test_vectors_near_zero_give_uniform_weights():
    base, loras = random(1, 4, 8, 8, seed=1), random(3, 1, 4, 8, 8, seed=2)
    base[..., :2, :2] = 0
    loras[1, ..., 4:6, 4:6] -= loras[1, ..., 4:6, 4:6].mean(dim=1, keepdim=True)  # the channel mean cancels
    base[..., 6:, :2] = 1e-9
    weights = softmin(cosine_of(base, loras, 2), 50.0)
    for r, c in ((0, 0), (2, 2), (3, 0)):
        assert weights[:, 0, r, c].tolist() == pytest.approx([1 / 3] * 3, abs=1e-6)
    assert weights[:, 0, 1, 1].max() > 0.5
    nothing = cosine_of(torch.zeros_like(base), torch.zeros_like(loras), 2)
    assert nothing.eq(0).all() and torch.isfinite(softmin(nothing, 1e4)).all()


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", [(8, 8), (9, 15)], ids=str)
@pytest.mark.parametrize("inverse_temperature", [0.0, 10.0, 5e2, 1e4])
def test_weights_sum_to_one_at_every_pixel(size, inverse_temperature, mode):
    similarity = cosine_of(random(2, 4, *size, seed=1), random(5, 2, 4, *size, seed=2), 2)
    weights = upsample(softmin(similarity, inverse_temperature), size, 2, mode)
    assert weights.shape == (5, 2, 1, *size) and weights.min() >= 0
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(2, 1, *size), atol=1e-6, rtol=0)


def test_nearest_upsampling_repeats_each_patch():
    weights = torch.rand(2, 1, 3, 2, generator=torch.Generator().manual_seed(0))
    full = upsample(weights, (5, 3), 2, "nearest")[:, 0, 0]
    for r in range(5):
        for c in range(3):
            assert torch.equal(full[:, r, c], weights[:, 0, r // 2, c // 2])


@pytest.mark.parametrize(("size", "patch"), [((8, 8), 2), ((9, 15), 2), ((7, 10), 3), ((16, 8), 8)], ids=str)
def test_bilinear_upsampling_is_its_formula(size, patch):
    """Between the centres of patches, beyond the outermost ones their own value."""
    def matrix(side: int) -> np.ndarray:
        count = -(-side // patch)
        at = np.clip((np.arange(side) + 0.5) / patch - 0.5, 0, count - 1)
        low = np.floor(at).astype(int)
        out = np.zeros((side, count))
        np.add.at(out, (np.arange(side), low), 1 - (at - low))
        np.add.at(out, (np.arange(side), np.minimum(low + 1, count - 1)), at - low)
        return out

    tall, wide = matrix(size[0]), matrix(size[1])
    weights = torch.rand(2, 1, tall.shape[1], wide.shape[1], generator=torch.Generator().manual_seed(0))
    full = upsample(weights, size, patch, "bilinear")
    for one, found in zip(weights[:, 0].double().numpy(), full[:, 0, 0].numpy(), strict=True):
        np.testing.assert_allclose(found, tall @ one @ wide.T, atol=1e-6)


def test_a_lora_equal_to_the_base_weighs_least_and_order_does_not_matter():
    base = random(1, 4, 16, 16, seed=1)
    loras = torch.stack([base + 0.5 * random(1, 4, 16, 16, seed=2), base, base + random(1, 4, 16, 16, seed=3)])
    similarity = cosine_of(base, loras, 2)
    weights = softmin(similarity, 10.0)
    assert (weights[1] <= weights[0] + 1e-6).all() and (weights[1] <= weights[2] + 1e-6).all()
    order = [2, 0, 1]
    torch.testing.assert_close(softmin(cosine_of(base, loras[order], 2), 10.0), weights[order])
    torch.testing.assert_close(softmin(similarity + 0.3, 10.0), weights, atol=1e-5, rtol=0)


def test_weights_are_fp32_whatever_comes_in():
    """In fp16 the smaller one is 0 already, and before that their sum is not 1."""
    similarity = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1).half()
    weights = softmin(similarity, 40.0)
    assert weights.dtype == torch.float32 and weights[1].item() == pytest.approx(np.exp(-80.0), rel=1e-5)


@pytest.mark.parametrize("scope", ["image", "patch"])
def test_the_most_divergent_are_kept(scope):
    similarity = random(5, 2, 4, 3, seed=3)
    keep = most_divergent(similarity, 2, scope)
    relevance = similarity.double().numpy()
    if scope == "image":
        relevance = relevance.mean(axis=(2, 3), keepdims=True)
    lowest = np.argsort(relevance, axis=0, kind="stable")[:2]
    want = np.zeros(relevance.shape, bool)
    np.put_along_axis(want, lowest, True, axis=0)
    assert np.array_equal(keep.numpy(), want)
    weights = softmin(similarity, 4.0, keep)
    assert (weights > 0).sum(dim=0).eq(2).all()
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(2, 4, 3))
    everyone = most_divergent(similarity, 5, scope)
    assert torch.equal(softmin(similarity, 4.0, everyone), softmin(similarity, 4.0))


def test_of_equals_the_first_are_kept():
    assert most_divergent(torch.ones(4, 1, 2, 2), 2).flatten().tolist() == [True, True, False, False]


def test_masks_confine_and_the_rest_is_renormalised():
    weights = softmin(random(3, 1, 8, 8, seed=4), 1.0).unsqueeze(2)
    masks = torch.ones(3, 1, 1, 8, 8)
    masks[0, ..., 4:] = 0
    masks[:, ..., 0, 0] = 0
    got = confine(weights, masks)
    assert got[0, ..., 4:].eq(0).all() and got[:, ..., 0, 0].eq(0).all()
    total = got.sum(dim=0)
    assert total[..., 0, 0].item() == 0 and total.flatten()[1:].sub(1).abs().max() < 1e-6
    torch.testing.assert_close(got[1, ..., 5], weights[1, ..., 5] / (weights[1] + weights[2])[..., 5])
    torch.testing.assert_close(confine(weights, torch.ones_like(masks)), weights)


def test_grey_masks_leave_the_base_its_share():
    """Guard: the least grey of a soft border let a LoRA act whole."""
    weights = softmin(random(2, 1, 4, 4, seed=4), 1.0).unsqueeze(2)
    for masks, covered in (((0.3, 0.0), 0.3), ((0.3, 0.2), 0.5), ((0.6, 0.7), 1.0), ((0.3, 1.0), 1.0)):
        got = confine(weights, torch.tensor(masks).reshape(2, 1, 1, 1, 1).expand_as(weights))
        torch.testing.assert_close(got.sum(dim=0), torch.full_like(weights[0], covered))
        if all(masks):
            torch.testing.assert_close(got[0] / got[1], weights[0] / weights[1] * masks[0] / masks[1])


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_the_mix_is_the_weighted_sum_with_the_base_beside_it(share):
    base, loras = random(2, 4, 6, 6, seed=1).double(), random(3, 2, 4, 6, 6, seed=2).double()
    weights = torch.softmax(random(3, 2, 1, 6, 6, seed=3).double(), dim=0)
    want = share * (weights * loras).sum(dim=0) + (1 - share) * base
    torch.testing.assert_close(weighted(base, loras, weights, share), want)
    assert torch.equal(weighted(base, base.expand_as(loras), weights, share), base)
