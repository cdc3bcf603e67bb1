"""ComfyUI's torch.compile node before and after ours. The backend runs graphs as they are: what is at stake is whether
the compiler sees our forwards, and whether it bakes one run's LoRAs into a graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.switch import Switch

from .any_model import any_model
from .builders import composite, lora, merge, method, same, sample, stock, three
from .compiled import compiled
from .disturbed import skipped_where_older
from .models import FAMILIES, base
from .small_video import SMALL
from .test_parity_families import NAME, drawn, layers_of


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


DEEP = replace(FAMILIES["Flux"], name="deep Flux", config=dict(FAMILIES["Flux"].config, depth=3, depth_single_blocks=4))
BLOCKS = [f"diffusion_model.{kind}.{i}" for kind, count in (("double_blocks", 3), ("single_blocks", 4))
          for i in range(count)]


@pytest.mark.parametrize(("name", "keys"), [("Flux", ["diffusion_model"]), (DEEP.name, BLOCKS)],
                         ids=["whole", "block by block"])
def test_no_more_graphs_than_the_plain_model_has(name, keys, loras, monkeypatch):
    """Guard: every block compiled anew, up to the compiler's limit, as with a number of its own in each. Other LoRAs,
    strengths and turns bring no graph either."""
    monkeypatch.setitem(FAMILIES, DEEP.name, DEEP)
    model, graphs = base(name), []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    first = compiled(model, counted, keys)
    ensemble = three(model, loras)
    plain = sample(first, name)
    alone = len(graphs)
    for make in (Switch, Merge, Composite):
        ours = method(first, ensemble, lambda strengths, make=make: make(strengths))
        same(sample(ours, name, steps=3), sample(method(model, ensemble, make), name, steps=3),
             sample(model, name, steps=3))
        again = len(graphs)
        sample(method(first, [replace(spec, strength_model=0.3) for spec in ensemble], make), name)
        assert len(graphs) == again
        # One set for batches of two rows, and one for Composite's wider ones; with LoRAs each is another graph.
        assert len(graphs) - alone <= alone * (2 if make is Composite else 1)
    same(plain, sample(model, name), sample(stock(model, ensemble), name), 1e-4)
    assert not [node for graph in graphs for node in graph.graph.nodes if "route_" in str(node.target)]


@pytest.mark.parametrize("name", ["Wan 2.2", "Flux 2 timestep zero"])
def test_layers_with_several_entries_for_each_row(name, loras):
    """A time for every frame, the batch over and over: Composite is in one graph there, too, with nothing opaque."""
    with skipped_where_older(name):
        model = any_model(SMALL[name])
        layers = layers_of(model)
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    ensemble = [LoRASpec(loras(lora(layers, seed, seed, **NAME)), 0.8, 0.0) for seed in (1, 2)]
    found = drawn(composite(compiled(model, counted), ensemble), 1, 3.0)
    same(found, drawn(composite(model, ensemble), 1, 3.0), drawn(model, 1, 3.0))
    assert len(graphs) == 1 and not [node for node in graphs[0].graph.nodes if "route_" in str(node.target)]


def test_routed_loras_in_a_compiled_model(loras):
    """Attention inside a graph is not read: said, and the LoRAs act everywhere on their own words. Contrast needs
    predictions alone, and finds the places that it finds without the compiler."""
    from .test_routed import MARKS, prompt, rests, routed, specs

    model, others = base("SD3"), [prompt("SD3", None, 20 + k)[0] for k in range(3)]
    ensemble = specs(model, loras)
    read = compiled(routed(model, ensemble))
    found, plain = sample(read, "SD3", prompt("SD3")), sample(model, "SD3", prompt("SD3"))
    (problem,) = record_of(read).problems
    assert "torch.compile" in problem and "contrast" in problem and (places_of(read)[0].maps == 1).all()
    same(found, sample(routed(model, ensemble, gamma=0.0), "SD3", prompt("SD3")), plain, 1e-3)
    conds = prompt("SD3", lora_ensemble_without=rests(MARKS, others))
    apart = routed(model, ensemble, mode="contrast")
    want = sample(apart, "SD3", conds)
    same(sample(compiled(apart), "SD3", conds), want, plain, 1e-3)
    assert record_of(apart).problems == [] and places_of(apart)[0].maps.min() < 1
