#!/usr/bin/env python3
"""Every goal of speed in one command, within a budget of time.

    python3 run.py bench --device cuda [--comfyui PATH]              environments made as needed
    python3 run.py bench --device cuda --comfyui PATH --as-it-is     with this interpreter as it is, where nothing can
                                                                     be installed
    python3 benchmarks/goals.py --comfyui PATH --device cuda --minutes 25 [--only "SDXL 1024"] > results.jsonl
    python3 benchmarks/goals.py --comfyui PATH --quick               narrow models on a CPU: shows that all of it works

Start it with the interpreter that ComfyUI runs in. Each part is a benchmark of this folder in a process of its own, one
after another, the most telling first. A part that no longer fits into the budget is left out and named, and one that
takes longer than its share is stopped; a part that fails leaves the others alone. Prints the results of all parts as
they come, one JSON object per line, then one per goal, then the table; what parts say besides goes to stderr.
What every method costs, and what saves how much of it, is asked of methods.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.goals", *sys.argv[1:]]))

import argparse
import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Timer
from time import monotonic

import torch

from .host_time import BYPASS
from .measure import ROOT, Results, parser_of
from .table import goal_table, number, result


@dataclass(frozen=True)
class Part:
    """A benchmark as it is run for the goals.

    module    of this folder
    seconds   its share of time: where less is left it is not begun, and after it it is stopped
    common    arguments on every device
    cuda      arguments on a GPU
    cpu       arguments on a CPU; None: not run there but with --quick
    quick     arguments with --quick
    needs     what of `comfyui` and `device` it takes as arguments
    """

    module: str
    seconds: int
    common: str = ""
    cuda: str = ""
    cpu: str | None = None
    quick: str = ""
    needs: tuple[str, ...] = ("comfyui", "device")

    def arguments(self, options: argparse.Namespace) -> list[str] | None:
        """The command line behind the interpreter; None where it is not for this device."""
        chosen = self.quick if options.quick else self.cuda if options.device == "cuda" else self.cpu
        if chosen is None:
            return None
        named = [text for name in self.needs for text in (f"--{name}", str(getattr(options, name)))]
        return [str(ROOT / "run.py"), "_module", f"benchmarks.{self.module}", *named, *self.common.split(),
                *chosen.split()]


SMALL = "--scale 0.05 --size 64 --steps 2 --run-steps 4 --rounds 1 --repeats 1"
PARTS: dict[str, Part] = {
    "SD1.5 512": Part("speed", 120, "--model SD1.5 --only composite tax --base",
                      cuda="--size 512 --n 1 5 --steps 12 --rounds 3 --repeats 20",
                      cpu="--size 256 --n 1 4 --steps 3", quick=f"{SMALL} --n 1 2"),
    "SDXL 1024": Part("speed", 150, "--model SDXL --only composite tax --base",
                      cuda="--size 1024 --n 5 --steps 8 --rounds 3 --repeats 10", quick=f"{SMALL} --n 2"),
    "host time": Part("host_time", 150, cuda="--rounds 8", cpu="--rounds 30", quick="--quick"),
    "stack SD1.5": Part("speed", 90, "--model SD1.5 --only stack cache",
                        cuda="--size 512 --n 5 --run-steps 31 --rounds 3", cpu="--size 256 --n 4 --run-steps 7",
                        quick=f"{SMALL} --n 2"),
    "stack SDXL": Part("speed", 150, "--model SDXL --only stack cache saving",
                       cuda="--size 1024 --n 5 --run-steps 31 --rounds 1", quick=f"{SMALL} --n 2"),
    "statistics": Part("selection", 60, "--only topk energy", cuda="", cpu="", quick="--repeats 1", needs=()),
    "statistics of a pair": Part("selection", 40, "--only setup", cuda="", quick="--every 100", needs=("device",)),
    "nodes": Part("nodes", 90, cuda="", cpu="", quick="--quick --runs 1", needs=("comfyui",)),
    "choices": Part("selection", 90, "--only layers", cuda="--repeats 10", cpu="--every 7",
                    quick="--every 70 --tokens 0.02 --repeats 1", needs=("device",)),
    "share of a step": Part("speed", 90, "--model SD1.5 --only mixing guidance", cuda="--size 512 --n 2 5 --repeats 10",
                            cpu="--size 256 --n 2 5", quick=f"{SMALL} --n 2"),
    "kinds": Part("kinds", 60, cpu="", quick="--quick --kinds LoRA LoKr --n 1", needs=("comfyui",)),
    "int8": Part("int8", 90, cuda="", cpu="--size 256", quick="--quick"),
    "rank 128": Part("speed", 90, "--model SD1.5 --only tax --ranks 128", cuda="--size 512 --n 5 --repeats 20",
                     quick=f"{SMALL} --n 2"),
    "unequal ranks": Part("speed", 120, "--model SD1.5 --only composite tax --ranks 4 8 16 32",
                          cuda="--size 512 --n 4 --steps 12 --rounds 3 --repeats 20",
                          cpu="--size 256 --n 4 --steps 3", quick=f"{SMALL} --n 4"),
    "SDXL in 24 GB": Part("speed", 180, "--model SDXL --only composite --memory 24",
                          cuda="--size 1024 --n 5 --steps 4", quick=f"{SMALL} --n 2"),
    "Flux 1024": Part("speed", 240, "--model Flux --only composite tax cache --scope attention",
                      cuda="--size 1024 --n 5 --steps 4 --repeats 5", quick=f"{SMALL} --n 2"),
    "routed SDXL": Part("speed", 90, "--model SDXL --only routed",
                        cuda="--size 1024 --n 5 --steps 8 --rounds 3", quick=f"{SMALL} --n 2"),
    "routed Flux": Part("speed", 120, "--model Flux --only routed --scope attention",
                        cuda="--size 1024 --n 5 --steps 6 --rounds 2", quick=f"{SMALL} --n 2"),
    "floor SDXL": Part("speed", 300, "--model SDXL --only floor", cuda="--size 1024 --n 5 --steps 4 --compile",
                       quick=f"{SMALL} --n 2"),
    "floor Flux": Part("speed", 300, "--model Flux --only floor --scope attention",
                       cuda="--size 1024 --n 5 --steps 4 --compile", quick=f"{SMALL} --n 1"),
}


Reader = Callable[[Sequence[dict]], "list[float]"]
"""(records of one benchmark of one part) -> the numbers that a goal is about."""


def every(key: str) -> Reader:
    return lambda records: [r[key] for r in records if key in r]


def most_loras(key: str) -> Reader:
    """Of the result with the most LoRAs alone."""
    return lambda records: every(key)([r for r in records if r["n"] == max(r["n"] for r in records)])


def growth(records: Sequence[dict]) -> list[float]:
    """A step of the most LoRAs over one of the fewest."""
    by_n = {r["n"]: r["composite_seconds"] for r in records}
    return [by_n[max(by_n)] / by_n[min(by_n)]] if len(by_n) > 1 else []


def over_bypass(records: Sequence[dict]) -> list[float]:
    """What five merged LoRAs add to a step over what one adds by ComfyUI's bypass loader, per model."""
    added = {(r["model"], r["case"]): r["added"] for r in records}
    return [each / added[model, BYPASS] for (model, case), each in added.items()
            if case == "Merge of 5" and (model, BYPASS) in added]


