"""In which evaluations of a run something is learnt of the places of LoRAs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lora_ensemble.engine.positions import Places
from lora_ensemble.host.compose.probe import listening
from lora_ensemble.host.compose.run import Run
from lora_ensemble.kernels.branch import Branch

from .test_routes import BOTH, called, cond, regions

NONE, ONE, BENEATH = Branch((0.0, 0.0)), Branch((1.0, 0.0)), Branch((1.0,))


@pytest.mark.parametrize(("branches", "heard"), [((NONE, NONE), True), ((NONE, ONE), False), ((ONE, ONE), False)])
def test_loras_are_asked_what_they_would_do_where_none_of_them_acts(branches, heard):
    """In no row of the batch: what one does is in what it would be measured by. LoRAs beneath that are always on are
    no reason against it."""
    (ours, _), one = regions(trust=True), cond(BOTH)
    called(ours, [one])
    run = SimpleNamespace(regions=[None, ours], routes=[ours], origins={"row": one["uuid"]},
                          confined=lambda k, branch, uuid: branch)
    joined = SimpleNamespace(methods=(0, 1), adapters=[range(1), range(1, 3)])
    rows = [((BENEATH, branch), uuid) for branch, uuid in zip(branches, ("row", None), strict=True)]
    places = Places(torch.ones(2, 2, 8, 8), [0, 1])
    reach = listening(run, joined, rows, places, 1)
    assert (reach is not None) == heard and (reach is None or reach.adapters == range(1, 3))
    assert listening(run, joined, rows, None, 1) is None
    run.routes = []
    assert listening(run, joined, rows, places, 1) is None


def test_the_rows_of_one_combination_are_read():
    """By the caller's names of the conds. Of several branches each has its own copy of a cond."""
    run = SimpleNamespace(origins={"copy": "a", "other": "a"}, read=None)
    assert Run.to_read(run, ["copy", "b", None], [ONE, ONE, ONE]) == ["a", "b", None]
    run.read = NONE
    assert Run.to_read(run, ["copy", "other"], [ONE, NONE]) == [None, "a"]
