"""What goes by the number of steps where a user leaves it open, at 4, 8, 20 and 50; numbers that are given stay."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.kernels.branch import Step
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.counted import counted
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.schedule import BySteps, NonUniform, Uniform, oldest, own_interval, refresh_steps
from lora_ensemble.methods.selection import Contest, Selection, main_subject
from lora_ensemble.methods.session import RunContext, begin
from lora_ensemble.methods.switch import Switch
from lora_ensemble.methods.windows import Window, gains_of

STEPS = (4, 8, 20, 50)
NAMES = ("one", "two", "three", "four", "five")
HIGH = (True, True, True, True, False)


def context(total: int, **options) -> RunContext:
    return RunContext(tuple(float(total - j) for j in range(total + 1)), tuple(1 - j / total for j in range(total)),
                      (1, 4, 8, 8), **options)


def led(method, total: int, key=lambda session, step: session.notes()["led"]) -> list[int]:
    session, out = begin(method, context(total)), []
    for j in range(total):
        step = Step(j, total, float(total - j))
        session.observe(step, torch.zeros(1, 4, 8, 8))
        session.branches(step)
        out.append(key(session, step))
    return out


def acting(session, step: Step) -> int:
    """The one LoRA of a step's one branch."""
    (branch,) = session.branches(step)
    (i,) = [i for i, gain in enumerate(branch.gains) if gain]
    return i


# --- Switch: whose the last steps are ---


@pytest.mark.parametrize(("total", "count", "tail"), [
    (4, 2, 1), (4, 3, 1), (4, 4, 0), (4, 5, 0), (8, 2, 1), (8, 5, 1), (20, 2, 2), (20, 5, 2), (50, 3, 5), (100, 3, 10)])