def over_floor(records: Sequence[dict]) -> list[float]:
    return [r["added"] / r["floor"] for r in records]


@dataclass(frozen=True)
class Goal:
    """A number to reach. Of several results the one furthest from it counts.

    part, bench   where the numbers come from
    value         which of them
    target        at least this; with `most`, at most
    unit          "%" for shares
    where         what else a record must hold
    """

    name: str
    what: str
    part: str
    bench: str
    value: Reader
    target: float
    most: bool = False
    unit: str = "times"
    where: Mapping[str, object] = field(default_factory=dict)

    def shown(self, value: float) -> str:
        return f"{number(100 * value)} %" if self.unit == "%" else f"{number(value)} {self.unit}"

    def judged(self, records: Sequence[dict], missing: str) -> dict[str, object]:
        """The goal with what was measured for it, and whether that is enough; `missing`: why there may be nothing."""
        values = self.value([r for r in records if r["part"] == self.part and r["bench"] == self.bench
                             and all(r.get(key) == value for key, value in self.where.items())])
        line = {"goal": self.name, "what": self.what,
                "target": f"at {'most' if self.most else 'least'} {self.shown(self.target)}"}
        if not values:
            return line | {"measured": "", "verdict": missing}
        worst = max(values) if self.most else min(values)
        met = worst <= self.target if self.most else worst >= self.target
        return line | {"measured": self.shown(worst), "value": worst, "verdict": "met" if met else "missed"}


