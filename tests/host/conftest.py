"""Tests inside a real ComfyUI: COMFYUI_UNDER_TEST names its folder, and without it this folder is skipped.

ComfyUI reads its command line when it is imported, so this file prepares that before any test module imports `comfy`.
One release per process. On the CPU, or with TESTS_ON=cuda on a GPU, with the servers: made for test_accelerator.py,
test_cuda.py and test_server*.py.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lora_ensemble.tests.browser import Browser

COMFYUI = os.environ.get("COMFYUI_UNDER_TEST")
HOST_API = {"test_always", "test_animated", "test_apply", "test_attention", "test_auto", "test_banks", "test_border",
            "test_broken_files", "test_by_steps", "test_cache_budget", "test_compile", "test_control", "test_enlarged",
            "test_ensembles", "test_example_workflows", "test_files", "test_film", "test_fused", "test_golden",
            "test_guidance", "test_guidance_extrapolated", "test_guidance_extrapolated_nodes", "test_guidance_guiders",
            "test_guided_step", "test_hazards", "test_info", "test_inner_code", "test_kept", "test_kept_guard",
            "test_keymaps", "test_kinds", "test_lasting", "test_latents", "test_leave_one_out",
            "test_leave_one_out_batches", "test_lifecycle", "test_live", "test_marked", "test_masks", "test_memory",
            "test_models", "test_multigpu", "test_muted", "test_neighbours", "test_neighbours_routed",
            "test_neighbours_skipping", "test_nested", "test_nodes", "test_parity", "test_parity_families",
            "test_prepared_texts", "test_prompt_node", "test_quantized", "test_read_weight", "test_routed",
            "test_routed_probes", "test_routed_texts", "test_row_order", "test_samplers", "test_scenarios",
            "test_server", "test_server_errors", "test_server_routed", "test_server_stack", "test_server_two_runs",
            "test_sessions", "test_spectrum_node", "test_split_points", "test_stack", "test_started_films",
            "test_steps", "test_tiles", "test_token_order", "test_two_runs", "test_two_runs_guidance", "test_uncalled",
            "test_weights", "test_windows", "test_windows_told", "test_words"}
"""Files whose tests ask ComfyUI for what changes from release to release, marked `host_api`: loading and parsing, the
life of a run and of a model, samplers, guiders and schemas, the models' own code. `run.py test` runs them on older
releases; the others ask what our own mathematics does, which one release shows."""

if COMFYUI:
    from lora_ensemble.tests.on_gpu import ARGUMENTS, REAL, dynamic_vram

    sys.path.insert(0, str(Path(COMFYUI).expanduser()))
    arguments, sys.argv = sys.argv, [sys.argv[0], *ARGUMENTS]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401
    import torch
    import utils.extra_config  # noqa: F401  (as main.py: later `utils` would be found in comfy/)

    torch.set_num_threads(1)
    if REAL:
        dynamic_vram()
    sys.argv = arguments

    import psutil

    _known: list = [0.0, None]

    def _virtual_memory(ask=psutil.virtual_memory):
        """Asked once in a tenth of a second: the host asks at every load, hundreds of times in a test."""
        if (now := time.monotonic()) - _known[0] > 0.1:
            _known[:] = now, ask()
        return _known[1]

    psutil.virtual_memory = _virtual_memory


class _WithoutComfyUI(pytest.Module):
    """A module that says why its tests were not even imported."""

    def collect(self):
        raise pytest.skip.Exception("no ComfyUI; name its folder in COMFYUI_UNDER_TEST", allow_module_level=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where only `host_api` is asked for, the other files are not even imported."""
    file = collection_path.suffix == ".py" and config.option.markexpr == "host_api"
    return True if file and collection_path.stem not in HOST_API else None


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if COMFYUI else _WithoutComfyUI.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    if gone := [name for name in sorted(HOST_API) if not (here / f"{name}.py").is_file()]:
        raise pytest.UsageError(f"HOST_API names files that do not exist: {', '.join(gone)}")
    for item in items:
        if item.path.parent == here and item.path.stem in HOST_API:
            item.add_marker("host_api")


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for the whole run: it keeps what it has compiled of the host's pages."""
    from lora_ensemble.tests.browser import Browser, find_chromium

    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on the PATH; name one in CHROMIUM")
    with Browser(tmp_path_factory.mktemp("browser"), program) as running:
        yield running


