"""Calls of layers that no batch of a sampler makes at first sight: vectors without a batch, none at all, outputs of
another dtype than inputs, inputs by name. And banks and batches drawn at random, against the slow reference."""

from __future__ import annotations

import random
from contextlib import ExitStack

import pytest
import torch
import torch.nn.functional as F
from lora_ensemble.engine import products
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.engine.layout import NotRows
from lora_ensemble.engine.products import Rates
from lora_ensemble.host.families.containers import forward_of
from lora_ensemble.kernels.branch import Branch, one_hot
from lora_ensemble.tests.reference import close, expected, make_ops, relative_error
from lora_ensemble.tests.test_engine_ops import One, routed_output
from lora_ensemble.tests.test_engine_slices import adapter
from torch import Tensor, nn

BOTH = Branch((0.7, -0.5))
ALONE = [one_hot((0.7, -0.5), i) for i in range(2)]
KINDS = pytest.mark.parametrize("kinds", [("lora", "lora wide"), ("dense", "kron"), ("dora out", "glora")],
                                ids="-".join)


def routed(layer: nn.Module, kinds, x: Tensor, rows, name: str = "") -> tuple[Tensor, Tensor]:
    """(what the layer gives for these rows, the same for the weight of all of them changed, in float64)"""
    shape, weight, bias = layer.weight.shape, layer.weight.double(), layer.bias.double()
    made = [make_ops(kind, shape, seed) for seed, kind in enumerate(kinds)]
    for (_, change), gain in zip(made, rows[0].gains, strict=True):
        weight, bias = change(weight, bias, gain)
    root = nn.Sequential(layer)
    forwards = RoutedForwards(root, Bank([{"0": ops} for ops, _ in made]))
    forwards.install()
    with torch.no_grad(), forwards.rows(rows):
        y = layer(**{name: x}) if name else layer(x)
    forwards.remove()
    wide = x.double()
    return y, F.linear(wide, weight, bias) if len(shape) == 2 else F.conv2d(wide, weight, bias, layer.stride,
                                                                             layer.padding)


def layer_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return (nn.Linear(24, 24) if kind == "linear" else nn.Conv2d(8, 16, 3, padding=1)).requires_grad_(False)


@KINDS
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("count", [1, 2, 24])
def test_without_a_batch(kind, kinds, count):
    """A vector for a linear layer, a picture for a convolution: one entry, whatever it is as long as."""
    x = torch.randn(24) if kind == "linear" else torch.randn(8, 6, 5)
    y, want = routed(layer_of(kind), kinds, x, [BOTH] * count)
    assert close(y, want)
    if count > 1:
        with pytest.raises(NotRows):
            routed(layer_of(kind), kinds, x, (ALONE * count)[:count])


@KINDS
@pytest.mark.parametrize("rows", [[BOTH], ALONE], ids=["one branch", "two branches"])
@pytest.mark.parametrize(("kind", "size"), [("linear", (0, 24)), ("linear", (0, 5, 24)), ("linear", (2, 0, 24)),
                                            ("linear", (2, 0, 3, 24)), ("conv", (0, 8, 6, 5))])
