"""Latents of several parts (picture and sound in one tensor): each part is weighed as if it were alone."""

from __future__ import annotations

from math import prod

import pytest
import torch
from lora_ensemble.kernels.branch import Branch
from lora_ensemble.kernels.nested import pack_weights, unpack
from lora_ensemble.kernels.patches import patch_cosine, softmin, upsample
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.session import POSITIVE, UNCONDITIONAL, Call, RunContext
from lora_ensemble.tests.test_loratorio import FACTS, SIGMA, TOTAL, random, step
from torch import Tensor

PARTS = ((16, 3, 9, 8), (8, 7, 16), (5, 11))
"""Frames of a video, sound as a picture of times and frequencies, a sequence."""
LENGTH = sum(prod(part) for part in PARTS)
COUNT = 3


def flat(*tensors: Tensor) -> Tensor:
    """[B, C, *size] each -> [B, 1, elements]: the host's layout."""
    return torch.cat([tensor.reshape(tensor.shape[0], 1, -1) for tensor in tensors], dim=-1)


def cut(x: Tensor) -> list[Tensor]:
    """The parts of [B, 1, elements], by indexes."""
    out, start = [], 0
    for part in PARTS:
        out.append(x[:, 0, start:start + prod(part)].reshape(x.shape[0], *part))
        start += prod(part)
    return out


def predictions(seed: int = 0, strength: float = 1.0) -> dict[str, Tensor]:
    """Per side [COUNT + 1, 2, 1, elements], the base last."""
    sides = {}
    for k, side in enumerate((POSITIVE, UNCONDITIONAL)):
        base = random(2, 1, LENGTH, seed=100 * seed + k)
        loras = [base + strength * random(2, 1, LENGTH, seed=100 * seed + 10 + 10 * i + k) for i in range(COUNT)]
        sides[side] = torch.stack([*loras, base])
    return sides


def mix(method: LoRAtorio, index: int, x: Tensor, given: dict[str, Tensor], parts=PARTS,
        masks=()) -> tuple[Tensor, Tensor, dict]:
    """(positive, negative, notes) of one call; branches that are not evaluated have no prediction."""
    session = method.begin(RunContext(FACTS.sigmas, FACTS.times, tuple(x.shape), masks))
    branches = session.branches(step(index))
    call = Call(x, SIGMA, branches, list(given.values()), list(given), parts)
    return (*session.mix(step(index), call), session.notes())


@pytest.mark.parametrize("options", [
    {}, {"upsampling": "bilinear"}, {"space": "x0"}, {"patch": 3}, {"top_k": 1}, {"top_k": 2, "scope": "patch"},
    {"recenter_lambda": 1.0}], ids=str)
@pytest.mark.parametrize("index", [0, 2])
def test_every_part_is_mixed_as_if_it_were_alone(index, options):
    method, x, given = LoRAtorio((1.0,) * COUNT, kappa=0.7, **options), random(2, 1, LENGTH, seed=99), predictions()
    packed = mix(method, index, x, given)
    for k in range(len(PARTS)):
        alone = mix(method, index, cut(x)[k], {side: torch.stack([cut(p)[k] for p in found])
                                               for side, found in given.items()}, ())
        for side in (0, 1):
            torch.testing.assert_close(cut(packed[side])[k], alone[side], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(packed[2]["weights"][k], alone[2]["weights"])


def test_one_flat_vector_would_be_weighed_otherwise():
    method, x, given = LoRAtorio((1.0,) * COUNT, kappa=0.7), random(2, 1, LENGTH, seed=99), predictions()
    assert (mix(method, 2, x, given)[0] - mix(method, 2, x, given, ())[0]).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_weights_sum_to_one_at_every_element(mode):
    cosines = [patch_cosine(random(COUNT + 1, 2, *part, seed=1), 2) for part in PARTS]
    parts = [upsample(softmin(cosine, 9.0), part[1:], 2, mode)
             for cosine, part in zip(cosines, PARTS, strict=True)]
    weights = pack_weights(parts, PARTS)
    assert weights.shape == (COUNT, 2, 1, LENGTH) and weights.min() >= 0
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(2, 1, LENGTH), atol=1e-6, rtol=0)
    for i in range(COUNT):
        for part, one in zip(parts, cut(weights[i]), strict=True):
            assert torch.equal(one, part[i].expand_as(one)), "the same for all channels of a place"


def test_unpacking_is_the_inverse_of_packing():
    tensors = [random(2, *part, seed=k) for k, part in enumerate(PARTS)]
    for found in (unpack(flat(*tensors), PARTS), cut(flat(*tensors))):
        assert all(torch.equal(one, tensor) for one, tensor in zip(found, tensors, strict=True))
    stacked = torch.stack([flat(*tensors), 2 * flat(*tensors)])
    assert all(torch.equal(one[1], 2 * tensor) for one, tensor in zip(unpack(stacked, PARTS), tensors, strict=True))
    assert unpack(stacked, ())[0] is stacked and pack_weights([stacked], ()) is stacked


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"upsampling": "bilinear"}], ids=str)
def test_identical_loras_are_the_single_lora_and_strength_0_is_the_base(options):
    x, given = random(2, 1, LENGTH, seed=99), predictions()
    same = {side: torch.stack([found[0]] * COUNT + [found[-1]]) for side, found in given.items()}
    positive, negative, _ = mix(LoRAtorio((1.0,) * COUNT, recenter_lambda=1.0, **options), 3, x, same)
    torch.testing.assert_close(positive, given[POSITIVE][0])
    torch.testing.assert_close(negative, given[UNCONDITIONAL][0])
    nothing = predictions(strength=0.0)
    positive, negative, _ = mix(LoRAtorio((1.0,) * COUNT, **options), 3, x, nothing)
    assert torch.equal(positive, nothing[POSITIVE][-1]) and torch.equal(negative, nothing[UNCONDITIONAL][-1])


def test_masks_confine_loras_in_the_first_part_alone():
    left = torch.zeros(1, 1, 9, 8)
    left[..., :4] = 1
    x, given = random(2, 1, LENGTH, seed=99), predictions()
    method = LoRAtorio((1.0,) * COUNT, kappa=0.7)
    masks = (left, 1 - left, torch.zeros_like(left))
    free, confined = (mix(method, 2, x, given, masks=some)[0] for some in ((), masks))
    film = [cut(given[POSITIVE][i])[0] for i in range(COUNT)]
    torch.testing.assert_close(cut(confined)[0][..., :4], film[0][..., :4])
    torch.testing.assert_close(cut(confined)[0][..., 4:], film[1][..., 4:])
    for k in (1, 2):
        assert torch.equal(cut(confined)[k], cut(free)[k])


def test_what_any_part_chose_stays_in_between_re_checks():
    session = LoRAtorio((1.0,) * COUNT, top_k=1, recheck_every=5).begin(FACTS)
    given = predictions()[POSITIVE]
    for part, i in ((0, 0), (1, 2), (2, 2)):  # LoRA 0 departs most in the picture, 2 in the rest
        found, base = cut(given[i])[part], cut(given[-1])[part]
        found += 9 * (found - base)
    for index in range(3):
        branches = session.branches(step(index))
        kept = [next((i for i, gain in enumerate(branch.gains) if gain), COUNT) for branch in branches]
        session.mix(step(index), Call(random(2, 1, LENGTH, seed=50 + index), SIGMA, branches, [given[kept]],
                                      (POSITIVE,), PARTS))
    assert session.notes()["active"] == [0, 2] and index < TOTAL
    assert session.branches(step(2))[-1] == Branch((0.0,) * COUNT)
