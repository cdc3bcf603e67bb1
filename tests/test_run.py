"""What `run.py test` runs on which ComfyUI."""

from __future__ import annotations

from pathlib import Path

import pytest
from lora_ensemble.tools.comfyui import Host
from lora_ensemble.tools.commands import pytest_runs


def host(version: str, tools: str | None = None) -> Host:
    return Host(Path(f"/comfy/{version}"), version, Path("python"), tools and Path(tools))


def test_versions_are_numbers():
    assert host("0.33.0").number > host("0.28.0").number > host("0.3.64").number > host("unknown").number


@pytest.mark.parametrize("everything", [False, True])
def test_all_on_the_newest_and_the_api_on_the_others(everything):
    hosts = [host("0.3.64"), host("0.33.0", "/tools"), host("0.28.0")]
    first, *others = pytest_runs(Path("base"), hosts, everything, ["-k", "parity"])
    assert "tests/host" in first[1][first[1].index("--ignore"):] and "COMFYUI_UNDER_TEST" not in first[2]
    found = {Path(env["COMFYUI_UNDER_TEST"]).name: command for _, command, env in others}
    assert list(found) == ["0.33.0", "0.28.0", "0.3.64"]
    assert ["host_api" in command for command in found.values()] == [False, not everything, not everything]
    fuzzed = [env.get("LORA_ENSEMBLE_FUZZ") for _, _, env in others]
    assert fuzzed == ["2000" if everything else None, None, None]
    assert all(command[-2:] == ["-k", "parity"] for command in found.values())
    assert str(Path("/tools")) in found["0.33.0"] and str(Path("/tools")) not in found["0.28.0"]
    assert all(env["OMP_NUM_THREADS"] == "1" for _, _, env in (first, *others))


def test_one_old_comfyui_is_the_newest_there_is():
    _, (title, command, _) = pytest_runs(Path("base"), [host("0.3.64")], False, [])
    assert "host_api" not in command and "ComfyUI 0.3.64" in title
    assert len(list(pytest_runs(Path("base"), [], False, []))) == 1
