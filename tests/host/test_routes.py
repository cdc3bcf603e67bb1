"""What one method knows of the places of its LoRAs, told what models would have shown."""

from __future__ import annotations

from types import SimpleNamespace
from uuid import uuid4

import pytest
import torch
from lora_ensemble.engine.positions import Places
from lora_ensemble.host.compose.placing import Routed
from lora_ensemble.host.compose.probe import AttentionReading
from lora_ensemble.host.compose.routes import RoutedLoRAs
from lora_ensemble.host.words.marked import PROMPT
from lora_ensemble.kernels.branch import Branch, Step
from lora_ensemble.kernels.routing import compete
from lora_ensemble.methods.prompt import LoRAWords
from lora_ensemble.methods.routed import Routing
from torch import Tensor, nn

from .test_prompts import cond as marked
from .test_prompts import tokens

WORDS = (LoRAWords("x", "ohwx"), LoRAWords("y", "sks"))
BOTH, FIRST, SECOND = "ohwx cat, sks dog, a field", "ohwx cat, a field", "sks dog, a field"
PICTURE, FILM = (1, 4, 8, 8), (1, 4, 6, 8, 8)
LEFT = torch.zeros(1, 1, 8, 8)
LEFT[..., :4] = 1


def regions(shape=PICTURE, masks=(None, None), everywhere=(False, False), **options) -> tuple[RoutedLoRAs, list[str]]:
    told: list[str] = []
    routed = Routed(Routing(**options), WORDS, (0, 1), everywhere)
    return RoutedLoRAs(routed, masks, shape, torch.device("cpu"), told.append), told


def cond(text: str, area=None) -> dict:
    return marked(tokens(text), area=area)


def attention(clauses: int, *grid: int, seed: int = 0) -> Tensor:
    return torch.rand(1, clauses, *(grid or (1, 8, 8)), generator=torch.Generator().manual_seed(seed))


def called(ours: RoutedLoRAs, entries: list, acting: list | None = None, step: int = 0) -> None:
    """A call of an evaluation of its own."""
    ours.begin(Step(step, 4, 1.0))
    ours.evaluate(object())
    ours.meet(entries, entries if acting is None else acting)


def shown(ours: RoutedLoRAs, entry: dict, found: Tensor) -> None:
    ours.see(entry["uuid"], found)
    ours.commit()


def test_a_lora_acts_in_the_prompts_that_have_its_words():
    """Unless it has a mask, in which it acts whatever the words say. What is on no prompt has what is on any."""
    for mask in (None, LEFT):
        (ours, _), one, other = regions(masks=(None, mask)), cond(FIRST), cond(SECOND)
        called(ours, [one, other])
        branch = Branch((1.0, 0.5), (("a", (1.0, 0.2)),))
        found, base = ours.confined(one["uuid"], branch), Branch((0.0, 0.0))
        assert found == (Branch((1.0, 0.0), (("a", (1.0, 0.0)),)) if mask is None else branch)
        assert ours.confined(one["uuid"], branch) is found and ours.confined(None, branch) is branch
        assert ours.confined(one["uuid"], base) is base
        assert torch.equal(ours.of(one["uuid"])[:, 1:], torch.zeros(1, 1, 8, 8) if mask is None else mask)
        assert ours.of(other["uuid"])[:, 0].amax() == 0 and ours.of(one["uuid"])[:, 0].amin() == 1
        assert torch.equal(ours.of(ours.kind(None)), torch.ones(1, 2, 8, 8) if mask is None else
                           torch.cat([torch.ones(1, 1, 8, 8), LEFT], 1))
        assert ours.text(None, nn.Module(), 3).tolist() == [[0.0] * 3] * 2
    alone, _ = regions()
    called(alone, [cond(FIRST)])
    assert alone.text(None, nn.Module(), 3).tolist() == [[0.0] * 3, [1.0] * 3]


