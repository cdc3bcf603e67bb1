"""What is kept of the runs of a MODEL when they end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lora_ensemble.host.compose.composition import Composition, Outcome, Placed, outcome_of
from lora_ensemble.host.compose.earlier import mark_of
from lora_ensemble.host.compose.sampled import run_of

from ..devices import Plain


class Ending:
    """A run with places on an accelerator; its end may fail."""

    def __init__(self, value: float, fail: bool = False):
        maps = Plain(torch.full((1, 2, 4, 4), value))
        self.regions, self.fail = [None, SimpleNamespace(maps=maps, found=({"lora": "a"},))], fail

    def close(self, left):
        self.left = left
        if self.fail:
            raise RuntimeError("the device is gone")


def composed() -> Composition:
    return Composition((SimpleNamespace(names=("z",), masks=(None,)),
                        SimpleNamespace(names=("a", "b"), masks=(None, torch.ones(1, 4, 4)))))


@pytest.mark.parametrize("first", [0, 1])
def test_the_innermost_run_samples_and_any_of_them_may_end_first(first):
    ours, both = composed(), [Ending(1.0), Ending(2.0)]
    ours.runs += both
    assert ours.run is both[1]
    ours.end(both[first], None)
    assert ours.run is both[1 - first] and ours.runs == [both[1 - first]]
    ours.end(both[1 - first], None)
    assert ours.run is None


def test_a_model_that_is_evaluated_although_no_run_of_it_began_is_said_once(caplog):
    ours = composed()
    model = SimpleNamespace(current_patcher=SimpleNamespace(get_attachment=lambda key: ours))
    for _ in range(2):
        assert run_of(model) is None
    assert ["its LoRAs have no effect there" in line for line in caplog.messages] == [True]
    ours.runs.append(one := Ending(1.0))
    assert run_of(model) is one
    assert run_of(SimpleNamespace(current_patcher=SimpleNamespace(get_attachment=lambda key: None))) is None
    assert run_of(SimpleNamespace()) is None


def test_places_are_kept_on_the_cpu_and_outcome_of_by_the_latent_that_was_left():
    """Of a run that came to no end nothing is told, but for the last one."""
    ours, latents = composed(), [torch.rand(1, 4, 8, 8) for _ in range(3)]
    model = SimpleNamespace(get_attachment=lambda key: ours)
    for value, latent in enumerate(latents):
        ours.runs.append(one := Ending(float(value)))
        ours.record = value
        left = mark_of(latent) if value != 1 else None
        ours.end(one, left)
        assert one.left is left
        (placed,) = ours.places
        assert placed.maps.device.type == "cpu" and placed.maps.unique().tolist() == [value]
        assert placed == Placed(("a", "b"), placed.maps, ({"lora": "a"},), (False, True))
    assert [outcome_of(model, latent).record for latent in latents] == [0, 2, 2]
    assert outcome_of(model, latents[0]).places[0].maps.sum() == 0
    assert outcome_of(SimpleNamespace(get_attachment=lambda key: None), latents[0]) == Outcome(None, ())


def test_a_run_is_over_also_where_its_end_fails():
    ours, one = composed(), Ending(1.0, fail=True)
    ours.runs.append(one)
    with pytest.raises(RuntimeError, match="the device is gone"):
        ours.end(one, None)
    assert ours.runs == [] and ours.places
