"""ComfyUI's torch.compile node before and after ours. The backend runs graphs as they are: what is at stake is whether
the compiler sees our forwards, and whether it bakes one run's LoRAs into a graph."""

from __future__ import annotations

import pytest
import torch

from .builders import composite, merge, same, sample, stock, three
from .compiled import compiled
from .models import base


@pytest.fixture(scope="module", autouse=True)
def forget():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("place", ["before", "after"])
def test_compiled_model(place, loras):
    """Guard: forwards are replaced on the instances (hooks would be ignored by a compiled module), and what they add is
    one operator that looks up its run: other LoRAs, strengths and batch layouts through the same graphs."""
    model = base("SD3")
    ensemble = three(model, loras)
    first = compiled(model) if place == "before" else model
    plain = sample(model, "SD3")
    made = {"merge": merge(first, ensemble), "composite": composite(first, ensemble),
            "one": merge(first, ensemble[:1])}
    if place == "after":
        made = {name: compiled(ours) for name, ours in made.items()}
    reference = {"merge": sample(stock(model, ensemble), "SD3"), "one": sample(stock(model, ensemble[:1]), "SD3"),
                 "composite": sample(composite(model, ensemble), "SD3")}
    for name in ("merge", "one", "composite", "merge"):
        same(sample(made[name], "SD3"), reference[name], plain)
    same(sample(compiled(model), "SD3"), plain, reference["merge"], 1e-4)
