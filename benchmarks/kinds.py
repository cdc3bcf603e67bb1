#!/usr/bin/env python3
"""What each kind of adapter costs its layer: `python3 benchmarks/kinds.py --comfyui PATH [--quick]`.

Start it with the interpreter that ComfyUI runs in, whose loader reads the kinds. Times a linear layer (1280 x 1280, 512
tokens) with one adapter over the layer alone, in processor time of one thread, in turns; prints one JSON object per
kind, then a table. A layer is timed only after it gave what the layer with the adapter in its weight gives.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file: run it as a module of the pack
    import runpy

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.kinds", *sys.argv[1:]]))

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..engine.bank import Bank
from ..engine.forwards import RoutedForwards
from ..kernels.branch import Branch
from . import models
from .measure import Results, in_turns, one_thread, parser_of, spread
from .table import kind_table

CPU = torch.device("cpu")
STRENGTH = 0.8
Make = Callable[[Tensor, int, torch.Generator], dict[str, Tensor]]
"""(weight, rank, random numbers) -> the tensors of a file, by the end of their keys."""


def randn(g: torch.Generator, *shape: int) -> Tensor:
    """Random numbers whose products with such a tensor keep their size."""
    return torch.randn(shape, generator=g) / shape[-1] ** 0.5


def lora(weight: Tensor, rank: int, g: torch.Generator) -> dict[str, Tensor]:
    out, wide = weight.shape
    return {"lora_up.weight": 0.1 * randn(g, out, rank), "lora_down.weight": randn(g, rank, wide)}


def loha(weight: Tensor, rank: int, g: torch.Generator) -> dict[str, Tensor]:
    return {f"hada_w{i}_{half}": randn(g, *shape) for i in (1, 2)
            for half, shape in (("a", (weight.shape[0], rank)), ("b", (rank, weight.shape[1])))}


def lokr(whole: bool) -> Make:
    """As LyCORIS splits a layer by default, as square as its sizes allow."""
    def make(weight: Tensor, rank: int, g: torch.Generator) -> dict[str, Tensor]:
        out, wide = (next(n for n in range(int(size**0.5), 0, -1) if size % n == 0) for size in weight.shape)
        rows, columns = weight.shape[0] // out, weight.shape[1] // wide
        first = {"lokr_w1": randn(g, out, wide)}
        if whole:
            return {**first, "lokr_w2": 0.1 * randn(g, rows, columns)}
        return {**first, "lokr_w2_a": 0.1 * randn(g, rows, rank), "lokr_w2_b": randn(g, rank, columns)}

    return make


def glora(weight: Tensor, rank: int, g: torch.Generator) -> dict[str, Tensor]:
    out, wide = weight.shape
    return {"a1.weight": 0.1 * randn(g, wide, rank), "a2.weight": randn(g, rank, wide),
            "b1.weight": 0.1 * randn(g, out, rank), "b2.weight": randn(g, rank, wide)}


def dora(make: Make) -> Make:
    def decomposed(weight: Tensor, rank: int, g: torch.Generator) -> dict[str, Tensor]:
        norm = weight.norm(dim=1, keepdim=True)
        return {**make(weight, rank, g), "dora_scale": norm * (1 + 0.1 * torch.randn(norm.shape, generator=g))}

    return decomposed


def oft(weight: Tensor, rank: int, g: torch.Generator) -> dict[str, Tensor]:
    return {"oft_blocks": 0.1 * randn(g, weight.shape[0] // 64, 64, 64)}


def difference(weight: Tensor, rank: int, g: torch.Generator) -> dict[str, Tensor]:
    return {"diff": 0.1 * randn(g, *weight.shape)}


KINDS: dict[str, Make] = {"LoRA": lora, "LoHa": loha, "LoKr": lokr(True), "LoKr, factors": lokr(False), "GLoRA": glora,
                          "DoRA": dora(lora), "DoRA of LoKr": dora(lokr(True)), "OFT": oft, "difference": difference}


def bench_kind(tell: Results, kind: str, size: int, tokens: int, rank: int, count: int, rounds: int) -> dict:
    """One layer with `count` adapters of a kind, all merged, over the layer alone."""
    import comfy.lora

    from ..host.files.files import LoRAFile
    from ..host.files.parse import parse
    from ..host.files.patches import load

    generator = torch.Generator().manual_seed(0)
    layer, alone = (nn.Linear(size, size, bias=False).requires_grad_(False) for _ in range(2))
    layer.weight.copy_(randn(generator, size, size))
    alone.weight.copy_(layer.weight)
    host = nn.Module()
    host.diffusion_model, keys = nn.Sequential(layer), {"lora_unet_0": "diffusion_model.0.weight"}
    files = [{f"lora_unet_0.{end}": value for end, value in KINDS[kind](layer.weight, rank, generator).items()}
             for _ in range(count)]
    weight = layer.weight.clone()
    for file in files:
        patches = comfy.lora.load_lora(file, keys, log_missing=False)
        weight = comfy.lora.calculate_weight([(STRENGTH, patches[keys["lora_unet_0"]], 1.0, None, None)], weight, "0")
    adapters = [parse(load(LoRAFile(file), keys, host, {}), host).layers for file in files]
    routed = RoutedForwards(host.diffusion_model, Bank(adapters, dtype=torch.float32))
    x = torch.randn(1, tokens, size, generator=generator)
    routed.install()
    try:
        with torch.inference_mode(), routed.rows([Branch((STRENGTH,) * count)]):
            apart = (layer(x) - x @ weight.T).norm() / (x @ (weight - alone.weight).T).norm()
            if not apart <= 1e-3:
                raise SystemExit(f"{kind}: off by {apart:.1e} of the adapter's effect, nothing is timed")
            found = in_turns({"plain": lambda: alone(x), "ours": lambda: layer(x)}, rounds, CPU, warmups=2)
    finally:
        routed.remove()
    plain, ours = ([seconds.thread for seconds in found[arm]] for arm in ("plain", "ours"))
    ratio = spread([one / other for one, other in zip(ours, plain, strict=True)])
    return tell("kind", kind=kind if count == 1 else f"{kind}, {count} of them", layer=f"{size}x{size}", tokens=tokens,
                rank=rank, n=count, ratio=ratio.middle, quartiles=[ratio.low, ratio.high],
                plain_seconds=spread(plain).middle, rounds=rounds)


def main(arguments: list[str]) -> None:
    parser = parser_of("kinds", __doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--size", type=int, default=1280)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--n", type=int, nargs="+", default=[1, 4], help="adapters of the kind that act at once")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="small and few: shows that it works and measures nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        options.size, options.tokens, options.rounds = 128, 16, 2
    one_thread()
    tell = Results(CPU, comfyui=models.start_comfyui(options.comfyui, "cpu"))
    found = [bench_kind(tell, kind, options.size, options.tokens, options.rank, count, options.rounds)
             for count in options.n for kind in options.kinds]
    sys.stdout.write("\n" + kind_table(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