def test_the_last_steps_are_the_subjects(total, count, tail):
    """A tenth of the run, one at least, and none where a LoRA would lose its only turn."""
    method = Switch((1.0,) * count, last=0)
    found = led(method, total, acting)
    assert method.tail(total) == tail and found[total - tail:] == [0] * tail
    assert set(found) == set(range(min(count, total)))
    turn = min(max((total - tail) // (2 * count), 1), 5)
    assert found[:total - tail] == [j // turn % count for j in range(total - tail)]
    assert led(Switch((1.0,) * count, 3), total, acting) == [j // 3 % count for j in range(total)], "no rule, no tail"


@pytest.mark.parametrize("tau", [1, 2, 3])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("total", STEPS)
def test_the_last_steps_leave_every_turn(total, late, tau):
    """Those of given lengths, too: whoever has a turn without the rule has one with it."""
    for count in (2, 3, 4, 5):
        plain = set(led(Switch((1.0,) * count, tau, late=late), total, acting))
        assert set(led(Switch((1.0,) * count, tau, late=late, last=1), total, acting)) == plain


def test_the_last_steps_and_windows():
    """A subject whose window is shut at the end is not there."""
    gains = gains_of((Window(0, 0.5), Window()), [j / 20 for j in range(20)])
    session = begin(Switch((1.0, 1.0), last=0), context(20, gains=gains))
    assert [acting(session, Step(j, 20, 1.0)) for j in (18, 19)] == [1, 1]
    session = begin(Switch((1.0, 1.0), last=1), context(20, gains=gains))
    assert acting(session, Step(19, 20, 1.0)) == 1


@pytest.mark.parametrize(("total", "tau", "shares", "lengths"), [
    (50, 0, (0.4, 0.2, 0.1), (5, 2, 1)), (50, 0, (0.0, 0.3, 0.3), (1, 5, 5)), (20, 0, (0.1, 0.2, 0.2), (2, 3, 3)),
    (8, 0, (0.4, 0.2, 0.1), (1, 1, 1)), (4, 3, (0.4, 0.2, 0.1), (3, 2, 1)), (50, 6, (0.1, 0.1, 0.1), (6, 6, 6)),
    (50, 0, (), (5, 5, 5)), (50, 0, (0.0, 0.0, 0.0), (5, 5, 5))])
def test_turns_by_the_prompt(total, tau, shares, lengths):
    """n_i = max(1, round(tau w_i / max w)), turn after turn; equal where nothing is known of the prompt."""
    method = Switch((1.0,) * 3, tau, by_prompt=True)
    assert method.lengths(total, shares) == lengths
    session = begin(method, context(total, shares=shares))
    circle = [i for i, n in enumerate(lengths) for _ in range(n)]
    assert [acting(session, Step(j, total, 1.0)) for j in range(total)] == (circle * total)[:total]
    names = NAMES[:3]
    if any(shares):
        assert session.missed(names) == [f"no prompt has words of LoRA '{names[0]}': each turn is then 1 step. Use the "
                                         "LoRA's words in the prompt, mark some for it, or set lengths to 'equal'"
                                         ] * (0 in shares)
        assert "turns by the prompt: " + ", ".join(
            f"{name} {n}" for name, n in zip(names, lengths, strict=True)) in session.chosen(names)
    else:
        assert "turns have one length" in session.missed(names)[0]
        assert not [line for line in session.chosen(names) if "by the prompt" in line]
    plain = begin(Switch((1.0,) * 3, tau), context(total, shares=shares))
    assert plain.missed(names) == [] and [acting(plain, Step(j, total, 1.0)) for j in range(total)] == [
        j // Switch((1.0,) * 3, tau).turn(total) % 3 for j in range(total)]


def test_switch_says_what_it_chose():
    def said(total, *args, **options):
        return begin(Switch((1.0,) * 4, *args, **options), context(total)).chosen(NAMES[:4])

    assert said(8) == ["8 steps, 4 LoRAs: steps_per_lora is 1"] and said(8, 2) == []
    assert said(50, 2, last=1) == ["the last 5 steps are those of LoRA 'two'"]
    assert said(8, 1, last=1) == ["the last 1 step is those of LoRA 'two'"]
    assert said(4, 1, last=1) == ["4 steps leave none at the end for LoRA 'two' alone"]
    with pytest.raises(ValueError, match="no LoRA 4"):
        Switch((1.0,) * 4, last=4)


# --- CMLoRA: when the lead passes on ---


@pytest.mark.parametrize(("total", "count", "found"), [
    (4, 2, (2, 3)), (4, 3, (2, 3)), (4, 4, (1, 2)), (4, 5, (1, 1)), (8, 2, (2, 3)), (8, 4, (2, 3)), (8, 5, (1, 2)),
    *((total, count, (2, 3)) for total in (20, 50, 200) for count in (2, 3, 4, 5))])
def test_every_lora_leads_where_that_can_be(total, count, found):
    """With a background last, whose time is short. The paper's 2 and 3 wherever they do."""
    method = CMLoRA((1.0,) * count, HIGH[5 - count:])
    assert method.intervals(total) == found
    who = led(method, total)
    late = int(0.6 * total) + 1
    assert set(who[:late]) == set(range(count - 1)) or (total, count) == (4, 5)
    assert set(who[late:]) == {count - 1}
    session = begin(method, context(total))
    assert session.refreshes == sorted(refresh_steps(total, *found)) and session.oldest == oldest(count, *found)
    assert session.chosen(NAMES[:count]) == [f"{total} steps, {count} LoRAs: c1 is {found[0]}, c2 is {found[1]}"]


def test_cmlora_says_how_long_its_cache_serves():
    said = {total: begin(CMLoRA((1.0,) * 3, c1=2, c2=3, cache_age=0), context(total)).chosen(NAMES[:3])
            for total in (8, 20, 200)}
    assert said == {8: ["8 steps, 3 LoRAs: cached features do not serve, so few steps differ too much"],
                    20: ["20 steps, 3 LoRAs: cached features serve 3 steps"],
                    200: ["200 steps, 3 LoRAs: cached features serve 9 steps"]}
    assert begin(CMLoRA((1.0,) * 3, c1=2, c2=3, cache_age=0, caching=False), context(8)).chosen(NAMES[:3]) == []


@pytest.mark.parametrize("total", STEPS)
def test_intervals_that_are_given_stay(total):
    for pair in ((2, 3), (1, 1), (5, 7)):
        method = CMLoRA((1.0,) * 5, HIGH, c1=pair[0], c2=pair[1])
        assert method.intervals(total) == pair and begin(method, context(total)).chosen(NAMES) == []
        assert begin(method, context(total)).refreshes == sorted(refresh_steps(total, *pair))
    assert CMLoRA((1.0,) * 5, HIGH, c1=3).intervals(8)[0] == 3 and CMLoRA((1.0,) * 5, HIGH, c2=1).intervals(8) == (2, 1)
    turns_by_tenths = CMLoRA((1.0,) * 5, HIGH, order="async")
    assert turns_by_tenths.intervals(total) == (2, 3) and begin(turns_by_tenths, context(total)).chosen(NAMES) == []
    assert CMLoRA((1.0,) * 5, HIGH, order="online").intervals(total) == CMLoRA((1.0,) * 5, HIGH).intervals(total)
    assert oldest(4) == 12 and oldest(4, 1, 1) == 4
    assert CMLoRA(()).intervals(total) == (2, 3)


def test_whoever_never_led_is_named():
    def never(method, total):
        session = begin(method, context(total))
        for j in range(total):
            session.observe(Step(j, total, 1.0), torch.zeros(1, 4, 8, 8))
        return session.missed(NAMES[:len(method.strengths)])

    assert never(CMLoRA((1.0,) * 5, HIGH), 4) == ["four never led in 4 steps"]
    assert never(CMLoRA((1.0,) * 5, HIGH, c1=2, c2=3), 4) == ["three, four never led in 4 steps"]
    assert never(CMLoRA((1.0,) * 5, HIGH), 8) == [] == never(CMLoRA((1.0,)), 1)
    assert never(CMLoRA((1.0, 1.0), (True, False)), 2) == ["the class of backgrounds never led in 2 steps (two)"]
    assert never(CMLoRA((1.0, 1.0), (True, False), boundary=1.0), 50) == [
        "the class of backgrounds never led in 50 steps (two)"]
    assert never(CMLoRA((1.0, 1.0), (True, False), order="online", threshold=2.0), 50) == [
        "the class of fine detail never led in 50 steps (one)"]


@pytest.mark.parametrize(("total", "count"), [(total, count) for total in STEPS for count in (2, 3, 4, 5)])
def test_switch_a_lets_backgrounds_begin_after_the_boundary(total, count):
    method = CMLoRA((1.0,) * count, HIGH[5 - count:], order="switch-a")
    who, first = led(method, total, acting), int(0.6 * total) + 1
    tau = min(max(total // (2 * count), 1), 5)
    assert who[:first] == [j // tau % (count - 1) for j in range(first)]
    assert who[first:] == [((j - first) // tau - 1) % count for j in range(first, total)], "the background, then others"
    given = CMLoRA((1.0,) * count, HIGH[5 - count:], order="switch-a", steps_per_lora=5)
    assert led(given, total, acting) == [j // 5 % (count - 1 if j < first else count) for j in range(total)]
    assert begin(method, context(total)).chosen(NAMES[:count]) == [
        f"{total} steps, {count} LoRAs: steps_per_lora is {tau}"]
    assert begin(given, context(total)).chosen(NAMES[:count]) == []


@pytest.mark.parametrize("high", [True, False])
def test_switch_a_of_one_class_knows_no_boundary(high):
    """Guard: without a background, turns began anew at the boundary, though a node said that it is not used."""
    for boundary in (0.2, 0.6):
        method = CMLoRA((1.0, 1.0), (high, high), order="switch-a", boundary=boundary)
        assert led(method, 8, acting) == [0, 0, 1, 1, 0, 0, 1, 1]


# --- the Branch Cache ---


@pytest.mark.parametrize(("total", "interval"), [(1, 1), (4, 1), (8, 1), (9, 1), (10, 2), (20, 3), (30, 4), (50, 5),
                                                 (200, 5)])
def test_the_caches_interval(total, interval):
    assert own_interval(total) == interval and BySteps().at(total) == Uniform(interval)
    assert BySteps(False).at(total) == NonUniform(min(2, interval), min(3, interval))
    for schedule in (BySteps(), BySteps(False)):
        there = schedule.at(total)
        assert there.max_age <= schedule.max_age
        steps = [Step(j, total, 1.0) for j in range(total)]
        assert [schedule.refreshes(step) for step in steps] == [there.refreshes(step) for step in steps]
        assert all(map(schedule.refreshes, steps)) == (interval == 1)


# --- K-LoRA and EST-LoRA: the ramp is one of progress ---


@pytest.mark.parametrize("total", STEPS)
def test_the_ramp_is_whole_with_any_number_of_steps(total):
    """From beta at the first step to alpha + beta at the last; the choice of a layer changes at the same progress."""
    ratios = tuple(0.4 + 0.2 * k for k in range(10))
    contest = Contest((1.0, 1.0), tuple("abcdefghij"), (0,) * 10, (1,) * 10, ratios, (True, False))
    method, run = Selection(contest, 1.5, 0.5), context(total)
    at = [method.scale(run.progress(Step(j, total, 1.0))) for j in range(total)]
    assert (at[0], at[-1]) == (0.5, 2.0) and sum(at) / total == pytest.approx(1.25)
    for ratio in ratios:
        subject = sum(scale <= ratio + 1e-9 for scale in at)
        assert subject == min(max(int((ratio - 0.5) / 1.5 * (total - 1) + 1e-6) + 1, 0), total) or ratio < 0.5
        assert abs(subject / total - min(max(method.flip(ratio), 0.0), 1.0)) <= 1 / total


# --- LoRAtorio: how sharp its weights become ---


@pytest.mark.parametrize("total", (1, *STEPS))
def test_few_steps_sharpen_as_far_as_eight(total):
    """From 8 steps on each step counts, as the paper has it."""
    method = LoRAtorio((1.0, 1.0), unit="auto")
    found = [method.inverse_temperature(Step(j, total, 1.0)) for j in range(total)]
    if total >= 8:
        assert found == [10.0 * j for j in range(total)]
    else:
        assert found == pytest.approx([70.0 * j / max(total - 1, 1) for j in range(total)])
    said = begin(method, context(total)).chosen(NAMES[:2])
    assert said == [f"{counted(total, 'step')}: the inverse temperature rises to {found[-1]:g}"]
    given = LoRAtorio((1.0, 1.0), kappa=3.0)
    assert [given.inverse_temperature(Step(j, total, 1.0)) for j in range(total)] == [3.0 * j for j in range(total)]
    assert begin(given, context(total)).chosen(NAMES[:2]) == []


@pytest.mark.parametrize(("roles", "order", "found"), [
    (("style", "object", "character"), None, 2), (("style", "object", "clothing"), None, 1),
    (("style", "object", "clothing"), (2, 0, 1), 2), (("auto", "style"), None, 0), (("auto", "style"), (1, 0), 1),
    (("character", "character"), (1, 0), 1), ((), None, None)])
def test_whom_a_picture_is_about(roles, order, found):
    assert main_subject(roles, order) == found
