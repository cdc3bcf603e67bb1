"""A short night on a real server; tests/soak.py has the long ones."""

from __future__ import annotations

import subprocess
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
    """In a process of its own, where nothing else comes and goes."""
    (tmp_path / "a").write_bytes(b"x" * 2**16)
    program = ("import mmap, os, sys; print(flush=True); sys.stdin.readline(); kept = os.urandom(2**25); "
               "file = open(sys.argv[1], 'rb'); seen = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); "
               "print(flush=True); sys.stdin.readline()")
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "a")], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        before = looked_at(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        after = looked_at(process.pid)
        process.stdin.close()
    assert after["memory"] > before["memory"] + 2**15 - 1024
    assert after["handles"] > before["handles"] and after["maps"] > before["maps"]


def test_cache_modes_are_those_of_the_release(server: Server):
    modes = known(server.comfyui)
    assert "the default cache" in modes and "--cache-none" in modes
