"""CMLoRA as a method: who leads and when, with which weight, what is refreshed; and the faults of the released code."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from lora_ensemble.kernels.branch import Branch, Step
from lora_ensemble.kernels.spectrum import high_share, radial_amplitude, radial_bins
from lora_ensemble.methods.cmlora import CMLoRA, dominance
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.schedule import AgeBySteps, refresh_steps
from lora_ensemble.methods.session import POSITIVE, UNCONDITIONAL, Call, RunContext

ORDERS = ("offline", "online", "async", "switch-a")
each_order = pytest.mark.parametrize("order", ORDERS)


def run(method: CMLoRA, total: int, latents=None) -> list[dict]:
    """The notes of every step, with what had to run whole; `latents` per step, white noise by default."""
    g = torch.Generator().manual_seed(0)
    session = method.begin(RunContext(tuple(float(total - i) for i in range(total + 1)), shape=(1, 4, 64, 64)))
    found = []
    for index in range(total):
        step = Step(index, total, float(total - index))
        x = torch.randn(1, 4, 64, 64, generator=g) if latents is None else latents[index]
        session.observe(step, x)
        session.observe(step, x)  # a second call in the same step changes nothing
        branches = session.branches(step)
        refresh = session.refresh(step)
        assert len(refresh) == len(branches)
        found.append({**session.notes(), "branches": branches, "refresh": refresh})
    return found


def leaders(method: CMLoRA, total: int, latents=None) -> list[int]:
    return [entry["led"] for entry in run(method, total, latents)]


def mix(method: CMLoRA, predictions: torch.Tensor, total: int = 20, index: int = 0) -> torch.Tensor:
    session = method.begin(RunContext(tuple(float(i) for i in range(total, -1, -1))))
    for i in range(index + 1):
        step = Step(i, total, float(total - i))
        session.observe(step, predictions[0])
    call = Call(predictions[0], torch.ones(1), session.branches(step), [predictions, None], (POSITIVE, UNCONDITIONAL))
    mixed, nothing = session.mix(step, call)
    assert nothing is None
    return mixed


# --- schedule and weights -------------------------------------------------------------------------------------------


def test_the_papers_refresh_schedule():
    paper = {*range(0, 75, 2), *range(75, 175, 3), *range(175, 200, 2)}
    assert refresh_steps(200) == paper and len(paper) == 85
    assert sorted(refresh_steps(20)) == [0, 2, 4, 6, 8, 11, 14, 17, 18]


@pytest.mark.parametrize("total", [1, 2, 3, 7, 20, 33, 200, 1000])
@pytest.mark.parametrize(("c1", "c2"), [(2, 3), (1, 1), (5, 2)])
def test_refreshes_for_any_step_count(total, c1, c2):
    """Fault: the released boundaries are absolute steps of T = 200."""
    steps = sorted(refresh_steps(total, c1, c2))
    assert steps[0] == 0 and steps[-1] < total
    assert all(b - a <= max(c1, c2) for a, b in pairwise([*steps, total]))


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("start", [None, 1.0, 3.0])
def test_the_mix_is_the_papers_weighted_mean(count, start):
    predictions = torch.randn(count, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    w = (max(count - 0.5, 1) if start is None else start)
    for index in (0, 3):
        lead = leaders(CMLoRA((1.0,) * count, start=start), 20)[index]
        lam = [(w if i == lead else 1.0) / (w + count - 1) for i in range(count)]
        assert sum(lam) == pytest.approx(1)
        want = sum(share * p for share, p in zip(lam, predictions, strict=True))
        torch.testing.assert_close(mix(CMLoRA((1.0,) * count, start=start), predictions, index=index), want)


def test_the_papers_numbers():
    for count, first, other in ((2, 0.6, 0.4), (3, 0.556, 0.222), (4, 0.538, 0.154), (5, 0.529, 0.118)):
        share = run(CMLoRA((1.0,) * count), 10)[0]["weight"]
        assert share == pytest.approx(first, abs=1e-3)
        assert (1 - share) / (count - 1) == pytest.approx(other, abs=1e-3)


@each_order
def test_w_1_without_caching_is_composite_bit_for_bit(order):
    predictions = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    method = CMLoRA((1.0,) * 3, order=order, start=1.0, caching=False)
    if order != "switch-a":
        for index in range(5):
            assert torch.equal(mix(method, predictions, index=index),
                               Composite((1.0,) * 3).mix(Step(index, 20, 1.0), predictions))
        assert all(entry["refresh"] == (True,) * 3 for entry in run(method, 20))
        assert run(method, 20)[4]["branches"] == Composite((1.0,) * 3).branches(Step(4, 20, 1.0))


def test_identical_loras_and_one_lora_are_the_single_lora():
    one = torch.randn(1, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for decay in ("none", "halving", "linear"):
        for index in range(8):
            method = CMLoRA((1.0,) * 4, decay=decay)
            torch.testing.assert_close(mix(method, one.expand(4, -1, -1, -1, -1), index=index), one[0])
            assert torch.equal(mix(CMLoRA((1.0,), decay=decay), one, index=index), one[0])


def test_no_lora_is_the_base():
    (entry,) = run(CMLoRA(()), 1)
    assert entry["branches"] == (Branch(()),)
    one = torch.randn(1, 2, 4, 8, 8)
    assert torch.equal(mix(CMLoRA(()), one), one[0])


def test_decay_acts_and_never_turns_a_weight_negative():
    """Fault: the released decay is computed and never used; used as it stands it would turn N = 2 negative."""
    assert [dominance(4.5, n, "halving") for n in range(5)] == [4.5, 3.5, 3.0, 2.75, 2.625]
    assert [dominance(4.5, n, "linear") for n in range(5)] == [4.5, 4.0, 3.0, 1.5, 1.0]
    assert [dominance(1.5, n, "halving") for n in range(4)] == [1.5, 1.0, 1.0, 1.0]
    assert dominance(0.5, 9, "linear") == 0.5
    for decay in ("halving", "linear"):
        for count in range(2, 6):
            shares = [entry["weight"] for entry in run(CMLoRA((1.0,) * count, decay=decay), 50)]
            assert all(1 / count <= b <= a + 1e-12 for a, b in pairwise(shares)) and shares[-1] < shares[0]
    assert len({entry["weight"] for entry in run(CMLoRA((1.0,) * 3), 50)}) == 1, "none: as released"


# --- who leads ------------------------------------------------------------------------------------------------------

HIGH = (True, False, True, True, False)
"""LoRAs 1 and 4 are backgrounds."""


def test_offline_leads_stay_in_the_active_class():
    """Fault: after the boundary the released code lets high-frequency LoRAs lead, all but the first."""
    for total in (10, 20, 55, 200):
        led = leaders(CMLoRA((1.0,) * 5, HIGH), total)
        for index, lead in enumerate(led):
            assert HIGH[lead] == (index <= 0.6 * total), (total, index)
        early = [lead for index, lead in enumerate(led) if index in refresh_steps(total) and index <= 0.6 * total]
        assert early == [(0, 2, 3)[n % 3] for n in range(len(early))], "one after the other, at every refresh"


def test_the_boundary_is_a_share_of_the_run():
    """Fault: released, it is step 120, whatever the number of steps."""
    for total in (5, 20, 100, 200, 400):
        led = leaders(CMLoRA((1.0,) * 2, (True, False)), total)
        assert led.index(1) == int(0.6 * total) + 1


@pytest.mark.parametrize("high", [(True,) * 3, (False,) * 3, None])
def test_a_class_without_loras_leaves_the_lead_to_the_other(high):
    assert set(leaders(CMLoRA((1.0,) * 3, high), 40)) == {0, 1, 2}


def smooth(share: float) -> torch.Tensor:
    """A latent between white noise (1) and a slow wave (0)."""
    wave = torch.linspace(0, 6.28, 64).sin()[None, None, :, None].expand(1, 4, 64, 64)
    return share * torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)) + (1 - share) * 5 * wave


def test_online_follows_the_measured_share_one_step_later():
    """Fault: the released mean over profile[80:] of a 64 x 64 latent is empty, NaN, and never at least g."""
    latents = [smooth(s) for s in (1, 1, 1, 0.01, 0.01, 1, 1, 0.01, 0.01, 0.01)]
    entries = run(CMLoRA((1.0,) * 2, (True, False), order="online"), 10, latents)
    bins = radial_bins(64, 64)
    shares = [high_share(radial_amplitude(x, bins)).item() for x in latents]
    assert max(shares[3:5]) < 0.4 < min(shares[:3])
    assert [entry["high_share"].item() for entry in entries] == pytest.approx(shares)
    before = [1.0, *shares[:-1]]
    assert [entry["led"] for entry in entries] == [0 if share >= 0.4 else 1 for share in before]


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (64, 64), (96, 128)], ids=str)
def test_online_measures_latents_of_every_size(size):
    latents = [torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    entries = run(CMLoRA((1.0,) * 2, (True, False), order="online", threshold=0.2), 6, latents)
    assert all(torch.isfinite(entry["high_share"]) for entry in entries)
    assert {entry["led"] for entry in entries} == {0}


def test_async_passes_the_lead_on_its_own_period():
    led = leaders(CMLoRA((1.0,) * 3, (True, False, True), order="async"), 200)
    assert led == [(0, 2, 1)[i // 20 % 3] for i in range(200)]
    assert leaders(CMLoRA((1.0,) * 2, order="async"), 4) == [0, 1, 0, 1]


def test_switch_a_is_switch_with_backgrounds_late():
    entries = run(CMLoRA((1.0, 0.5, 0.8), (True, False, True), order="switch-a", steps_per_lora=3), 30)
    for index, entry in enumerate(entries):
        group = (0, 2) if index <= 18 else (0, 2, 1)
        assert entry["led"] == group[index // 3 % len(group)]
        (branch,) = entry["branches"]
        assert [i for i, gain in enumerate(branch.gains) if gain] == [entry["led"]] and entry["weight"] == 1.0
    one = torch.randn(1, 2, 4, 8, 8)
    assert torch.equal(mix(CMLoRA((1.0,) * 3, order="switch-a"), one), one[0])


# --- what is refreshed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS[:3])
@pytest.mark.parametrize("dominant_full", ["every_step", "on_refresh"])
@pytest.mark.parametrize("high", [HIGH, None], ids=["classes", "one class"])
@pytest.mark.parametrize("total", [20, 200])
def test_every_cache_is_made_at_first_and_of_bounded_age(order, dominant_full, high, total):
    method = CMLoRA((1.0,) * 5, high, order=order, dominant_full=dominant_full)
    entries = run(method, total)
    assert entries[0]["refresh"] == (True,) * 5
    made = [0] * 5
    for index, entry in enumerate(entries):
        for i, whole in enumerate(entry["refresh"]):
            made[i] = index if whole else made[i]
            assert index - made[i] < 15, "never older than if all took turns: 5 LoRAs, 3 steps each"
    cached = sum(not whole for entry in entries for whole in entry["refresh"])
    assert cached > 0.5 * 5 * total, "most passes come from a cache"


@pytest.mark.parametrize("order", ORDERS[:3])
@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("total", [4, 9, 10, 20, 50, 200])
def test_the_age_goes_by_the_number_of_steps(order, count, total):
    """0: at most 15 % of the steps and at most the paper's, which it is in the paper's 200; other numbers are taken."""
    own, paper = (CMLoRA((1.0,) * count, HIGH[5 - count:], order=order, cache_age=age) for age in (0, None))
    by_steps = min(max(round(0.15 * total), 1), count * max(paper.intervals(total)))
    assert own.oldest(total) == by_steps and paper.oldest(total) == count * max(paper.intervals(total))
    for method, most in ((own, by_steps), (replace(own, cache_age=3), 3)):
        ages, made = [], [0] * count
        for index, entry in enumerate(run(method, total)):
            made = [index if whole else made[i] for i, whole in enumerate(entry["refresh"])]
            ages += [index - since for since in made]
        assert max(ages) < most and (max(ages) == most - 1 or total != 20), "no older, and as old where it may be"
    if total == 200:
        assert [e["refresh"] for e in run(own, total)] == [e["refresh"] for e in run(paper, total)]
    assert AgeBySteps(count).at(total) >= own.oldest(total)
    with pytest.raises(ValueError, match="cache_age must be at least 0"):
        CMLoRA((1.0,), cache_age=-1)


def test_where_steps_go_back_features_of_much_later_ones_are_too_old():
    """A restart."""
    session = CMLoRA((1.0,) * 3, cache_age=3).begin(RunContext(tuple(float(20 - i) for i in range(21))))
    for index in [*range(11), 2]:
        session.observe(Step(index, 20, 20.0 - index), torch.zeros(1, 4, 8, 8))
    assert session.notes()["whole"] == [0, 1, 2]


@pytest.mark.parametrize("dominant_full", ["every_step", "on_refresh"])
def test_with_the_papers_schedule_passes_do_come_from_the_cache(dominant_full):
    """Fault: released, its own schedule is `cache_interval = 0`, which switches the cache off: 1000 whole passes for
    5 LoRAs and 200 steps. Here it is 4 whole ones at first, then the leader's, and what grew too old."""
    entries = run(CMLoRA((1.0,) * 5, dominant_full=dominant_full), 200)
    whole = sum(sum(entry["refresh"]) for entry in entries)
    leads = 200 if dominant_full == "every_step" else 85
    assert leads + 4 <= whole <= leads + 4 + 4 * 200 / 15


