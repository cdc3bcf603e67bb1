"""Masks of a film's frames, where the host's nodes put a reference before the film: each frame has its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.compose.neighbours import APART
from lora_ensemble.host.families.film import ahead_of_film, in_frames
from lora_ensemble.host.files.ensemble import LoRASpec, Mask

from .builders import composite, lora, merge, same, stock
from .disturbed import skipped_where_older
from .models import base
from .started import STARTED, WAN, Started, pixels, seen, tiny, wan
from .test_context_windows import windowed
from .test_started_films import NAME

LAST = "diffusion_model.head.head"
LENGTH = 9
"""Frames of the film: three of its latent's, with a fourth one before them."""


def animate(*prompts) -> tuple[list, list, dict]:
    positive, negative, latent = wan(
        "WanAnimateToVideo", *prompts, reference_image=pixels(), clip_vision_output=seen(), pose_video=pixels(9, 4),
        continue_motion=pixels(1, 5), continue_motion_max_frames=5, video_frame_offset=0)
    return positive, negative, latent


def animate_2(*prompts) -> tuple[list, list, dict]:
    return wan("WanAnimate2ToVideo", *prompts, reference_image=pixels(), clip_vision_output=seen(),
               pose_video=pixels(9, 4), video_frame_offset=0)


CASES = {
    "VACE": STARTED["Wan VACE, control and reference"],
    "Animate": Started(tiny("WAN22_Animate", WAN, 16, 32, model_type="animate", in_dim=36, num_layers=5), animate),
    "Animate 2": Started(tiny("WAN_Animate2", WAN, 16, 32, model_type="animate2", in_dim=36), animate_2),
}


def of_latent(masks: torch.Tensor) -> torch.Tensor:
    """The slow, obvious way: the first frame alone, four of the others together, and nothing hidden of the reference.
    """
    each = [torch.ones_like(masks[0]), masks[0], *(masks[k:k + 4].mean(0) for k in range(1, len(masks), 4))]
    return torch.stack(each)


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("make", [merge, composite])
def test_each_frame_has_its_own_mask(make, name, cut, loras):
    """Beside a reference, in context windows as well."""
    if make is merge and name == "Animate 2":
        pytest.skip("where its tokens lie is not known")
    case = CASES[name]
    model = case.model()
    spec = LoRASpec(loras(lora({LAST: model.model.diffusion_model.head.head.weight.shape}, 1, **NAME)), 0.8, 0.0)
    masks = torch.zeros(LENGTH, 4, 4)
    masks[0], masks[1:5, 2:4], masks[5:7] = torch.eye(4), 1, 1
    masks = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)  # whole patches

    def drawn(one) -> torch.Tensor:
        return case.drawn(windowed(one, "Wan") if cut else one)

    with skipped_where_older(name):
        plain, alone = drawn(model), drawn(stock(model, [spec]))
    ours = make(model, [replace(spec, mask=Mask(masks))])
    want = plain + of_latent(masks) * (alone - plain)
    same(drawn(ours), want, plain, 1e-4)
    assert [line for line in record_of(ours).problems if APART not in line] == []


def test_a_start_picture_of_vace_is_no_reference():
    """Guard: of it, too, nothing is to be drawn anew, by its mask."""
    model = base("Wan").model.diffusion_model
    control, mask = pixels(LENGTH, 4), torch.ones(LENGTH, 64, 64)
    mask[0] = 0

    def begun(**more) -> dict:
        positive, *_ = wan("WanVaceToVideo", [[torch.zeros(1, 5, 32), {}]], [[torch.zeros(1, 5, 32), {}]], 1,
                           strength=1.0, control_video=control, control_masks=mask, **more)
        return {"positive": [options for _, options in positive]}

    assert [ahead_of_film(model, begun(**more)) for more in ({}, {"reference_image": pixels()})] == [0, 1]
    assert ahead_of_film(model, {"positive": [{}], "negative": None}) == 0


@pytest.mark.parametrize(("masks", "frames", "together"), [(81, 21, 4), (25, 4, 8), (7, 2, 6), (3, 3, 1)])
def test_frames_that_are_one_of_the_latents(masks, frames, together):
    given = torch.rand(masks, 1, 2, 2)
    want = [given[:1], *given[1:].split(together)]
    assert torch.allclose(in_frames(given, frames)[0, 0], torch.cat([each.mean(0) for each in want]))


def test_other_numbers_of_masks_go_by_equal_parts():
    given = torch.rand(6, 1, 2, 2)
    assert torch.allclose(in_frames(given, 3)[0, 0], given[:, 0].unflatten(0, (3, 2)).mean(1))
    assert torch.allclose(in_frames(given, 1)[0, 0], given[:, 0].mean(0, keepdim=True))
