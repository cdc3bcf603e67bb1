"""Guidance without ComfyUI: the state of a run, calibration on exact relations."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lora_ensemble.kernels.branch import Step
from lora_ensemble.methods.guidance import adaptive
from lora_ensemble.methods.guidance.adaptive import AdaptiveGuidance, AdaptiveSession, ReadBack
from lora_ensemble.methods.guidance.calibration import Calibration, CalibrationSession, NormalEquations
from lora_ensemble.methods.guidance.linear import LinearAG, LinearSession
from lora_ensemble.methods.guidance.record import GuidanceRecord, GuidanceStep
from lora_ensemble.methods.guidance.session import CONDITIONAL, FULL, REPLACED, noise_of
from lora_ensemble.methods.session import Sent
from lora_ensemble.tests.devices import Far, Plain
from lora_ensemble.tests.operations import Operations
from lora_ensemble.tests.test_guidance_kernels import rand

# --- the policy ---


@pytest.mark.parametrize(("steps", "evaluations"), [(20, 25), (10, 13), (4, 5), (1, 2), (2, 3), (5, 7)])
def test_evaluations_of_linear_ag(steps, evaluations):
    kinds = [LinearAG.kind_at(i, steps) for i in range(steps)]
    assert sum(2 if kind == "guided" else 1 for kind in kinds) == evaluations
    assert kinds[0] == "guided"


@pytest.mark.parametrize("steps", range(1, 60))
def test_linear_ag_alternates_and_begins_with_a_true_negative(steps):
    """Written out: the first half in turns, from a true one on, then none."""
    half = [step for step in range(steps) if step < steps / 2]
    expected = [("guided", "predicted")[step % 2] for step in half] + ["conditional"] * (steps - len(half))
    assert [LinearAG.kind_at(step, steps) for step in range(steps)] == expected
    rows = tuple((1.0,) * (2 * steps + 1) for _ in range(steps))
    session = LinearSession(LinearAG(rows, tuple(range(steps))))
    assert session.begin(Step(0, steps, 1.0)) == FULL and expected[0] == "guided"


def test_options_that_make_no_sense():
    for options in ({"space": "pixels"}, {"min_steps": -1}, {"ramp_steps": -1}):
        with pytest.raises(ValueError, match="Adaptive Guidance"):
            AdaptiveGuidance(**options)


# --- sessions ---


def feed(session: AdaptiveSession, rows: list[list[float]]) -> list:
    """What each step evaluates, and its weights, for given similarities."""
    out = []
    for index, gamma in enumerate(rows):
        needed = session.begin(Step(index, len(rows), 1.0), len(gamma)).rows
        session.decide(torch.tensor(gamma))
        out.append((needed, session.weigh(torch.zeros(len(gamma), 2)).flatten().tolist()))
    return out


def test_a_decision_is_sticky_and_its_own():
    session = AdaptiveSession(AdaptiveGuidance(0.9))
    found = feed(session, [[0.5, 0.5], [0.95, 0.6], [0.1, 0.7], [0.2, 0.95], [0, 0]])
    assert [needed for needed, _ in found] == [None, None, (1,), (1,), ()]
    assert [weight for _, weight in found] == [[1, 1], [0, 1], [0, 1], [0, 0], [0, 0]]
    assert session.gamma[1] == pytest.approx([0.95, 0.6]) and session.gamma[2] == [None, pytest.approx(0.7)]


def test_the_whole_batch_waits_for_its_last():
    session = AdaptiveSession(AdaptiveGuidance(0.9, per_sample=False))
    found = feed(session, [[0.95, 0.5], [0.95, 0.92], [0, 0]])
    assert [needed for needed, _ in found] == [None, None, ()]


def test_one_decision_per_step():
    session = AdaptiveSession(AdaptiveGuidance(0.9))
    step = Step(0, 2, 1.0)
    assert session.begin(step) == FULL
    session.decide(torch.tensor([0.5]))
    assert session.begin(step) == FULL
    session.decide(torch.tensor([0.99]))  # a second call of the same step
    assert session.weigh(torch.zeros(1, 2)).item() == 1
    assert session.begin(Step(1, 2, 0.5)) == FULL


@pytest.mark.parametrize("exact", [True, False])
def test_a_noise_level_that_rises_begins_anew(exact, monkeypatch):
    """A restart, to a level at which the sides are unlike: as `e_cfg if gamma < threshold` says. On an accelerator a
    decision of before it that is read behind it changes nothing. Levels of the calls within a step are no rise."""
    monkeypatch.setattr(adaptive, "Sent", Far)
    session, found = AdaptiveSession(AdaptiveGuidance(0.9), exact), []
    for index, (sigma, *gamma) in enumerate([(9, 0.5, 0.5), (4, 0.95, 0.5), (1, 0.97, 0.95), (4, 0.5, 0.95),
                                             (1, 0.95, 0.5), (0.5, 0.5, 0.5), (0.2, 0.5, 0.5)]):
        session.begin(Step(index, 7, sigma), 2)
        session.decide(torch.tensor(gamma))
        found.append(session.weigh(torch.zeros(2, 2)).flatten().tolist())
        needed = session.begin(Step(index, 7, sigma / 2), 2).rows
    assert found == [[1, 1], [0, 1], [0, 0], [1, 0], [0, 0], [0, 0], [0, 0]]
    assert needed == ()
    assert session.begin(Step(7, 8, 0.9), 2) == FULL


def test_from_a_picture_to_its_noise():
    """Without noise both sides are the picture, and there is nothing to compare; then noise rises at every step."""
    told, x = [], rand(1, 4, 8, 8)
    session = AdaptiveSession(AdaptiveGuidance(0.9), tell=told.append)
    for index, u in enumerate((x, 0.9 * x, 0.9 * x)):
        assert session.begin(Step(index, 3, float(index))) == FULL and session.weigh(x).item() == 1
        session.keep(0 * x, x, {"negative": u}, torch.zeros(1))
        session.end()
    session.summary(GuidanceRecord("", finished=True))
    (line,) = told
    assert sorted(session.gamma) == [1, 2] and "the noise level rises in this run" in line


@pytest.mark.parametrize(("exact", "wanted"), [(True, [[], [0], [1], [2]]), (False, [[], [], [0], [1]])])
def test_read_back(exact, wanted, monkeypatch):
    """On an accelerator: before the next step, or one step later."""
    monkeypatch.setattr(adaptive, "Sent", Far)
    back, seen = ReadBack(exact), []
    for index in range(4):
        seen.append([sent for sent, _, _ in back.arrived(index)])
        back.send(index, None, torch.zeros(1))
    assert seen == wanted
    assert [sent for sent, _, _ in back.arrived(None)] == ([3] if exact else [2, 3])


@pytest.mark.parametrize(("options", "most"), [({}, 12), ({"space": "x0"}, 11), ({"per_sample": False}, 13),
                                               ({"ramp_steps": 3}, 17)])
def test_operations_of_a_decision(options, most):
    """On a fast GPU a decision takes as long as the host needs to ask for its operations, some 15 us each."""
    session = AdaptiveSession(AdaptiveGuidance(0.9, **options))
    x, c, u = (rand(2, 4, 8, 8, seed=seed) for seed in range(3))
    sigma = torch.ones(2)
    for index in range(3):
        with torch.no_grad(), Operations() as asked:
            session.begin(Step(index, 3, 1.0), 2)
            session.keep(x, c, {"negative": u}, sigma)
            torch.lerp(c, u, session.weigh(c))
            session.end()
        assert index == 0 or len(asked.names) <= most, asked.names


class OnDevice:
    """A value on the second of two devices, of which the first is the current one."""

    is_cuda, device, shape, dtype = True, torch.device("cuda", 1), (1,), torch.float32

    def to(self, *args, **kwargs):
        return torch.zeros(1)


def test_a_value_is_awaited_on_its_own_device(monkeypatch):
    streams = []
    event = SimpleNamespace(record=lambda stream=None: streams.append(stream))
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream of", device))
    Sent(0, OnDevice())
    assert streams == [("stream of", OnDevice.device)]


def test_no_copy_is_on_its_way_from_a_device_without_events():
    """Guards: Apple's would write into memory that was given back; the host holds such copies for unsafe."""
    value = SimpleNamespace(is_cuda=False, device=torch.device("mps"), tolist=lambda: [3.0])
    assert Sent(0, value).read() == [3.0], "and `to` is never called"


