"""Slow, obvious references: what each adapter kind does to a weight, written from the definitions in float64, and a
model evaluated row by row with its weights really changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from lora_ensemble.engine.adapters import BOFT, OFT, Bias, Decomposed, Dense, GLoRA, Kron, LowRank, Op, Replace, given
from lora_ensemble.kernels.branch import Branch
from lora_ensemble.kernels.orthogonal import cayley
from torch import Tensor, nn

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
"""Largest relative error (Frobenius norm) that one kernel, or one layer with its adapters, may make."""

Change = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(weight, bias, gain) -> the changed weight and bias, float64."""

KINDS = ("lora", "lora wide", "lora+bias", "dense", "kron", "glora", "oft", "boft", "dora out", "dora in", "set")


def relative_error(value: Tensor, reference: Tensor) -> float:
    assert value.shape == reference.shape
    return ((value.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)).item()


def close(value: Tensor, reference: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether `value` is finite and within the tolerance of its dtype of a float64 reference."""
    return bool(value.isfinite().all()) and relative_error(value, reference) <= TOLERANCE[dtype or value.dtype]


def permutation(source: Sequence[int]) -> Tensor:
    """The matrix P with (P v)[k] = v[source[k]]."""
    matrix = torch.zeros(len(source), len(source), dtype=torch.float64)
    matrix[range(len(source)), list(source)] = 1
    return matrix


def butterfly_matrix(rotations: Tensor) -> Tensor:
    """BOFT's chain of stages as one matrix: shuffle, block-diagonal rotation, shuffle back."""
    stages, blocks, size, _ = rotations.shape
    channels = blocks * size
    matrix = torch.eye(channels, dtype=torch.float64)
    for i in range(stages):
        stride = 2**i * size // 2
        source = [c * 2 * stride + half * stride + k
                  for c in range(channels // (2 * stride)) for k in range(stride) for half in range(2)]
        shuffle = permutation(source)
        matrix = shuffle.T @ torch.block_diag(*rotations[i].double()) @ shuffle @ matrix
    return matrix


def make_ops(kind: str, shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> tuple[list[Op], Change]:
    """Ops of one adapter with random factors for a weight of this shape, and the change of the weight they stand for.

    Factors are rounded to `dtype` before both are made, so that only the arithmetic can differ.
    """
    generator = torch.Generator().manual_seed(seed)
    out, inputs, ones = shape[0], shape[1] if len(shape) > 1 else 1, [1] * (len(shape) - 1)

    def random(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * 0.3).to(dtype)

    def wide(*tensors: Tensor) -> list[Tensor]:
        return [t.double() for t in tensors]

    def lowrank(rank: int) -> tuple[LowRank, Tensor]:
        up, down = random(out, rank), random(rank, *shape[1:])
        dense = 0.5 * torch.einsum("or,r...->o...", *wide(up, down))
        return LowRank(up, down, 0.5), dense

    if kind in ("lora", "lora wide"):
        op, delta = lowrank(3 if kind == "lora" else 7)
        return [op], lambda w, b, g: (w + g * delta, b)
    if kind == "lora parts":  # of a weight that a model fuses of two
        (first, one), (second, two) = lowrank(3), lowrank(2)
        half = out // 2
        ops = [LowRank(first.up[:half], first.down, 0.5, (0, 0, half)),
               LowRank(second.up[half:], second.down, 0.5, (0, half, out - half))]
        return ops, lambda w, b, g: (w + g * torch.cat([one[:half], two[half:]]), b)
    if kind == "lora+bias":
        op, delta = lowrank(3)
        vector = random(out)
        return [op, Bias(vector)], lambda w, b, g: (w + g * delta, b + g * vector.double())
    if kind == "dense":
        delta = random(*shape)
        return [Dense(given, [delta], tuple(shape), 0.7)], lambda w, b, g: (w + g * 0.7 * delta.double(), b)
    if kind == "dense in":  # of the last inputs alone
        delta, whole = random(out, inputs // 2, *shape[2:]), torch.zeros(shape, dtype=torch.float64)
        whole[:, -(inputs // 2):] = 0.7 * delta.double()
        span = (1, inputs - inputs // 2, inputs // 2)
        return [Dense(given, [delta], tuple(delta.shape), 0.7, span)], lambda w, b, g: (w + g * whole, b)
    if kind == "lora in":  # of the last inputs alone
        half = inputs // 2
        up, down, whole = random(out, 3), random(3, half, *shape[2:]), torch.zeros(shape, dtype=torch.float64)
        whole[:, -half:] = 0.5 * torch.einsum("or,r...->o...", *wide(up, down))
        return [LowRank(up, down, 0.5, (1, inputs - half, half))], lambda w, b, g: (w + g * whole, b)
    if kind == "two parts":  # of two kinds, each with outputs of its own
        (low, one), half = lowrank(3), out // 2
        rest = random(out - half, *shape[1:])
        ops = [LowRank(low.up[:half], low.down, 0.5, (0, 0, half)),
               Dense(given, [rest], tuple(rest.shape), 0.7, (0, half, out - half))]
        return ops, lambda w, b, g: (w + g * torch.cat([one[:half], 0.7 * rest.double()]), b)
    if kind == "kron":
        left, right = random(4, 2), random(out // 4, *([inputs // 2, *shape[2:]] if len(shape) > 1 else []))
        delta = torch.zeros(shape, dtype=torch.float64)
        for p in range(4):
            for q in range(2):
                rows, columns = p * (out // 4), q * (inputs // 2)
                delta[rows:rows + out // 4, columns:columns + inputs // 2] = left[p, q].double() * right.double()
        return [Kron(left, right, 0.7)], lambda w, b, g: (w + g * 0.7 * delta, b)
    if kind == "glora":
        m_up, m_down, d_up, d_down = random(inputs, 3), random(3, inputs), random(out, 3), random(3, *shape[1:])
        mix = m_up.double() @ m_down.double()
        delta = torch.einsum("or,r...->o...", *wide(d_up, d_down))
        return [GLoRA(m_up, m_down, d_up, d_down, 0.5)], lambda w, b, g: (
            w + g * 0.5 * (torch.einsum("oi...,ij->oj...", w, mix) + delta), b)
    if kind == "oft":
        rotations = cayley(random(4, out // 4, out // 4))
        matrix = torch.block_diag(*rotations.double()).T
        return [OFT(rotations)], lambda w, b, g: (
            w + g * g * (torch.einsum("po,o...->p...", matrix, w) - w), b)
    if kind == "boft":
        rotations, rescale = cayley(random(2, 4, out // 4, out // 4)), 1 + random(out, 1).float()

        def turned(w: Tensor, b: Tensor, g: float) -> tuple[Tensor, Tensor]:
            eye = torch.eye(out // 4, dtype=torch.float64)
            matrix = rescale.double() * butterfly_matrix(g * rotations.double() + (1 - g) * eye)
            return w + g * (torch.einsum("po,o...->p...", matrix, w) - w), b

        return [BOFT(rotations, rescale)], turned
    if kind in ("dora out", "dora in"):
        op, delta = lowrank(3)
        on_output = kind == "dora out"
        magnitude = (1 + random(*((out, *ones) if on_output else (1, inputs, *ones[1:])))).abs()

        def decomposed(w: Tensor, b: Tensor, g: float) -> tuple[Tensor, Tensor]:
            if on_output:
                norm = w.flatten(1).norm(dim=1).reshape(-1, *ones)
            else:
                norm = (w + delta).transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *ones[1:])
            return w + g * (magnitude.double() / norm * (w + delta) - w), b

        return [Decomposed(op, magnitude)], decomposed
    if kind == "set":
        value = random(*shape)
        return [Replace(value)], lambda w, b, g: (value.double(), b)
    raise ValueError(kind)


def expected(model: nn.Module, changes: Sequence[Mapping[str, Change]], branches: Sequence[Branch],
             x: Tensor) -> Tensor:
    """The model's output, float64, each row from a copy of the model whose weights are really changed.

    changes   per adapter: layer name -> change; x may hold several entries per row
    """
    fold = x.shape[0] // len(branches)
    outs = []
    for row, branch in enumerate(branches):
        changed = copy.deepcopy(model).double()
        for adapter, layers in enumerate(changes):
            for name, change in layers.items():
                layer, gain = changed.get_submodule(name), branch.at(name)[adapter]
                if gain:
                    bias = getattr(layer, "bias", None)
                    zero = torch.zeros(layer.weight.shape[0], dtype=torch.float64)
                    weight, bias_after = change(layer.weight.data, zero if bias is None else bias.data, gain)
                    layer.weight.data = weight
                    if bias is not None:
                        bias.data = bias_after
        with torch.no_grad():
            outs.append(changed(x[row * fold:(row + 1) * fold].double()))
    return torch.cat(outs)