def test_everybody_is_refreshed_after_the_boundary_as_well():
    """Fault: released, with an interval and a background LoRA, the reset goes into a copy of the list, and after step
    120 of 200 nothing is refreshed again."""
    entries = run(CMLoRA((1.0,) * 5, HIGH, c1=2, c2=2, dominant_full="on_refresh"), 200)
    for i in range(5):
        late = [index for index, entry in enumerate(entries) if index > 120 and entry["refresh"][i]]
        assert len(late) >= 79 // 10 and late[0] <= 120 + 10


def test_a_leader_runs_whole_and_the_others_ride():
    full = run(CMLoRA((1.0,) * 3), 12)
    for entry in full[1:]:
        assert entry["refresh"][entry["led"]]
    on_refresh = run(CMLoRA((1.0,) * 3, dominant_full="on_refresh"), 12)
    for index, entry in enumerate(on_refresh[1:], start=1):
        whole = [i for i, fresh in enumerate(entry["refresh"]) if fresh]
        assert whole == ([entry["led"]] if index in refresh_steps(12) else [])


@pytest.mark.parametrize("interval", [2, 3])
def test_with_refreshes_alone_each_lora_of_the_group_is_refreshed_in_turn(interval):
    entries = run(CMLoRA((1.0,) * 3, dominant_full="on_refresh", c1=interval, c2=interval), 48)
    refreshed = [entry["led"] for index, entry in enumerate(entries) if index in refresh_steps(48, interval, interval)]
    assert refreshed == [n % 3 for n in range(len(refreshed))]