@pytest.fixture(scope="module")
def browser(chromium: Browser) -> Iterator[Browser]:
    """The browser without a page, and without what pages kept of each other; a page that is open computes all the time.
    """
    yield chromium
    chromium.leave()


@pytest.fixture(scope="session")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that ComfyUI lists as `loras`."""
    import folder_paths

    folder = tmp_path_factory.mktemp("loras")
    folder_paths.add_model_folder_path("loras", str(folder), is_default=True)
    return folder


@pytest.fixture
def raw(lora_folder: Path):
    """Writes bytes below `loras` for one test: `raw(content)` -> name in ComfyUI's list."""
    import folder_paths

    written: list[Path] = []

    def write(content: bytes, name: str = "raw.safetensors") -> str:
        path = lora_folder / name
        path.unlink(missing_ok=True)  # a file that is mapped into memory must not change under it
        path.write_bytes(content)
        written.append(path)
        folder_paths.filename_list_cache.clear()
        return name

    yield write
    for path in written:
        path.unlink(missing_ok=True)
    folder_paths.filename_list_cache.clear()


@pytest.fixture(scope="module")
def lasting(lora_folder: Path) -> Iterator[dict[str, os.stat_result]]:
    """LoRA files that stay until the last test of a module, as they were when they were written."""
    import folder_paths

    written: dict[str, os.stat_result] = {}
    yield written
    for name in written:
        (lora_folder / name).unlink(missing_ok=True)
    folder_paths.filename_list_cache.clear()


@pytest.fixture
def loras(request: pytest.FixtureRequest, raw, lora_folder: Path, lasting: dict[str, os.stat_result]):
    """Writes LoRA files: `loras(tensors)` -> name in ComfyUI's list; with `metadata` in the header. Without a `name`,
    tests of a module that write the same have the same file, so that the pack has read it once, as it does for users;
    one that is written twice in a test is two. Where a test changes what anything else does, nothing is there yet, and
    nothing stays."""
    import folder_paths
    from safetensors.torch import save

    from .builders import nothing_known

    changes = "monkeypatch" in request.fixturenames
    if changes:
        nothing_known()
    here: Counter[int] = Counter()

    def write(tensors: dict, name: str | None = None, metadata: dict | None = None) -> str:
        content = None if metadata else getattr(tensors, "content", None)  # builders.Tensors: made once
        if content is None:
            content = save({key: value.contiguous() for key, value in tensors.items()}, metadata)
        if name is not None:
            return raw(content, name)
        key = zlib.crc32(content)
        here[key] += 1
        name = f"lora_{key:08x}_{here[key]}.safetensors"
        path = lora_folder / name
        if name not in lasting or not path.exists() or _changed(path, lasting[name]):
            path.unlink(missing_ok=True)
            path.write_bytes(content)
            lasting[name] = path.stat()
            folder_paths.filename_list_cache.clear()
        return name

    yield write
    if changes:
        nothing_known()


def _changed(path: Path, before: os.stat_result) -> bool:
    now = path.stat()
    return (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns)


@pytest.fixture
def spied():
    """The small SD1.5 model, counting what it evaluates."""
    from .guidance_tools import Spy
    from .models import base

    return Spy(base("SD15"))


def forwards_left() -> list[str]:
    """The modules of small models that carry a forward of their own."""
    from .models import alive

    return [f"{type(model).__name__}.{name}" for model in alive() for name, module in model.named_modules()
            if "forward" in module.__dict__]


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[Callable[[], list[str]]]:
    """After every test, no small model still carries a forward of its own or is loaded. Before it, what the last one
    left is gone, and what stays is there to stay: a collection looks at the objects of one test."""
    if not COMFYUI or "comfy.model_management" not in sys.modules or "server" in request.fixturenames:
        yield forwards_left
        return
    import comfy.model_management as management

    gc.collect()
    gc.freeze()
    # A fixture that keeps a ControlNet's module, and clones for further devices, leave entries without a patcher: every
    # later load of the host would collect garbage because of them.
    management.current_loaded_models[:] = [each for each in management.current_loaded_models if not each.is_dead()]
    yield forwards_left
    left = forwards_left()
    assert not left, f"forwards left on {left[:5]}"
    management.unload_all_models()