def test_the_places_of_a_batch_follow_what_is_known(monkeypatch):
    """Words as well, where a prompt comes to act later; each time once. Those of another card are its own."""
    (ours, _), root, x, text = regions(), nn.Linear(1, 1), torch.zeros(PICTURE), {"context": torch.zeros(1, 6, 4)}
    called(ours, [cond(FIRST)])
    found = ours.places(root, x, text, [None], [None], None)
    assert found.words.amax(dim=2).tolist() == [[0.0, 1.0]]
    updates, update = [], Places.update
    monkeypatch.setattr(Places, "update", lambda *given: updates.append(1) or update(*given))
    called(ours, [cond(BOTH)])
    for _ in range(2):
        assert ours.places(root, x, text, [None], [None], None) is found
        assert found.words.amax(dim=2).tolist() == [[0.0, 0.0]] and len(updates) == 1
    others = {}, {"refs": [torch.zeros(1, 4)]}, {"refs": [torch.zeros(1, 8)]}, {"method": "index"}, {"method": "offset"}
    assert len({id(ours.places(root, x, text | more, [None], [None], None)) for more in others}) == len(others), (
        "what the order of tokens depends on")
    card = ours.places(nn.Linear(1, 1), x.to("meta"), text, [None], [None], None)
    assert card.maps.device.type == card.words.device.type == "meta"


def test_what_was_seen_holds_from_the_next_evaluation_on():
    """Of clauses that are there: rows behind them are filling."""
    (ours, _), one = regions(), cond(BOTH)
    called(ours, [one])
    found = attention(5)
    ours.see(one["uuid"], found)
    assert (ours.of(one["uuid"]) == 1).all() and ours.probes(Step(0, 4, 1.0))
    called(ours, [one])
    want = compete(found[:, :3, 0], (0, 1), (0, 1, 2), 2.0)
    assert torch.allclose(ours.of(one["uuid"]), want) and torch.equal(ours.maps, ours.of(one["uuid"]))
    assert torch.equal(ours.masks[1], ours.maps[:, 1:])


def test_in_an_area_and_nowhere_outside_of_it():
    (ours, _), one = regions(), cond(BOTH, (4, 4, 2, 3))
    called(ours, [one])
    found = attention(3, 1, 4, 4)
    shown(ours, one, found)
    want = torch.zeros(1, 2, 8, 8)
    want[..., 2:6, 3:7] = compete(found[:, :, 0], (0, 1), (0, 1, 2), 2.0)
    assert torch.allclose(ours.of(one["uuid"]), want)


def test_windows_of_a_film():
    """Each shows the places of its own frames, not of the one that guides it; all in one evaluation, and what was known
    before stays what it was."""
    (ours, _), one = regions(FILM), cond(BOTH)
    called(ours, [one])
    ours.window = (2, (0, 1, 2), 0)
    assert ours.probes(Step(0, 4, 1.0)) and ours.members(one["uuid"], nn.Module(), 8) is not None
    parts = attention(3, 3, 8, 8), attention(3, 4, 8, 8, seed=1), attention(3, 3, 8, 8, seed=2)
    ours.see(one["uuid"], parts[0])
    assert ours.members(one["uuid"], nn.Module(), 8) is None, "seen in this evaluation"
    ours.window = (2, (0, 3, 4, 5), 1)
    assert ours.members(one["uuid"], nn.Module(), 8) is not None, "another window"
    ours.see(one["uuid"], parts[1])
    ours.commit()
    first, second = (compete(part, (0, 1), (0, 1, 2), 2.0) for part in parts[:2])
    want = torch.cat([first, second[:, :, 1:]], dim=2)
    assert torch.allclose(ours.of(one["uuid"]), want) and not ours.probes(Step(1, 4, 1.0))
    before, copy = ours.answers(), {key: value.clone() for key, value in ours.answers().items()}
    ours.window = (2, (0, 1, 2), 0)
    ours.see(one["uuid"], parts[2])
    assert all(torch.equal(before[key], copy[key]) for key in copy)
    ours.commit()
    assert torch.allclose(ours.of(one["uuid"])[:, :, :3], compete(parts[2], (0, 1), (0, 1, 2), 2.0))


def test_frames_that_no_window_has_shown():
    (ours, _), one = regions(FILM), cond(BOTH)
    called(ours, [one])
    ours.window = (2, (0, 1, 2), 0)
    shown(ours, one, attention(3, 3, 8, 8))
    ours.routes.found = True
    assert not ours.probes(Step(1, 4, 1.0))
    ours.window = (2, (2, 3, 4), 0)
    assert ours.probes(Step(1, 4, 1.0))
    called(ours, [one, cond(SECOND)])
    ours.window = (2, (0, 1, 2), 0)
    ours.routes.found = True
    assert ours.probes(Step(1, 4, 1.0)), "a prompt came that none has shown"


