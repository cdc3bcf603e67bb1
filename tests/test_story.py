"""The story of a run from records made by hand: who led, what was saved, and when guidance went off."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.engine.record import RunRecord, StepRecord
from lora_ensemble.host.look.chart import HeatRows, Lines, Stack
from lora_ensemble.host.look.sheet import Beside, Figures, sheet
from lora_ensemble.host.look.story import charts, costs_of, now, says, switch_of
from lora_ensemble.methods.guidance.record import GuidanceRecord, GuidanceStep

NAMES = ["a.safetensors", "b.safetensors"]
BOTH = [[[1.0, 0.0]], [[0.0, 0.5]]]


def run(steps: list[dict], methods=("Composite",), adapters=(NAMES,)) -> RunRecord:
    """Steps with what is given of each, two rows if nothing is."""
    made = [StepRecord(i, 1.0, **{"calls": 1, "rows": 2, **step}) for i, step in enumerate(steps)]
    return RunRecord(list(methods), [list(each) for each in adapters], made, finished=True)


def guided(negatives, full=None, rows=1, gamma=None, predicted=()) -> GuidanceRecord:
    steps = [GuidanceStep(i, 1.0, 1, rows, negative, predicted[i] if predicted else 0, (gamma or {}).get(i, []))
             for i, negative in enumerate(negatives)]
    return GuidanceRecord("a policy", steps, 2 * rows * len(steps) if full is None else full)


@pytest.mark.parametrize(("branches", "notes", "shares"), [
    (BOTH, {}, [0.5, 0.5]),
    ([[[1.0, 0.0]]], {}, [1.0, 0.0]),
    ([[[0.75, -0.25]]], {}, [0.75, 0.25]),
    ([[[0.0, 0.0]]], {}, [0.0, 0.0]),
    (BOTH, {"led": 1, "weight": 0.75}, [0.25, 0.75]),
    (BOTH[:1], {"led": 0, "weight": 1.0}, [1.0, 0.0]),
    (BOTH, {"active": [1, 0], "weights": [0.2, 0.6]}, [0.75, 0.25]),
    (BOTH, {"active": [0, 1], "weights": [[0.2, 0.2], [0.9, 0.1]]}, [0.5, 0.5]),
    (BOTH[:1], {"layers": [30, 10]}, [0.75, 0.25]),
])
def test_who_has_the_say(branches, notes, shares):
    record = run([{"branches": branches, "notes": {"Composite": notes}}])
    assert [each[0] for each in says(record, 0)] == pytest.approx(shares)


def test_what_is_still_on_a_device_is_not_waited_for():
    """One such number among the others is enough; then the step before says it, if it is known."""
    there, known = {"led": 1, "weight": torch.tensor(0.75)}, {"led": 0, "weight": 0.75}
    steps = [{"branches": BOTH, "notes": {"CMLoRA": notes}} for notes in (known, there)]
    assert now(run(steps[1:], ("CMLoRA",)), 0) == (None, {})
    assert now(run(steps, ("CMLoRA",)), 0) == (pytest.approx([0.75, 0.25]), known)
    assert now(run(steps[:1], ("CMLoRA",)), 0)[1] == known


def test_the_second_method_of_a_kind_is_told_apart():
    notes = {"KLoRA": {"layers": [1]}, "KLoRA 2": {"layers": [3, 1]}}
    record = run([{"branches": [[[1.0], [0.0, 2.0]]], "notes": notes}], ("KLoRA", "KLoRA"), (["x"], NAMES))
    assert says(record, 0) == [[1.0]] and says(record, 1) == [[0.75], [0.25]]


def test_what_is_left_out_counts_for_every_branch():
    """Two branches of one picture: four evaluations with both sides of guidance, two with one."""
    record = run([{"rows": 4, "branches": BOTH}, {"rows": 2, "branches": BOTH, "notes": {"cache": {"reused": 2}}}])
    costs = costs_of(record, guided([1, 0]))
    assert (costs.whole, costs.cached, costs.left_out) == ([4, 0], [0, 2], [0, 2])
    assert costs.plain == 8 and costs.saved == 0.25
    assert costs_of(record, None).as_dict() == {"whole": 4, "cached": 2, "left_out": 0, "plain": 6, "saved": 0.0}
    assert costs_of(None, guided([1, 0])).as_dict() == {"whole": 3, "cached": 0, "left_out": 1, "plain": 4,
                                                        "saved": 0.25}
    assert costs_of(run([]), guided([])).saved == 0


@pytest.mark.parametrize(("negatives", "predicted", "step"), [
    ([1, 1, 0, 0], (), 2), ([1, 1, 1], (), None), ([0, 0], (), 0), ([1, 0, 1, 0], (), 3), ([1, 0, 0], (0, 1, 0), 2)])
def test_when_guidance_went_off(negatives, predicted, step):
    assert switch_of(guided(negatives, predicted=predicted)) == step


def test_only_what_there_is_to_tell():
    plain = run([{"branches": [[[1.0, 0.5]]]}] * 3, ("Merge",))
    assert [type(block) for block in charts(plain, None)] == [Figures]
    turns = run([{"branches": [[[1.0, 0.0]]]}, {"branches": [[[0.0, 1.0]]]}], ("Switch",))
    assert [type(block) for block in charts(turns, None)] == [Figures, Stack]
    routed = run([{"branches": [[[1.0, 1.0]]], "notes": {"Merge": {"places": [0.2, 0.4]}}}] * 2, ("Merge",))
    assert [type(block) for block in charts(routed, None)] == [Figures, Lines]
    cached = run([{"branches": BOTH, "rows": 4, "notes": {"cache": {"reused": 4 * k, "ages": [k, k]}}} for k in (0, 1)])
    blocks = charts(cached, guided([1, 1], gamma={0: [0.9], 1: [0.95]}))
    assert [type(block) for block in blocks] == [Figures, Beside, HeatRows]
    assert [(row.name, row.values) for row in blocks[-1].rows] == [("a", [0, 1]), ("b", [0, 1])]
    assert sheet(blocks, "t").height > 300
    many = charts(None, guided([9, 0], rows=9, gamma={0: [0.5] * 8 + [None]}))[1].blocks[0]
    assert [one.name for one in many.series] == ["mean of 9 pictures"] and many.series[0].values == [0.5, None]
    assert many.head.endswith("the negative is off from step 2") and many.behind.values == [1.0, 0.0]