SQUARE = {"shape": [3072, 3072]}
GOALS = (
    Goal("G1", "SD1.5, step of all LoRAs and the base: hooks over ours", "SD1.5 512", "composite",
         most_loras("ratio"), 5),
    Goal("G2", "SDXL, step of all LoRAs and the base: hooks over ours", "SDXL 1024", "composite", every("ratio"), 1.6),
    Goal("G2", "SDXL, one LoRA after another over one batch", "SDXL 1024", "tax", every("apart_ratio"), 1.3),
    Goal("G3", "Flux, step of all LoRAs: hooks over ours", "Flux 1024", "composite", every("ratio"), 1),
    Goal("G3", "Flux, memory beyond the base model: hooks over ours", "Flux 1024", "memory", every("extra_ratio"), 20),
    Goal("G4", "SDXL in 24 GB, step: hooks over ours", "SDXL in 24 GB", "composite", every("ratio"), 2),
    Goal("G5", "SD1.5, tax of LoRAs of rank 16 on their batch", "SD1.5 512", "tax", most_loras("tax"), 0.08, True, "%"),
    Goal("G5", "SDXL, tax of LoRAs of rank 16", "SDXL 1024", "tax", every("tax"), 0.08, True, "%"),
    Goal("G5", "SD1.5, tax of LoRAs of rank 128", "rank 128", "tax", every("tax"), 0.12, True, "%"),
    Goal("G5", "SD1.5, tax of LoRAs of ranks 4, 8, 16 and 32", "unequal ranks", "tax", every("tax"), 0.08, True, "%",
         where={"ranks": [4, 8, 16, 32]}),
    Goal("G5", "Flux, tax of LoRAs of rank 16", "Flux 1024", "tax", every("tax"), 0.08, True, "%"),
    Goal("G6", "SD1.5, start of a run: hooks over ours", "SD1.5 512", "start", most_loras("ratio"), 10),
    Goal("G6", "SDXL, start of a run: hooks over ours", "SDXL 1024", "start", every("ratio"), 10),
    Goal("G7", "K-LoRA and EST-LoRA on SDXL: released code over ours", "choices", "layers", every("ratio"), 3),
    Goal("G7", "K-LoRA and EST-LoRA on SDXL, beyond one LoRA", "choices", "layers", every("over_single"), 0.03, True,
         "%"),
    Goal("G8", "top-K sum of 3072 x 3072: dense over ours", "statistics", "topk", every("ratio"), 5, where=SQUARE),
    Goal("G8", "energy of 3072 x 3072: dense over ours", "statistics", "energy", every("ratio"), 30, where=SQUARE),
    Goal("G9", "SD1.5, steps without over with the branch cache", "stack SD1.5", "cache", every("ratio"), 2),
    Goal("G9", "SDXL, steps without over with the branch cache", "stack SDXL", "cache", every("ratio"), 2),
    Goal("G9", "Flux, steps without over with the branch cache", "Flux 1024", "cache", every("ratio"), 1.6),
    Goal("G10", "SDXL, run without over with Adaptive Guidance", "stack SDXL", "saving", every("ratio"), 1.25,
         where={"policy": "AdaptiveGuidance"}),
    Goal("G10", "SD1.5, decisions of guidance in a step", "share of a step", "guidance", every("share"), 0.005, True,
         "%"),
    Goal("G11", "SDXL, run without over with LinearAG", "stack SDXL", "saving", every("ratio"), 1.4,
         where={"policy": "LinearAG"}),
    Goal("G12", "SD1.5, run: hooks over all of ours", "stack SD1.5", "stack", every("ratio"), 10),
    Goal("G12", "SDXL, run: hooks over all of ours", "stack SDXL", "stack", every("ratio"), 4),
    Goal("G13", "SDXL, bare products in a step", "floor SDXL", "floor", every("share"), 0.35, unit="%"),
    Goal("G13", "SDXL, bare products in a compiled step", "floor SDXL", "floor", every("compiled_share"), 0.5,
         unit="%"),
    Goal("G13", "Flux, bare products in a step", "floor Flux", "floor", every("share"), 0.35, unit="%"),
    Goal("G13", "Flux, bare products in a compiled step", "floor Flux", "floor", every("compiled_share"), 0.5,
         unit="%"),
    Goal("G14", "SD1.5, weights of LoRAtorio and CMLoRA in a step", "share of a step", "mixing", every("share"), 0.01,
         True, "%"),
    Goal("G15", "SD1.5, step of the most LoRAs over a step of one", "SD1.5 512", "composite", growth, 2.5, True),
    Goal("G16", "Wan with int8 weights, step with four LoRAs of rank 16 over one without", "int8", "int8", every("tax"),
         0.3, True, "%", where={"case": "Merge of 4"}),
    Goal("R1", "SDXL, step of Routed LoRAs, places renewed in every step, over one of Merge", "routed SDXL", "routed",
         every("ratio"), 1.05, True, where={"mode": "every step"}),
    Goal("R1", "Flux, step of Routed LoRAs over one of Merge", "routed Flux", "routed", every("ratio"), 1.1, True,
         where={"mode": "every step"}),
    Goal("E1", "host time added to a layer call over two bare products", "host time", "layer", over_floor, 2, True),
    Goal("E2", "host time added to a step: five merged over one by ComfyUI's bypass loader", "host time", "step",
         over_bypass, 1, True),
    Goal("E3", "layer with a LoKr over the layer", "kinds", "kind", every("ratio"), 1.25, True, where={"kind": "LoKr"}),
    Goal("E5", "SDXL, a node with another strength: its first run over that", "nodes", "node", every("ratio"), 20),
    Goal("E6", "SDXL, seconds for the statistics of a pair on 722 layers", "nodes", "sizes", every("seconds"), 10, True,
         unit="s"),
    Goal("E6", "SDXL, seconds for the statistics of a pair on a GPU", "statistics of a pair", "setup",
         every("klora_seconds"), 1.5, True, unit="s", where={"place": "gpu"}),
    Goal("E4", "SD1.5, step of unequal ranks over one of equal ranks", "unequal ranks", "composite",
         lambda records: [r["composite_seconds"] / r["equal_seconds"] for r in records], 1.1, True),
)


