"""What is told of a run while it samples: over a real server's websocket, and nothing where nobody looks."""

from __future__ import annotations

import asyncio
import html
import json
import struct
import sys
import time
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import aiohttp
import lora_ensemble.nodes  # noqa: F401  (it has runs watched)
import pytest
import torch
from comfy_execution.graph import DynamicPrompt
from comfy_execution.progress import reset_progress_state
from comfy_execution.utils import CurrentNodeContext
from lora_ensemble.engine.record import RunRecord, StepRecord
from lora_ensemble.host.compose.apply import with_cache, with_reason
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import KEY, record_of
from lora_ensemble.host.guidance.apply import apply_guidance
from lora_ensemble.host.guidance.options import GuidanceOptions, guidance_of
from lora_ensemble.host.look import live
from lora_ensemble.host.look.live import EVENT, on_the_node, unmarked
from lora_ensemble.host.look.panel import shown
from lora_ensemble.host.look.story import costs_of, line, saved, titles
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.guidance.adaptive import AdaptiveGuidance
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.schedule import BySteps, Uniform
from lora_ensemble.methods.switch import Switch
from lora_ensemble.nodes.said import say
from lora_ensemble.tests.server import Server
from lora_ensemble.tests.workflows import ROOT, load
from safetensors.torch import save_file

from .builders import method, sample, three
from .models import base
from .test_server import GOOD, random_lora

TEXT = 3
"""The host's number of a binary message with text (protocol.py)."""


def texts_of(messages: list[bytes]) -> list[tuple[str, str]]:
    """(node, text) of the messages that are one."""
    found = []
    for message in messages:
        if struct.unpack(">I", message[:4])[0] == TEXT:
            size = struct.unpack(">I", message[4:8])[0]
            found.append((message[8:8 + size].decode(), message[8 + size:].decode()))
    return found


def read(said: list) -> str:
    """Head or foot of a panel as the page has it in English."""
    return ", ".join(text.format(**values) for text, values in said)


def test_the_story_comes_over_the_websocket(server: Server):
    for seed, name in enumerate(GOOD):
        save_file(random_lora(seed), server.base / "models" / "loras" / name)
    prompt = load(ROOT / "tests" / "host" / "workflows" / "switch.json")
    (sampler,) = [key for key, node in prompt.items() if node["class_type"] == "KSampler"]
    one = next(key for key, node in prompt.items() if node["class_type"] == "LoRAEnsembleLoRA")
    prompt[one]["inputs"]["fade"] = 0.5
    steps = prompt[sampler]["inputs"]["steps"]

    heard = []

    async def queued() -> list[bytes]:
        address, seen = f"http://127.0.0.1:{server.port}", []
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{address}/ws?clientId=looking") as socket, \
                session.ws_connect(f"{address}/ws?clientId=another") as other:
            async with session.post(f"{address}/prompt", json={"prompt": prompt, "client_id": "looking"}) as answer:
                number = (await answer.json())["prompt_id"]
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    seen.append(message.data)
                elif message.type is aiohttp.WSMsgType.TEXT:
                    told = json.loads(message.data)
                    assert told["type"] != "execution_error", told
                    if told["type"] == EVENT:
                        assert told["data"]["prompt_id"] == number
                        heard.append(told["data"]["panels"])
                    if told["type"] == "executing" and told["data"].get("node") is None \
                            and told["data"].get("prompt_id") == number:
                        break
            with suppress(asyncio.TimeoutError):
                while message := await other.receive(timeout=0.5):
                    assert message.type is aiohttp.WSMsgType.TEXT, "another page has nodes of the same numbers"
        return seen

    (node, said), *found = texts_of(asyncio.run(asyncio.wait_for(queued(), 120)))
    assert node == one and said.startswith("fade is not used")
    assert [node for node, _ in found] == [sampler, "method"] * (len(found) // 2), "the method's node tells it, too"
    assert "1 of" in found[0][1] and "Switch, two acts" in found[0][1]  # the order is 2,1
    assert found[-1][1].startswith(f"{steps} of {steps} steps in ") and f"{2 * steps} evaluations" in found[-1][1]
    assert len(heard) == len(found) // 2
    (first,), (last,) = heard[0], heard[-1]
    assert [(row["name"], row["part"], row["strength"]) for row in first["rows"]] == [("one", 0, 0), ("two", 1, 1)]
    assert first["node"] == "method" and read(first["head"]) == "Switch: whose turn it was"
    assert sum(row["part"] for row in last["rows"]) == pytest.approx(1) and last["rows"][0]["part"] > 0
    assert read(last["foot"]) == f"{steps} of {steps} steps, {2 * steps} evaluations"


# --- who looks ---


class Wire(SimpleNamespace):
    """Stands for the server of a process that has none, and keeps what it is to send."""

    def __init__(self, client, sockets):
        extra = {"extra_pnginfo": {"workflow": {"id": "w"}}}
        running = SimpleNamespace(currently_running={0: (0, "other", {}, {}, []), 1: (1, "p", {}, extra, [])})
        super().__init__(client_id=client, sockets=sockets, sent=[], panels=[], prompt_queue=running)

    def send_progress_text(self, text, node, sid) -> None:
        self.sent.append((text, node, sid))

    def send_sync(self, event, data, sid) -> None:
        assert event == EVENT and sid == "c" and data["prompt_id"] == "p" and data["workflow"] == "w"
        self.panels.append(json.loads(json.dumps(data["panels"])))


def wired(monkeypatch, client="c", sockets=("c",)) -> Wire:
    wire = Wire(client, dict.fromkeys(sockets))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=wire)))
    return wire


