"""How a latent is known again, and what is handed on to the run that goes on with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lora_ensemble.host.compose.earlier import Earlier, Left, Runs, bare, mark_of, marks, names_of
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.session import RunContext
from lora_ensemble.methods.switch import Switch
from torch import Tensor

from ..devices import Plain


def latent(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(*(shape or (1, 4, 8, 8)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 16, 5, 30, 30), (1, 1, 1)])
def test_a_latent_is_known_again(shape):
    """In half precision too; not by a part of it, not in another shape, and not by every value of a large one."""
    left, own = Left(), latent(0, *shape)
    assert left.before(own) is None and left.values() == []
    left.keep(mark_of(own), "first")
    assert left.before(own) == left.before(own.half()) == left.before(own.bfloat16()) == "first"
    assert left.before(own.flatten()) is None
    for part in (slice(None, max(own.numel() // 4, 1)), slice(own.numel() - max(own.numel() // 4, 1), None)):
        other = own.clone().flatten()
        other[part] += 0.5
        assert left.before(other.view(shape)) is None
    assert mark_of(own).values.shape == (min(own.numel(), 512),) and mark_of(own).values.dtype is torch.float32


def test_marks_of_tensors():
    """By shape and values; of so many that a narrower number of theirs would lie behind the last."""
    assert marks(torch.zeros(2, 3), 9) != marks(torch.zeros(3, 2), 9) == marks(torch.zeros(3, 2), 9)
    assert marks(torch.ones(1).expand(2**24 + 4), 512) == ((2**24 + 4,), (1.0,) * 512)


def test_the_last_of_the_runs_that_left_it():
    left = Left(3)
    for number in range(4):
        left.keep(mark_of(latent(number)), number)
    assert left.values() == [3, 2, 1] and left.before(latent(0)) is None and left.before(latent(2)) == 2
    left.keep(mark_of(latent(2)), "again")
    assert left.before(latent(2)) == "again" and left.values() == ["again", 3, 2]


def test_the_last_sixteen_runs_are_known():
    left = Left()
    for number in range(17):
        left.keep(mark_of(latent(number)), number)
    assert left.values() == list(range(16, 0, -1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_is_whole_where_all_of_it_are_numbers(value):
    own = latent()
    assert mark_of(own).whole
    own[..., 3, 5] = value
    assert not mark_of(own).whole


def several(*parts: Tensor) -> SimpleNamespace:
    """A latent of several parts, as the host's own class has them."""
    return SimpleNamespace(is_nested=True, unbind=lambda: parts)


def test_latents_of_several_parts():
    """Picture and sound: both count, of whatever shapes; noise in one of them is noise."""
    picture, sound, left = latent(0), latent(1, 1, 8, 20), Left()
    left.keep(mark_of(several(picture, sound)), "both")
    assert left.before(several(picture, sound)) == "both" and left.before(picture) is None
    for other in (several(picture, sound + 1), several(picture + 1, sound), several(picture, sound.mT)):
        assert left.before(other) is None
    for k in (0, 1):
        assert not bare(several(picture * k, sound * (1 - k)))
    assert bare(several(picture * 0, sound * 0)) and bare(picture * 0) and not bare(picture)


def test_what_a_run_hands_on():
    """Its steps and noise levels behind those of the runs before, where these are known; its places, on the CPU."""
    runs, places = Runs(), {"asked": Plain(torch.ones(1, 2))}
    first, more = RunContext((8.0, 4.0, 2.0)), RunContext((2.0, 1.0, 0.5, 0.25), before=2, whole=7)
    routes = [SimpleNamespace(answers=lambda: places), SimpleNamespace(answers=lambda: {"other": torch.zeros(1, 2)})]
    session = SimpleNamespace(left=lambda: "left")
    runs.left(mark_of(latent(0)), first, routes, None, {"name": session})
    before = runs.before(latent(0))
    assert before == Earlier(2, (), (8.0, 4.0), before.maps, {"name": "left"})
    assert before.maps.keys() == {"asked", "other"} and before.maps["asked"].device.type == "cpu"
    runs.left(mark_of(latent(1)), more, [], before)
    after = runs.before(latent(1))
    assert (after.steps, after.sigmas, after.maps, after.left) == (5, (8.0, 4.0, 2.0, 1.0, 0.5), {}, {})
    runs.left(mark_of(latent(2)), more, [])
    assert (runs.before(latent(2)).steps, runs.before(latent(2)).sigmas) == (5, ())


def test_methods_of_one_kind_are_told_apart():
    names = names_of([Merge((1.0,)), Switch((1.0,)), Merge((1.0,))])
    assert len(set(names)) == 3 and names == names_of([Merge((2.0,)), Switch((1.0,)), Merge((1.0,))])
    assert names_of([Switch((1.0,)), Merge((1.0,))]) == [names[1], names[0]]
