"""Wrong input on a real headless server, memory that is given back, and the example client."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lora_ensemble.tests.server import PromptFailed, PromptRefused, Server
from lora_ensemble.tests.workflows import ROOT, load
from PIL import Image
from safetensors.torch import save_file

from .test_server import changed, difference, lora_files, pictures, random_lora  # noqa: F401  (a fixture)


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("web_page.safetensors", "download it again"),
        ("truncated.safetensors", "fetch the file again"),
        ("empty_file.safetensors", "Download it again"),
    ],
)
def test_damaged_file_is_refused_before_the_run(server: Server, file: str, remedy: str):
    prompt = changed("merge")
    prompt["lora2"]["inputs"]["lora_name"] = file
    with pytest.raises(PromptRefused) as refused:
        server.run(prompt)
    assert set(refused.value.reasons) == {"lora2"}
    (error,) = refused.value.answer["node_errors"]["lora2"]["errors"]
    assert error["extra_info"]["input_name"] == "lora_name"
    assert file in refused.value.reasons["lora2"] and remedy in refused.value.reasons["lora2"]
    assert pictures(server, changed("merge", filename_prefix=file)).std() > 5


@pytest.mark.parametrize(
    ("file", "remedy"),
    [("made_for_flux.safetensors", "another architecture"), ("not_a_number.safetensors", "use another version")],
)
@pytest.mark.parametrize("name", ["merge", "merge_baked", "switch", "composite"])
def test_unusable_file_is_named(server: Server, name: str, file: str, remedy: str):
    prompt = changed(name)
    prompt["lora2"]["inputs"]["lora_name"] = file
    with pytest.raises(PromptFailed) as failed:
        server.run(prompt)
    assert file in failed.value.message and remedy in failed.value.message
    assert pictures(server, changed(name, filename_prefix=file)).std() > 5


def test_a_clip_that_was_never_connected_is_told_before_the_prompt_fails(server: Server):
    prompt = changed("merge", strength_clip=0.0)
    del prompt["method"]["inputs"]["clip"]
    said = len(server.log.read_bytes())
    with pytest.raises(PromptFailed) as failed:
        server.run(prompt)
    assert failed.value.node_type == "CLIPTextEncode"
    assert b"Merge LoRAs: nothing is connected to clip" in server.log.read_bytes()[said:]


def test_file_deleted_after_the_list_was_made(server: Server, lora_files: Path):  # noqa: F811
    prompt = changed("merge")
    prompt["lora2"]["inputs"]["lora_name"] = "gone.safetensors"
    with pytest.raises(PromptRefused) as refused:
        server.run(prompt)
    assert "gone.safetensors" in refused.value.reasons["lora2"]


def test_file_replaced_between_runs(server: Server, lora_files: Path):  # noqa: F811
    """A LoRA that was exported anew under the same name takes effect, without a restart."""
    save_file(random_lora(20), lora_files / "again.safetensors")
    prompt = changed("merge")
    prompt["lora2"]["inputs"]["lora_name"] = "again.safetensors"
    before = pictures(server, prompt)
    save_file(random_lora(21), lora_files / "again.safetensors")
    assert difference(pictures(server, prompt), before) > 20


def test_empty_ensemble(server: Server):
    with pytest.raises(PromptFailed) as failed:
        server.run(changed("merge_stack", first="None", second="None"))
    assert "ensemble is empty" in failed.value.message and "LoRA (Ensemble)" in failed.value.message
    unconnected = changed("merge")
    del unconnected["method"]["inputs"]["ensemble"]
    with pytest.raises(PromptRefused) as refused:
        server.run(unconnected)
    assert "ensemble" in refused.value.reasons["method"]
    assert pictures(server, changed("merge", filename_prefix="after")).std() > 5


@pytest.mark.parametrize("order", ["a,b", "0,1", "1,3"])
def test_switch_order_that_makes_no_sense(server: Server, order: str):
    with pytest.raises((PromptRefused, PromptFailed)) as error:
        server.run(changed("switch", order=order))
    assert "order" in str(error.value)


def test_memory_is_given_back_on_request(server: Server):
    """What the front end's button to free memory asks for: no file and no bank is kept, and the next prompt draws the
    same."""
    def kept() -> list[int]:
        found = server.json("/lora_ensemble_testbed/kept")
        return [found["files.files"], found["compose.banks"]]

    before = pictures(server, changed("merge", filename_prefix="before"))
    assert all(kept())
    server.free()
    deadline = time.monotonic() + 30
    while any(kept()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert kept() == [0, 0]
    assert difference(pictures(server, changed("merge", filename_prefix="after")), before) == 0 and all(kept())


# --- the example client ----------------------------------------------------------------------------------------------


def client(server: Server | None, tmp_path: Path, workflow: object, *options: str) -> subprocess.CompletedProcess:
    path = tmp_path / "workflow.json"
    path.write_text(workflow if isinstance(workflow, str) else json.dumps(workflow))
    address = f"127.0.0.1:{server.port if server else 9}"
    command = [sys.executable, ROOT / "examples" / "queue_prompt.py", path, "--server", address, "--out", tmp_path]
    return subprocess.run([*map(str, command), *options], capture_output=True, text=True, timeout=300)


def test_client_saves_the_picture(server: Server, tmp_path: Path):
    result = client(server, tmp_path, changed("switch"), "--set", "sampler.seed=99", "--set", "positive.text=blue robe")
    assert result.returncode == 0, result.stderr
    (saved,) = tmp_path.glob("*.png")
    assert str(saved) in result.stdout and "KSampler" in result.stdout and "6 of 6" in result.stdout
    same = changed("switch", seed=99, filename_prefix="same")
    same["positive"]["inputs"]["text"] = "blue robe"
    assert difference(np.asarray(Image.open(saved), dtype=np.float64), pictures(server, same)[0]) == 0


def test_client_errors_are_sentences(server: Server, tmp_path: Path):
    bad_name, bad_file = changed("merge"), changed("merge")
    bad_name["lora1"]["inputs"]["lora_name"] = "truncated.safetensors"
    bad_file["lora1"]["inputs"]["lora_name"] = "not_a_number.safetensors"
    cases = [
        (None, changed("base"), [], "No ComfyUI reachable at 127.0.0.1:9"),
        (server, load(ROOT / "example_workflows" / "sd15_compare.json"), [], "not in API format"),
        (server, "{", [], "cannot be read"),
        (server, changed("base"), ["--set", "sampler.sede=1"], "--set sampler.sede=1"),
        (server, bad_name, [], "node lora1 (LoRAEnsembleLoRA)"),
        (server, bad_file, [], "Node method (LoRAEnsembleMerge) failed: Merge LoRAs: LoRA 'not_a_number.safetensors'"),
    ]
    for where, workflow, options, expected in cases:
        result = client(where, tmp_path, workflow, *options)
        assert result.returncode == 1 and expected in result.stderr, (expected, result.stderr, result.stdout)
        assert "Traceback" not in result.stderr
