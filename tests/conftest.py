"""Makes the pack importable as `lora_ensemble`, and this folder as `lora_ensemble.tests`, wherever they lie."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lora_ensemble.tests.accelerator import Accelerator, Watched
    from lora_ensemble.tests.server import Server

ROOT = Path(__file__).resolve().parents[1]

if "lora_ensemble" not in sys.modules:
    spec = importlib.util.spec_from_file_location("lora_ensemble_run", ROOT / "run.py")
    sys.modules[spec.name] = run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    run.load_pack()


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator | Watched]:
    """A device called cuda:0 that computes on the CPU and writes down waits and copies, or with TESTS_ON=cuda the
    machine's own; open during one test."""
    from lora_ensemble.tests.accelerator import REAL, pretended, watched

    with (watched if REAL else pretended)(monkeypatch) as opened:
        yield opened


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One headless server of the ComfyUI under test for the whole run, with the pack and the testbed's loader nodes."""
    from lora_ensemble.tests.server import Server

    comfyui = os.environ.get("COMFYUI_UNDER_TEST")
    if not comfyui:
        pytest.skip("no ComfyUI; name it in COMFYUI_UNDER_TEST")
    packs = [ROOT, ROOT / "tests" / "comfy_testbed"]
    with Server(Path(comfyui), tmp_path_factory.mktemp("comfyui"), packs) as running:
        yield running
