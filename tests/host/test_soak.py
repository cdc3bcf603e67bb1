"""A short night on a real server; tests/soak.py has the long ones."""

from __future__ import annotations

import sys

import pytest
from lora_ensemble.tests.server import Server
from lora_ensemble.tests.soak import OURS, Worker, known, looked_at, slope
from lora_ensemble.tests.workflows import TESTBED, load

PROMPTS, WARM = 42, 10


@pytest.mark.skipif(sys.platform != "linux", reason="memory, handles and maps are read from /proc")
def test_a_short_night(server: Server):
    """A prompt of every method in turn, two interrupted, one refused: no handle, no map and no memory stays."""
    beds = {path.stem: load(path) for path in TESTBED}
    worker = Worker(server, [beds[name] for name in OURS])
    worker.prepare()
    first = worker.picture()
    for number in range(PROMPTS):
        worker.one(number)
    assert worker.picture() == first
    assert len(worker.seen["time"]) == PROMPTS - 3
    seen = {name: values[WARM:] for name, values in worker.seen.items()}
    assert max(seen["handles"][16:]) <= max(seen["handles"][:16]) + 2
    assert slope(seen["maps"]).low < 1 and slope(seen["memory"]).low < 1024


@pytest.mark.skipif(sys.platform != "linux", reason="memory, handles and maps are read from /proc")
def test_what_stays_is_seen(tmp_path):
    import mmap
    import os

    before = looked_at(os.getpid())
    kept = [bytearray(os.urandom(2**24)), (tmp_path / "a").open("wb")]
    (tmp_path / "b").write_bytes(b"x" * 2**16)
    with (tmp_path / "b").open("rb") as file:
        kept.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    after = looked_at(os.getpid())
    assert after["memory"] > before["memory"] + 10_000
    assert after["handles"] > before["handles"] and after["maps"] > before["maps"]
    del kept


def test_cache_modes_are_those_of_the_release(server: Server):
    modes = known(server.comfyui)
    assert "the default cache" in modes and "--cache-none" in modes
