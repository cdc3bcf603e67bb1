#!/usr/bin/env python3
"""What K-LoRA and EST-LoRA cost: their statistics, and a pass over SDXL's attention layers. Needs torch alone.

    python3 benchmarks/selection.py                       everything; some minutes on two cores
    python3 benchmarks/selection.py --only topk energy    some seconds
    python3 benchmarks/selection.py --only setup --device cuda      some 20 seconds: the statistics, on both
    python3 benchmarks/selection.py --device cuda

Prints one JSON object per result, and a summary to stderr. Factors are random; what is compared runs in alternation in
one process, and nothing is timed before both ways give the same number.

    topk       sum of the K largest |entries| and sum of all of B A: exact and tiled, over torch.topk of the product
    energy     squared Frobenius norm: Gram matrices in float64, over the norm of the product
    setup      all sizes of a pair of LoRAs on SDXL, as the K-LoRA and EST-LoRA nodes measure them once: on the
               processor and, with --device cuda, on the GPU; both must agree to 1e-6
    layers     one pass over SDXL's 560 attention linears, each with the LoRA that K-LoRA and EST-LoRA choose: over a
               pass with one LoRA everywhere, and against the released algorithms written plainly from their formulas,
               which rebuild and compare both products at every layer call and apply the winner's dense delta
"""

from __future__ import annotations

import sys

if not __package__:  # started as a file: run it as a module of the pack
    import runpy
    from pathlib import Path

    run = runpy.run_path(str(Path(__file__).resolve().parents[1] / "run.py"))
    sys.exit(run["main"](["_module", "benchmarks.selection", *sys.argv[1:]]))

import argparse
from collections.abc import Callable, Sequence
from dataclasses import astuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..engine.adapters import LowRank
from ..engine.bank import Bank
from ..engine.forwards import RoutedForwards
from ..engine.sizes import measure
from ..kernels.branch import Branch
from ..kernels.energy import energy
from ..kernels.topk import sums_on_device, top_and_total
from ..methods.est import ESTLoRA
from ..methods.klora import KLoRA
from .measure import Results, alternate, now, since, synchronize

SHAPES = {"SD1.5": (320, 320), "SDXL": (1280, 1280), "SDXL feed-forward": (10240, 1280), "Flux": (3072, 3072)}
PARTS = ("topk", "energy", "setup", "layers")
PAIR = (True, False)