def kill(process: subprocess.Popen) -> None:
    """End a process and those that it has started: a compiler's would keep its output open."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def measured(command: Sequence[str], limit: float, told: Callable[[dict], None]) -> str:
    """Run a part; `told` gets each of its results. In words why it did not end well, or nothing."""
    begun = monotonic()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, encoding="utf-8",
                               start_new_session=True)
    late = Timer(limit, kill, (process,))
    late.start()
    try:
        for line in process.stdout:
            found = result(line)
            if found is not None:
                told(found)
        code = process.wait()
    finally:
        late.cancel()
        kill(process)
    if code == 0:
        return ""
    return f"stopped after {limit:.0f} s" if monotonic() - begun >= limit else f"failed (exit {code})"


def run_parts(options: argparse.Namespace) -> tuple[list[dict], dict[str, str]]:
    """The results of all parts, and why a part gave none or not all."""
    records: list[dict] = []
    why: dict[str, str] = {name: "not asked for" for name in PARTS}
    end = monotonic() + 60 * options.minutes
    for name in options.only:
        part, left = PARTS[name], end - monotonic()
        command = part.arguments(options)
        if command is None:
            why[name] = "not on a CPU"
            continue
        if left < (1 if options.quick else part.seconds):
            why[name] = f"left out: {left:.0f} s were left of {part.seconds}"
            sys.stderr.write(f"=== {name}: {why[name]}\n")
            continue

        def told(record: dict, name: str = name) -> None:
            record |= {"part": name, "quick": options.quick}
            sys.stdout.write(json.dumps(record) + "\n")
            sys.stdout.flush()
            records.append(record)

        sys.stderr.write(f"=== {name}, {left:.0f} s left\n")
        sys.stderr.flush()
        why[name] = measured(command, left if options.quick else part.seconds, told)
        if why[name]:
            sys.stderr.write(f"=== {name}: {why[name]}\n")
    return records, why


def main(arguments: list[str]) -> int:
    parser = parser_of("goals", __doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--minutes", type=float, default=25, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="narrow models, few steps: measures nothing")
    options = parser.parse_args(arguments)
    records, why = run_parts(options)
    versions = [r["comfyui"] for r in records if r.get("comfyui")]
    tell = Results(torch.device(options.device), comfyui=versions[0] if versions else None, quick=options.quick)
    found = [tell("goal", **goal.judged(records, why[goal.part] or "not measured")) for goal in GOALS]
    sys.stdout.write(f"\n{goal_table(found)}\n")
    failed = {name: reason for name, reason in why.items() if reason.startswith(("failed", "stopped"))}
    for name, reason in failed.items():
        sys.stderr.write(f"{name}: {reason}\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
