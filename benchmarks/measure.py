"""Clocks, memory and a description of the machine, for benchmarks that compare two ways in one process."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter, process_time, sleep, thread_time
from typing import NamedTuple

import torch

from ..tools.results import commit

ROOT = Path(__file__).resolve().parents[1]


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on the device, so that the clock sees it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Seconds(NamedTuple):
    """wall: what a person waits. cpu: processor time of all threads of the process, which other programs on a busy
    machine hardly change; it says nothing about work on a GPU. thread: processor time of this thread alone, which is
    what the host's side of a step takes where torch computes in one thread or on a GPU."""

    wall: float
    cpu: float
    thread: float


def now() -> Seconds:
    return Seconds(perf_counter(), process_time(), thread_time())


def since(start: Seconds) -> Seconds:
    return Seconds(*(end - begun for end, begun in zip(now(), start, strict=True)))


def median(times: Iterable[Seconds]) -> Seconds:
    return Seconds(*(statistics.median(each) for each in zip(*times, strict=True)))


def total(times: Iterable[Seconds]) -> Seconds:
    return Seconds(*(sum(each) for each in zip(*times, strict=True)))


def in_turns(arms: Mapping[str, Callable[[], object]], repeats: int, device: torch.device,
             warmups: int = 1) -> dict[str, list[Seconds]]:
    """Seconds of every call of each arm. Arms take turns, every second round in reverse, so that a machine that slows
    down or is busy for a while weighs on all alike; the n-th times of all arms belong to one round."""
    times: dict[str, list[Seconds]] = {name: [] for name in arms}
    for round_ in range(-warmups, repeats):
        for name in list(arms)[::1 if round_ % 2 else -1]:
            synchronize(device)
            start = now()
            arms[name]()
            synchronize(device)
            if round_ >= 0:
                times[name].append(since(start))
    return times


def alternate(arms: Mapping[str, Callable[[], object]], repeats: int, device: torch.device,
              warmups: int = 1) -> dict[str, Seconds]:
    """Median seconds of each arm, taken in turns."""
    return {name: median(each) for name, each in in_turns(arms, repeats, device, warmups).items()}


class Spread(NamedTuple):
    """The median of some numbers between their quartiles."""

    low: float
    middle: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(*values * 3)
    return Spread(*statistics.quantiles(values, n=4, method="inclusive"))


def one_thread() -> None:
    """From now on torch computes in the calling thread, so that its processor time holds all that a step takes."""
    torch.set_num_threads(1)


class Peak:
    """bytes: how far memory rose above its level at the start while open. Device memory as torch counts it; for a CPU
    the resident memory of the process, looked at every few milliseconds."""

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            import psutil

            process = psutil.Process()
            self._before, self._open = process.memory_info().rss, True

            def watch() -> None:
                while self._open:
                    self.bytes = max(self.bytes, process.memory_info().rss - self._before)
                    sleep(0.005)

            self._watcher = threading.Thread(target=watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._open = False
            self._watcher.join()


def difference(value: torch.Tensor, reference: torch.Tensor) -> float:
    """How far they are apart, as a share of the reference's norm."""
    return ((value - reference).double().norm() / reference.double().norm()).item()


def processor() -> str:
    """The CPU's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def driver() -> str | None:
    """The version of NVIDIA's driver; None where there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def environment(device: torch.device) -> dict:
    """What a number was measured on."""
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "commit": commit(), "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }
    return found | {"driver": driver()} if device.type == "cuda" else found


class _Parser(argparse.ArgumentParser):
    def parse_args(self, *arguments):
        options = super().parse_args(*arguments)
        if not options.comfyui:
            self.error("name a ComfyUI with --comfyui PATH or in COMFYUI_UNDER_TEST")
        return options


def parser_of(name: str, doc: str) -> argparse.ArgumentParser:
    """The command line of a benchmark that needs a ComfyUI: with --comfyui, which ends it where none is named."""
    parser = _Parser(prog=name, description=doc.split("\n\n")[0])
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_UNDER_TEST"), metavar="PATH")
    return parser


class Results:
    """Prints each result as a line of JSON that also says when, where and of what it was measured; floats with four
    significant digits. more: what else holds for all results, as the release of ComfyUI."""

    def __init__(self, device: torch.device, **more):
        self.stamp = environment(device) | more

    def __call__(self, bench: str, **record) -> dict:
        record = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in record.items()}
        record = {"bench": bench, **record, **{k: v for k, v in self.stamp.items() if k not in record}}
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()
        return record
