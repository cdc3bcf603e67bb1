"""How far adapters reach beyond their places, against deltas that are formed and applied place by place."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.engine.positions import Places, Segment
from lora_ensemble.engine.reach import Reach
from lora_ensemble.kernels.branch import Branch
from lora_ensemble.methods.routed import HIGH, LOW, loosened, trusted
from lora_ensemble.tests.reference import make_ops
from torch import Tensor, nn
from torch.nn import functional as F

KINDS = ["lora", "lora wide", "lora parts", "lora in", "two parts", "kron", "dense", "dense in", "lora+bias",
         "dora out"]
BASE = Branch((0.0,) * len(KINDS))
SEGMENTS = (Segment("text", 3), Segment("picture", 16, (1, 4, 4)), Segment("other", 1))


class Net(nn.Module):
    """A convolution on a picture, two layers on tokens with the picture among them, others on its text, on
    vectors and along a line."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.tokens = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(24, 32)
        self.again, self.text, self.vector = nn.Linear(24, 40), nn.Linear(24, 16), nn.Linear(24, 32)
        self.line = nn.Conv1d(24, 20, 1)

    def forward(self, picture: Tensor, tokens: Tensor) -> list[Tensor]:
        return [self.conv(picture), self.tokens(tokens), self.again(tokens), self.text(tokens[:, :3]),
                self.vector(tokens[:, 0]), self.line(tokens.mT)]


def locate(layer: str, tokens: int) -> tuple[Segment, ...]:
    return SEGMENTS if tokens == 20 else (Segment("text", tokens),)


def made() -> tuple[Net, Bank, list[Tensor]]:
    net, names = Net(), ("conv", "tokens", "again", "text", "vector", "line")
    bank = Bank([{name: make_ops(kind, getattr(net, name).weight.shape, seed)[0] for name in names}
                 for seed, kind in enumerate(KINDS)])
    return net, bank, [torch.randn(2, 8, 6, 6), torch.randn(2, 20, 24)]


def listened(silent: str = "") -> tuple[Net, list[Tensor], Reach, list[Tensor], list[Tensor]]:
    """`silent`: a layer that gives zeros."""
    net, bank, inputs = made()
    for parameter in getattr(net, silent).parameters() if silent else ():
        nn.init.zeros_(parameter)
    reach, routed = Reach(locate, range(len(KINDS))), RoutedForwards(net, bank)
    before = net(*inputs)
    routed.install()
    with torch.no_grad(), routed.rows([BASE, BASE], None, reach):
        after = net(*inputs)
    routed.remove()
    return net, inputs, reach, before, after


def energies(weight: Tensor, change, columns: Tensor) -> Tensor:
    """|D x|^2 of each column of inputs."""
    changed, _ = change(weight.double(), torch.zeros(weight.shape[0], dtype=torch.float64), 1.0)
    return ((changed - weight.double()).flatten(1) @ columns.double()).square().sum(0)


@torch.no_grad()
def share_by_loops(net: Net, inputs: list[Tensor], maps: Tensor, row: int, adapter: int,
                   outputs: list[Tensor] | None = None) -> float:
    conv, *linear = (each[row] for each in (outputs or net(*inputs))[:3])
    patches, tokens = F.unfold(inputs[0][row:row + 1], 3, padding=1)[0], inputs[1][row, 3:19].T
    outside = inside = 0.0
    for name, out, columns, grid in (("conv", conv.flatten(1), patches, (6, 6)), *(
            (name, each[3:19].T, tokens, (4, 4)) for name, each in zip(("tokens", "again"), linear, strict=True))):
        layer, out = getattr(net, name), out.double()
        if not out.any():
            continue
        found = energies(layer.weight.detach(), make_ops(KINDS[adapter], layer.weight.shape, adapter)[1], columns)
        gain = F.adaptive_avg_pool2d(maps[row, adapter][None], grid)[0].flatten().double()
        scale = out.square().sum(0).mean()
        outside += float(((1 - gain) * found).sum() / (1 - gain).sum() / scale)
        inside += float((gain * found).sum() / gain.sum() / scale)
    return outside / inside