@pytest.mark.parametrize("case", ["client gone", "no client", "no node", "no server"])
def test_nothing_is_sent_where_nobody_looks(case, loras, monkeypatch):
    wire = wired(monkeypatch, None if case == "no client" else "c", () if case == "client gone" else ("c",))
    if case == "no server":
        monkeypatch.setitem(sys.modules, "server", None)
    made = []
    monkeypatch.setattr(live, "line", lambda *_: made.append(1) or "text")
    model = base("SD15")
    ours = method(model, three(model, loras), Switch)
    if case == "no node":
        sample(ours, steps=3)
    else:
        with CurrentNodeContext("p", "7"):
            sample(ours, steps=3)
    assert wire.sent == wire.panels == made == [] and record_of(ours).finished


def test_it_is_told_of_steps_and_of_the_end(loras, monkeypatch):
    wire = wired(monkeypatch)
    monkeypatch.setattr(live, "EVERY", 0.0)
    model = base("SD15")
    ensemble = three(model, loras)
    ours = method(model, ensemble, lambda s: Switch(s, 1))
    with CurrentNodeContext("p", "7"):
        sample(ours, steps=3)
    texts = [text for text, _, _ in wire.sent]
    assert {(node, sid) for _, node, sid in wire.sent} == {("7", "c")} and len(texts) == 4 and not wire.panels
    names = [spec.name.removesuffix(".safetensors") for spec in ensemble]
    assert [text.splitlines()[0].rstrip() for text in texts[:3]] == [
        f"{k + 1} of 3 steps: Switch, {name} acts" for k, name in enumerate(names)]
    assert texts[3].startswith("3 of 3 steps in ") and texts[3].endswith("6 evaluations")

    def broken(*_):
        raise KeyError("a sampler fails")

    with pytest.raises(KeyError), CurrentNodeContext("p", "7"):
        sample(ours, steps=3, callback=broken)
    assert wire.sent[-1][0].startswith("1 of 3 steps in ")


@pytest.mark.parametrize("text", ["<img src=x onerror=alert(1)>", "in the style of <s0><s1>", "a&b &lt;", "![](//a/b)",
                                  "[[a|http://b]]", "*a* _b_ __c__ ~~d~~ `e`", r"styles\_mine"])
def test_what_files_hold_is_no_markup_on_a_node(text, loras, monkeypatch):
    """Guard: the page of ComfyUI 0.3.64 ran what the header of a LoRA had as its trigger words."""
    wire = wired(monkeypatch)
    monkeypatch.setattr(live, "line", lambda *_: text)
    model = base("SD15")
    with CurrentNodeContext("p", "7"):
        sample(method(model, three(model, loras), Switch), steps=1)
    said = wire.sent[-1][0]
    assert html.unescape(said) == text and not set("<>[*`~\\") & set(said)
    assert unmarked("my_lora_v2.safetensors\nnext") == "my_lora_v2.safetensors  \nnext", "a name stays one to read"


def test_a_step_is_not_told_more_often_than_can_be_read(loras, monkeypatch):
    wire = wired(monkeypatch)
    model = base("SD15")
    ours = method(model, three(model, loras)[:1], Switch)
    with CurrentNodeContext("p", "7"):
        since = time.perf_counter()
        sample(ours, steps=30)
    most = (time.perf_counter() - since) / live.EVERY + 2
    assert 2 <= len(wire.sent) <= most