def test_a_change_of_class_between_refreshes_is_a_refresh_of_the_new_leader():
    entries = run(CMLoRA((1.0,) * 2, (True, False), dominant_full="on_refresh", boundary=0.5), 20)
    change = next(i for i, entry in enumerate(entries) if entry["led"] == 1)
    assert change == 11 and entries[change]["refresh"][1]


def test_a_run_leaves_the_share_of_its_last_latent():
    """By it the first step of the picture's next run goes; of a run without a step there is nothing to say."""
    session = CMLoRA((1.0,) * 2, (True, False), order="online").begin(RunContext((2.0, 1.0, 0.0), shape=(1, 4, 32, 32)))
    assert session.left() is None
    latents = torch.randn(2, 1, 4, 32, 32, generator=torch.Generator().manual_seed(4))
    for index, x in enumerate(latents):
        session.observe(Step(index, 2, 2.0 - index), x)
    first, last = (high_share(radial_amplitude(x, radial_bins(32, 32))).item() for x in latents)
    assert session.left() == pytest.approx(last) and first != pytest.approx(last)


# --- input ----------------------------------------------------------------------------------------------------------


def test_roles_are_the_users_word_and_unknown_ones_count_as_high():
    """Fault: released classes go by hard-coded ids; a LoRA with any other name is dropped silently."""
    assert CMLoRA((1.0,) * 3).classes == ((0, 1, 2), ())
    assert CMLoRA((1.0,) * 3, (True, False, True)).classes == ((0, 2), (1,))


