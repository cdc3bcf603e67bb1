"""Windows in time: who may act when, and what methods make of it, without a model."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.kernels.branch import Branch, Step
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.klora import KLoRA
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.selection import Contest
from lora_ensemble.methods.session import POSITIVE, Call, RunContext, begin
from lora_ensemble.methods.switch import Switch
from lora_ensemble.methods.windows import InTime, Window, gains_of

STEPS = 8
TIMES = tuple(j / STEPS for j in range(STEPS))
SIGMAS = tuple(float(STEPS - j) for j in range(STEPS + 1))


def context(*windows: Window, **options) -> RunContext:
    return RunContext(SIGMAS, TIMES, (1, 4, 8, 8), gains=gains_of(windows, TIMES), **options)


def who(session, index: int) -> list[tuple[int, ...]]:
    """Per branch of a step, the LoRAs that act in it."""
    step = Step(index, STEPS, SIGMAS[index])
    session.observe(step, torch.zeros(1, 4, 8, 8))
    return [tuple(i for i, gain in enumerate(branch.gains) if gain) for branch in session.branches(step)]


# --- the window ---


@pytest.mark.parametrize(("window", "gains"), [
    (Window(), [1, 1, 1, 1, 1, 1, 1, 1]),
    (Window(0, 0.5), [1, 1, 1, 1, 0, 0, 0, 0]),
    (Window(0.5, 1), [0, 0, 0, 0, 1, 1, 1, 1]),
    (Window(0.25, 0.75), [0, 0, 1, 1, 1, 1, 0, 0]),
    (Window(0.26, 0.3), [0, 0, 0, 0, 0, 0, 0, 0]),
    (Window(0.25, 1, 0.25), [0, 0, 0, 0.5, 1, 1, 1, 1]),
    (Window(0, 0.75, 0.5), [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
    (Window(0.25, 0.75, 0.25), [0, 0, 0, 0.5, 1, 0.5, 0, 0]),
    (Window(0.25, 0.75, 1), [0, 0, 0, 0.5, 1, 0.5, 0, 0]),
    (Window(0, 1, 0.5), [1, 1, 1, 1, 1, 1, 1, 1])])
def test_gain(window, gains):
    assert [window.gain(time) for time in TIMES] == pytest.approx(gains)


def test_the_ends_of_the_schedule():
    assert Window(0.5, 1).gain(1.0) == 1 and Window(0, 0.5).gain(0.0) == 1
    assert Window(0, 0.999).gain(1.0) == 0 and Window(0.001, 1).gain(0.0) == 0


@pytest.mark.parametrize("time", [0.5, 0.5 - 1e-6, 0.5 + 1e-6, 0.5 - 3e-5])
def test_windows_that_meet_share_no_step(time):
    """However the noise level of the step was rounded, it is the later one's."""
    assert (Window(0, 0.5).gain(time), Window(0.5, 1).gain(time)) == (0, 1)


@pytest.mark.parametrize("numbers", [(0.5, 0.5, 0), (0.6, 0.4, 0), (-0.1, 1, 0), (0, 1.1, 0), (0, 1, 2),
                                     (float("nan"), 1, 0)])
def test_windows_that_never_open_are_refused(numbers):
    with pytest.raises(ValueError, match="start"):
        Window(*numbers)


def test_whole_windows_are_none():
    assert gains_of((Window(), Window(0, 1, 0.3)), TIMES) == () and gains_of((), TIMES) == ()
    branches = (Branch((1.0, 0.5)),)
    assert InTime(())(Step(0, STEPS, 8.0), branches) is branches
    gains = gains_of((Window(), Window(0, 0.5)), TIMES)
    assert InTime(gains)(Step(0, STEPS, 8.0), branches) is branches
    assert InTime(gains)(Step(4, STEPS, 4.0), branches) == (Branch((1.0, 0.0)),)


def test_shut_in_the_steps_of_one_run():
    """Of a picture that several runs sample, those of the runs before and after do not count."""
    gains = ((0.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0))
    for before, steps, shut in ((0, 2, (True, False)), (1, 1, (True, False)), (2, 1, (False, True)),
                                (2, None, (False, True)), (3, None, (True, True)), (0, None, (False, False))):
        in_time = InTime(gains, before, steps)
        assert (in_time.shut(0), in_time.shut(1)) == shut, (before, steps)
    assert not InTime(()).shut(0)


def test_gains_of_layers_follow_too():
    branch = Branch((0.5, 0.0), (("a", (0.0, 0.8)), ("b", (0.5, 0.8))))
    in_time = InTime(((0.5, 0.25),))
    (found,) = in_time(Step(0, 1, 1.0), (branch,))
    assert found == Branch((0.25, 0.0), (("a", (0.0, 0.2)), ("b", (0.25, 0.2))))
    assert in_time(Step(0, 1, 1.0), (branch,))[0] is found


