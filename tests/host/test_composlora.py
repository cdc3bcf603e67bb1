"""ComposLoRA on a real server: two sets by two methods, a grid and a table; then once more, with what failed."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lora_ensemble.tests.server import ROOT, Server
from PIL import Image
from safetensors.torch import save_file

from .builders import lora, shapes
from .small_checkpoints import model

WORDS = {"character": "ohwx woman, long red hair", "clothing": "green coat", "style": "watercolor painting"}


@pytest.fixture(scope="module")
def listed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's file, of LoRAs for the small SDXL."""
    entries = []
    for seed, (category, words) in enumerate(WORDS.items()):
        file = f"composlora_{category}.safetensors"
        made = lora(shapes(model("SDXL")), seed)
        save_file({key: value.contiguous() for key, value in made.items()}, server.base / "models" / "loras" / file)
        entries.append({"file": file, "category": category, "words": words, "strength": 0.7})
    path = tmp_path_factory.mktemp("composlora") / "loras.json"
    path.write_text(json.dumps(entries))
    return path


def draw(server: Server, listed: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    """The script in a process of its own, as it is meant to be run."""
    command = [sys.executable, ROOT / "benchmarks" / "composlora.py", "--server", f"127.0.0.1:{server.port}",
               "--loader", "LoRAEnsembleTestbedCheckpoint", "--checkpoint", "SDXL", "--loras", listed, "--out", out,
               "--sizes", "2", "3", "--sets", "2", "--steps", "4", "--width", "64", "--height", "96"]
    return subprocess.run([*map(str, command), *options], capture_output=True, text=True, timeout=400)


def table(out: Path) -> list[dict[str, str]]:
    with (out / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_two_sets_by_two_methods_and_once_more(server: Server, listed: Path, tmp_path: Path):
    done = draw(server, listed, tmp_path, "--methods", "Merge", "Routed")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(tmp_path)
    assert [(len(row["loras"].split(", ")), row["method"]) for row in rows] == [
        (2, "Merge"), (2, "Routed"), (3, "Merge"), (3, "Routed")]
    assert len({row["seed"] for row in rows}) == 2 and all(float(row["seconds"]) > 0 for row in rows)
    assert all(int(row["evaluations"]) >= 4 and row["problems"] == "" for row in rows)
    assert [row["words_found"] for row in rows[::2]] == ["", ""]
    assert rows[3]["words_found"] == "ohwx woman, long red hair | green coat | watercolor painting"
    pictures = [np.asarray(Image.open(tmp_path / row["file"]).convert("RGB"), dtype=float) for row in rows]
    assert all(picture.shape == (96, 64, 3) and picture.std() > 1 for picture in pictures)
    assert np.abs(pictures[2] - pictures[3]).max() > 5, "the methods give the same picture"
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.height > 2 * 320 and len(sheet.convert("RGB").getcolors(1 << 24)) > 50

    kept = [(tmp_path / row["file"]).stat().st_mtime_ns for row in rows]
    (tmp_path / rows[1]["file"]).unlink()
    again = draw(server, listed, tmp_path, "--methods", "Merge", "Routed")
    assert again.returncode == 0 and again.stdout.count("is there") == 3, again.stdout + again.stderr
    assert [(tmp_path / row["file"]).stat().st_mtime_ns == time for row, time in zip(rows, kept, strict=True)] == [
        True, False, True, True]
    assert table(tmp_path)[2:] == rows[2:]


def test_a_prompt_that_fails_is_skipped(server: Server, listed: Path, tmp_path: Path):
    """The others are drawn, the table says why, and unknown names are refused before that."""
    broken = server.base / "models" / "loras" / "composlora_broken.safetensors"
    made = lora(shapes(model("SDXL")), 9)
    next(iter(made.values())).view(-1)[0] = float("nan")
    save_file({key: value.contiguous() for key, value in made.items()}, broken)
    entries = json.loads(listed.read_text())
    entries[1]["file"] = broken.name
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(entries))
    done = draw(server, wrong, tmp_path / "out", "--methods", "Merge", "--sizes", "2")
    assert done.returncode == 1 and "1 of 2 pictures were not drawn" in done.stderr, done.stdout + done.stderr
    assert "skipped. Node method (LoRAEnsembleMerge) failed: " in done.stdout
    (failed, drawn) = table(tmp_path / "out")
    assert broken.name in failed["problems"] and failed["file"] == "" != drawn["file"]
    assert (tmp_path / "out" / "grid.png").is_file()

    entries[1]["file"] = "composlora_clothes.safetensors"
    wrong.write_text(json.dumps(entries))
    refused = draw(server, wrong, tmp_path / "none", "--methods", "Merge", "Rooted")
    assert refused.returncode == 1 and not (tmp_path / "none").exists()
    assert "no LoRA 'composlora_clothes.safetensors'. Did you mean" in refused.stderr
    assert "no method 'Rooted'. Did you mean 'Routed'?" in refused.stderr and "Traceback" not in refused.stderr
