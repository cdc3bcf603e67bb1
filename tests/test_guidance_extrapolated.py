"""Extrapolated guidance without ComfyUI: kernels against plain definitions, which steps are evaluated, a run's state.
"""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.kernels.branch import Step
from lora_ensemble.kernels.guidance import line, relative_size
from lora_ensemble.methods.guidance import extrapolated
from lora_ensemble.methods.guidance import line as line_of
from lora_ensemble.methods.guidance.extrapolated import ExtrapolatedSession, Extrapolation, widest
from lora_ensemble.methods.guidance.record import GuidanceRecord, GuidanceStep
from lora_ensemble.methods.guidance.session import FULL, REPLACED, Need
from lora_ensemble.methods.guidance.turns import spread_steps, steps_among
from lora_ensemble.methods.schedule import Uniform
from lora_ensemble.tests.devices import Far
from lora_ensemble.tests.operations import Operations
from torch import Tensor


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- kernels ---


def test_line():
    """Per sample, against one number at a time."""
    d0, d1 = rand(3, 2, 4), rand(3, 2, 4, seed=1)
    t0, t1, t = torch.tensor([1.0, 0.8, 0.5]), torch.tensor([0.9, 0.8, 0.2]), torch.tensor([0.7, 0.3, 0.1])
    found = line(d0, d1, t0, t1, t)
    for b in range(3):
        slope = (d1[b] - d0[b]) / (t1[b] - t0[b]) if t0[b] != t1[b] else 0.0
        assert torch.allclose(found[b], d1[b] + slope * (t[b] - t1[b]), atol=1e-5)
    assert torch.equal(line(d0, d1, t0, t1, t1), d1)


def test_relative_size():
    a, b = rand(3, 5), rand(3, 5, seed=1)
    b[2] = a[2] = 0
    found = relative_size(a - b, b)
    assert found[:2].tolist() == pytest.approx([((a - b)[i].norm() / b[i].norm()).item() for i in range(2)])
    assert found[2] == 0 and relative_size(a - a, a).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("total", "evaluated", "widest", "wanted"), [
    (40, 16, 4, (0, 1, 2, 4, 6, 9, 12, 16, 20, 24, 28, 31, 34, 36, 38, 39)), (20, 8, 4, (0, 1, 3, 6, 10, 14, 17, 19)),
    (20, 7, 4, (0, 1, 4, 8, 12, 16, 19)), (8, 5, 2, (0, 1, 3, 5, 7)), (8, 7, 2, (0, 1, 2, 3, 5, 6, 7)),
    (2, 2, 4, (0, 1)), (1, 1, 4, (0,)), (3, 3, 4, (0, 1, 2))])
def test_spread_steps(total, evaluated, widest, wanted):
    assert spread_steps(total, evaluated, widest) == wanted


@pytest.mark.parametrize(("planned", "interval", "wanted"), [
    ((0, 1, 3, 6, 10, 14, 17, 19), 1, (0, 1, 3, 6, 10, 14, 17, 19)),
    ((0, 1, 3, 6, 10, 14, 17, 19), 2, (0, 1, 2, 4, 6, 10, 14, 16, 18, 19)),
    ((0, 1, 3, 6, 10, 14, 17, 19), 3, (0, 1, 3, 6, 9, 12, 15, 18, 19)),
    ((0, 1, 3, 6, 10, 14, 17, 19), 4, (0, 1, 3, 4, 8, 12, 16, 19)),
    ((0, 1, 2, 4, 6, 9, 12, 16, 20, 24, 28, 31, 34, 36, 38, 39), 3,
     (0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 38, 39)), ((0, 1), 2, (0, 1)), ((0,), 2, (0,))])
def test_steps_among_those_that_are_whole(planned, interval, wanted):
    whole = [step for step in range(planned[-1] + 1) if step % interval == 0 or step == 1]
    assert steps_among(planned, whole, interval, 4) == wanted


