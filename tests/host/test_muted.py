"""Chains of ensembles with a muted node: what it would take with it is told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from comfy_api.latest import io
from lora_ensemble.nodes import chain
from lora_ensemble.nodes.ensembles import LoRAEnsembleFromStack, LoRAEnsembleLoRA

from .models import base

if not hasattr(io, "DynamicCombo"):
    pytest.skip("this release cannot show rows", allow_module_level=True)

from .test_stack import NODE, nested, two  # noqa: F401  (a fixture)


def node(number: int, before: int | None = None, mode: int = 0, kind: str = "LORA_ENSEMBLE", link: int | None = None):
    return {"id": number, "type": "LoRAEnsembleLoRA", "mode": mode,
            "inputs": [{"name": "ensemble", "type": kind, "link": link or before}]}


def links(*pairs: tuple[int, int]) -> list[list]:
    """Each link has the number of the node that it comes from."""
    return [[origin, origin, 0, target, 0, "LORA_ENSEMBLE"] for origin, target in pairs]


def said(workflow: dict | None, unique_id: str, ensemble: object = None) -> str:
    class Node(LoRAEnsembleLoRA):
        hidden = SimpleNamespace(unique_id=unique_id, extra_pnginfo=workflow and {"workflow": workflow})

    try:
        chain.check_chain(Node, ensemble=ensemble)
    except ValueError as error:
        return str(error)
    return ""


def graph(*modes: int) -> dict:
    """A chain of nodes 1, 2, 3 ... with these modes."""
    count = len(modes)
    return {"nodes": [node(k, k - 1 or None, mode) for k, mode in enumerate(modes, 1)],
            "links": links(*((k, k + 1) for k in range(1, count)))}


@pytest.mark.parametrize(("modes", "lost"), [
    ((0, 0, 0), ""), ((0, 2, 0), "(node 1)"), ((2, 0, 0), ""), ((2, 2, 0), ""), ((0, 4, 0), ""),
    ((0, 2, 2, 0), "(node 1)"), ((0, 2, 4, 0), "(node 1)"), ((0, 4, 2, 0), "(node 1)"), ((4, 2, 0), ""),
    ((0, 0, 2, 0), "(node 2), 'LoRAEnsembleLoRA' (node 1)"),
])  # fmt: skip
def test_a_muted_node_that_takes_others_with_it(modes, lost):
    text = said(graph(*modes), str(len(modes)))
    assert lost in text and bool(text) == bool(lost)
    if lost:
        assert text.startswith("LoRA (Ensemble): 'LoRAEnsembleLoRA' (node ") and "Bypass it instead" in text
        assert "at the input ensemble is muted" in text


def test_an_input_that_got_something_is_whole():
    assert said(graph(0, 2, 0), "3", ensemble=()) == ""


def test_a_muted_node_in_a_subgraph():
    inner = {"id": "5c", "nodes": graph(0, 2, 0)["nodes"],
             "links": [{"id": k, "origin_id": k, "origin_slot": 0, "target_id": k + 1, "target_slot": 0,
                        "type": "LORA_ENSEMBLE"} for k in (1, 2)]}
    workflow = {"nodes": [{"id": 7, "type": "5c", "mode": 0, "inputs": []}], "links": [],
                "definitions": {"subgraphs": [inner]}}
    assert "(node 1)" in said(workflow, "7:3") and said(workflow, "7:1") == ""


@pytest.mark.parametrize("workflow", [None, {}, {"nodes": []}, {"nodes": [{"id": 3}], "links": []}, "text",
                                      {"nodes": [node(3, 2)], "links": [[2]]}, {"nodes": {}, "links": 3}])
def test_a_workflow_that_says_nothing_stops_nothing(workflow):
    assert said(workflow, "3") == ""


def test_nodes_of_a_chain_look(two, monkeypatch):  # noqa: F811
    """Those with an optional ensemble or stack; only the host fills in what they look at."""
    seen = []
    monkeypatch.setattr("lora_ensemble.nodes.ensembles.check_chain", lambda node, **inputs: seen.append(set(inputs)))
    monkeypatch.setattr("lora_ensemble.nodes.stack.check_chain", lambda node, **inputs: seen.append(set(inputs)))
    LoRAEnsembleLoRA.execute(two[0], 1.0, 1.0, "auto")
    LoRAEnsembleFromStack.execute([])
    NODE.execute(base("SD15"), "Merge", **nested())
    assert seen == [{"ensemble"}, {"ensemble"}, {"ensemble", "lora_stack"}]
