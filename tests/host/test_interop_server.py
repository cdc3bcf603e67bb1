"""Adaptive Guidance beside the host's guidance nodes, and under all of its samplers and guiders, on a real server.

What must come out is drawn by the host alone: with guidance on, the same graph without our node; where guidance stops
at step k, a run of k guided steps and one of the rest without guidance (`Graph.relay`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from lora_ensemble.tests.server import Server

from .graphs import STEPS, Graph, Link, switch
from .guidance_tools import same


@dataclass(frozen=True)
class Neighbour:
    """A node of the host.

    after   what is left of it where guidance has stopped: "nothing", "one step" ("nothing" from the next step on),
            "itself", or "own": no nodes of the host say it
    """

    kind: str
    after: str = "nothing"
    options: dict = field(default_factory=dict)
    family: str = "SD15"


LAYERS = {"double_layers": "0", "single_layers": "0"}
WHOLE = {"start_percent": 0.0, "end_percent": 1.0}
NEIGHBOURS = {
    "RescaleCFG": Neighbour("RescaleCFG"),
    "APG": Neighbour("APG", options={"eta": 0.5, "norm_threshold": 5.0, "momentum": 0.0}),
    "APG with momentum": Neighbour("APG", options={"eta": 0.5, "norm_threshold": 5.0, "momentum": -0.5}),
    "TCFG": Neighbour("TCFG"),
    "CFG-Zero*": Neighbour("CFGZeroStar"),
    "CFGNorm": Neighbour("CFGNorm"),
    "Mahiro": Neighbour("Mahiro"),
    "FreSca": Neighbour("FreSca", options={"freq_cutoff": 2}),
    "CFG Override": Neighbour("CFGOverride", options={"cfg": 5.0, **WHOLE}),
    "Perp-Neg": Neighbour("PerpNeg", options={"neg_scale": 0.8}),
    "NAG": Neighbour("NAGuidance", "one step"),
    "PAG": Neighbour("PerturbedAttentionGuidance", "itself"),
    "FreeU": Neighbour("FreeU", "itself"),
    "FreeU V2": Neighbour("FreeU_V2", "itself"),
    "Epsilon Scaling": Neighbour("Epsilon Scaling", "itself", {"scaling_factor": 1.05}),
    "TSR": Neighbour("TemporalScoreRescaling", "itself"),
    "SLG": Neighbour("SkipLayerGuidanceDiT", "itself", LAYERS | WHOLE, "Flux"),
    "SLG simple": Neighbour("SkipLayerGuidanceDiTSimple", "nothing", LAYERS | WHOLE, "Flux"),
    "SLG SD3": Neighbour("SkipLayerGuidanceSD3", "itself", {"layers": "0"} | WHOLE, "SD3"),
    "SAG": Neighbour("SelfAttentionGuidance", "own"),
    "EasyCache": Neighbour("EasyCache", "own", WHOLE),
    "LazyCache": Neighbour("LazyCache", "own", WHOLE),
}


@pytest.fixture(scope="module")
def info(server: Server) -> dict:
    return server.json("/object_info")


def on(graph: Graph, neighbour: Neighbour, model: Link) -> Link:
    """The model with that node on it."""
    extra = {"empty_conditioning": graph.other} if neighbour.kind == "PerpNeg" else {}
    return graph.add(neighbour.kind, model=model, **neighbour.options, **extra)


def stops_at(record: dict, step: int) -> None:
    """The step that passes the threshold evaluates the last negative; what follows it saves one evaluation each."""
    assert [entry["negative"] for entry in record["steps"]] == [1] * (step + 1) + [0] * (STEPS - step - 1)
    spent = sum(entry["rows"] + entry["negative"] for entry in record["steps"])
    assert record["finished"] and spent == STEPS + step + 1 and record["full"] == 2 * STEPS


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbour_before_and_after(server: Server, info: dict, name: str):
    neighbour = NEIGHBOURS[name]
    if neighbour.kind not in info:
        pytest.skip(f"this ComfyUI has no {neighbour.kind}")

    def ours(graph: Graph, threshold: float) -> None:
        model = graph.ours(on(graph, neighbour, graph.model), threshold)
        graph.save("after it", graph.ksampler(model), model)
        model = on(graph, neighbour, graph.ours(graph.model, threshold))
        graph.save("before it", graph.ksampler(model), model)

    graph = Graph(info, neighbour.family)
    graph.save("guided", graph.ksampler(on(graph, neighbour, graph.model)))
    graph.save("alone", graph.ksampler(graph.model))
    ours(graph, 1.1)
    latents, records = graph.run(server)
    guided = latents["guided"]
    assert torch.equal(latents["after it"], guided) and torch.equal(latents["before it"], guided)
    assert not torch.equal(guided, latents["alone"]), "the neighbour does nothing"
    assert records["after it"]["steps"] == records["before it"]["steps"]
    if name == "LazyCache":  # it leaves out whole steps, of which guidance then knows nothing
        threshold, step = -1.0, 1
    else:
        threshold, step = switch(records["after it"])

    graph = Graph(info, neighbour.family)
    ours(graph, threshold)
    if neighbour.after != "own":
        model = on(graph, neighbour, graph.model)
        legs = [(graph.guider(model), step)]
        if neighbour.after == "one step":
            legs.append((graph.guider(model, cfg=1.0), step + 1))
        after = model if neighbour.after == "itself" else graph.model
        graph.save("wanted", graph.relay(*legs, (graph.prompt_alone(after), STEPS)))
    latents, records = graph.run(server)
    assert torch.equal(latents["after it"], latents["before it"]) and latents["after it"].isfinite().all()
    assert not torch.equal(latents["after it"], guided)
    if neighbour.after != "own":
        same(latents["after it"], latents["wanted"], guided)
    for record in records.values():
        if name == "LazyCache":
            assert {entry["index"]: entry["negative"] for entry in record["steps"]}[0] == 1
            assert sum(entry["negative"] for entry in record["steps"]) == 2
        else:
            stops_at(record, step)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbour_of_extrapolated_guidance(server: Server, info: dict, name: str):
    """Identical where nothing is to be saved. Else the order of the nodes makes no difference, the negative is left out
    at one step of six, and the picture stays nearer to that of full guidance than the prompt alone is."""
    neighbour = NEIGHBOURS[name]
    if neighbour.kind not in info:
        pytest.skip(f"this ComfyUI has no {neighbour.kind}")
    graph = Graph(info, neighbour.family)
    guided = on(graph, neighbour, graph.model)
    graph.save("guided", graph.ksampler(guided))
    graph.save("alone", graph.guided(graph.prompt_alone(guided if neighbour.after == "itself" else graph.model)))
    for saving in (0.0, 0.3):
        model = graph.extrapolated(on(graph, neighbour, graph.model), saving)
        graph.save(f"after it {saving}", graph.ksampler(model), model)
        model = on(graph, neighbour, graph.extrapolated(graph.model, saving))
        graph.save(f"before it {saving}", graph.ksampler(model), model)
    latents, records = graph.run(server)
    wanted, ours = latents["guided"], latents["after it 0.3"]
    assert torch.equal(latents["after it 0.0"], wanted) and torch.equal(latents["before it 0.0"], wanted)
    assert torch.equal(ours, latents["before it 0.3"]) and ours.isfinite().all()
    for name_of, record in records.items():
        assert record["finished"]
        if name in ("NAG", "EasyCache"):
            assert all(entry["negative"] == entry["rows"] for entry in record["steps"])
            assert any(name in said for said in record["problems"]) or name_of.endswith("0.0")
        elif name_of.endswith("0.3") and name != "LazyCache":
            assert [entry["negative"] for entry in record["steps"]] == [1, 1, 1, 0, 1, 1]
    if name in ("NAG", "EasyCache"):
        assert torch.equal(ours, wanted)
    elif name != "LazyCache":  # which leaves out whole steps, of which guidance then knows nothing
        assert not torch.equal(ours, wanted)
        assert (ours - wanted).norm() < (latents["alone"] - wanted).norm()


def test_samplers_draw_the_same(server: Server, info: dict):
    """Four samplers of the host with our MODEL, our guider and our sampler; RescaleCFG before us, PAG and FreeU after.
    """
    def draw(graph: Graph, threshold: float) -> None:
        before = graph.add("RescaleCFG", model=graph.model)
        for name, sampled in {
            "KSampler": graph.ksampler,
            "KSamplerAdvanced": lambda model: graph.ksampler(model, "KSamplerAdvanced"),
            "SamplerCustom": graph.custom,
            "CFGGuider": lambda model: graph.guided(graph.guider(model)),
        }.items():
            model = lasting(graph, graph.ours(before, threshold))
            graph.save(name, sampled(model), model)
        model = lasting(graph, before)
        graph.save("AdaptiveGuider", graph.guided(graph.guider(model, "LoRAEnsembleAdaptiveGuider",
                                                               mode="threshold", threshold=threshold)))
        drawn, _ = graph.ksampler(model, "LoRAEnsembleKSampler", mode="threshold", threshold=threshold)
        graph.save("our KSampler", [drawn, 0], text=[drawn, 1])

    def lasting(graph: Graph, model: Link) -> Link:
        return graph.add("FreeU_V2", model=graph.add("PerturbedAttentionGuidance", model=model))

    graph = Graph(info)
    graph.save("without", graph.ksampler(lasting(graph, graph.add("RescaleCFG", model=graph.model))))
    draw(graph, 1.1)
    latents, records = graph.run(server)
    guided = latents["without"]
    assert [name for name, latent in latents.items() if not torch.equal(latent, guided)] == []
    threshold, step = switch(records["KSampler"])

    graph = Graph(info)
    draw(graph, threshold)
    model = lasting(graph, graph.add("RescaleCFG", model=graph.model))
    after = graph.prompt_alone(lasting(graph, graph.model))
    graph.save("wanted", graph.relay((graph.guider(model), step), (after, STEPS)))
    latents, records = graph.run(server)
    assert f"{STEPS + step + 1} of {2 * STEPS} evaluations" in records.pop("our KSampler")
    wanted, ours = latents.pop("wanted"), latents["KSampler"]
    same(ours, wanted, guided)
    assert [name for name, latent in latents.items() if not torch.equal(latent, ours)] == []
    for record in records.values():
        stops_at(record, step)


@pytest.mark.parametrize("kind", ["DualCFGGuider", "DualCFGGuider nested", "PerpNegGuider", "DualModelGuider"])
def test_guiders_with_a_formula_of_their_own(server: Server, info: dict, kind: str):
    """RescaleCFG before us, FreeU after. Guidance stops where all negatives agree with the prompt's prediction."""
    kind, style = kind.split(" ")[0], {"style": "nested"} if "nested" in kind else {}
    if kind not in info:
        pytest.skip(f"this ComfyUI has no {kind}")
    negatives = 1 if kind == "DualModelGuider" else 2

    def drawn(graph: Graph, threshold: float | None) -> tuple[Link, Link]:
        model = graph.add("RescaleCFG", model=graph.model)
        model = graph.add("FreeU_V2", model=model if threshold is None else graph.ours(model, threshold))
        return model, graph.guider(model, kind, **style)

    graph = Graph(info)
    graph.save("without", graph.guided(drawn(graph, None)[1]))
    model, guider = drawn(graph, 1.1)
    graph.save("with", graph.guided(guider), model)
    latents, records = graph.run(server)
    guided = latents["without"]
    assert torch.equal(latents["with"], guided)
    threshold, step = switch(records["with"])

    graph = Graph(info)
    model, guider = drawn(graph, threshold)
    graph.save("with", graph.guided(guider), model)
    after = graph.prompt_alone(graph.add("FreeU_V2", model=graph.model))
    graph.save("wanted", graph.relay((drawn(graph, None)[1], step), (after, STEPS)))
    latents, records = graph.run(server)
    same(latents["with"], latents["wanted"], guided)
    negative = [entry["negative"] for entry in records["with"]["steps"]]
    assert negative == [negatives] * (step + 1) + [0] * (STEPS - step - 1)
    assert records["with"]["full"] == (1 + negatives) * STEPS
