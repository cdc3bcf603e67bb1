"""The branch cache behind ComfyUI's torch.compile node: the same pictures as without the compiler."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.compose.composition import record_of

from .builders import composite, sample, three
from .caches import cached, cmlora, steps_of
from .compiled import compiled
from .models import base


@pytest.fixture(scope="module", autouse=True)
def forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


CASES = {
    "Composite, SD1.5": (lambda model, ensemble: cached(composite(model, ensemble)), "SD15", "before"),
    "CMLoRA, Flux": (lambda model, ensemble: cmlora(model, ensemble, 1), "Flux", "before"),
    "Composite, Flux, node behind": (lambda model, ensemble: cached(composite(model, ensemble)), "Flux", "after"),
}


@pytest.mark.parametrize(("make", "family", "place"), CASES.values(), ids=CASES)
def test_the_cache_behind_a_compiled_model(make, family, place, loras):
    model = base(family)
    ensemble = three(model, loras)
    plain = make(model, ensemble)
    ours = make(compiled(model), ensemble) if place == "before" else compiled(make(model, ensemble))
    for _ in range(2):
        found, want = sample(ours, family, steps=4), sample(plain, family, steps=4)
        assert (found - want).norm() < 1e-4 * want.norm()
        assert [step["reused"] for step in steps_of(ours)] == [step["reused"] for step in steps_of(plain)]
        assert any(step["reused"] for step in steps_of(ours))
        assert not [line for line in record_of(ours).problems if "never led" not in line]  # in 4 steps not all do
