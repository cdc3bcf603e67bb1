"""The tracker: which step a model call belongs to, and that it does not make the host wait for a device."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.compose.context import _schedule, run_context, timed
from lora_ensemble.host.compose.earlier import Earlier
from lora_ensemble.host.compose.steps import StepTracker, tracked
from lora_ensemble.host.guidance.apply import guidance_record_of

from .builders import composite, sample, three
from .guidance_tools import ag
from .models import base

SIGMAS = [10.0, 6.0, 3.0, 1.0, 0.3, 0.0]


class OnDevice:
    """A timestep that claims to be on an accelerator and counts how often its value is asked for."""

    device = SimpleNamespace(type="cuda")

    def __init__(self, sigma: float):
        self.sigma, self.reads = sigma, 0

    def flatten(self) -> list[float]:
        self.reads += 1
        return [self.sigma]


def test_cpu_values_are_read_and_matched():
    tracker = StepTracker(SIGMAS)
    for index, sigma in enumerate(SIGMAS[:-1]):
        step = tracker.step(torch.tensor([sigma]))
        assert (step.index, step.total, step.sigma) == (index, 5, pytest.approx(sigma))
        tracker.tell()


@pytest.mark.parametrize(("sigma", "index"), [(10.0, 0), (11.0, 0), (9.0, 0), (6.0, 1), (6.0003, 1), (5.99, 1),
                                              (3.5, 1), (0.31, 3), (0.3, 4), (0.01, 4), (0.0, 4)])
def test_noise_levels_between_steps(sigma, index):
    """An entry of the schedule, however rounded, is that step; a level between two belongs to the step it is in."""
    assert StepTracker(SIGMAS).index_of(sigma) == index


RESTARTED = [10.0, 4.0, 1.0, 4.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("sigmas", [RESTARTED, [0.01, 1.0, 4.0, 10.0]])
@pytest.mark.parametrize("between", [False, True])
def test_noise_levels_that_come_again(sigmas, between):
    """A restart, a level twice, or from a picture to its noise: steps are told apart by how many are finished. So they
    are on a device that is not asked."""
    tracker, found = StepTracker(sigmas), []
    for start, end in zip(sigmas, sigmas[1:], strict=False):
        found.append(tracker.step(torch.tensor([start])).index)
        if between and start != end:  # a second evaluation within the step
            found.append(tracker.step(torch.tensor([0.6 * start + 0.4 * end])).index)
        tracker.tell()
    assert sorted(set(found)) == list(range(len(sigmas) - 1)) and found == sorted(found)


@pytest.mark.parametrize("left_out", [False, True])
def test_a_schedule_that_turns_is_read_there(left_out):
    """Samplers with restarts begin them at the level that noise rises to; others take a step from the lowest one."""
    sigmas = [14.0, 10.0, 6.0, 3.0, 1.0, 0.3, 3.0, 1.0, 0.3, 3.0, 1.0, 0.3, 0.2, 0.1, 0.03, 0.0]
    lowest = [5, 8] if left_out else []
    tracker = StepTracker(sigmas)
    stamps = {i: OnDevice(sigma) for i, sigma in enumerate(sigmas[:-1]) if i not in lowest}
    for index, stamp in stamps.items():
        step = tracker.step(stamp)
        assert (step.index, step.sigma) == (index, sigmas[index])
        tracker.tell()
    assert not stamps[14].reads and sum(stamp.reads for stamp in stamps.values()) == (9 if left_out else 5)


def test_restarts_of_a_sampler_that_looks_ahead():
    """Heun, which tells of a step before it looks at its end: the last one before a restart looks at the lowest level,
    and the restart's own first call is no further look of it."""
    sigmas, found = [14.0, 6.0, 1.0, 0.3, 3.0, 1.0, 0.3, 3.0, 1.0, 0.3, 0.1, 0.0], []
    begun = [i for i in range(11) if i not in (3, 6)]
    tracker = StepTracker(sigmas)
    for index in begun:
        found.append(tracker.step(OnDevice(sigmas[index])).index)
        tracker.tell()
        if sigmas[index + 1]:
            tracker.step(OnDevice(sigmas[index + 1]))
    assert found == begun


def test_noise_levels_that_come_again_in_a_run_that_tells_of_nothing():
    """They go by the last call."""
    tracker = StepTracker(RESTARTED)
    assert [tracker.step(torch.tensor([sigma])).index for sigma in (10.0, 1.0, 2.2)] == [0, 2, 2]


def test_no_device_read_once_the_sampler_is_known():
    """Guard: StepTracker's trust. Without it every step would wait for the device."""
    tracker, stamps = StepTracker(SIGMAS), [OnDevice(sigma) for sigma in SIGMAS[:-1]]
    steps = []
    for stamp in stamps:
        steps.append(tracker.step(stamp))
        tracker.tell()
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert [step.sigma for step in steps] == pytest.approx(SIGMAS[:-1])
    assert [stamp.reads for stamp in stamps] == [1, 1, 1, 0, 0]
    assert tracker.step(OnDevice(SIGMAS[-2])).index == 4, "a call behind the last step, of which there is no next one"


