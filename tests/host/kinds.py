"""Files of every adapter kind that ComfyUI can load. A maker takes the weight it belongs to and random numbers, and
returns the tensors by the end of their keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .builders import Rand, factors

Made = dict[str, Tensor]
RANK = 4


def split(size: int) -> tuple[int, int]:
    """size = small * large with small <= large, as square as possible."""
    small = next(n for n in range(int(size**0.5), 0, -1) if size % n == 0)
    return small, size // small


def low_rank(weight: Tensor, rand: Rand, alpha: float | None = None, rank: int = RANK) -> Made:
    up, down = factors(weight.shape, rank, rand)
    made = {"lora_up.weight": up, "lora_down.weight": down}
    return made if alpha is None else {**made, "alpha": torch.tensor(alpha)}


def tucker_lora(weight: Tensor, rand: Rand) -> Made:
    out, wide, *kernel = weight.shape
    return {"lora_up.weight": rand(out, RANK, 1, 1, size=0.2), "lora_down.weight": rand(RANK, wide, 1, 1) / wide**0.5,
            "lora_mid.weight": rand(RANK, RANK, *kernel, size=0.3), "alpha": torch.tensor(3.0)}


def loha(weight: Tensor, rand: Rand, alpha: float | None = None) -> Made:
    out, wide = weight.shape[0], weight[0].numel()
    made = {"hada_w1_a": rand(out, RANK, size=0.4), "hada_w1_b": rand(RANK, wide, size=0.4),
            "hada_w2_a": rand(out, RANK, size=0.4), "hada_w2_b": rand(RANK, wide) / wide**0.5}
    return made if alpha is None else {**made, "alpha": torch.tensor(alpha)}


def loha_cp(weight: Tensor, rand: Rand) -> Made:
    out, wide, *kernel = weight.shape
    return {"hada_w1_a": rand(RANK, out, size=0.4), "hada_w1_b": rand(RANK, wide, size=0.4),
            "hada_w2_a": rand(RANK, out, size=0.4), "hada_w2_b": rand(RANK, wide) / wide**0.5,
            "hada_t1": rand(RANK, RANK, *kernel, size=0.4), "hada_t2": rand(RANK, RANK, *kernel, size=0.4),
            "alpha": torch.tensor(3.0)}


def lokr(weight: Tensor, rand: Rand, first: str = "whole", second: str = "whole", alpha: float | None = 2.0) -> Made:
    (p, s), (q, t) = split(weight.shape[0]), split(weight.shape[1])
    kernel = weight.shape[2:]
    size = 0.3 / weight[0].numel() ** 0.5
    made = {} if alpha is None else {"alpha": torch.tensor(alpha)}
    if first == "whole":
        made["lokr_w1"] = rand(p, q)
    else:
        made |= {"lokr_w1_a": rand(p, RANK), "lokr_w1_b": rand(RANK, q, size=0.5)}
    if second == "whole":
        made["lokr_w2"] = rand(s, t, *kernel, size=size)
    elif second == "factors":
        made |= {"lokr_w2_a": rand(s, RANK), "lokr_w2_b": rand(RANK, t * kernel.numel(), size=size)}
    else:
        made |= {"lokr_w2_a": rand(RANK, s), "lokr_w2_b": rand(RANK, t, size=size),
                 "lokr_t2": rand(RANK, RANK, *kernel, size=0.5)}
    return made


def glora(weight: Tensor, rand: Rand, old: bool = False) -> Made:
    out, wide = weight.shape[:2]
    inputs = wide if not old else weight[0].numel()
    tall, low = rand(inputs, RANK, size=0.2), rand(RANK, inputs) / inputs**0.5
    up, down = rand(out, RANK, size=0.1), rand(RANK, weight[0].numel()) / weight[0].numel() ** 0.5
    values = (low, tall, down, up) if old else (tall, low, up, down)
    return {**dict(zip(("a1.weight", "a2.weight", "b1.weight", "b2.weight"), values, strict=True)),
            "alpha": torch.tensor(3.0)}


def dora(weight: Tensor, rand: Rand, make: Callable[..., Made] = low_rank, on_output: bool = True) -> Made:
    flat = weight.float()
    if on_output:
        norm = flat.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        norm = flat.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    return {**make(weight, rand), "dora_scale": norm * (1 + 0.2 * rand(*norm.shape))}


def oft(weight: Tensor, rand: Rand, alpha: float | None = None) -> Made:
    blocks = split(weight.shape[0])[0]
    size = weight.shape[0] // blocks
    made = {"oft_blocks": rand(blocks, size, size, size=0.1), "rescale": 1 + rand(weight.shape[0], 1, size=0.1)}
    return made if alpha is None else {**made, "alpha": torch.tensor(alpha)}


def boft(weight: Tensor, rand: Rand, rescale: bool = False, alpha: float = 0.0) -> Made:
    stages = 2 if weight.shape[0] % 8 == 0 else 1
    made = {"oft_blocks": rand(stages, weight.shape[0] // 4, 4, 4, size=0.1), "alpha": torch.tensor(alpha)}
    if rescale:
        made["rescale"] = 1 + rand(weight.shape[0], *[1] * (weight.ndim - 1), size=0.1)
    return made


def difference(weight: Tensor, rand: Rand) -> Made:
    return {"diff": rand(*weight.shape, size=0.3 / weight[0].numel() ** 0.5)}


def bias_difference(weight: Tensor, rand: Rand) -> Made:
    return {"diff_b": rand(weight.shape[0], size=0.3)}


def replacement(weight: Tensor, rand: Rand) -> Made:
    return {"set_weight": weight.float() * (1 + 0.2 * rand(*weight.shape))}


EVERYWHERE: dict[str, Callable[[Tensor, Rand], Made]] = {
    "LoRA": low_rank,
    "LoRA alpha": partial(low_rank, alpha=2.0),
    "LoHa": loha,
    "LoHa alpha": partial(loha, alpha=2.0),
    "LoKr w1 w2": lokr,
    "LoKr w1 w2a": partial(lokr, second="factors"),
    "LoKr w1a w2": partial(lokr, first="factors"),
    "LoKr w1a w2a": partial(lokr, first="factors", second="factors"),
    "LoKr no alpha": partial(lokr, first="factors", second="factors", alpha=None),
    "GLoRA": glora,
    "DoRA": dora,
    "DoRA alpha": partial(dora, make=partial(low_rank, alpha=2.0)),
    "DoRA inputs": partial(dora, on_output=False),
    "DoRA of LoHa": partial(dora, make=loha),
    "DoRA of LoKr": partial(dora, make=lokr),
    "OFT": oft,
    "OFT constrained": partial(oft, alpha=0.5),
    "BOFT": boft,
    "BOFT rescale": partial(boft, rescale=True, alpha=1.0),
    "diff": difference,
    "diff_b": bias_difference,
    "set_weight": replacement,
}
"""Kinds that fit any linear layer and any convolution."""

CONVOLUTIONS: dict[str, Callable[[Tensor, Rand], Made]] = {
    "LoCon Tucker": tucker_lora,
    "LoHa Tucker": loha_cp,
    "DoRA Tucker": partial(dora, make=tucker_lora),
}
"""Kinds that only convolutions have."""