@pytest.mark.parametrize("silent", ["", "again"])
def test_energy_outside_over_energy_inside(silent):
    """Layers of the picture count, those of the text, of vectors and of lines do not, nor one that gives zeros alone;
    nothing is added to any; what depends on the weight (DoRA) is left out, and not let out of its place."""
    net, inputs, reach, before, after = listened(silent)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    maps = torch.rand(2, len(KINDS), 6, 6, generator=torch.Generator().manual_seed(3))
    share = reach.share(Places(maps, (0, 1)))
    for row in range(2):
        for adapter in range(len(KINDS) - 1):
            assert share[row, adapter] == pytest.approx(share_by_loops(net, inputs, maps, row, adapter), rel=1e-4)
    assert share[:, -1].tolist() == [torch.inf] * 2 and trusted(share)[:, -1].tolist() == [0, 0]


def test_everywhere_and_nowhere():
    _, _, reach, *_ = listened()
    maps = torch.ones(2, len(KINDS), 6, 6)
    maps[1] = 0
    share = reach.share(Places(maps, (0, 1)))
    assert (share[0, :-1] == 0).all() and (share[1] == torch.inf).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_always_on_acts_and_is_not_heard(compiled):
    """The first adapter acts in all rows, as it would unheard, and numbers are of the others. A compiled model is not
    heard."""
    act = Branch((1.0, *[0.0] * (len(KINDS) - 1)))
    net, bank, inputs = made()
    reach, found = Reach(locate, range(1, len(KINDS))), []
    for heard in (reach, None):
        routed = RoutedForwards(net, bank, compiled=compiled)
        routed.install()
        with torch.no_grad(), routed.rows([act, act], None, heard):
            found.append(net(*inputs))
        routed.remove()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not torch.equal(found[0][0], net(*inputs)[0])
    maps = torch.rand(2, len(KINDS), 6, 6)
    share = reach.share(Places(maps[:, 1:], (0, 1)))
    if compiled:
        assert share is None
    else:  # the layers' own outputs, by which energies are measured, have the first one's part here
        want = [share_by_loops(net, inputs, maps, 0, k, found[0]) for k in range(1, len(KINDS) - 1)]
        assert share[0, :-1].tolist() == pytest.approx(want, rel=1e-4)


def test_norms_are_not_heard():
    """What is added to the weight of a norm says nothing of places."""
    layer = nn.LayerNorm(24)
    routed = RoutedForwards(nn.Sequential(layer), Bank([{"0": make_ops("dense", layer.weight.shape, 0)[0]}]))
    reach = Reach(locate, range(1))
    routed.install()
    with torch.no_grad(), routed.rows([Branch((0.0,))] * 2, None, reach):
        layer(torch.randn(2, 20, 24))
    routed.remove()
    assert reach.share(Places(torch.rand(2, 1, 4, 4), (0, 1))) is None


def share_of_linear(shape: tuple[int, ...], size: float, dtype: torch.dtype, segments) -> Tensor | None:
    """Of one LoRA on one layer, whose inputs are of this size."""
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 16, bias=False).to(dtype), torch.randn(2, 16, 24)
    bank = Bank([{"0": make_ops("lora", layer.weight.shape, 0)[0]}], dtype=dtype)
    routed, reach = RoutedForwards(nn.Sequential(layer), bank), Reach(lambda layer, tokens: segments(tokens), range(1))
    routed.install()
    with torch.no_grad(), routed.rows([Branch((0.0,))] * 2, None, reach):
        layer((size * x).to(dtype).view(2, *shape, 24))
    routed.remove()
    return reach.share(Places(torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)), (0, 1)))


