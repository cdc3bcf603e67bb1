#!/usr/bin/env python3
"""What a method's node takes when it runs for the first time, and again after a strength was changed.

    python3 benchmarks/nodes.py --comfyui PATH [--n 2 5] [--rank 16]

SDXL's architecture without weights (nothing reads them), and LoRA files on all linears of attention and feed-forward.
The files have been read before the first run, as they are when a node runs again. Of K-LoRA and EST-LoRA also what
their statistics take, once per pair and CPU. Prints one JSON object per result.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.nodes", *sys.argv[1:]]))

import tempfile
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..engine.sizes import measure
from ..methods.composite import Composite
from ..methods.merge import Merge
from . import models
from .measure import Results, Seconds, median, now, parser_of, since


def bench(model, ensemble: tuple, runs: int, tell: Results) -> str:
    """Each round is a first run, of which nothing is known but the files, and some with other strengths."""
    from ..host.compose import banks
    from ..host.compose.apply import apply_method

    def node(make, strength: float):
        specs = tuple(replace(spec, strength_model=strength) for spec in ensemble)
        start = now()
        composed, _ = apply_method(model, None, specs, lambda active: make(active.strengths), "benchmark")
        return composed, since(start)

    times: dict[str, list[Seconds]] = {"first": [], "again": []}
    for _ in range(runs):
        banks.forget()
        composed, seconds = node(Merge, 0.8)
        times["first"].append(seconds)
        for k, make in enumerate((Merge, Composite, Merge)):
            again, seconds = node(make, 0.7 - 0.1 * k)
            times["again"].append(seconds)
            if models.bank_of(again).model is not models.bank_of(composed).model:
                raise SystemExit("a bank was built once more: nothing to report")
    first, again = median(times["first"]), median(times["again"])
    bank = models.bank_of(composed).model
    tell("node", n=len(ensemble), layers=len(bank.sites), bank_bytes=bank.nbytes(), first_seconds=first.wall,
         again_seconds=again.wall, ratio=first.wall / again.wall, first_cpu_seconds=first.cpu,
         again_cpu_seconds=again.cpu, cpu_ratio=first.cpu / again.cpu)
    return (f"N={len(ensemble)}: {1000 * first.wall:.0f} ms, with another strength {1000 * again.wall:.0f} ms: "
            f"{first.wall / again.wall:.0f} times as fast (goal 20)")


def bench_sizes(model, files: Sequence[Path], tell: Results) -> str:
    """The sums that K-LoRA chooses by, and the energies that EST-LoRA needs, of a pair on all its layers."""
    bank = models.bank_of(models.compose(model, files[:2], lambda active: Merge(active.strengths))[0]).model
    seconds = {}
    for name, top in (("klora", True), ("est", False)):
        start = now()
        measure(bank, (True, False), top=top)
        seconds[name] = since(start).wall
        tell("sizes", method=name, seconds=seconds[name], layers=len(bank.sites))
    return f"statistics of a pair: K-LoRA {seconds['klora']:.2f} s, EST-LoRA {seconds['est']:.2f} s (goal 10)"


def main(arguments: list[str]) -> None:
    parser = parser_of("nodes", __doc__)
    parser.add_argument("--n", type=int, nargs="+", default=[2, 5], help="numbers of LoRAs")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3, help="first runs of each kind")
    parser.add_argument("--quick", action="store_true", help="a narrow model: shows that it works and measures nothing")
    options = parser.parse_args(arguments)
    version = models.start_comfyui(options.comfyui, "cpu")

    from ..host.files.ensemble import LoRASpec
    from ..host.files.files import read

    model = models.build("SDXL", 0.05 if options.quick else 1.0, torch.float16, torch.device("meta"))
    tell = Results(torch.device("cpu"), comfyui=version, model="SDXL", rank=options.rank, quick=options.quick)
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        files = models.write_loras(Path(folder), "SDXL", model, [options.rank] * max(*options.n, 2))
        for file in files:
            read(file.name, model.model)
        for count in options.n:
            ensemble = tuple(LoRASpec(file.name, 0.8, 0.0) for file in files[:count])
            lines.append(bench(model, ensemble, options.runs, tell))
        lines.append(bench_sizes(model, files, tell))
    sys.stderr.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