# --- methods ---


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("tau", [0, 1, 2, 3])
@pytest.mark.parametrize("order", [None, (2, 0, 1)])
def test_switch_with_open_windows_is_the_formula(tau, order, late):
    switch = Switch((1.0, 1.0, 1.0), tau, order, late)
    found = switch.turns([(0, 1, 2)] * 20)
    assert found == [(order or (0, 1, 2))[max(j - late, 0) // (tau or 3) % 3] for j in range(20)]


@pytest.mark.parametrize("method", [Merge, Switch, Composite, LoRAtorio], ids=lambda method: method.__name__)
@pytest.mark.parametrize("windows", [(), (Window(), Window(0, 0.5))], ids=["always", "in time"])
def test_a_method_without_a_cache_leaves_that_of_another_one_be(method, windows):
    """As where CMLoRA is on the same MODEL: the branches of this one are the same whenever they are there."""
    session = begin(method((1.0, 1.0)), context(*windows))
    assert session.refresh(Step(1, STEPS, 8.0)) == (False,) * len(session.branches(Step(1, STEPS, 8.0)))


def test_a_shut_window_takes_no_turn():
    switch = Switch((1.0, 1.0, 1.0), 2)
    session = begin(switch, context(Window(), Window(0, 0.375), Window(0.5, 1)))
    assert [who(session, j) for j in range(STEPS)] == [[(i,)] for i in (0, 0, 1, 0, 0, 2, 2, 0)]


def test_no_open_window_is_the_base_model():
    windows = Window(0, 0.25), Window(0.75, 1)
    for method in (Switch((1.0, 1.0)), Composite((1.0, 1.0)), CMLoRA((1.0, 1.0)), CMLoRA((1.0, 1.0), order="switch-a"),
                   LoRAtorio((1.0, 1.0)), LoRAtorio((1.0, 1.0), top_k=1, recheck_every=2)):
        session = begin(method, context(*windows))
        for j in range(STEPS):
            found = who(session, j)
            assert ([each for each in found if each] or [()])[0] == ((0,) if j < 2 else (1,) if j > 5 else ())
            step = Step(j, STEPS, SIGMAS[j])
            x, predictions = torch.randn(1, 4, 8, 8), torch.randn(len(found), 1, 4, 8, 8)
            assert len(session.refresh(step)) == len(found)
            (mixed,) = session.mix(step, Call(x, torch.ones(1), session.branches(step), [predictions], [POSITIVE]))
            if len(found) == 1:
                assert torch.equal(mixed, predictions[0])


def test_composite_is_the_mean_of_those_that_are_open():
    session = begin(Composite((1.0, 1.0, 1.0)), context(Window(), Window(0, 0.5), Window(0.5, 1)))
    for j, expected in ((0, [(0,), (1,)]), (3, [(0,), (1,)]), (4, [(0,), (2,)])):
        assert who(session, j) == expected
        step, p = Step(j, STEPS, SIGMAS[j]), torch.randn(2, 1, 4, 8, 8)
        call = Call(p[0], torch.ones(1), session.branches(step), [p, None], [POSITIVE, POSITIVE])
        assert torch.equal(session.mix(step, call)[0], p.mean(dim=0)) and session.mix(step, call)[1] is None


def test_masks_of_those_that_are_open():
    """A mask whose LoRA is shut confines nothing. The base has a share where all that are open have masks."""
    left = torch.zeros(1, 1, 8, 8)
    left[..., :4] = 1
    session = begin(Composite((1.0, 1.0)), context(Window(0, 0.5), Window(0.5, 1), masks=(left, None)))
    assert who(session, 0) == [(0,), ()] and who(session, 4) == [(1,)]
    session = begin(Composite((1.0, 1.0)), context(Window(0, 0.5), Window(), masks=(left, None)))
    assert who(session, 0) == [(0,), (1,)] and who(session, 4) == [(1,)]
    p = torch.randn(1, 1, 4, 8, 8)
    step = Step(4, STEPS, 4.0)
    assert torch.equal(session.mix(step, Call(p[0], torch.ones(1), (), [p], [POSITIVE]))[0], p[0])


def test_cmlora_leads_among_those_that_are_open():
    """Their number is N: two of three share the weights of two."""
    method = CMLoRA((1.0, 1.0, 1.0), (True, True, False), caching=False)
    session = begin(method, context(Window(), Window(0.5, 1), Window(0, 0.25)))
    for j in range(STEPS):
        found = [i for (i,) in who(session, j)]
        assert found == [0] + [1] * (j >= 4) + [2] * (j < 2)
        notes = session.notes()
        assert notes["led"] in found and notes["whole"] == found
        assert notes["weight"] == pytest.approx({1: 1.0, 2: 1.5 / 2.5, 3: 2.5 / 4.5}[len(found)])
    assert begin(method, context(Window(), Window(), Window())).open == (0, 1, 2)


def test_cmlora_runs_whole_with_another_gain():
    """What is cached of a LoRA was made with the gain that it had then."""
    method = CMLoRA((1.0, 1.0), (True, False), c1=8, c2=8)  # the first leads throughout
    for window, expected in ((Window(0, 0.5, 0.5), [[0, 1]] * 4), (Window(0, 0.5), [[0, 1], [0], [0], [0]])):
        session, whole = begin(method, context(Window(), window)), []
        for j in range(4):
            who(session, j)
            whole.append(session.notes()["whole"])
        assert whole == expected


def test_loratorio_weighs_those_that_are_open():
    session = begin(LoRAtorio((1.0, 1.0, 1.0)), context(Window(), Window(0, 0.5), Window(0.5, 1)))
    assert who(session, 0) == [(0,), (1,), ()] and who(session, 4) == [(0,), (2,), ()]


def test_weights_of_others_are_not_used_again():
    """As many LoRAs, but not the same ones: a pass without a positive side weighs them alike."""
    session = begin(LoRAtorio((1.0, 1.0), kappa=100.0), context(Window(0, 0.5), Window(0.5, 1)))
    p = torch.randn(2, 1, 4, 8, 8)
    step, x = Step(3, STEPS, 5.0), torch.randn(1, 4, 8, 8)
    session.mix(step, Call(x, torch.ones(1), session.branches(step), [p], [POSITIVE]))
    step = Step(4, STEPS, 4.0)
    session.branches(step)
    session.mix(step, Call(x, torch.ones(1), (), [p], ["other"]))
    assert "uniform" in session.notes()


def test_the_pool_is_checked_again_when_windows_open():
    """Between re-checks those chosen take part; a LoRA that comes in later is looked at when it comes."""
    method = LoRAtorio((1.0, 1.0, 1.0), top_k=1, recheck_every=8)
    session = begin(method, context(Window(), Window(), Window(0.5, 1)))
    found = []
    for j in range(STEPS):
        found.append([each[0] for each in who(session, j)[:-1]])
        step, x = Step(j, STEPS, SIGMAS[j]), torch.randn(1, 4, 8, 8)
        base = torch.randn(1, 4, 8, 8)
        # LoRA 1 departs most from the base, LoRA 2 still more.
        p = torch.stack([base + {0: 0.01, 1: 1.0, 2: 9.0}[i] * torch.randn(1, 4, 8, 8) for i in found[-1]] + [base])
        session.mix(step, Call(x, torch.ones(1), session.branches(step), [x - p], [POSITIVE]))
    assert found[0] == [0, 1] and found[2:4] == [[1], [1]]
    assert found[4] == [0, 1, 2] and found[6:] == [[2], [2]]


def test_a_shut_lora_is_not_chosen():
    """The other one is, at all of its layers; between three, the second best of its side."""
    scores = ({0: 2.0, 1: 1.0}, {0: 1.0, 1: 2.0}, {0: 1.0}, {1: 1.0}, {0: 3.0, 1: 1.0, 2: 2.0})
    sides, names = (True, False, True), tuple("abcde")
    contest = Contest((1.0, 1.0, 1.0), names, (0, 0, 0, None, 0), (1, 1, None, 1, 1),
                      (2.0, 0.5, float("inf"), float("-inf"), 3.0), sides, True, scores)
    assert contest.among((0, 1, 2)) is contest and contest.among((1, 2)) is contest.among((1, 2))
    assert contest.acting(1.0) == (0, 1, 0, 1, 0)
    assert contest.among((1, 2)).acting(1.0) == (1, 1, None, 1, 2)
    assert contest.among((1,)).acting(1.0) == (1, 1, None, 1, 1)
    assert contest.among(()).acting(1.0) == (None,) * 5 and contest.among(()).branch(1.0).is_base
    alone = contest.among((1,)).branch(1.0)
    assert alone == Branch((0.0, 1.0, 0.0))
    session = begin(KLoRA(contest), context(Window(), Window(0, 0.5), Window(0.5, 1)))
    step = Step(7, STEPS, 1.0)
    assert all(session.branches(step)[0].at(name)[1] == 0 for name in names)
    assert session.notes()["layers"] == [4, 0, 0]
