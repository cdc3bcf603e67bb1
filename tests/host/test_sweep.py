"""A sweep on two real servers, one of which is killed; one that is itself killed and goes on; one on Ray."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from lora_ensemble.tests.server import ROOT, Server
from PIL import Image
from safetensors.torch import save_file

from .test_server import GOOD, WORKFLOWS, random_lora

STRENGTHS = "lora1.strength_model+lora2.strength_model=0.4,1.0"
CLASSES = "method.class_type=LoRAEnsembleMerge,LoRAEnsembleComposite"


def with_loras(server: Server) -> Server:
    for seed, name in enumerate(GOOD):
        save_file(random_lora(seed), server.base / "models" / "loras" / name)
    return server


@pytest.fixture(scope="module")
def first(server: Server) -> Server:
    return with_loras(server)


@pytest.fixture
def prepared(tmp_path: Path) -> Server:
    """The folders of one that is yet to be started."""
    packs = [ROOT, ROOT / "tests" / "comfy_testbed"]
    return with_loras(Server(Path(os.environ["COMFYUI_UNDER_TEST"]), tmp_path / "second", packs))


@pytest.fixture
def second(prepared: Server) -> Iterator[Server]:
    with prepared as running:
        yield running


def address(server: Server) -> str:
    return f"127.0.0.1:{server.port}"


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts the script in a process of its own, as it is meant to be run; into `tmp_path / "out"`."""
    path, begun = tmp_path / "workflow.json", []
    path.write_text(json.dumps(WORKFLOWS["merge"]))

    def start(*options: str, env: dict[str, str] | None = None) -> subprocess.Popen:
        command = [sys.executable, ROOT / "examples" / "sweep.py", path, "--out", tmp_path / "out", *options]
        begun.append(subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                      env={**os.environ, **(env or {})}))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def until(true: Callable[[], object], process: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    out, err = process.communicate(timeout=500)
    assert "Traceback" not in err, err
    return process.returncode, out + err


def table(out: Path) -> list[dict[str, str]]:
    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pictures(out: Path) -> list[Path]:
    return sorted((out / "pictures").glob("*.png"))


def test_a_server_that_is_killed_midway_loses_no_cell(first: Server, second: Server, sweep, tmp_path: Path):
    process = sweep("--servers", address(first), address(second), "--vary", STRENGTHS, "--vary", CLASSES,
                    "--vary", "sampler.seed=1..4", "--set", "sampler.steps=20")
    until(lambda: second.json("/history") and second.json("/queue")["queue_running"], process)
    second.process.kill()
    code, said = ended(process)
    assert code == 0 and f"{address(second)} is lost" in said, said
    rows = table(tmp_path / "out")
    cells = [(row["lora1.strength_model+lora2.strength_model"], row["method.class_type"], row["sampler.seed"])
             for row in rows]
    assert len(rows) == 16 and max(Counter(cells).values()) == 1
    workers = Counter(row["worker"] for row in rows)
    assert set(workers) == {address(first), address(second)} and all(row["problems"] == "" for row in rows)
    shown = [np.asarray(Image.open(tmp_path / "out" / row["file"]).convert("RGB"), dtype=float) for row in rows]
    apart = [np.abs(a - b).max() for i, a in enumerate(shown) for b in shown[:i]]
    assert len(pictures(tmp_path / "out")) == 16 and min(apart) > 1, "each cell is a picture of its own"
    with Image.open(tmp_path / "out" / "grid.png") as sheet:
        assert sheet.height > 4 * 320 and len(sheet.convert("RGB").getcolors(1 << 24)) > 100


def test_a_sweep_that_is_killed_goes_on_and_says_what_failed(first: Server, sweep, tmp_path: Path):
    options = ["--servers", address(first), "--vary", "sampler.sampler_name=euler,none_of_these",
               "--vary", "sampler.seed=1..5", "--set", "sampler.steps=20"]
    out = tmp_path / "out"
    process = sweep(*options)
    until(lambda: len(pictures(out)) >= 2, process)
    process.kill()
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in pictures(out)}
    code, said = ended(sweep(*options))
    assert code == 1 and said.rstrip().endswith("5 of 10 cells were not drawn. The same command tries them again.")
    assert f"10 cells, {len(before)} are there" in said
    assert len(pictures(out)) == 5 and {path: path.stat().st_mtime_ns for path in before} == before
    rows = table(out)
    assert [(row["sampler.sampler_name"], row["sampler.seed"]) for row in rows] == [
        (name, str(seed)) for name in ("euler", "none_of_these") for seed in range(1, 6)]
    assert all("none_of_these" in row["problems"] and not row["file"] for row in rows[5:])


def servers_below(folder: Path) -> list[tuple[int, int]]:
    """(process, its parent) of the ComfyUIs that write below a folder."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if "main.py" in (line := process.info["cmdline"] or []) and any(str(folder) in part for part in line):
            found.append((process.pid, process.info["ppid"]))
    return found


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed; it is an example's "
                                                                    "requirement, not the pack's")
def test_on_ray_a_server_and_an_actor_are_lost(prepared: Server, sweep, tmp_path: Path):
    """Ray starts two servers; one is killed, then the other's actor, with which it goes."""
    arguments = ("--cpu", "--disable-api-nodes", f"--base-directory={prepared.base}", "--disable-all-custom-nodes",
                 "--whitelist-custom-nodes", *prepared.names)
    out = tmp_path / "out"
    process = sweep("--comfyui", prepared.comfyui, "--workers", "2", "--server-args", " ".join(arguments),
                    "--vary", STRENGTHS, "--vary", CLASSES, "--vary", "sampler.seed=1..6", "--set", "sampler.steps=40",
                    env={"LORA_ENSEMBLE_ROOT": str(ROOT), "OMP_NUM_THREADS": "1"})
    until(lambda: len(pictures(out)) >= 3, process, 500)
    (lost, _), (other, actor) = servers_below(out)
    os.kill(lost, signal.SIGKILL)
    before = len(pictures(out))
    until(lambda: len(pictures(out)) >= before + 2, process)
    os.kill(actor, signal.SIGKILL)
    code, said = ended(process)
    assert code == 0, said
    rows = table(out)
    assert len(rows) == 24 == len(pictures(out)) and all(row["problems"] == "" for row in rows)
    assert {row["worker"] for row in rows} == {"worker 1", "worker 2"}
    until_gone = time.monotonic() + 30
    while servers_below(out) and time.monotonic() < until_gone:
        time.sleep(0.2)
    assert not servers_below(out), "a server outlives its sweep"
    assert other and lost
