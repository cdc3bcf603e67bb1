"""Films whose reference stands before them in the latent, as the host's nodes put it there: each frame has its own
mask, and words are sought in the film by itself."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from comfy.latent_formats import Wan21
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.compose.neighbours import APART
from lora_ensemble.host.compose.routes import RoutedLoRAs
from lora_ensemble.host.families.film import ahead_of_film, end_of_film, in_frames
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from torch.nn import functional as F

from .builders import composite, lora, merge, same, stock
from .disturbed import skipped_where_older
from .models import base
from .started import STARTED, WAN, Started, pixels, seen, tiny, wan
from .test_context_windows import windowed
from .test_routed import MARKS, routed
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


def control(references: int, frames: int = 4) -> torch.Tensor:
    """A control film of VACE with so many references before it; in its own first frame one place has nothing."""
    film, nothing = torch.rand(1, 32, frames, 2, 2), Wan21().process_out(torch.zeros(1, 16, 1, 2, 2))
    film[:, 16:, :references] = nothing
    film[:, 16:, references, 0, 0] = nothing[:, :, 0, 0, 0]
    return film


def test_references_are_those_of_the_prompt_that_has_most():
    """Counted from the first frame on: a frame of the film in which nothing is to be drawn anew is none."""
    model, later = base("Wan").model.diffusion_model, control(1)
    later[:, 16:, 3] = later[:, 16:, 0]
    conds = {"positive": [{"vace_frames": [control(2)]}, {"vace_frames": [control(0)]}, {}],
             "negative": [{"vace_frames": [later]}, {"vace_frames": []}]}
    assert ahead_of_film(model, conds) == 2
    assert ahead_of_film(model, {"negative": conds["negative"]}) == 1


def test_a_model_counts_its_own_reference_off_whether_it_is_compiled_or_not():
    model = CASES["Animate"].model().model.diffusion_model
    conds = {"positive": [{"vace_frames": [control(2)]}]}
    assert ahead_of_film(model, conds) == ahead_of_film(SimpleNamespace(_orig_mod=model), conds) == 1


def test_where_guides_of_ltx_stand_behind_the_film():
    """By the prompt with most of them; places are counted as tokens."""
    guide = {"keyframe_idxs": torch.zeros(1, 3, 2 * 12, 2)}
    more = {"keyframe_idxs": torch.zeros(1, 3, 3 * 12, 2)}
    assert end_of_film((1, 128, 9, 3, 4), {"positive": [guide, more, {"keyframe_idxs": None}], "negative": None}) == 6
    assert end_of_film((1, 128, 9, 3, 4), {"positive": [{}]}) is None
    assert end_of_film((1, 128, 9), {"positive": [guide]}) is None


@pytest.mark.parametrize(("masks", "frames", "together"), [(81, 21, 4), (25, 4, 8), (7, 2, 6), (3, 3, 1)])
def test_frames_that_are_one_of_the_latents(masks, frames, together):
    given = torch.rand(masks, 1, 2, 2)
    want = [given[:1], *given[1:].split(together)]
    assert torch.allclose(in_frames(given, frames)[0, 0], torch.cat([each.mean(0) for each in want]))


def test_other_numbers_of_masks_go_by_equal_parts():
    given = torch.rand(6, 1, 2, 2)
    assert torch.allclose(in_frames(given, 3)[0, 0], given[:, 0].unflatten(0, (3, 2)).mean(1))
    assert torch.allclose(in_frames(given, 1)[0, 0], given[:, 0].mean(0, keepdim=True))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", ["VACE", "Animate"])
def test_words_are_sought_in_the_film_and_in_its_reference_by_themselves(name, cut, loras, monkeypatch):
    """A reference may be attended to far more than any frame of the film. Nothing else is compared with its places."""
    case, seen, see = CASES[name], [], RoutedLoRAs.see

    def note(self, uuid, attention):
        seen.append((self._prompts[uuid].clauses, self.window, attention.clone()))
        see(self, uuid, attention)

    monkeypatch.setattr(RoutedLoRAs, "see", note)
    model = case.model()
    shape = model.model.diffusion_model.head.head.weight.shape
    ensemble = [LoRASpec(loras(lora({LAST: shape}, seed, **NAME)), 0.8, 0.0, words=words)
                for seed, words in ((1, "ohwx"), (2, "sks"))]
    ours = routed(model, ensemble, mode="once", trust=False)
    with skipped_where_older(name):
        case.drawn(windowed(ours, "Wan") if cut else ours, lora_ensemble_prompt=MARKS)
    want = {}
    for clauses, window, attention in seen:
        frames, anchored = (range(attention.shape[2]), 0) if window is None else window[1:]
        attention = attention[:, :len(clauses.members)]
        for own in ([k for k, frame in enumerate(frames) if bool(frame) == film] for film in (False, True)):
            places = clauses.places(attention[:, :, own], 2.0) if own else ()
            want |= {frames[k]: places[:, :, i] for i, k in enumerate(own) if k >= anchored}
    (placed,), want = places_of(ours), torch.stack([want[frame] for frame in range(4)], dim=2)
    assert placed.maps.std() > 1e-2
    assert torch.allclose(placed.maps, F.interpolate(want, placed.maps.shape[2:], mode="trilinear"), atol=1e-5)