@pytest.mark.parametrize("interval", [2, 3, 4, 5])
@pytest.mark.parametrize("saving", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("first", [1, 2])
def test_no_step_makes_the_model_run_whole_once_more(interval, saving, first):
    """The first and the last of the plan stay, none is farther from the one before than allowed, and each is whole or
    has a whole one little before it that sees the term."""
    for total in range(6, 60):
        planned, reach = Extrapolation(saving).steps(total), widest(total)
        whole = [step for step in range(total) if step % interval == 0 or step < first]
        found = steps_among(planned, whole, interval, reach)
        assert list(found) == sorted({*found}) and {0, total - 1} <= {*found}
        assert max(b - a for a, b in zip(found, found[1:], strict=False)) <= reach
        for step in found:
            assert step - max(each for each in found if each in whole and each <= step) < interval, (found, step)


@pytest.mark.parametrize("total", range(1, 60))
@pytest.mark.parametrize("reach", [2, 3, 4])
def test_as_many_steps_as_asked_for(total, reach):
    """In order, each once, the first two and the last among them, none farther from the one before than allowed, and
    closer together at the ends than in the middle."""
    for evaluated in range(min(2 + max(-(-(total - 2) // reach), 0), total), total + 1):
        found = spread_steps(total, evaluated, reach)
        assert len(found) == evaluated and list(found) == sorted(set(found)) and found[:2] == (0, 1)[:total]
        assert found[-1] == total - 1
        gaps = [b - a for a, b in zip(found[1:], found[2:], strict=False)]
        assert max(gaps, default=0) <= reach
        assert all(abs(a + b - total) <= 1 for a, b in zip(found[1:], found[:0:-1], strict=True))
        if len(gaps) > 5 and 2 <= (total - 2) / len(gaps) <= reach / 1.5:
            assert max(gaps[:1] + gaps[-1:]) < min(gaps[len(gaps) // 2:][:1] + gaps[(len(gaps) - 1) // 2:][:1])


# --- which steps ---


@pytest.mark.parametrize("total", range(1, 60))
@pytest.mark.parametrize("saving", [0.0, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("first", [2, 5])
def test_steps(total, saving, first):
    steps = Extrapolation(saving, first=first).steps(total)
    assert steps[:first] == tuple(range(min(first, total)))
    assert total - len(steps) <= 2 * total * saving + 1e-9, "no more than asked for"
    assert max((b - a for a, b in zip(steps, (*steps[1:], total), strict=True)), default=1) <= widest(total)
    if total < 8:
        assert steps[:3] == tuple(range(min(3, total)))
    if saving == 0 or total < 6:
        assert steps == tuple(range(total))


def test_options_out_of_range():
    for options in ({"saving": 0.6}, {"saving": -0.1}, {"tolerance": 0.0}, {"tolerance": -1.0}):
        with pytest.raises(ValueError, match="Extrapolated guidance"):
            Extrapolation(**options)


# --- a run ---


def drive(session: ExtrapolatedSession, sigmas: list[float], term, batch: int = 1, calls: int = 1) -> list:
    """A run whose negative is x0_c + t term(t), as far as it is asked for: what was needed, and every negative."""
    needs, negatives = [], []
    for index, sigma in enumerate(sigmas[:-1]):
        for call in range(calls):
            level = torch.full((batch,), sigma * (1 - 0.1 * call))
            t = (level if session.flow else level / (1 + level)).view(-1, 1)
            need = session.begin(Step(index, len(sigmas) - 1, sigma * (1 - 0.1 * call)), batch)
            x, c = rand(batch, 6, seed=index), rand(batch, 6, seed=99)
            true = c + t * term(t)
            given = session.replace("negative", x, c, level) if need.rows is not None and \
                session.ready(["negative"], x) else true
            rows = range(batch) if need.rows is None else need.rows
            out = torch.stack([true[row] if row in rows else given[row] for row in range(batch)])
            if need.rows != ():
                session.keep(x, c, {"negative": out}, level)
                out = session.settle("negative", x, c, out, level)
            session.end()
            needs.append(need)
            negatives.append((out, true))
    return [needs, negatives]


@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_operations_of_a_step(tolerance):
    """On a fast GPU a step of the rule takes as long as the host needs to ask for its operations, some 15 us each."""
    levels = [8.0 - index for index in range(9)]
    session = ExtrapolatedSession(Extrapolation(tolerance=tolerance), False, levels)
    kinds = set()
    for index in range(8):
        sigma, (x, c, u) = torch.full((2,), 8.0 - index), (rand(2, 4, 8, 8, seed=10 * index + k) for k in range(3))
        with torch.no_grad(), Operations() as asked:
            need = session.begin(Step(index, 8, 8.0 - index), 2)
            if need == REPLACED:
                session.replace("negative", x, c, sigma)
            else:
                session.keep(x, c, {"negative": u}, sigma)
                session.settle("negative", x, c, u, sigma)
            session.end()
        kinds.add(need)
        assert len(asked.names) <= (9 if need == REPLACED else 19), asked.names
    assert kinds == {FULL, REPLACED}


SIGMAS = torch.linspace(1, 0, 21).tolist()


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_term_on_a_straight_line_is_exact(flow, calls):
    a, b = rand(1, 6, seed=3), rand(1, 6, seed=4)
    levels = SIGMAS if flow else [14 * s for s in SIGMAS]
    session = ExtrapolatedSession(Extrapolation(), flow, levels)
    needs, negatives = drive(session, levels, lambda t: a + b * t, calls=calls)
    evaluated = Extrapolation().steps(20)
    assert [need.rows for need in needs[::calls]] == [None if i in evaluated else () for i in range(20)]
    for out, true in negatives:
        assert torch.allclose(out, true, atol=1e-5)
    record = GuidanceRecord("", [GuidanceStep(i, 0.0, 1, 1, int(i in evaluated)) for i in range(20)], 40, finished=True)
    session.summary(record)
    assert all(step.missed[0] < 1e-4 for step in record.steps if step.missed)
    assert [step.index for step in record.steps if step.missed] == list(evaluated[2:])


def test_a_miss_is_measured():
    """Against the line through the two terms before."""
    a = rand(1, 6, seed=3)
    session = ExtrapolatedSession(Extrapolation(), True, SIGMAS)
    drive(session, SIGMAS, lambda t: a * (1 + t**2))
    session.summary(record := GuidanceRecord("", [GuidanceStep(i, 0.0) for i in range(20)]))
    t = [1 - i / 20 for i in (3, 6, 10)]
    values = [1 + s**2 for s in t]
    guess = values[1] + (values[1] - values[0]) * (t[2] - t[1]) / (t[1] - t[0])
    assert record.steps[10].missed == pytest.approx([abs(guess - values[2]) / values[2]], rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"tolerance": 0.05}], ids=["saving", "tolerance"])
@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("calls", [1, 2])
def test_a_turn_makes_up_for_what_the_line_has_missed(calls, flow, options, monkeypatch):
    """If for all of it, the terms that guidance went by from turn to turn add up, each times the length of its step, to
    those on the line through both turns. Steps of unequal lengths, a picture on a line and one on a curve, each with
    its turns."""
    monkeypatch.setattr(line_of, "PART", 1.0)
    a, b = rand(6, seed=3), rand(6, seed=4)
    levels = [(1 - i / 20) ** 1.3 * (1 if flow else 14) for i in range(21)]

    def term(t):
        return torch.stack([a + b * t[0], a + b * t[1] ** 3])

    session = ExtrapolatedSession(Extrapolation(**options), flow, levels)
    needs, negatives = drive(session, levels, term, batch=2, calls=calls)
    starts = [level if flow else level / (1 + level) for level in levels]
    for row in range(2):
        turns = [i for i, need in enumerate(needs[::calls]) if need.rows is None or row in need.rows]
        assert 5 < len(turns) < 20
        for t1, t2 in zip(turns[1:], turns[2:], strict=False):
            went, wanted = torch.zeros(6), torch.zeros(6)
            first, last = (term([starts[t]] * 2)[row] for t in (t1, t2))
            for step in range(t1 + 1, t2 + 1):
                for call in range(calls):
                    level = levels[step] * (1 - 0.1 * call)
                    t = level if flow else level / (1 + level)
                    out, true = negatives[step * calls + call]
                    share = (t - starts[t1]) / (starts[t2] - starts[t1])
                    line = first + (last - first) * share if step < t2 else term([t] * 2)[row]
                    length = (starts[step] - starts[step + 1]) / calls
                    went += length * ((out - true)[row] / t + term([t] * 2)[row])
                    wanted += length * line
            assert torch.allclose(went, wanted, atol=2e-6)
    assert not torch.allclose(negatives[3 * calls][0][1], negatives[3 * calls][1][1], atol=1e-5)


def test_what_a_turn_makes_up_for_has_a_bound():
    """A turn that is much shorter than the steps that it makes up for counts as one of half their length."""
    owed = []
    for end in (0.525, 0.549, 0.5499):  # the step at 0.55 is 0.025 long, half of the one before, or shorter
        levels = [*(1 - i / 20 for i in range(8)), 0.6, 0.55, end, *(0.5 - i / 20 for i in range(10))]
        session = ExtrapolatedSession(Extrapolation(), True, levels)
        _, negatives = drive(session, levels, lambda t: rand(1, 6, seed=3) * t**3)
        owed.append((negatives[9][0] - negatives[9][1]).norm().item())
    assert owed[0] > 0.001 and owed[1:] == pytest.approx(owed[:1] * 2, rel=1e-4)


def test_a_tolerance_goes_by_each_picture(monkeypatch):
    """A picture on a straight line is evaluated as rarely as may be, one that jumps in every step, once that is known.
    """
    monkeypatch.setattr(extrapolated, "Sent", Far)
    noise = iter(range(1000))

    def term(t):
        return torch.stack([torch.ones(6) + t[0], rand(6, seed=next(noise))])

    needs, _ = drive(ExtrapolatedSession(Extrapolation(tolerance=0.05), True, SIGMAS), SIGMAS, term, batch=2)
    rows = [range(2) if need.rows is None else need.rows for need in needs]
    assert [i for i, taken in enumerate(rows) if 0 in taken] == [0, 1, 3, 7, 11, 15, 19]
    assert [i for i, taken in enumerate(rows) if 1 in taken][:3] == [0, 1, 3] and all(1 in taken for taken in rows[5:])
    noise = iter(range(1000))
    session = ExtrapolatedSession(Extrapolation(tolerance=0.05, per_sample=False), True, SIGMAS)
    together, _ = drive(session, SIGMAS, term, 2)
    assert all(need in (FULL, REPLACED) for need in together)


def test_the_last_step_is_evaluated():
    """No step after it could make up for what it misses, and a term changes most there."""
    for steps in range(6, 26):
        for options in ({"saving": 0.5}, {"tolerance": 1e3}, {"tolerance": 1e3, "per_sample": False}):
            levels = torch.linspace(1, 0, steps + 1).tolist()
            session = ExtrapolatedSession(Extrapolation(**options), True, levels)
            needs, _ = drive(session, levels, lambda t: t + torch.ones(6), batch=2)
            assert needs[-1] == FULL and REPLACED in needs


@pytest.mark.parametrize(("cut", "first", "second"), [
    (20, [0, 1, 3, 6, 9, 12, 15, 18, 19], []), (8, [0, 1, 3, 6], [9, 11, 14, 17, 19])])
def test_turns_beside_a_cache_in_two_runs(cut, first, second):
    """The cache's steps are those of each run; turns are those of the picture, and what is past does not move."""
    def turns(session: ExtrapolatedSession, steps: range) -> list[int]:
        session.whole, found = Uniform(3, first=2), []
        for index in steps:
            if session.begin(Step(index - steps[0], 20 - steps[0], SIGMAS[index])) == FULL:
                found.append(index)
                level = torch.full((1,), SIGMAS[index])
                session.keep(rand(1, 6), rand(1, 6), {"negative": rand(1, 6, seed=1)}, level)
            else:
                session.replace("negative", rand(1, 6), rand(1, 6), torch.full((1,), SIGMAS[index]))
            session.end()
        return found

    begun = ExtrapolatedSession(Extrapolation(), True, SIGMAS[:cut + 1], whole=20)
    assert turns(begun, range(cut)) == first
    if second:
        begun.summary(GuidanceRecord("", []))
        later = ExtrapolatedSession(Extrapolation(), True, SIGMAS[cut:], before=cut, whole=20)
        assert "goes on" in later.go_on(cut, begun.left(), "", torch.device("cpu"))
        assert turns(later, range(cut, 20)) == second


def test_a_broken_run_does_not_stop_at_a_miss():
    """Predictions that are not numbers are the sampler's to show."""
    session = ExtrapolatedSession(Extrapolation(tolerance=0.05), True, SIGMAS)
    needs, _ = drive(session, SIGMAS, lambda t: torch.full((1, 6), torch.nan))
    assert needs[-1] == FULL


def test_it_begins_anew():
    """Where noise rises, with another number of pictures, and where no negative was seen for too long."""
    session = ExtrapolatedSession(Extrapolation(), True, SIGMAS)
    step = lambda index, sigma: session.begin(Step(index, 20, sigma), pictures)  # noqa: E731
    pictures = 1

    def evaluate(index: int, sigma: float) -> Need:
        need = step(index, sigma)
        if need == FULL:
            level = torch.full((pictures,), sigma)
            session.keep(rand(pictures, 6), rand(pictures, 6), {"negative": rand(pictures, 6, seed=1)}, level)
        session.end()
        return need

    assert [evaluate(i, 1 - i / 20) for i in range(5)] == [FULL, FULL, REPLACED, FULL, REPLACED]
    assert [evaluate(i, 2 - i / 20) for i in range(5, 8)] == [FULL, FULL, REPLACED], "noise has risen"
    pictures = 2
    assert [evaluate(i, 2 - i / 20) for i in range(8, 11)] == [FULL, FULL, REPLACED]
    assert [evaluate(i, 2 - i / 20) for i in range(16, 18)] == [FULL, FULL], "five steps without guidance"


def test_what_is_asked_for_and_not_there():
    session = ExtrapolatedSession(Extrapolation(), True, SIGMAS)
    drive(session, SIGMAS[:4], lambda t: t)
    x = rand(1, 6)
    assert session.ready(["negative"], x) and not session.ready(["negative", "middle"], x)
    assert not session.ready(["negative"], rand(1, 7))


@pytest.mark.parametrize(("steps", "evaluated", "saving", "words"), [
    (8, 5, 0.3, "19 % were saved and not 30 %"), (20, 8, 0.3, None), (21, 9, 0.3, None),
    (4, 4, 0.3, "nothing was saved"),
    (4, 0, 0.3, None)])
def test_what_is_said_of_the_saving(steps, evaluated, saving, words):
    told = []
    session = ExtrapolatedSession(Extrapolation(saving), True, SIGMAS, told.append)
    record = GuidanceRecord("", [GuidanceStep(i, 0.0, 1, 1, int(i < evaluated)) for i in range(steps)],
                            2 * steps if evaluated else steps, finished=True)
    session.summary(record)
    assert (words in told[0] if words else not told) and len(told) == bool(words)
    if words and "and not" in words:
        session.whole = Uniform(3)
        session.summary(record)
        assert "Branch Cache" in told[1] and "Branch Cache" not in told[0]
    record.finished, told[:] = False, []
    session.summary(record)
    assert told == []
