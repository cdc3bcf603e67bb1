"""What is kept of the programs of a run is used where it was made for, and nowhere else: each call of many is as in a
run of its own."""

from __future__ import annotations

from random import Random

import pytest
import torch
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.engine.gains import Gains
from lora_ensemble.engine.layout import Layout
from lora_ensemble.engine.positions import Places, Segment
from lora_ensemble.kernels.branch import Branch
from lora_ensemble.tests.reference import make_ops
from lora_ensemble.tests.test_positions import ALL, ALONE, maps
from torch import Tensor, nn
from torch.nn import functional as F

GAINS = (ALL, ALONE[1], Branch((0.7, 0.2, 1.1)), Branch((0.7, 0.2, 0.4)))


class Widening(nn.Linear):
    """A layer that computes in float32 whatever it gets, as some norms and embeddings do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Casting(nn.Linear):
    """A layer that computes in the dtype of what it gets, as ComfyUI's do."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Net(nn.Module):
    """Layers of a picture and its text, of a text alone, in another dtype, and on two grids."""

    def __init__(self, kind: type[nn.Linear]):
        super().__init__()
        self.joint, self.text, self.narrow = kind(6, 8), kind(6, 8), nn.Linear(6, 8).bfloat16()
        self.fine, self.coarse = nn.Conv2d(6, 8, 1), nn.Conv2d(6, 8, 2, 2)

    def forward(self, x: Tensor) -> list[Tensor]:
        planes = x[:, :16].float().mT.unflatten(-1, (4, 4))
        return [self.joint(x), self.text(x), self.narrow(x.bfloat16()), self.fine(planes), self.coarse(planes)]


def placed(seed: int, rows: tuple[int, ...]) -> Places | None:
    """The picture has as many tokens as there are, or stands before a text."""
    if not seed:
        return None

    def locate(name: str, tokens: int) -> tuple[Segment, ...]:
        if name == "text":
            return (Segment("other", tokens),)
        return Segment("picture", 16, (1, 4, 4)), *([Segment("other", tokens - 16)] if tokens > 16 else [])

    return Places(maps(2, seed=seed), rows, locate=locate)


def drawn(net: Net, kinds, calls: list, *names: str) -> list[list[Tensor]]:
    """What the layers give in these calls of one run with LoRAs on some layers, in which equal places are one object.
    """
    out, known = [], {}
    bank = Bank([{name: make_ops(kind, getattr(net, name).weight.shape, seed)[0] for name in names}
                 for seed, kind in enumerate(kinds)])
    routed = RoutedForwards(net, bank)
    routed.install()
    try:
        for branches, where, x in calls:
            known.setdefault(where, placed(*where))
            with torch.no_grad(), routed.rows(branches, known[where]):
                out.append(net(x))
    finally:
        routed.remove()
    return out


@pytest.mark.parametrize("kinds", [("lora", "lora wide", "lora"), ("lora", "dora out", "lora")], ids="/".join)
@pytest.mark.parametrize("kind", [nn.Linear, Widening, Casting])
def test_each_call_is_as_in_a_run_of_its_own(kind, kinds):
    """Of other gains, places, orders of rows, numbers of tokens, and dtypes of what comes in."""
    torch.manual_seed(0)
    random, net = Random(1), Net(kind)
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if kind is not nn.Linear else (torch.float32,)
    places = [(0, ()), *((seed, rows) for seed in (1, 2) for rows in ((0, 1), (1, 0)))]
    calls = []
    for _ in range(24):
        x = torch.randn(2, random.choice((16, 32)), 6).to(random.choice(dtypes))
        calls.append(([random.choice(GAINS) for _ in range(2)], random.choice(places), x))
    names = [name for name, _ in net.named_children()]
    for found, call in zip(drawn(net, kinds, calls, *names), calls, strict=True):
        for k, name in enumerate(names):
            want = drawn(net, kinds, [call], name)[0][k]
            assert found[k].dtype is want.dtype and torch.equal(found[k], want)


def test_the_row_of_each_entry_is_known_by_the_order_and_how_many_there_are():
    """Of one row every entry is its own, in whatever order."""
    orders = {"a": "repeat", "b": "tile", "c": None}
    two = Layout(Gains().marked([Branch((1.0,)), Branch((2.0,))]), order=lambda layer, entries, rows: orders[layer])
    for _ in range(2):
        assert two.owners("a", 4) == (0, 0, 1, 1) and two.owners("a", 2) == (0, 1) and two.owners("c", 4) is None
        assert two.owners("b", 4) == (0, 1, 0, 1) and two.owners("b", 6) == (0, 1, 0, 1, 0, 1)
    assert Layout(Gains().marked([Branch((1.0,))]), order=lambda *asked: None).owners("c", 3) == (0, 0, 0)


def test_gains_of_layers_with_exceptions_are_their_own():
    marked = Gains().marked([Branch((1.0,), (("a", (2.0,)),)), Branch((3.0,))])
    one, two, three = (marked.of[gain,] for gain in (1.0, 2.0, 3.0))
    layout = Layout(marked)
    assert len({one, two, three}) == 3
    for _ in range(2):
        assert layout.marks("a", (0, 1)) == (two, three) and layout.marks("b", (0, 1)) == (one, three)
        assert layout.marks("a", (1, 0)) == (three, two)
