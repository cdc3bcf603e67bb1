#!/usr/bin/env python3
"""What LoRAs cost a model with int8 weights: `python3 benchmarks/int8.py --comfyui PATH [--device cuda] [--quick]`.

Start it with the interpreter that ComfyUI runs in; it needs one that has int8 layers (0.33). The model is some blocks
of Wan 2.2's transformer (14B) or of Flux at their true widths, with random weights in ComfyUI's own int8 format; blocks
are alike, so the share that LoRAs add does not depend on how many there are. A step of the sampler at cfg 1 with one
and with four LoRAs of Merge over the same step without, in turns; beside it one LoRA of ComfyUI's bypass loader, which
does not act on the layers that ComfyUI folds. Prints one JSON object per number of LoRAs, then a table. Nothing is
timed before each layer gives what it gives without LoRAs, and their effect.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.int8", *sys.argv[1:]]))

import argparse
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.forwards import RoutedForwards
from ..kernels.branch import Branch
from ..methods.merge import Merge
from . import models, packed
from .measure import Results, Seconds, parser_of, spread
from .models import STRENGTH
from .table import int8_table

FORMATS = ("int8", "int8 convrot")
FOLDED, ACT = ".ffn.2", "gelu_tanh"  # of Wan: the layers into which ComfyUI folds the activation before them
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""Of the effect of the LoRAs on a layer, which is some 2 % of its output, and that is rounded."""


def check(model, bank, files: Sequence[Path]) -> None:
    """Each layer, called as ComfyUI calls it, gives what it gives without LoRAs and what they add to its input."""
    import comfy.model_management
    import comfy.ops
    from safetensors.torch import load_file

    from ..host.compose import fused

    comfy.model_management.load_models_gpu([model, bank])
    root, device, dtype = model.model.diffusion_model, model.load_device, model.model.get_dtype_inference()
    generator = torch.Generator(device).manual_seed(0)
    layers = {name: root.get_submodule(name) for name in bank.model.sites}
    inputs = {name: torch.randn(1, 64, layer.in_features, generator=generator, device=device, dtype=dtype)
              for name, layer in layers.items()}
    tensors = [load_file(file, device=str(device)) for file in files]

    def called(name: str) -> Tensor:
        if name.endswith(FOLDED):
            return comfy.ops.linear_input_act(layers[name], inputs[name], ACT)
        return layers[name](inputs[name])

    with torch.inference_mode():
        plain = {name: called(name) for name in layers}
        routed = RoutedForwards(root, bank.model)
        routed.install()
        fused.call_routed_layers()
        try:
            with routed.rows([Branch((STRENGTH,) * len(files))]):
                found = {name: called(name) for name in layers}
        finally:
            fused.as_before()
            routed.remove()
        for name in layers:
            x = (comfy.ops.INPUT_ACT_EAGER[ACT](inputs[name]) if name.endswith(FOLDED) else inputs[name]).float()
            key = f"lora_unet_{name.replace('.', '_')}"
            effect = sum(STRENGTH * (x @ each[f"{key}.lora_down.weight"].float().T)
                         @ each[f"{key}.lora_up.weight"].float().T for each in tensors)
            off = ((found[name].float() - plain[name].float() - effect).norm() / effect.norm()).item()
            if not off <= TOLERANCE[dtype]:
                raise SystemExit(f"{name}: off by {off:.1e} of the effect of the LoRAs, nothing is timed")


def bench(tell: Results, options: argparse.Namespace, device: torch.device, name: str) -> list[dict]:
    """A model in one format, with every number of LoRAs."""
    model = models.build(options.model, options.scale, options.dtype, device, options.blocks)
    noise, conds = models.inputs(options.model, model, options.size, frames=options.frames)
    with tempfile.TemporaryDirectory() as folder:
        files = models.write_loras(Path(folder), options.model, model, [options.rank] * max(options.n))
        layers = [layer for layer, _ in models.targets(options.model, model, "linear")]
        packed.pack(model.model.diffusion_model, layers, name)
        arms = {"plain": model, **{n: models.compose(model, files[:n], lambda active: Merge(active.strengths))[0]
                                   for n in options.n}}
        for n in options.n:
            check(model, models.bank_of(arms[n]), files[:n])
        bypass = models.stock(model, files[:1], bypass=True)
        arms |= {} if bypass is None else {"bypass": bypass}
        rounds: dict[object, list[list[Seconds]]] = {arm: [] for arm in arms}
        for round_ in range(-1, options.rounds):
            for arm in list(arms)[::1 if round_ % 2 else -1]:
                _, times = models.sampled(arms[arm], *conds, noise, options.steps, 1.0)
                if round_ >= 0:
                    rounds[arm].append(times[1:])
    shape = {"tokens": noise[0, 0].numel() // 4, "layers": len(layers), "blocks": options.blocks, "rank": options.rank}
    return [tell("int8", format=name, case=f"Merge of {arm}" if isinstance(arm, int) else "ComfyUI's bypass loader, 1",
                 **shape, **taxed(rounds[arm], rounds["plain"], device)) for arm in arms if arm != "plain"]


def taxed(ours: Sequence[Sequence[Seconds]], plain: Sequence[Sequence[Seconds]], device: torch.device) -> dict:
    """What a step takes beyond a plain one, by rounds: on the clock, and on a CPU by processor time of all threads."""
    field = "wall" if device.type == "cuda" else "cpu"

    def middle(times: Sequence[Seconds]) -> float:
        return spread([getattr(each, field) for each in times]).middle

    tax = spread([middle(one) / middle(other) - 1 for one, other in zip(ours, plain, strict=True)])
    return {"tax": tax.middle, "quartiles": [tax.low, tax.high], "clock": field,
            "plain_seconds": spread([middle(times) for times in plain]).middle, "rounds": len(ours)}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = parser_of("int8", __doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--model", choices=["Wan", "Flux"], default="Wan")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--n", type=int, nargs="+", default=[1, 4], help="LoRAs that act at once")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--blocks", type=int, help="default: 1 on a CPU, 8 on a GPU")
    parser.add_argument("--size", type=int, default=512, help="of a frame in pixels")
    parser.add_argument("--frames", type=int, help="latent frames of Wan; default: 1 on a CPU, 9 on a GPU")
    parser.add_argument("--steps", type=int, help="of a run, the first not timed; default: 2 on a CPU, 5 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small and few: shows that it works and measures nothing")
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    options.scale, options.dtype = 1.0, torch.bfloat16 if cuda else torch.float32
    for name, on_cpu, on_gpu in (("blocks", 1, 8), ("frames", 1, 9), ("steps", 2, 5)):
        if getattr(options, name) is None:
            setattr(options, name, on_gpu if cuda else on_cpu)
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step is the start of the run")
    if options.quick:
        options.scale, options.size, options.rounds = 0.05, 64, 1
        options.n, options.formats = options.n[-1:], options.formats[-1:]
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    version = models.start_comfyui(options.comfyui, options.device)
    missing = set(options.formats) - set(packed.formats())
    if missing:
        raise SystemExit(f"ComfyUI {version} has no {', '.join(sorted(missing))}: take 0.33 or later")
    device = torch.device(options.device)
    tell = Results(device, comfyui=version, model=options.model, size=options.size, frames=options.frames,
                   dtype=str(options.dtype).removeprefix("torch."), quick=options.quick)
    found = [record for name in options.formats for record in bench(tell, options, device, name)]
    sys.stdout.write("\n" + int8_table(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