def test_more_passes_at_one_timestep_are_one_step():
    """Context windows and perturbed attention come back with the very same tensor."""
    tracker, stamps = StepTracker(SIGMAS), [OnDevice(sigma) for sigma in SIGMAS[:-1]]
    for index, stamp in enumerate(stamps):
        assert {tracker.step(stamp).index for _ in range(3)} == {index}
        tracker.tell()
    assert sum(stamp.reads for stamp in stamps) == 3
    levels = torch.full((3,), SIGMAS[0])
    step = tracker.step(levels)
    assert tracker.step(levels[:2]) is step, "some of the pictures"


def test_a_sampler_that_calls_twice_is_read():
    """Heun evaluates at the next level before it tells of the step: an index counted blindly would run ahead."""
    tracker = StepTracker(SIGMAS)
    for i in range(len(SIGMAS) - 2):
        assert tracker.step(OnDevice(SIGMAS[i])).index == i
        assert tracker.step(OnDevice((SIGMAS[i] + SIGMAS[i + 1]) / 2)).index == i
        tracker.tell()


def test_a_second_call_after_trust_is_read():
    tracker = StepTracker(SIGMAS)
    for sigma in SIGMAS[:3]:
        tracker.step(OnDevice(sigma))
        tracker.tell()
    trusted, second = OnDevice(SIGMAS[3]), OnDevice(0.6)
    assert tracker.step(trusted).index == 3 and trusted.reads == 0
    assert tracker.step(second).index == 3 and second.reads == 1


def steps_of(tracker: StepTracker, calls: str) -> str:
    """The steps of calls at levels of the schedule (0 1 2), and between one and the next (a b c); at | the sampler
    tells."""
    found = ""
    for call in calls:
        if call == "|":
            tracker.tell()
            found += call
            continue
        level, between = ("abcdef".index(call), 0.5) if call.isalpha() else (int(call), 0.0)
        here, there = tracker.sigmas[level:level + 2]
        found += str(tracker.step(OnDevice(here + between * (there - here))).index)
    return found


@pytest.mark.parametrize(("calls", "steps"), [
    ("01|12|23|34|4", "00|11|22|33|4"),  # a stage at the end of a step, which is told of afterwards
    ("0aa1a|1bb2b|2cc3c|", "00000|11111|22222|"),
    ("00a1|00a1|11b2|11b2|22c3|22c3", "0000|0000|1111|1111|2222|2222"),  # several passes over a step, each told of
    ("0|1|1|1|2|2|2|3|3|3|4", "0|1|1|1|2|2|2|3|3|3|4"),
    ("2c|3d|4", "22|33|4"),  # begun later
    ("0|11|22|33|44|", "0|11|22|33|44|"),  # told of before it is done: Heun, Heun++ and PECE of ComfyUI
    ("0|121|232|343|44|", "0|111|222|333|44|"),
    ("0|1|12|23|34|", "0|1|12|23|34|"),
    ("02|4", "02|4"),  # steps left out
    ("0ab|", "001|"),  # a call in the middle of the next step
    ("01234", "00234"),  # never told of: the second call looks like a stage of the first step
])
def test_samplers_that_call_and_tell_in_their_own_ways(calls, steps):
    """The first five are RES4LYF's."""
    assert steps_of(StepTracker(SIGMAS), calls) == steps


@pytest.mark.parametrize(("sigmas", "sampled"), [
    ([9.0, 4.0, 1.0, 0.0], [9.0, 4.0, 1.0, 0.0]),
    ([0.0, 9.0, 4.0, 1.0, 0.0, 0.0], [9.0, 4.0, 1.0, 0.0]),  # RES4LYF goes on with a picture
    ([0.0, 1.0, 4.0, 9.0, 0.0], [0.0, 1.0, 4.0, 9.0]),  # and back to its noise
    ([0.0, 1.0, 4.0, 9.0], [0.0, 1.0, 4.0, 9.0]),
    ([9.0, 1.0, 4.0, 0.0], [9.0, 1.0, 4.0, 0.0]),  # a restart
    ([9.0, 0.0], [9.0, 0.0]),
    ([0.0, 0.0], [0.0, 0.0]),  # a step without noise
])
def test_zeros_that_only_keep_the_host_from_adding_noise_are_no_steps(sigmas, sampled):
    assert run_context(torch.tensor(sigmas), torch.zeros(1, 4, 8, 8), None).sigmas == tuple(sampled)