def test_prompts_that_act_at_other_noise_levels():
    """All conds that are on no prompt have the union of those that act in an evaluation, whatever calls it is made of.
    """
    (ours, _), one, other = regions(), cond(BOTH), cond(BOTH)
    called(ours, [one, other])
    for seed, entry in enumerate((one, other)):
        shown(ours, entry, attention(3, seed=seed))
    first, second = (ours.of(entry["uuid"]).clone() for entry in (one, other))
    union = torch.maximum(first, second)
    assert torch.equal(ours.maps, union) and not torch.equal(first, second)
    called(ours, [one, other], [one])
    assert torch.equal(ours.maps, first)
    ours.meet([one, other], [other])
    assert torch.equal(ours.maps, union), "another call of it"
    called(ours, [one, other], [other])
    assert torch.equal(ours.maps, second)
    ours.meet([one, other], [])
    assert torch.equal(ours.maps, second)
    called(ours, [one, other], [])
    assert torch.equal(ours.maps, second), "none acts: those of before"


def test_places_are_looked_for_once_the_prompt_acts():
    (ours, _), one, other = regions(), cond(BOTH), cond(BOTH)
    called(ours, [one, other], [one])
    ours.await_stand_in(one["uuid"])
    shown(ours, one, attention(3))
    assert not ours.probes(Step(1, 4, 1.0))
    called(ours, [one, other], [other])
    assert ours.probes(Step(2, 4, 1.0))


def test_a_mask_does_not_change_what_was_found():
    """The next run of the picture may have none."""
    (ours, _), one, found = regions(masks=(None, LEFT)), cond(BOTH), attention(3)
    called(ours, [one])
    shown(ours, one, found)
    want = compete(found[:, :, 0], (0, 1), (0, 1, 2), 2.0)
    assert torch.equal(ours.of(one["uuid"])[:, 1:], LEFT)
    assert torch.allclose(torch.stack([*ours.answers().values()], 1), want)


def test_how_far_a_lora_may_leave_the_place_that_a_call_has():
    """In its window and area; what is known already stays."""
    (ours, _), one, other, heard = regions(FILM, trust=True), cond(BOTH), cond(BOTH, (6, 4, 4, 0, 2, 2)), []

    def share(places: Places) -> Tensor:
        heard.append(places.maps)
        return torch.tensor([[0.0, torch.inf]] * len(places.pictures))

    called(ours, [one, other])
    ours.see(one["uuid"], attention(3, 6, 8, 8))
    ours.see(other["uuid"], attention(3, 6, 4, 4))
    ours.commit()
    prompts = [ours._prompts[entry["uuid"]] for entry in (one, other)]
    for prompt, area in zip(prompts, (slice(None), slice(2, 6)), strict=True):
        ours.trust._learn(SimpleNamespace(share=share), [None, prompt], 1, (2, (1, 2), 0))
        assert torch.equal(heard[-1][1:], prompt.maps[:, :, 1:3, area, area]) and (heard[-1][0] == 1).all()
        assert prompt.free.tolist() == [[1.0, 0.0]]
    prompts[0].free, prompts[1].free = torch.zeros(1, 2), None
    prompts[1].area = None
    ours.trust._learn(SimpleNamespace(share=share), prompts, 1, None)
    assert prompts[0].free.tolist() == [[0.0, 0.0]] and prompts[1].free.tolist() == [[1.0, 0.0]]
    ours.trust._learn(SimpleNamespace(share=None), [None], 1, None)  # nobody's places
    ours.trust._learn(SimpleNamespace(share=lambda places: None), prompts, 1, None)  # no layer was heard
    prompts[0].maps, prompts[1].maps = prompts[0].maps.repeat(2, 1, 1, 1, 1), None
    prompts[0].free = prompts[1].free = None
    ours.trust._learn(SimpleNamespace(share=share), prompts, 1, None)  # of one of two pictures, and without places
    assert heard[-1].shape[0] == 2 and prompts[0].free.tolist() == [[1.0, 0.0]] and prompts[1].free is None
    assert ours.trust.mean(prompts).tolist() == [1.0, 0.0]
    ours.trust.give(prompts[1], torch.tensor([[0.5, 1.0], [0.0, 0.0]]))
    assert ours.trust.mean(prompts).tolist() == [0.625, 0.25], "over all prompts, as they are now"
    heard.clear()
    prompts[0].free = None
    for use, count in ((ours.trust.forget, 0), (ours.trust.learn, 1)):
        ours.trust._heard.append((SimpleNamespace(share=share), prompts, 1, None))
        use()
        ours.trust.learn()
        assert len(heard) == count, "what was heard is used once, or not at all"


