"""Every adapter kind: its weight form against the definition, and routed forwards against weights really changed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lora_ensemble.engine.adapters import Decomposed, Dense, GLoRA, LowRank, Op, given
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.kernels.branch import Branch
from lora_ensemble.tests.reference import KINDS, TOLERANCE, close, expected, make_ops, relative_error
from torch import Tensor, nn

LAYERS = {
    "linear": (partial(nn.Linear, 24, 32), (5, 24)),
    "linear without bias": (partial(nn.Linear, 24, 32, bias=False), (24,)),
    "conv1d": (partial(nn.Conv1d, 8, 16, 3, padding=1), (8, 9)),
    "conv2d": (partial(nn.Conv2d, 8, 16, 3, padding=1, stride=2), (8, 9, 7)),
    "conv2d 1x1": (partial(nn.Conv2d, 8, 16, 1), (8, 5, 6)),
    "conv2d dilated": (partial(nn.Conv2d, 8, 16, 3, padding="same", dilation=2, bias=False), (8, 9, 7)),
    "conv3d": (partial(nn.Conv3d, 8, 16, (1, 3, 3), padding=(0, 1, 1)), (8, 3, 4, 5)),
}
BRANCHES = [Branch((0.7, 0.0)), Branch((0.0, 0.0)), Branch((0.5, 0.9)), Branch((0.0, 1.0)), Branch((0.7, 0.0)),
            Branch((0.5, 0.9))]
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def model_of(layer: str, dtype: torch.dtype = torch.float32) -> tuple[One, Tensor]:
    """A seeded model and an input of one entry per row of BRANCHES."""
    torch.manual_seed(0)
    make, size = LAYERS[layer]
    return One(make().to(dtype)), torch.randn(len(BRANCHES), *size).to(dtype)


def routed_output(model: nn.Module, bank: Bank, branches, x: Tensor) -> Tensor:
    problems: list = []
    routed = RoutedForwards(model, bank, report=lambda *problem: problems.append(problem))
    routed.install()
    with torch.no_grad(), routed.rows(branches):
        y = model(x)
    routed.remove()
    assert not problems and not [name for name, m in model.named_modules() if "forward" in m.__dict__]
    return y


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_weight_form_is_the_definition(kind, layer):
    model, _ = model_of(layer)
    weight, bias = model.layer.weight.data.double(), torch.zeros(model.layer.weight.shape[0], dtype=torch.float64)
    ops, change = make_ops(kind, weight.shape, 1)
    for gain in (1.0, 0.6, -0.4):
        want, _ = change(weight, bias, gain)
        # The host merges a Bias into the bias and not into the weight; OFT's and DoRA's own constants are fp32.
        assert close(ops[0].on_weight(weight, gain), want, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_glora_of_few_bits_is_multiplied_in_many(dtype):
    """Its two products are rounded nowhere but in the file."""
    generator = torch.Generator().manual_seed(3)
    factors = [torch.randn(shape, generator=generator).to(dtype) for shape in ((24, 4), (4, 24), (32, 4), (4, 24))]
    weight = torch.randn(32, 24, generator=generator)
    few, many = (GLoRA(*each) for each in (factors, [factor.float() for factor in factors]))
    assert torch.equal(few.on_weight(weight, 0.7), many.on_weight(weight, 0.7))


@pytest.mark.parametrize("layer", ["linear", "conv2d"])
@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_pairs_of_kinds(first, second, layer):
    """Two adapters of any two kinds, alone and together in that order, rows of all branches mixed."""
    model, x = model_of(layer)
    built = [make_ops(kind, model.layer.weight.shape, seed) for seed, kind in enumerate((first, second))]
    bank = Bank([{"layer": ops} for ops, _ in built])
    y = routed_output(model, bank, BRANCHES, x)
    assert close(y, expected(model, [{"layer": change} for _, change in built], BRANCHES, x))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora+bias"])
def test_every_kind_on_every_layer(kind, layer):
    model, x = model_of(layer)
    ops, change = make_ops(kind, model.layer.weight.shape, 1)
    branches = [Branch((gain,)) for gain in (1.0, 0.0, 0.8, 0.8, 0.5, 1.0)]
    y = routed_output(model, Bank([{"layer": ops}]), branches, x)
    assert close(y, expected(model, [{"layer": change}], branches, x))


@DTYPES
@pytest.mark.parametrize("layer", ["linear", "conv2d"])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision(kind, layer, dtype):
    """One kind at a time at bf16 and fp16 against float64, the factors in the same precision."""
    model, x = model_of(layer, dtype)
    ops, change = make_ops(kind, model.layer.weight.shape, 1, dtype)
    branches = [Branch((gain,)) for gain in (1.0, 0.0, 0.8, 0.8, 0.5, 1.0)]
    y = routed_output(model, Bank([{"layer": ops}], dtype=dtype), branches, x)
    assert y.dtype == dtype and close(y, expected(model, [{"layer": change}], branches, x))


def test_factors_in_another_dtype_than_the_activations():
    """A bank held in fp32 on a bf16 layer: converted once, never written back."""
    model, x = model_of("linear", torch.bfloat16)
    ops, change = make_ops("lora", (32, 24), 1, torch.bfloat16)
    bank = Bank([{"layer": ops}], dtype=torch.float32)
    branches = [Branch((1.0,))] * len(x)
    assert close(routed_output(model, bank, branches, x), expected(model, [{"layer": change}], branches, x))
    assert {p.dtype for p in bank.parameters()} == {torch.float32}


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("kind", ["dense", "oft", "dora out", "set"])
def test_grouped_convolution(kind, groups):
    torch.manual_seed(0)
    model, x = One(nn.Conv2d(8, 16, 3, padding=1, groups=groups)), torch.randn(6, 8, 6, 5)
    shape = model.layer.weight.shape
    if kind == "dora out":
        ops, change = make_ops("dora out", shape, 1)
        direction = ops[0].direction
        dense = direction.delta(torch.zeros(1, dtype=torch.float64)).float()
        ops = [Decomposed(Dense(given, [dense], tuple(shape)), ops[0].magnitude)]
    else:
        ops, change = make_ops(kind, shape, 1)
    branches = [Branch((gain,)) for gain in (1.0, 0.0, 0.8, 0.8, 0.5, 1.0)]
    assert close(routed_output(model, Bank([{"layer": ops}]), branches, x),
                 expected(model, [{"layer": change}], branches, x))


NORMS = {
    "layer norm": (partial(nn.LayerNorm, 24), (5, 24)),
    "layer norm without bias": (partial(nn.LayerNorm, 24, bias=False), (24,)),
    "group norm": (partial(nn.GroupNorm, 4, 8), (8, 6, 5)),
    "group norm of video": (partial(nn.GroupNorm, 4, 8), (8, 2, 3, 4)),
    "rms norm": (partial(nn.RMSNorm, 24, eps=1e-6), (5, 24)),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kinds", ["dense", "set", "dense+set", "set+dense"])
def test_norms(kinds, norm):
    torch.manual_seed(0)
    make, size = NORMS[norm]
    model, x = One(make()), torch.randn(len(BRANCHES), *size)
    nn.init.normal_(model.layer.weight)
    built = [make_ops(kind, model.layer.weight.shape, seed) for seed, kind in enumerate(kinds.split("+"))]
    branches = [Branch(branch.gains[:len(built)]) for branch in BRANCHES]
    y = routed_output(model, Bank([{"layer": ops} for ops, _ in built]), branches, x)
    assert close(y, expected(model, [{"layer": change} for _, change in built], branches, x))


def test_bias_of_a_norm():
    torch.manual_seed(0)
    model, x = One(nn.GroupNorm(4, 8)), torch.randn(6, 8, 6, 5)
    (_, op), change = make_ops("lora+bias", (8, 1), 1)
    branches = [Branch((gain,)) for gain in (1.0, 0.0, 0.8, 0.8, 0.5, 1.0)]
    y = routed_output(model, Bank([{"layer": [op]}]), branches, x)
    only_bias = {"layer": lambda w, b, g: (w, change(torch.zeros(8, 1).double(), b, g)[1])}
    assert close(y, expected(model, [only_bias], branches, x))


def spanned(op: Op, span: tuple[int, int, int]) -> Op:
    """The op on a slice of a weight instead of all of it."""
    for each in (op, getattr(op, "plus", op)):
        each.span = span
    return op


SPANS = [((0, 0, 8), (0, 8, 8), (0, 16, 16)), ((1, 0, 8), (1, 8, 16)), ((0, 4, 8), (1, 8, 8)), ((0, 8, 8), None)]


@pytest.mark.parametrize("layer", ["linear", "conv2d 1x1"])
@pytest.mark.parametrize("spans", SPANS, ids=str)
@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_slices_of_a_fused_weight(kind, spans, layer):
    """Adapters of q, k and v on one weight: every slice with factors of its own, two adapters with the same slices."""
    torch.manual_seed(0)
    if layer == "linear":
        model, x = One(nn.Linear(24, 32)), torch.randn(len(BRANCHES), 5, 24)
    else:
        model, x = One(nn.Conv2d(24, 32, 1)), torch.randn(len(BRANCHES), 24, 3, 4)
    shape = model.layer.weight.shape
    adapters, changes = [], []
    for adapter in range(2):
        ops, parts = [], []
        for k, span in enumerate(spans):
            part = list(shape)
            if span is not None:
                part[span[0]] = span[2]
            (op,), change = make_ops(kind, part, 10 * adapter + k)
            ops.append(op if span is None else spanned(op, span))
            parts.append((span, change))

        def changed(w: Tensor, b: Tensor, g: float, parts=parts) -> tuple[Tensor, Tensor]:
            w = w.clone()
            for span, change in parts:
                target = w if span is None else w.narrow(*span)
                target.copy_(change(target, b, g)[0])
            return w, b

        adapters.append({"layer": ops})
        changes.append({"layer": changed})
    assert close(routed_output(model, Bank(adapters), BRANCHES, x), expected(model, changes, BRANCHES, x))


@pytest.mark.parametrize("kind", ["oft", "boft", "dora out", "dora in", "set", "glora"])
def test_ordered_kinds_on_a_slice_of_the_outputs(kind):
    torch.manual_seed(0)
    model, x = One(nn.Linear(24, 32)), torch.randn(len(BRANCHES), 5, 24)
    span = (0, 8, 16)
    (op,), change = make_ops(kind, (16, 24), 1)
    low, low_change = make_ops("lora", (32, 24), 2)

    def changed(w: Tensor, b: Tensor, g: float) -> tuple[Tensor, Tensor]:
        w = w.clone()
        w.narrow(*span).copy_(change(w.narrow(*span), b, g)[0])
        return w, b

    y = routed_output(model, Bank([{"layer": [spanned(op, span)]}, {"layer": low}]), BRANCHES, x)
    assert close(y, expected(model, [{"layer": changed}, {"layer": low_change}], BRANCHES, x))


def test_one_adapter_with_two_deltas_on_one_layer():
    torch.manual_seed(0)
    model, x = One(nn.Linear(24, 32)), torch.randn(2, 5, 24)
    (a,), change_a = make_ops("lora", (32, 24), 1)
    (b,), change_b = make_ops("lora", (32, 24), 2)
    branches = [Branch((0.5,)), Branch((0.0,))]
    y = routed_output(model, Bank([{"layer": [a, b]}]), branches, x)
    assert close(y, expected(model, [{"layer": lambda w, v, g: change_b(*change_a(w, v, g), g)}], branches, x))


def test_circular_padding_switched_on_the_live_layer():
    """Nodes that make pictures tile change padding_mode on the model after it was patched."""
    torch.manual_seed(0)
    model, x = One(nn.Conv2d(8, 16, 3, padding=1)), torch.randn(2, 8, 6, 5)
    (op,), change = make_ops("lora", model.layer.weight.shape, 1)
    branches = [Branch((0.8,)), Branch((0.0,))]
    routed = RoutedForwards(model, Bank([{"layer": [op]}]))
    routed.install()
    with torch.no_grad(), routed.rows(branches):
        zeros = model(x)
        model.layer.padding_mode = "circular"
        circular = model(x)
    routed.remove()
    assert close(circular, expected(model, [{"layer": change}], branches, x))
    model.layer.padding_mode = "zeros"
    assert close(zeros, expected(model, [{"layer": change}], branches, x))
    assert relative_error(circular, zeros) > 0.01


def test_dora_on_an_unreadable_weight_is_named_once_and_left_out():
    model, x = model_of("linear")
    (dora,), _ = make_ops("dora out", (32, 24), 1)
    (lora,), change = make_ops("lora", (32, 24), 2)
    told: list = []
    routed = RoutedForwards(model, Bank([{"layer": [dora]}, {"layer": [lora]}], ["portrait", "sketch"]),
                            reader=lambda name: None if name.endswith("weight") else model.get_parameter(name).detach(),
                            report=lambda *problem: told.append(problem))
    routed.install()
    with torch.no_grad(), routed.rows(BRANCHES):
        first, second = model(x), model(x)
    routed.remove()
    assert told == [("portrait", "layer", "DoRA needs the base weight, which is unreadable; left out")]
    unchanged = {"layer": lambda w, b, g: (w, b)}
    assert torch.equal(first, second) and close(first, expected(model, [unchanged, {"layer": change}], BRANCHES, x))


def test_low_rank_delta_agrees_with_its_factors():
    op = LowRank(torch.randn(6, 2), torch.randn(2, 5, 3, 3), 0.25)
    want = 0.25 * torch.einsum("or,rikl->oikl", op.up.double(), op.down.double())
    assert close(op.delta(torch.zeros(1)), want)
    x = torch.randn(2, 5, 6, 6)
    assert close(F.conv2d(x, op.delta(x)), F.conv2d(x.double(), want))