def test_however_tokens_lie_and_whatever_their_size():
    """In several dimensions, as Anima has them; of energies that half precision cannot hold. Where it is not known what
    they are, nothing is heard."""
    def known(tokens: int):
        return (Segment("picture", tokens, (1, 4, 4)),)

    want = share_of_linear((16,), 1.0, torch.float32, known)
    assert torch.allclose(share_of_linear((1, 4, 4), 1.0, torch.float32, known), want, rtol=1e-5)
    assert torch.allclose(share_of_linear((16,), 1000.0, torch.float16, known), want, rtol=1e-2)
    assert share_of_linear((16,), 1.0, torch.float32, lambda tokens: None) is None


@pytest.mark.parametrize("tokens", [False, True])
def test_frames_that_are_entries_of_their_own(tokens):
    """A row's frames are summed, each with its own map; in layers on tokens as well."""
    layer = nn.Linear(8, 16, bias=False) if tokens else nn.Conv2d(8, 16, 1, bias=False)
    bank = Bank([{"0": make_ops("lora", layer.weight.shape, 0)[0]}])
    reach = Reach(lambda layer, tokens: (Segment("picture", 16, (1, 4, 4)),), range(1))
    routed, x = RoutedForwards(nn.Sequential(layer), bank), torch.randn(6, 8, 4, 4)
    routed.install()
    with torch.no_grad(), routed.rows([Branch((0.0,))] * 2, None, reach):
        y = layer(x.flatten(2).mT).mT if tokens else layer(x).flatten(2)
    routed.remove()
    maps = torch.rand(2, 1, 3, 4, 4)
    found = energies(layer.weight.detach(), make_ops("lora", layer.weight.shape, 0)[1], x.transpose(0, 1).flatten(1))
    found = (found.unflatten(0, (6, 16)) / y.double().square().sum(1).mean(1)[:, None]).unflatten(0, (2, 3))
    gain = maps[:, 0].flatten(2).double()
    want = [((1 - g) * e).sum() / (1 - g).sum() / ((g * e).sum() / g.sum()) for g, e in zip(gain, found, strict=True)]
    assert torch.allclose(reach.share(Places(maps, (0, 1)))[:, 0].double(), torch.stack(want), rtol=1e-4)


def test_a_film_that_is_convolved_as_a_whole():
    """Frames, rows and columns are its places."""
    layer = nn.Conv3d(6, 8, (3, 1, 1), padding=(1, 0, 0), bias=False)
    bank = Bank([{"0": make_ops("lora", layer.weight.shape, 0)[0]}])
    routed, reach = RoutedForwards(nn.Sequential(layer), bank), Reach(locate, range(1))
    x = torch.randn(1, 6, 3, 4, 4)
    routed.install()
    with torch.no_grad(), routed.rows([Branch((0.0,))], None, reach):
        y = layer(x)
    routed.remove()
    maps = torch.rand(1, 1, 3, 4, 4)
    columns = F.pad(x, (0, 0, 0, 0, 1, 1)).unfold(2, 3, 1)[0].permute(0, 4, 1, 2, 3).reshape(18, -1)
    found = energies(layer.weight.detach(), make_ops("lora", layer.weight.shape, 0)[1], columns)
    found, gain = found / y.double().square().sum(1).mean(), maps.flatten().double()
    want = ((1 - gain) * found).sum() / (1 - gain).sum() / ((gain * found).sum() / gain.sum())
    assert reach.share(Places(maps, (0,))).item() == pytest.approx(want.item(), rel=1e-4)


def test_trust():
    """Whole up to LOW, none from HIGH on, half at their geometric mean; a map rises by what is missing to 1."""
    found = trusted(torch.tensor([[0.0, LOW, (LOW * HIGH) ** 0.5, HIGH, torch.inf]]))
    assert torch.allclose(found, torch.tensor([[1.0, 1.0, 0.5, 0.0, 0.0]]), atol=1e-6)
    maps = torch.rand(1, 5, 2, 3, 3)
    want = torch.stack([m + (1 - m) * f for m, f in zip(maps[0], found[0], strict=True)])[None]
    assert torch.allclose(loosened(maps, found), want) and loosened(maps, None) is maps