def test_before_its_start_no_lora_acts():
    (ours, _), one, branch = regions(start=0.5), cond(BOTH), Branch((1.0, 1.0))
    called(ours, [one])
    assert ours.confined(one["uuid"], branch).is_base and ours.maps.amax() == ours.of(one["uuid"]).amax() == 0
    assert not ours.probes(Step(1, 4, 1.0)) and ours.probes(Step(2, 4, 1.0))
    called(ours, [one], step=2)
    assert ours.confined(one["uuid"], branch) is branch and ours.maps.amin() == 1
    nobody, _ = regions(start=0.5)
    called(nobody, [])
    assert nobody.maps.amax() == 0


def test_there_is_nothing_to_look_for():
    """Where no prompt has words of a LoRA without a mask, or of none but a style's."""
    for options, text in (({}, "a field"), ({"masks": (LEFT, LEFT)}, BOTH), ({"everywhere": (True, True)}, BOTH)):
        ours, told = regions(**options)
        called(ours, [cond(text)])
        assert ours.idle and not ours.probes(Step(0, 4, 1.0)) and not ours.reads(Step(0, 4, 1.0))
        assert len(told) == (2 if text == "a field" else 0), told
    ours, _ = regions(masks=(LEFT, None))
    called(ours, [cond(BOTH)])
    assert not ours.idle and ours.probes(Step(0, 4, 1.0))


def test_of_an_evaluation_that_left_blocks_out_nothing_is_taken(monkeypatch):
    """A cache's: what its other blocks attend to is not what all of them do. Each model has its own number of them."""
    ours, root, names, seen = regions()[0], nn.Module(), [uuid4(), uuid4()], []
    monkeypatch.setattr(ours, "see", lambda name, found: seen.append((name, float(found.mean()))))
    found = torch.cat([torch.ones(2, 3, 1, 8, 8), 2 * torch.ones(2, 3, 1, 8, 8)])

    def done(count: int, root: nn.Module = root, found: Tensor | None = found) -> list:
        seen.clear()
        AttentionReading(ours, root, SimpleNamespace(count=count, found=[], mean=lambda wanted: found), names, 2).done()
        return list(seen)

    both = [(names[0], 1.0), (names[1], 2.0)]
    assert done(4) == both and done(3) == [] and done(0) == [] and done(4) == both
    assert done(3, nn.Module()) == both and done(4, found=None) == []


def test_rows_that_are_read():
    """For each cond all pictures; as a slice where they follow each other, each made once."""
    ours, names = regions()[0], [uuid4() for _ in range(3)]
    parts = [torch.ones(1, 5), 2 * torch.ones(2, 5), 3 * torch.ones(1, 5)]
    some = [(k, names[k], parts[k]) for k in (0, 2)]
    rows, members, made = ours.rows_to_read(some, 2, torch.device("cpu"))
    assert rows.tolist() == [0, 1, 4, 5] and members[:, 0, 0].tolist() == [1, 1, 3, 3]
    assert ours.rows_to_read(some, 2, torch.device("cpu"))[2] is made
    rows, members, _ = ours.rows_to_read([(k, names[k], parts[k]) for k in (1, 2)], 2, torch.device("cpu"))
    assert rows == slice(2, 6) and members[:, :, 0].tolist() == [[2, 2], [2, 2], [3, 0], [3, 0]]


