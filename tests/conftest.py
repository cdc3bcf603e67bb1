"""Makes the pack importable as `lora_ensemble`, and this folder as `lora_ensemble.tests`, wherever they lie."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import zlib
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


LONG = ("test_front_end", "test_panel", "test_help", "test_benchmarks", "test_accelerator", "test_server", "test_sweep",
        "test_words", "test_app", "test_interop_server", "test_server_routed", "test_rows_pages", "test_golden_pages",
        "test_blueprints", "test_leave_one_out", "test_composlora", "test_two_runs", "test_always", "test_weights",
        "test_split_points", "test_windows", "test_guidance_extrapolated", "test_parity_families", "test_multigpu",
        "test_compile", "test_server_families", "test_neighbours", "test_neighbours_skipping", "test_scenarios",
        "test_mixing", "test_inject", "test_server_stack", "test_testbed_joint", "test_testbed",
        "test_testbed_evaluate", "test_compiled", "test_sizes_kernels", "test_mutate")
"""The files that take longest, given to a process first: at the end, other processes would have to wait for them."""


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # else pytest-xdist gives out files by their number of tests
    gc.set_threshold(20_000)  # by itself Python looks for garbage much oftener than there is any


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--crossed", metavar="N", type=int, default=1, help="of tests of all combinations of several "
                     "things one of N cases, while each thing still has its case; of those whose cases are shown "
                     "elsewhere a share of their own")
    parser.addoption("--one-of", metavar="N", type=int, default=1, help="of each test's cases one of N; on another "
                     "release of ComfyUI others")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    from lora_ensemble.tests.shares import longest_first, taken

    release = ""
    if os.environ.get("COMFYUI_UNDER_TEST") and "comfy.options" in sys.modules:  # made ready by host/conftest.py
        from comfyui_version import __version__ as release
    kept = taken(items, config.option.crossed, config.option.one_of, zlib.crc32(release.encode()))
    known = set(map(id, kept))
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in known])
    items[:] = longest_first(kept, LONG) if hasattr(config, "workerinput") else kept


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported is there to stay, and no garbage is looked for in it


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator | Watched]:
    """A device called cuda:0 that computes on the CPU and writes down waits and copies, or with TESTS_ON=cuda the
    machine's own; open during one test."""
    from lora_ensemble.tests.accelerator import pretended, watched
    from lora_ensemble.tests.on_gpu import REAL

    with (watched if REAL else pretended)(monkeypatch) as opened:
        yield opened


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One headless server of the ComfyUI under test for the whole run, with the pack and the testbed's loader nodes; of
    the front end whose folder FRONT_END_UNDER_TEST names, instead of the installed one."""
    from lora_ensemble.tests.server import Server

    comfyui = os.environ.get("COMFYUI_UNDER_TEST")
    if not comfyui:
        pytest.skip("no ComfyUI; name it in COMFYUI_UNDER_TEST")
    packs = [ROOT, ROOT / "tests" / "comfy_testbed"]
    front_end = os.environ.get("FRONT_END_UNDER_TEST")
    arguments = ("--front-end-root", front_end) if front_end else ()
    with Server(Path(comfyui), tmp_path_factory.mktemp("comfyui"), packs, arguments=arguments) as running:
        yield running