@pytest.mark.parametrize("make", [LoRAtorio, lambda s: CMLoRA(s, ("subject",) * 3)], ids=["loratorio", "cmlora"])
def test_no_tensor_is_read(make, loras, monkeypatch):
    """Weights of LoRAtorio are on the device until the run is over."""
    wire = wired(monkeypatch)
    monkeypatch.setattr(live, "EVERY", 0.0)
    model = base("SD15")
    ours = method(model, three(model, loras), make)
    with CurrentNodeContext("p", "7"):
        sample(ours, steps=4)
    assert len(wire.sent) == 5 and any(" leads" in text for text, _, _ in wire.sent) == (make is not LoRAtorio)
    record = record_of(ours)
    (panel,) = shown(record, ["a"], ["5"], costs_of(record, None), 4, over=True)
    assert panel["rows"][0]["part"] > 0
    record = RunRecord(["LoRAtorio"], [["a", "b"]], [
        StepRecord(0, 1.0, [[[1.0, 0.0]], [[0.0, 1.0]]], 1, 4,
                   notes={"LoRAtorio": {"active": [0, 1], "weights": torch.zeros(2, device="meta")}})] * 2)
    costs = costs_of(record, None)
    assert line(record, ["LoRAtorio"], costs, 2).startswith("2 of 2 steps: LoRAtorio\n8 evaluations")
    assert [row["part"] for row in shown(record, record.methods, ["5"], costs, 2)[0]["rows"]] == [None, None]


def test_what_it_costs():
    """A text, for a run of 50 steps with cache and a leader: far below a hundredth of a step of any real model."""
    notes = {"CMLoRA": {"led": 0, "weight": 0.75}, "cache": {"reused": 2, "ages": [0, 1]}}
    steps = [StepRecord(i, 1.0, [[[1.0, 0.0]], [[0.0, 1.0]]], 1, 4, 0.1, notes) for i in range(50)]
    record = RunRecord(["CMLoRA"], [["a.safetensors", "b.safetensors"]], steps)
    costs = costs_of(record, None)
    text = line(record, record.methods, costs, 50)
    assert text == "50 of 50 steps: CMLoRA, a leads\n100 evaluations, 100 on cached features"
    (panel,) = shown(record, record.methods, ["5"], costs, 50)
    assert read(panel["foot"]) == "50 of 50 steps, 100 evaluations, 50 % on cached features"
    since = time.process_time()
    for _ in range(100):
        costs = costs_of(record, None)
        line(record, record.methods, costs, 50), shown(record, record.methods, ["5"], costs, 50)
    assert (time.process_time() - since) / 100 < 0.002


def test_every_node_that_applied_a_method_has_its_own_panel(loras, monkeypatch):
    """A LoRA of role always is a method beneath, of the same node; one that no node applied has none."""
    wire = wired(monkeypatch)
    model = base("SD15")
    one, two, three_ = three(model, loras)
    with CurrentNodeContext("p", "5"):
        ours = method(model, (replace(one, role="always"), two), Composite)
    with CurrentNodeContext("p", "6:2"):
        ours = method(ours, (three_,), Composite)
    ours = method(ours, (one,), Composite)
    with CurrentNodeContext("p", "7"):
        sample(ours, steps=2)
    assert [node for _, node, _ in wire.sent[-3:]] == ["7", "5", "6:2"]
    last = wire.panels[-1]
    stems = [spec.name.removesuffix(".safetensors") for spec in (one, two, three_)]
    heads = [read(part["head"]).split(":")[0] for part in last]
    assert [(part["node"], head, [row["name"] for row in part["rows"]])
            for part, head in zip(last, heads, strict=True)] == [
        ("5", "Merge", stems[:1]), ("5", "Composite", stems[1:2]), ("6:2", "Composite", stems[2:])]
    assert [row["strength"] for part in last for row in part["rows"]] == [
        round(spec.strength_model, 2) for spec in (one, two, three_)]


def test_a_round_of_a_loop_is_told_on_the_nodes_that_it_stands_for(loras, monkeypatch):
    """Guard: a page has no node of the id that a loop makes, and showed the first round alone."""
    wire, prompt, model = wired(monkeypatch), DynamicPrompt({"5": {}, "7": {}, "9": {}}), base("SD15")
    for node in ("5", "7"):
        prompt.add_ephemeral_node(f"9.0.0.{node}", {}, "9", node)
    reset_progress_state("p", prompt)
    with CurrentNodeContext("p", "9.0.0.5"):
        ours = method(model, three(model, loras), Composite)
        say("what a node says")
    with CurrentNodeContext("p", "9.0.0.7"):
        sample(ours, steps=2)
    assert [node for _, node, _ in wire.sent[-3:]] == ["5", "7", "5"] == [
        "5", "7", wire.panels[-1][0]["node"]]