def factors(out: int, inputs: int, rank: int, seed: int, spread: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(down, up); row and column norms are log-normal of this spread, 0: flat, the hardest to prune."""
    g = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=g) * torch.exp(spread * torch.randn(inputs, generator=g))
    up = torch.randn(out, rank, generator=g) * torch.exp(spread * torch.randn(out, 1, generator=g))
    return (down / inputs**0.5).to(device), (0.1 * up / rank**0.5).to(device)


def agree(ours: float, reference: float, tolerance: float, what: str) -> None:
    if not abs(ours - reference) <= tolerance * abs(reference):
        raise SystemExit(f"{what}: {ours:.9g} and {reference:.9g} differ, nothing is timed")


def bench_topk(options: argparse.Namespace, device: torch.device, tell: Results) -> str:
    for name, shape in SHAPES.items():
        for spread in (0.0, 1.0):
            down, up = factors(*shape, options.rank, 0, spread, device)
            k = options.rank**2

            def ours(down=down, up=up, k=k) -> Sequence[float]:
                if device.type == "cuda":
                    return sums_on_device([(down, up)], k, device, 2**24).tolist()
                return top_and_total([(down, up)], k)

            def dense(down=down, up=up, k=k) -> tuple[float, float]:
                entries = (up @ down).abs().flatten()
                return entries.topk(k).values.sum().item(), entries.sum().item()

            exact = (up.double() @ down.double()).abs().flatten()
            agree(ours()[0], exact.topk(k).values.sum().item(), 1e-6, f"top-K at {name}")
            agree(ours()[1], exact.sum().item(), 1e-6, f"sum at {name}")
            seconds = alternate({"ours": ours, "dense": dense}, options.repeats, device)
            last = tell("topk", shape=list(shape), model=name, rank=options.rank, k=k, spread=spread,
                        ratio=seconds["dense"].wall / seconds["ours"].wall,
                        cpu_ratio=seconds["dense"].cpu / seconds["ours"].cpu,
                        ours_seconds=seconds["ours"].wall, dense_seconds=seconds["dense"].wall)
    return f"top-K at 3072x3072, rank {options.rank}: {last['ratio']:.1f} times as fast (goal 5)"


def bench_energy(options: argparse.Namespace, device: torch.device, tell: Results) -> str:
    for name, shape in SHAPES.items():
        down, up = factors(*shape, options.rank, 0, 0.0, device)
        # The dense norm sums in float32 and is off by up to 1e-3 on the large layers: that is not what is compared.
        arms = {"ours": lambda down=down, up=up: energy(down, up).item(),
                "dense": lambda down=down, up=up: torch.linalg.vector_norm(up @ down).square().item()}
        exact = (up.double() @ down.double()).square().sum().item()
        agree(arms["ours"](), exact, 1e-9, f"energy at {name}")
        seconds = alternate(arms, options.repeats, device)
        last = tell("energy", shape=list(shape), model=name, rank=options.rank,
                    ratio=seconds["dense"].wall / seconds["ours"].wall,
                    cpu_ratio=seconds["dense"].cpu / seconds["ours"].cpu,
                    ours_seconds=seconds["ours"].wall, dense_seconds=seconds["dense"].wall)
    return f"Frobenius at 3072x3072, rank {options.rank}: {last['ratio']:.0f} times as fast (goal 30)"


def sdxl_layers(feed_forward: bool) -> dict[str, tuple[int, int, int]]:
    """Name -> (out, in, tokens at 1024 x 1024) of the linears in SDXL's 70 transformer blocks: 560 of attention."""
    layers = {}
    for i in range(70):
        width, tokens = (640, 4096) if i < 10 else (1280, 1024)
        block = {f"attn1.{name}": (width, width, tokens) for name in ("to_q", "to_k", "to_v", "to_out")}
        block |= {"attn2.to_q": (width, width, tokens), "attn2.to_out": (width, width, tokens),
                  "attn2.to_k": (width, 2048, 77), "attn2.to_v": (width, 2048, 77)}
        if feed_forward:
            block |= {"ff.0": (8 * width, width, tokens), "ff.2": (width, 4 * width, tokens)}
        layers |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return layers


def pair(layers: dict[str, tuple[int, int, int]], rank: int, device: torch.device,
         dtype: torch.dtype | None = None) -> Bank:
    """Two random LoRAs on all layers, in float32 as files hold them or in another dtype."""
    return Bank([{name: [LowRank(*factors(out, inputs, rank, 2 * n + seed, 0.3, device)[::-1])]
                  for n, (name, (out, inputs, _)) in enumerate(layers.items())} for seed in (0, 1)], dtype=dtype)


def bench_setup(options: argparse.Namespace, device: torch.device, tell: Results) -> str:
    layers = sdxl_layers(feed_forward=True)
    layers = dict(list(layers.items())[::options.every])
    bank = pair(layers, options.rank, torch.device("cpu"))
    places = {"cpu": None} | ({"gpu": device} if device.type == "cuda" else {})
    seconds, sizes, lines = {}, {}, []
    if device.type == "cuda":  # libraries are loaded with the first product
        measure(pair(dict(list(layers.items())[:3]), options.rank, torch.device("cpu")), PAIR, device=device)
    for place, where in places.items():
        for method, top in (("klora", True), ("est", False)):
            start = now()
            sizes[place, method] = measure(bank, PAIR, top=top, device=where)
            seconds[method] = since(start)
        tell("setup", place=place, layers=len(layers), rank=options.rank, klora_seconds=seconds["klora"].wall,
             est_seconds=seconds["est"].wall, klora_cpu_seconds=seconds["klora"].cpu,
             est_cpu_seconds=seconds["est"].cpu)
        lines.append(f"sizes of a pair on {len(layers)} SDXL layers, {place}: K-LoRA {seconds['klora'].wall:.2f} s, "
                     f"EST-LoRA {seconds['est'].wall:.2f} s (goal 10 on all 700 layers, on a GPU 1.5)")
    for name, here in sizes["cpu", "klora"].items() if "gpu" in places else ():
        for i, size in here.items():
            for one, other in zip(astuple(size), astuple(sizes["gpu", "klora"][name][i]), strict=True):
                agree(other, one, 1e-6, f"size on both at {name}")
    return "\n".join(lines)


def released(layer: nn.Linear, x: Tensor, loras: list[tuple[Tensor, Tensor]], size: Callable[[Tensor], Tensor],
             gamma: float, scale: float) -> Tensor:
    """The released algorithms at one layer call, from their formulas alone: both products, their sizes, a decision on
    the host, and the winner's dense delta, all in the dtype of the LoRA files, to which the input is converted."""
    content, style = (up @ down for down, up in loras)
    winner = content if (size(content) / (gamma * size(style) * scale)).item() > 1 else style
    return layer(x) + F.linear(x.to(winner.dtype), winner).to(x.dtype)


def bench_layers(options: argparse.Namespace, device: torch.device, tell: Results) -> str:
    """Every layer gets the tokens that it has in SDXL, one picture with guidance (2 rows), times --tokens. The model is
    in --dtype, the files in float32, as the released code keeps them: its factors are no parameters that follow the
    model to another dtype. Ours are converted once."""
    dtype = getattr(torch, options.dtype or ("float16" if device.type == "cuda" else "float32"))
    layers = dict(list(sdxl_layers(feed_forward=False).items())[::options.every])
    bank = pair(layers, options.rank, device)
    sizes, k = measure(bank, PAIR), options.rank**2
    methods = {"klora": KLoRA.of(sizes, (1.0, 1.0), PAIR), "est": ESTLoRA.of(sizes, (1.0, 1.0), PAIR)}
    root, inputs = nn.Module(), {}
    for name, (out, width, tokens) in layers.items():
        parent = root
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        layer = nn.Linear(width, out, bias=False, device=device, dtype=dtype).requires_grad_(False)
        parent.add_module(name.split(".")[-1], layer)
        inputs[name] = (width, max(round(tokens * options.tokens), 1))
    noise = {shape: torch.randn(2, shape[1], shape[0]).to(device, dtype) for shape in set(inputs.values())}
    modules = {name: root.get_submodule(name) for name in layers}
    factor_pairs = {name: [op.factors() for i in range(2) for op in bank.sites[name].all_ops(i)] for name in layers}
    routed, progress = RoutedForwards(root, pair(layers, options.rank, device, dtype)), 0.4

    def routed_pass(branch: Branch, keep: dict | None = None) -> None:
        with torch.inference_mode(), routed.rows([branch] * 2):
            for name, module in modules.items():
                y = module.forward(noise[inputs[name]])
                if keep is not None:
                    keep[name] = y

    size_of = {"klora": lambda delta: delta.abs().flatten().topk(min(k, delta.numel())).values.sum(),
               "est": lambda delta: torch.linalg.vector_norm(delta) ** 2}
    totals = {"klora": [sum(here[i].total for here in sizes.values()) for i in range(2)],
              "est": [sum(here[i].energy for here in sizes.values()) for i in range(2)]}

    def released_pass(kind: str, keep: dict | None = None) -> None:
        gamma, scale = totals[kind][0] / totals[kind][1], methods[kind].scale(progress)
        with torch.inference_mode():
            for name, module in modules.items():
                y = released(module, noise[inputs[name]], factor_pairs[name], size_of[kind], gamma, scale)
                if keep is not None:
                    keep[name] = y

    lines = []
    for kind, method in methods.items():
        ours, theirs = {}, {}
        released_pass(kind, theirs)
        routed.install()
        try:
            routed_pass(method.at(progress), ours)
            for name in layers:
                agree(ours[name].float().norm().item(), theirs[name].float().norm().item(),
                      1e-3 if dtype == torch.float32 else 1e-2, f"{kind} at {name}")
            # The branch is asked for anew in every pass, as a run does.
            arms = {"choice": lambda method=method: routed_pass(method.at(progress)),
                    "single": lambda: routed_pass(Branch((1.0, 0.0)))}
            seconds = alternate(arms, options.repeats, device)
        finally:
            routed.remove()
        plain = alternate({"released": lambda kind=kind: released_pass(kind)}, max(options.repeats // 3, 1), device)
        synchronize(device)
        choice, single, slow = seconds["choice"], seconds["single"], plain["released"]
        tell("layers", method=kind, layers=len(layers), rank=options.rank, tokens=options.tokens,
             dtype=str(dtype).removeprefix("torch."),
             over_single=choice.wall / single.wall - 1, cpu_over_single=choice.cpu / single.cpu - 1,
             ratio=slow.wall / choice.wall, cpu_ratio=slow.cpu / choice.cpu, seconds=choice.wall,
             single_seconds=single.wall, released_seconds=slow.wall)
        lines.append(f"{kind}, a pass over {len(layers)} SDXL layers: {100 * (choice.wall / single.wall - 1):+.1f} % "
                     f"over one LoRA (goal 3), {slow.wall / choice.wall:.1f} times as fast as the released algorithm "
                     "(goal 3)")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="selection", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="of each way, in turns")
    parser.add_argument("--every", type=int, default=1, help="take every n-th of SDXL's layers")
    parser.add_argument("--tokens", type=float, default=1.0, help="share of the tokens of a 1024 x 1024 picture")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"],
                        help="of the model in `layers`; default: float16 on a GPU, float32 on the CPU")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    tell = Results(device)
    benches = {"topk": bench_topk, "energy": bench_energy, "setup": bench_setup, "layers": bench_layers}
    sys.stderr.write("\n".join([benches[name](options, device, tell) for name in options.only]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