def test_nothing_at_all(kind, size, rows, kinds):
    """Experts that no token is sent to, a prompt of no tokens."""
    y, want = routed(layer_of(kind), kinds, torch.randn(size), rows * (2 // len(rows)))
    assert y.shape == want.shape and not y.numel()


class Gives(nn.Linear):
    """A layer whose outputs are of a dtype of their own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(self.gives)


@KINDS
@pytest.mark.parametrize("size", [(2, 24), (2, 5, 24), (2, 2, 3, 24)], ids=str)
@pytest.mark.parametrize(("takes", "gives"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
                                              (torch.float16, torch.float32)], ids=str)
def test_outputs_of_another_dtype(size, takes, gives, kinds):
    torch.manual_seed(0)
    layer = Gives(24, 24).requires_grad_(False)
    layer.gives = gives
    x = torch.randn(size).to(takes)
    y, want = routed(layer, kinds, x, [BOTH] * 2)
    assert y.dtype == gives and relative_error(y, want) < (2e-2 if gives != torch.float32 else 1e-5)


@pytest.mark.parametrize("rows", [[BOTH] * 2, ALONE], ids=["one branch", "two branches"])
def test_under_autocast(rows):
    """Factors stay in fp32, outputs are of the dtype that autocast says."""
    layer, x = layer_of("linear"), torch.randn(2, 5, 24)
    _, want = routed(layer, ("lora", "lora wide"), x, [rows[0]] * 2)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = routed(layer, ("lora", "lora wide"), x, rows)
    assert y.dtype == torch.bfloat16 and relative_error(y[0], want[0]) < 2e-2


@KINDS
def test_inputs_by_their_name(kinds):
    y, want = routed(layer_of("linear"), kinds, torch.randn(2, 5, 24), [BOTH] * 2, "input")
    assert close(y, want)


def test_what_a_file_does_to_a_layer_stays_in_its_order():
    """A DoRA of a slice and after it a LoRA of the whole layer: the DoRA does not see it."""
    torch.manual_seed(0)
    model, slices = One(nn.Linear(24, 32)), {(0, 8, 16): "dora out", None: "lora", (0, 0, 8): "lora wide"}
    ops, change = adapter(slices, 32, 1, torch.float32)
    x = torch.randn(2, 5, 24)
    want = expected(model, [{"layer": change}], [Branch((0.7,))] * 2, x)
    assert close(routed_output(model, Bank([{"layer": ops}]), [Branch((0.7,))] * 2, x), want)


LOW = ("lora", "lora wide")
OTHERS = (*LOW * 4, "dense", "kron", "dora out", "glora")


def drawn(rand: random.Random, out: int, spans: list, seed: int):
    """What a file does to the layer: to any of its slices, to two of them at once, to all of it."""
    kinds = LOW if rand.random() < 0.6 else OTHERS
    own = {span: rand.choice(kinds) for span in rand.sample(spans, rand.randint(0, len(spans)))}
    if rand.random() < 0.3:
        own[None] = rand.choice(kinds)
    if rand.random() < 0.2 and len(spans) > 1:
        own[(0, 0, spans[0][2] + spans[1][2])] = rand.choice(LOW)
    return adapter(own, out, seed, torch.float32)


@pytest.mark.parametrize("seed", range(60))
def test_any_bank_in_any_batch(seed, monkeypatch):
    rand = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [8] * rand.randint(1, 5) if rand.random() < 0.5 else [rand.choice((4, 8, 12)) for _ in range(4)]
    spans = [(0, sum(sizes[:k]), size) for k, size in enumerate(sizes)]
    made = [drawn(rand, sum(sizes), spans, 10 * seed + k) for k in range(rand.randint(1, 4))]
    model = One(nn.Linear(24, sum(sizes)))
    branches = [Branch(tuple(rand.choice((0.0, 0.0, 0.7, -0.5, 1.0)) for _ in made)) for _ in range(3)]
    rows = [rand.choice(branches) for _ in range(rand.randint(1, 6))]
    x = torch.randn(len(rows), *rand.choice(((), (3,), (2, 3))), 24)
    bank = Bank([{"layer": ops} if ops else {} for ops, _ in made])
    want = expected(model, [{"layer": change} for _, change in made], rows, x)
    for _ in range(3):
        monkeypatch.setitem(products.RATES, "cpu", Rates(*(10 ** rand.uniform(-9, 3) for _ in range(4))))
        assert close(routed_output(model, bank, rows, x), want)


class Contained:
    """A tensor among other things, as Trellis 2 has them."""

    shape, dtype = torch.Size((2, 24)), torch.float32  # of what it stands for, not of the tensor

    def __init__(self, feats: Tensor):
        self.feats = feats

    def replace(self, feats: Tensor) -> Contained:
        return Contained(feats)


class _SparseLinear(nn.Linear):
    """Named as the host's."""

    def forward(self, x: Contained) -> Contained:
        return x.replace(super().forward(x.feats))


@pytest.mark.parametrize("banks", [1, 2])
@pytest.mark.parametrize("kinds", [("lora", "lora wide"), ("dora out", "glora")], ids="-".join)
def test_a_layer_that_takes_its_tensor_in_a_container(kinds, banks):
    """The tensor has other dimensions than the container says. Banks above each other add up where they are additive.
    """
    torch.manual_seed(0)
    layer, x = _SparseLinear(24, 24).requires_grad_(False), torch.randn(7, 24)
    made, root = [make_ops(kind, layer.weight.shape, seed) for seed, kind in enumerate(kinds)], nn.Sequential(layer)
    forwards = [RoutedForwards(root, Bank([{"0": ops} for ops, _ in made]), position=k, forward_of=forward_of)
                for k in range(banks)]
    weight, bias = layer.weight.double(), layer.bias.double()
    for _ in range(banks):
        for (_, change), gain in zip(made, BOTH.gains, strict=True):
            weight, bias = change(weight, bias, gain)
    with torch.no_grad(), ExitStack() as stack:
        for each in forwards:
            each.install()
            stack.enter_context(each.rows([BOTH] * 2))
        y = root(Contained(x)).feats
    for each in reversed(forwards):
        each.remove()
    assert "forward" not in vars(layer)
    assert close(y, F.linear(x.double(), weight, bias)) or (banks > 1 and kinds[0] != "lora")
