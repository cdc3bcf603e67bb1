#!/usr/bin/env python3
"""What a method's node takes when it runs for the first time, and again after a strength was changed.

    python3 benchmarks/nodes.py --comfyui PATH [--n 2 5] [--rank 16]

SDXL's architecture without weights (nothing reads them), and LoRA files on all linears of attention and feed-forward.
The files have been read before the first run, as they are when a node runs again. Prints one JSON object per result.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.nodes", *sys.argv[1:]]))

import argparse
import os
import tempfile
from dataclasses import replace

import torch

from ..methods.composite import Composite
from ..methods.merge import Merge
from . import sd15
from .measure import environment, median, now, since
from .speed import bank_of, emit

UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "num_heads": -1, "num_head_channels": 64,
        "use_spatial_transformer": True, "use_linear_in_transformer": True, "adm_in_channels": 2816,
        "num_classes": "sequential", "use_temporal_attention": False, "legacy": False, "context_dim": 2048}


def sdxl():
    """ComfyUI's own SDXL as a MODEL of meta tensors."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SDXL(UNET)
    config.set_inference_dtype(torch.float16, None)
    model = config.get_model({}, "", device=torch.device("meta"))
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def bench(model, ensemble: tuple, runs: int) -> str:
    """Each round is a first run, of which nothing is known but the files, and some with other strengths."""
    from ..host.compose import banks
    from ..host.compose.apply import apply_method

    def node(make, strength: float):
        specs = tuple(replace(spec, strength_model=strength) for spec in ensemble)
        start = now()
        composed, _ = apply_method(model, None, specs, lambda active: make(active.strengths), "benchmark")
        return composed, since(start)

    found = {"first": [], "again": []}
    for _ in range(runs):
        banks.forget()
        composed, seconds = node(Merge, 0.8)
        found["first"].append(seconds)
        for k, make in enumerate((Merge, Composite, Merge)):
            again, seconds = node(make, 0.7 - 0.1 * k)
            found["again"].append(seconds)
            if bank_of(again).model is not bank_of(composed).model:
                raise SystemExit("a bank was built once more: nothing to report")
    first, again = median(found["first"]), median(found["again"])
    bank = bank_of(composed).model
    emit(bench="node", n=len(ensemble), layers=len(bank.sites), bank_bytes=bank.nbytes(), first_seconds=first.wall,
         again_seconds=again.wall, ratio=first.wall / again.wall, first_cpu_seconds=first.cpu,
         again_cpu_seconds=again.cpu, cpu_ratio=first.cpu / again.cpu)
    return (f"N={len(ensemble)}: {1000 * first.wall:.0f} ms, with another strength {1000 * again.wall:.0f} ms: "
            f"{first.wall / again.wall:.0f} times as fast (goal 20)")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="nodes", description=__doc__.split("\n\n")[0])
    parser.add_argument("--comfyui", type=Path, default=os.environ.get("COMFYUI_UNDER_TEST"), metavar="PATH")
    parser.add_argument("--n", type=int, nargs="+", default=[2, 5], help="numbers of LoRAs")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3, help="first runs of each kind")
    options = parser.parse_args(arguments)
    if not options.comfyui:
        parser.error("name a ComfyUI with --comfyui PATH or in COMFYUI_UNDER_TEST")
    version = sd15.start_comfyui(options.comfyui, "cpu")
    import folder_paths

    from ..host.files.ensemble import LoRASpec
    from ..host.files.files import read

    model = sdxl()
    emit(bench="environment", comfyui=version, model="SDXL", rank=options.rank, **environment(torch.device("cpu")))
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        folder_paths.add_model_folder_path("loras", folder, is_default=True)
        names = [f"node-{i}.safetensors" for i in range(max(options.n))]
        for seed, name in enumerate(names):
            sd15.write_lora(Path(folder) / name, model, seed, options.rank, "linear")
            read(name)
        for count in options.n:
            lines.append(bench(model, tuple(LoRASpec(name, 0.8, 0.0) for name in names[:count]), options.runs))
    sys.stderr.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