# --- LinearAG ---


def paths(calls: int, count: int, seed: int = 0, shape=(4, 8, 8), constant: float = 0.0) -> tuple[list, list]:
    """Predictions whose negative is an exact fixed combination of what came before: u_n = .5 c_n + .3 u_{n-1} + .2
    c_{n-1} + constant, u_0 = .9 c_0."""
    cs = [rand(count, *shape, seed=seed + n) for n in range(calls)]
    us = []
    for n, c in enumerate(cs):
        us.append(0.9 * c + constant if n == 0 else 0.5 * c + 0.3 * us[-1] + 0.2 * cs[n - 1] + constant)
    return cs, us


def fit(calls: int, constant: float = 0.0, intercept: bool = False) -> Calibration:
    equations = NormalEquations()
    for batch in range(5):
        cs, us = paths(calls, 4, 100 * batch, constant=constant)
        equations.add([t for pair in zip(cs, us, strict=True) for t in pair], us)
    coefficients, r2 = equations.solve(intercept)
    return Calibration(coefficients, tuple(range(calls)), r2, {})


@pytest.mark.parametrize(("constant", "intercept"), [(0.0, False), (0.7, True)])
def test_an_exact_relation_is_recovered(constant, intercept):
    """Relative error below 1e-4 on paths that were not seen; every odd step of the first half is foretold from
    estimates that were fed back."""
    calls = 12
    found = fit(calls, constant, intercept)
    assert (found.r2 > 1 - 1e-4).all()
    cs, us = paths(calls, 2, 999, constant=constant)
    told, sigma = [], torch.full((2,), 2.0)
    session = LinearSession(found.policy(), told.append)
    x = rand(2, 4, 8, 8, seed=5)
    for n in range(calls // 2):
        c, u = (x - 2.0 * noise for noise in (cs[n], us[n]))
        if session.begin(Step(n, calls, 2.0)) == REPLACED:
            guess = session.replace("negative", x, c, sigma)
            error = (noise_of(x, guess, sigma) - us[n]).norm() / us[n].norm()
            assert n % 2 == 1 and error < 1e-4
        else:
            session.keep(x, c, {"negative": u}, sigma)
    assert session.begin(Step(calls // 2, calls, 2.0)) == CONDITIONAL and not told


def test_the_sums_do_not_depend_on_the_batches():
    cs, us = paths(6, 4)
    features = [t for pair in zip(cs, us, strict=True) for t in pair]
    at_once, one_by_one = NormalEquations(), NormalEquations()
    at_once.add(features, us)
    for row in range(4):
        one_by_one.add([f[row:row + 1] for f in features], [u[row:row + 1] for u in us])
    for name in ("gram", "cross", "energy"):
        assert torch.allclose(getattr(at_once, name), getattr(one_by_one, name), rtol=1e-12)


def test_sums_over_paths_of_a_device_without_float64():
    cs, us = paths(6, 2)
    features = [t for pair in zip(cs, us, strict=True) for t in pair]
    here, there = NormalEquations(), NormalEquations()
    here.add(features, us)
    there.add([Plain(f) for f in features], [Plain(u) for u in us])
    for name in ("gram", "cross", "energy"):
        assert torch.equal(getattr(there, name), getattr(here, name)) and getattr(there, name).dtype == torch.float64


def test_least_squares_of_a_run_against_numpy():
    """One step's coefficients from the features themselves, without normal equations."""
    equations = NormalEquations()
    cs, us = [rand(3, 50, seed=n) for n in range(4)], [rand(3, 50, seed=50 + n) for n in range(4)]
    equations.add([t for pair in zip(cs, us, strict=True) for t in pair], us)
    coefficients, r2 = equations.solve(ridge=0.0)
    features = np.stack([t.flatten().double().numpy() for t in (cs[0], us[0], cs[1], us[1], cs[2])], axis=1)
    target = us[2].flatten().double().numpy()
    want, residual, *_ = np.linalg.lstsq(features, target, rcond=None)
    assert np.abs(coefficients[2, :5].numpy() - want).max() < 1e-10 and not coefficients[2, 5:].any()
    direction = ((us[2] - cs[2]).double() ** 2).sum().item()
    assert r2[2].item() == pytest.approx(1 - residual[0] / direction, abs=1e-9)


def test_paths_of_another_length_are_refused():
    equations = NormalEquations()
    for calls in (3, 4):
        cs, us = paths(calls, 1)
        features = [t for pair in zip(cs, us, strict=True) for t in pair]
        if calls == 3:
            equations.add(features, us)
    with pytest.raises(ValueError, match="4 times on one path and 3"):
        equations.add(features, us)


def test_a_call_that_another_node_left_out():
    """The coefficients of a step fit one history; with another, the negative is evaluated."""
    told = []
    session = LinearSession(fit(6).policy(), told.append)
    assert session.begin(Step(0, 6, 1.0)) == FULL and not told
    assert session.begin(Step(1, 6, 0.8)) == FULL  # nothing was kept of step 0
    assert len(told) == 1 and "left out or added model calls" in told[0]


def test_context_windows_leave_nothing_to_foretell_from():
    """Guard: they were taken for another node's calls."""
    told, parts = [], rand(1, 4, 8, 8)
    session = LinearSession(fit(6).policy(), told.append)
    for index in range(2):
        assert session.begin(Step(index, 6, 1.0), windowed=True) == FULL
        session.keep(parts, parts, {"negative": parts}, torch.ones(1))
    assert len(told) == 1 and "context windows" in told[0] and not session.features


def test_a_calibrated_path_is_the_one_that_linear_ag_leads():
    """The same features; every negative of the first half is seen as well, as a target."""
    calls, sigma = 6, torch.full((2,), 2.0)
    policy, (cs, us), x = fit(calls).policy(), paths(calls, 2, 999), rand(2, 4, 8, 8, seed=5)
    led, watched = LinearSession(policy), CalibrationSession(policy)
    for n in range(calls):
        step, (c, u) = Step(n, calls, 2.0), (x - 2.0 * noise for noise in (cs[n], us[n]))
        need, seen = led.begin(step), watched.begin(step)
        assert (seen.rows, seen.guided, seen.watch) == (need.rows, need.guided, need.guided)
        if need.rows is None:
            led.keep(x, c, {"negative": u}, sigma)
        if seen.watch:
            watched.keep(x, c, {"negative": u}, sigma)
        if need == REPLACED:
            assert torch.equal(*(each.replace("negative", x, c, sigma) for each in (led, watched)))
    assert len(led.features) == calls and all(map(torch.equal, led.features, watched.features))
    for target, u in zip(watched.targets, us[:calls // 2], strict=True):
        assert torch.allclose(target, u, atol=1e-5)


# --- the record ---


def test_the_record_in_words():
    record = GuidanceRecord("test", [GuidanceStep(0, 9.0, 1, 2, 2, gamma=[0.5, 0.25]),
                                     GuidanceStep(1, 1.0, 1, 2, 1, gamma=[None, 0.75])], full=8, finished=True)
    text = record.text()
    assert "test: 7 of 8 evaluations (12.5 % saved), 2 steps, 2 model calls" in text
    assert "similarity -, 0.750000" in text and "negative 1 of 2" in text