@pytest.mark.parametrize(("options", "message"), [({"c1": -1}, "c1 must be"), ({"c2": -1}, "c2 must be"),
                                                  ({"steps_per_lora": -1}, "steps_per_lora"),
                                                  ({"start": 0.0}, "dominance"), ({"high": (True,)}, "classes")])
def test_wrong_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=f"CMLoRA: .*{message}"):
        CMLoRA((1.0, 1.0), **options)


@pytest.mark.parametrize("film", [False, True], ids=["picture", "film"])
def test_places_weigh_the_loras_that_act_there(film):
    """lambda_i m_i / sum_j lambda_j m_j per place; where none acts all predictions are the base's, and so is the mix.
    Masks of ones are the paper's weights."""
    g = torch.Generator().manual_seed(2)
    size = (3, 4, 5) if film else (4, 5)
    predictions = torch.randn(3, 2, 4, *size, generator=g)
    masks = torch.rand(3, 1, 1, 4, 5, generator=g)
    masks[:, ..., 0] = 0
    predictions[..., 0] = predictions[:1, ..., 0]
    method = CMLoRA((1.0,) * 3)

    def mixed(masks):
        session = method.begin(RunContext(tuple(float(i) for i in range(20, -1, -1)), masks=masks))
        session.observe(step := Step(0, 20, 20.0), predictions[0])
        return session, session.mix(step, Call(predictions[0], torch.ones(1), session.branches(step), [predictions],
                                               (POSITIVE,)))[0]

    session, found = mixed((masks[0], masks[1], None))
    masks[2] = 1
    lam = torch.tensor([session.weight if i == session.lead else 1.0 for i in range(3)]).view(3, 1, 1, 1, 1)
    share = lam * masks
    share = (share / share.sum(0)).view(3, 1, 1, *([1] * film), 4, 5)
    torch.testing.assert_close(found, (share * predictions).sum(0))
    torch.testing.assert_close(mixed((torch.ones(1, 1, 4, 5),) * 3)[1], mixed(())[1])
    gone, base = mixed((masks[0] * 0,) * 3)
    torch.testing.assert_close(base, predictions[gone.lead])