def test_where_a_run_is_in_the_time_of_its_model_and_among_the_runs_of_its_picture():
    """Times go from 1 to 0, also of a model whose own does not end at 0: EDM's is the logarithm of its noise levels."""
    sampling = comfy.model_sampling.ModelSamplingContinuousEDM()
    top, bottom = float(sampling.sigma_max), float(sampling.sigma_min)

    def of(*sigmas: float, **known):
        context = run_context(torch.tensor(sigmas), torch.zeros(1, 4, 8, 8), None)
        return timed(context, SimpleNamespace(get_model_object=lambda name: sampling), **known)

    middle = (top * bottom) ** 0.5
    assert of(top, middle, bottom, 0.0).times == pytest.approx((1.0, 0.5, 0.0), abs=1e-5)
    assert of(top, middle, bottom).span == pytest.approx((0.0, 0.5), abs=1e-5), "handed on, behind a step at the middle"
    for parts in (4, 7):  # one of so many, of a schedule in equal parts, and then two
        found = [of(*(top * (bottom / top) ** (k / parts) for k in range(steps + 1))) for steps in (1, 2)]
        assert [(each.before, each.whole) for each in found] == [(0, parts)] * 2
    quarters = [top * (bottom / top) ** (k / 4) for k in range(4)]
    for first, last in ((0, 2), (1, 4), (1, 3), (3, 4)):  # some of four steps, where others are not known
        found = of(*(quarters + [0.0])[first:last + 1], noisy=first > 0)
        assert found.times == pytest.approx((1.0, 0.75, 0.5, 0.25)[:last], abs=1e-5)
        assert _schedule(sampling, found.sigmas, found, ()) == pytest.approx([0.0, 0.25, 0.5, 0.75], abs=1e-5)
    between, end = (of(*sigmas, earlier=Earlier(1, (1.0,), (top,)), noisy=True)
                    for sigmas in (quarters[1:4], [*quarters[1:], 0.0]))
    assert between.span == pytest.approx((0.25, 0.5), abs=1e-5) and end.span == pytest.approx((1 / 3, 1), abs=1e-5)
    assert of(top).times == (), "what is left of a schedule that is split at its beginning"


def test_progress():
    tracker, found = StepTracker([3.0, 1.0, 0.0]), []
    for sigma in (3.0, 1.0):
        found.append(tracker.step(torch.tensor([sigma])).progress)
        tracker.tell()
    assert found == [0.0, 1.0]
    assert StepTracker([3.0, 0.0]).step(torch.tensor([3.0])).progress == 0.0


@pytest.mark.parametrize("name", [n for n in comfy.samplers.KSampler.SAMPLERS if n != "dpm_adaptive"])
def test_every_sampler_of_the_host(name, loras, monkeypatch):
    """What the tracker infers without reading is what it would have read, for every sampler that ComfyUI offers (but
    one that chooses its own steps and takes hundreds of them on random weights)."""
    model = base("SD3")
    ours, seen = composite(model, three(model, loras)[:2]), []
    told = StepTracker.step

    def step(tracker: StepTracker, timestep: torch.Tensor):
        sigma = float(timestep.flatten()[0])
        if not hasattr(timestep, "stand_in"):
            timestep.stand_in = OnDevice(sigma)
        found = told(tracker, timestep.stand_in)
        seen.append((found.index, tracker.index_of(sigma)))
        return found

    monkeypatch.setattr(StepTracker, "step", step)
    sample(ours, "SD3", sampler=name, steps=6, cfg=1.0)
    assert len(seen) >= 6 and [inferred for inferred, _ in seen] == [read for _, read in seen]
    found = [step.index for step in record_of(ours).steps]
    assert found == sorted(set(found)), "every step once, in order"


# --- one tracker for composition and guidance ---


def test_a_run_has_one_tracker():
    """Guard: two that both listened would each read every step, or be told of every step twice."""
    done = []
    tracker, callback = tracked(SIGMAS, lambda *step: done.append(step) or "its own")
    again, same = tracked(SIGMAS, callback)
    assert again is tracker and same is callback
    other, _ = tracked(SIGMAS[1:], callback)  # a node between the two has changed the schedule
    assert other is not tracker and other.total == tracker.total - 1
    tracker.tell()  # before the first call: of nothing
    for sigma in SIGMAS[:3]:
        tracker.step(OnDevice(sigma))
        assert callback(1, 2) == "its own"
    assert done == [(1, 2)] * 3, "the sampler's own callback is called as ever"
    trusted = OnDevice(SIGMAS[3])
    assert tracker.step(trusted).index == 3 and trusted.reads == 0


@pytest.mark.parametrize("order", ["composition first", "guidance first"])
def test_guidance_and_composition_read_a_step_once(order, loras, monkeypatch):
    model, trackers, stamps, told = base("SD15"), set(), [], StepTracker.step
    pair = three(model, loras)[:2]
    ours = ag(composite(model, pair), 2.0) if order == "composition first" else composite(ag(model, 2.0), pair)

    def step(tracker: StepTracker, timestep: torch.Tensor):
        trackers.add(tracker)
        if not hasattr(timestep, "stand_in"):
            timestep.stand_in = OnDevice(float(timestep.flatten()[0]))
            stamps.append(timestep.stand_in)
        return told(tracker, timestep.stand_in)

    monkeypatch.setattr(StepTracker, "step", step)
    sample(ours, steps=6, cfg=7.0)
    assert len(trackers) == 1 and [stamp.reads for stamp in stamps] == [1, 1, 1, 0, 0, 0]
    assert [each.index for each in record_of(ours).steps] == list(range(6))
    assert [each.index for each in guidance_record_of(ours).steps] == list(range(6))
