#!/usr/bin/env python3
"""What torch.compile makes of a step: `python3 benchmarks/compiled.py --comfyui PATH --device cuda --model SDXL`.

The plain model and methods (methods.py) as they are and behind ComfyUI's compile node, with each of --backends:
inductor, which fuses operations; cudagraphs, which leaves them as they are and spares the host. Start it with the
interpreter that ComfyUI runs in. One JSON object per result, as soon as it is there:

    seconds, host    of a step but a run's first; processor time of the sampling thread in it until all was queued
    compile_seconds  what the first run took beyond one that is compiled
    graphs           how many were compiled
    ratio            to the plain model with the same backend
    difference       of the picture to that without, as a share of its norm
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.compiled", *sys.argv[1:]]))

import argparse
import tempfile
from time import time

import torch

from . import models
from .measure import Results, difference, median, parser_of, total
from .methods import METHODS, PLAIN, collected, composed
from .routing import with_clauses

EAGER = "none"
BACKENDS = ("inductor", "cudagraphs")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of("compiled", __doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=list(models.ARCHITECTURES), default="SD1.5")
    parser.add_argument("--size", type=int, default=256, help="picture size in pixels")
    parser.add_argument("--scale", type=float, default=1.0, help="width of the model as a share of the true one")
    parser.add_argument("--blocks", type=int, help="of the model; default: all")
    parser.add_argument("--n", type=int, default=5, help="LoRAs")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scope", choices=["attention", "linear", "conv"], default="linear", help="as in speed.py")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["Merge", "Composite"])
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), help="of torch.compile")
    parser.add_argument("--by-block", action="store_true", help="each block of the model by itself, as nodes do that "
                        "compile large models")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after that, counted from the start of "
                        "the process, nothing more is begun")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step is the start of the run")
    return options


def blocks_of(net: torch.nn.Module) -> list[str]:
    """Names of the blocks of a model, those of its lists."""
    return [f"diffusion_model.{name}.{i}" for name, each in net.named_children()
            if isinstance(each, torch.nn.ModuleList) for i in range(len(each))]


def main(arguments: list[str]) -> None:
    import psutil  # one of ComfyUI's

    options, begun = parse(arguments), psutil.Process().create_time()
    version = models.start_comfyui(options.comfyui, options.device)
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    architecture, device = models.ARCHITECTURES[options.model], torch.device(options.device)
    dtype = torch.float32 if options.device == "cpu" else architecture.dtype
    model = models.build(options.model, options.scale, dtype, device, options.blocks)
    models.settle(model)
    noise, plain = models.inputs(options.model, model, options.size)
    worded = [with_clauses(plain[0], options.n), plain[1]]
    asked = {name: getattr(options, name) for name in ("model", "blocks", "n", "rank", "size", "scope", "by_block")}
    tell = Results(device, comfyui=version, dtype=str(dtype).removeprefix("torch."), quick=options.scale != 1, **asked)
    keys = blocks_of(model.model.diffusion_model) if options.by_block else None
    steps: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = models.write_loras(Path(folder), options.model, model, [options.rank] * options.n, options.scope,
                                   options.device)
        for name in (PLAIN, *options.methods):
            way = model if name == PLAIN else composed(model, files, name)
            conds, eager = worded if name == "Routed" else plain, None
            for backend in (EAGER, *options.backends):
                if time() - begun > options.seconds:
                    sys.stderr.write(f"left out: {name}, {backend}: late\n")
                    continue
                ours = way.clone()
                torch.compiler.reset()
                torch._dynamo.utils.counters.clear()
                if backend != EAGER:
                    set_torch_compile_wrapper(ours, backend=backend, keys=keys)
                started = time()
                models.sampled(ours, *conds, noise, options.steps, architecture.cfg)
                first = time() - started
                with collected():
                    latent, times = models.sampled(ours, *conds, noise, options.steps, architecture.cfg)
                step = median(times[1:])
                eager = latent if backend == EAGER else eager
                if name == PLAIN:
                    steps[backend] = step.wall
                tell("compiled", way=name, backend=backend, seconds=step.wall, host=step.thread,
                     ratio=step.wall / steps[backend] if backend in steps else None,
                     compile_seconds=first - total(times).wall, difference=difference(latent, eager),
                     graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    main(sys.argv[1:])