def test_where_words_confine_loras_the_last_panel_shows_their_places():
    steps = [StepRecord(i, 1.0, [[[0.8, 0.4]]], 1, 2, notes={"Merge": {"places": each}})
             for i, each in enumerate([[0.25, 1.0], [0.75, 1.0]])]
    record = RunRecord(["Merge"], [["a.safetensors", "sub/a.safetensors"]], steps)
    costs = costs_of(record, None)
    called = titles(record, [True])
    (during,), (after,) = (shown(record, called, ["5"], costs, 2, over) for over in (False, True))
    assert [row["part"] for row in during["rows"]] == pytest.approx([2 / 3, 1 / 3], abs=1e-3)
    assert [row["part"] for row in after["rows"]] == [0.5, 1.0]
    assert read(during["head"]) == "Routed: strength of each LoRA"
    assert read(after["head"]) == "Routed: share of the picture of each LoRA"
    assert [row["name"] for row in after["rows"]] == ["a.safetensors", "sub/a.safetensors"]


@pytest.mark.parametrize(("count", "noted", "more"), [(0, 0, ""), (3, 3, ""), (5, 3, "2 more: see Ensemble Report")])
def test_what_could_not_be_done_is_on_the_panel(count, noted, more):
    """The first notes whole, and how many others there are."""
    problems = [f"LoRA 'a{i}': it acts everywhere" for i in range(count)]
    record = RunRecord(["Merge"], [["a"]], [StepRecord(0, 1.0, [[[1.0]]], 1, 1)])
    (panel,) = shown(record, ["Merge"], ["5"], costs_of(record, None), 1, notes=problems)
    assert panel["notes"] == problems[:noted] and read(panel["more"]) == more


def test_notes_of_methods_and_of_guidance_reach_the_panel(loras, monkeypatch):
    wire = wired(monkeypatch)
    monkeypatch.setattr(live, "guidance_record_of", lambda model: SimpleNamespace(problems=["of guidance"], steps=[]))
    with CurrentNodeContext("p", "5"):
        ours = with_reason(method(base("SD15"), three(base("SD15"), loras), Switch), "because")
    with CurrentNodeContext("p", "7"):
        sample(ours, steps=2)
    why, own, guided = wire.panels[-1][0]["notes"]
    assert why == "because" and "Switch gave it no turn" in own and guided == "of guidance"


def cached(model, interval: int = 2):
    return with_cache(model, CacheSpec(Uniform(interval) if interval else BySteps()))


def test_a_reason_is_that_of_the_last_method(loras):
    """Methods before it and the Branch Cache stay."""
    ensemble = three(base("SD15"), loras)
    composed = cached(method(method(base("SD15"), ensemble, Switch), ensemble, Composite))
    before, found = (each.get_attachment(KEY) for each in (composed, with_reason(composed, "because")))
    assert found.applied == (before.applied[0], replace(before.applied[1], reason="because"))
    assert found.cache is before.cache is not None


def guided(model, **options):
    return apply_guidance(model, guidance_of(GuidanceOptions("extrapolate", AdaptiveGuidance(), **options)))


@pytest.mark.parametrize(("make", "cfg", "parts"), [
    (lambda model: cached(model), 3.0, ["8 of 8 steps: Branch Cache", "8 evaluations, 8 on cached features"]),
    (lambda model: cached(model, 0), 3.0, ["16 evaluations", "so few differ too much, and nothing is reused."]),
    (lambda model: guided(model, saving=0.3), 3.0, ["8 of 8 steps: Extrapolated guidance, to save 30 %",
                                                    "left out by guidance"]),
    (lambda model: guided(model, saving=0.3), 1.0, ["8 evaluations", "at cfg 1, so there is nothing to save"]),
    (lambda model: cached(guided(model, saving=0.3)), 3.0, ["Branch Cache; Extrapolated guidance", "on cached features",
                                                            "left out by guidance"])])
def test_what_is_saved_without_loras_is_on_the_node_that_samples(make, cfg, parts, monkeypatch):
    """Guard: a cache or guidance that did nothing said so in the log and in the report alone."""
    wire = wired(monkeypatch)
    ours = make(base("SD15"))
    with CurrentNodeContext("p", "7"):
        sample(ours, steps=8, cfg=cfg)
    (text, node, client), = wire.sent
    assert all(part in text for part in parts) and (node, client, wire.panels) == ("7", "c", []), text


def test_a_run_without_a_step_has_no_text():
    empty = RunRecord(["Merge"], [["a"]])
    assert line(empty, ["Merge"], costs_of(empty, None), 5) == ""
    assert on_the_node(None, RunRecord([], []), 5) is None
    assert saved(RunRecord([], []), None, 5) == saved(None, None, 5) == ""
