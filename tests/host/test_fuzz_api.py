"""Damaged API workflows from seeds (tests/fuzz_api.py) on a real server: a tenth of the 700 that its command makes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lora_ensemble.tests.fuzz_api import Failure, Fuzz
from lora_ensemble.tests.server import Server

COUNT = 70
SHARE = 35


@pytest.fixture(scope="module")
def fuzz(server: Server) -> Iterator[Fuzz]:
    yield Fuzz(server)
    server.post("/history", clear=True)  # infinite numbers in it are no JSON that a front end could read


@pytest.mark.parametrize("first", range(0, COUNT, SHARE))
def test_damaged_workflows(first, fuzz):
    """Each runs, or is refused in words; the next good one is drawn as ever."""
    found = {fuzz.check(seed)[1] for seed in range(first, min(first + SHARE, COUNT))}
    assert {"works", "refused in the run", "refused before the run"} <= found
    fuzz.unharmed()


@pytest.mark.parametrize(("kind", "last"), [("AttributeError", "custom_nodes/lora-ensemble/host/x.py"),
                                            ("RuntimeError", "site-packages/torch/nn/functional.py"),
                                            ("ValueError", "site-packages/numpy/x.py")])
def test_the_judge_sees_what_is_no_error_of_ours(kind, last, fuzz):
    trace = ['File "/x/custom_nodes/lora-ensemble/nodes/x.py", line 1', f'File "/x/{last}", line 2']
    with pytest.raises(Failure, match=kind):
        fuzz.failed({"node_type": "LoRAEnsembleMerge", "exception_type": kind, "exception_message": "?",
                     "traceback": trace})