@pytest.mark.parametrize("trust", [False, True])
def test_a_run_that_goes_on_with_the_picture_takes_what_was_found(trust):
    """Of the same words for the same part of the picture, and only where all of them were."""
    (ours, _), one = regions(trust=trust), cond(BOTH)
    called(ours, [one])
    shown(ours, one, attention(3))
    if trust:
        ours._prompts[one["uuid"]].free = torch.tensor([[0.25, 0.5]])
    known = ours.answers()
    assert len(known) == (4 if trust else 2)
    for entry, all_there in ((cond(BOTH), True), (cond(BOTH, (4, 4, 0, 0)), False), (cond(FIRST), False)):
        after, _ = regions(trust=trust)
        after.known = known
        called(after, [entry])
        assert after.taken == all_there and after.probes(Step(0, 4, 1.0)) != all_there
        if all_there:
            ours._show()
            assert torch.equal(after.of(entry["uuid"]), ours.of(one["uuid"])) and after.of(entry["uuid"]).amin() < 1
            assert ("trust" in after.notes()) == trust
    two, _ = regions(trust=trust)
    two.known = known
    called(two, [cond(BOTH), cond(FIRST)])
    assert two.taken and two.probes(Step(0, 4, 1.0)), "one of two is known"
    later, _ = regions(trust=trust)
    later.known = known
    called(later, [other := cond(FIRST)])
    called(later, [other, cond(BOTH)])
    assert later.taken and later.probes(Step(0, 4, 1.0)), "and comes behind the other"


def test_a_text_that_the_host_has_repeated():
    """To the length of another in the batch: for another batch it may be as it was."""
    (ours, _), one, root = regions(), cond(BOTH), nn.Module()
    called(ours, [one])
    length = ours._prompts[one["uuid"]].length
    short, long = (ours.members(one["uuid"], root, count * length) for count in (1, 2))
    assert short.shape == (3, length) and torch.equal(long, short.repeat(1, 2))


def test_stand_ins():
    """A prompt whose places are those of another is not read itself; what was found for it stays found."""
    (ours, _), one, instead = regions(), cond(BOTH), cond("green cat, blue dog, a field")
    called(ours, [one])
    shown(ours, one, attention(3))
    ours.routes.found = True
    ours.await_stand_in(one["uuid"])
    assert ours.routes.found and ours.members(one["uuid"], nn.Module(), 7) is None
    (fresh, _), other = regions(), cond(BOTH)
    called(fresh, [other])
    fresh.routes.found = True
    fresh.await_stand_in(other["uuid"])
    assert not fresh.routes.found
    instead[PROMPT] = other[PROMPT]
    fresh.stand_in(other["uuid"], instead)
    assert fresh.members(instead["uuid"], nn.Module(), 7) is not None
    shown(fresh, instead, attention(3))
    assert fresh.routes.found and fresh.of(other["uuid"]).amin() < 1


def test_who_is_heard():
    """Nobody where places are final, and over a batch's windows none; what was heard while nothing was seen is lost."""
    places = Places(torch.ones(1, 2, 8, 8), (0,))
    for trust in (False, True):
        (ours, told), one = regions(trust=trust), cond(BOTH)
        called(ours, [one])
        assert ours.listen([uuid4()], places, 1, range(2)) is None
        assert (ours.listen([one["uuid"]], places, 1, range(2)) is not None) == trust
    ours.commit()
    assert not ours.trust._heard
    ours.window = (0, (0,), 0)
    assert ours.listen([one["uuid"]], places, 1, range(2)) is None and "not measured" in told[-1]
    ours.window, ours._prompts[one["uuid"]].free = None, torch.zeros(1, 2)
    assert ours.listen([one["uuid"]], places, 1, range(2)) is None


@pytest.mark.parametrize("masks", [(None, None), (None, LEFT)], ids=["no mask", "a mask"])
def test_places_that_cannot_be_found(masks):
    ours, told = regions(masks=masks)
    called(ours, [cond(BOTH)])
    ours.give_up("it is dark", nowhere=True)
    assert told == ["it is dark; the LoRAs act everywhere"] and not ours.probes(Step(1, 4, 1.0))
    assert ours.nowhere == (masks[1] is None)
    film, _ = regions(FILM)
    called(film, [cond(BOTH)])
    film.give_up("it is dark")
    film.window = (2, (3, 4, 5), 0)
    assert not film.probes(Step(1, 4, 1.0)), "nor in a window that comes later"


def test_each_lora_without_a_place_has_its_own_reason():
    told: list[str] = []
    words = (LoRAWords("x"), LoRAWords("y", "sks"))
    ours = RoutedLoRAs(Routed(Routing(), words, (0, 1), (False, False)), (None, None), PICTURE, torch.device("cpu"),
                       told.append)
    called(ours, [cond("a field")])
    first, second = told
    assert first.startswith("LoRA 'x': ") and second.startswith("LoRA 'y': ")
    assert first.removeprefix("LoRA 'x': ") != second.removeprefix("LoRA 'y': ")
