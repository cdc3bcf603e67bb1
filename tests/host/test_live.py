"""What is told of a run while it samples: over a real server's websocket, and nothing where nobody looks."""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import time
from types import SimpleNamespace

import aiohttp
import lora_ensemble.nodes  # noqa: F401  (it has runs watched)
import pytest
import torch
from comfy_execution.utils import CurrentNodeContext
from lora_ensemble.engine.record import RunRecord, StepRecord
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.look import live
from lora_ensemble.host.look.live import on_the_node
from lora_ensemble.host.look.story import line
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.switch import Switch
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


def test_the_story_comes_over_the_websocket(server: Server):
    for seed, name in enumerate(GOOD):
        save_file(random_lora(seed), server.base / "models" / "loras" / name)
    prompt = load(ROOT / "tests" / "host" / "workflows" / "switch.json")
    (sampler,) = [key for key, node in prompt.items() if node["class_type"] == "KSampler"]
    steps = prompt[sampler]["inputs"]["steps"]

    async def queued() -> list[bytes]:
        address, seen = f"http://127.0.0.1:{server.port}", []
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{address}/ws?clientId=looking") as socket:
            async with session.post(f"{address}/prompt", json={"prompt": prompt, "client_id": "looking"}) as answer:
                number = (await answer.json())["prompt_id"]
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY:
                    seen.append(message.data)
                elif message.type is aiohttp.WSMsgType.TEXT:
                    told = json.loads(message.data)
                    assert told["type"] != "execution_error", told
                    if told["type"] == "executing" and told["data"].get("node") is None \
                            and told["data"].get("prompt_id") == number:
                        return seen
        return seen

    found = texts_of(asyncio.run(asyncio.wait_for(queued(), 120)))
    assert found and {node for node, _ in found} == {sampler}
    assert "1 of" in found[0][1] and "Switch, two acts" in found[0][1]  # the order is 2,1
    assert found[-1][1].startswith(f"{steps} of {steps} steps in ") and f"{2 * steps} evaluations" in found[-1][1]


# --- who looks ---


class Wire(SimpleNamespace):
    """Stands for the server of a process that has none, and keeps what it is to send."""

    def __init__(self, client, sockets):
        super().__init__(client_id=client, sockets=sockets, sent=[])

    def send_progress_text(self, text, node, sid) -> None:
        self.sent.append((text, node, sid))


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
    assert wire.sent == made == [] and record_of(ours).finished


def test_it_is_told_of_steps_and_of_the_end(loras, monkeypatch):
    wire = wired(monkeypatch)
    monkeypatch.setattr(live, "EVERY", 0.0)
    model = base("SD15")
    ensemble = three(model, loras)
    ours = method(model, ensemble, lambda s: Switch(s, 1))
    with CurrentNodeContext("p", "7"):
        sample(ours, steps=3)
    texts = [text for text, _, _ in wire.sent]
    assert {(node, sid) for _, node, sid in wire.sent} == {("7", "c")} and len(texts) == 4
    names = [spec.name.removesuffix(".safetensors") for spec in ensemble]
    assert [text.splitlines()[0] for text in texts[:3]] == [
        f"{k + 1} of 3 steps: Switch, {name} acts" for k, name in enumerate(names)]
    assert texts[3].startswith("3 of 3 steps in ") and texts[3].endswith("6 evaluations")

    def broken(*_):
        raise KeyError("a sampler fails")

    with pytest.raises(KeyError), CurrentNodeContext("p", "7"):
        sample(ours, steps=3, callback=broken)
    assert wire.sent[-1][0].startswith("1 of 3 steps in ")


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
    record = RunRecord(["LoRAtorio"], [["a", "b"]], [
        StepRecord(0, 1.0, [[[1.0, 0.0]], [[0.0, 1.0]]], 1, 4,
                   notes={"LoRAtorio": {"active": [0, 1], "weights": torch.zeros(2, device="meta")}})] * 2)
    assert line(record, 2).startswith("2 of 2 steps: LoRAtorio\n8 evaluations")


def test_what_it_costs():
    """A text, for a run of 50 steps with cache and a leader: far below a hundredth of a step of any real model."""
    notes = {"CMLoRA": {"led": 0, "weight": 2.0}, "cache": {"reused": 2, "ages": [0, 1]}}
    steps = [StepRecord(i, 1.0, [[[1.0, 0.0]], [[0.0, 1.0]]], 1, 4, 0.1, notes) for i in range(50)]
    record = RunRecord(["CMLoRA"], [["a.safetensors", "b.safetensors"]], steps)
    assert line(record, 50) == "50 of 50 steps: CMLoRA, a leads\n100 evaluations, 100 on cached features"
    since = time.process_time()
    for _ in range(100):
        line(record, 50)
    assert (time.process_time() - since) / 100 < 0.002


def test_a_run_without_a_step_has_no_text():
    assert line(RunRecord(["Merge"], [["a"]]), 5) == ""
    assert on_the_node(None, RunRecord([], []), 5) is None
