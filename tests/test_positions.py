"""Gain maps: where in the picture and in the text an adapter acts, against one evaluation per place."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.engine.layout import folded
from lora_ensemble.engine.positions import Places, Segment
from lora_ensemble.kernels.branch import Branch, one_hot
from lora_ensemble.tests.reference import TOLERANCE, close, make_ops
from lora_ensemble.tests.test_engine_ops import spanned
from torch import Tensor, nn

STRENGTHS = (0.7, 0.9, 1.1)
ALONE = [one_hot(STRENGTHS, i) for i in range(3)]
BASE, ALL, EQUAL = Branch((0.0,) * 3), Branch(STRENGTHS), Branch((0.8,) * 3)
LAYOUTS = {"merged": [ALL, ALL], "equal strengths": [EQUAL, EQUAL], "alone": [ALONE[1]] * 2,
           "composite": [ALONE[0], ALONE[1], ALONE[2]], "scattered": [ALL, BASE, ALONE[2], ALL]}
LORAS, KINDS = ("lora", "lora wide", "lora"), ["lora", "lora+bias", "dense", "glora", "oft", "boft", "dora out",
                                              "dora in", "set"]


def maps(pictures: int = 1, grid=(4, 4), seed: int = 0) -> Tensor:
    return torch.rand(pictures, 3, *grid, generator=torch.Generator().manual_seed(seed))


def routed_output(layer: nn.Module, kinds, branches, x: Tensor, places: Places | None, order=folded,
                  told: list | None = None, flat: bool = False) -> Tensor:
    root = nn.Sequential(layer)
    bank = Bank([{"0": make_ops(kind, layer.weight.shape, seed)[0]} for seed, kind in enumerate(kinds)])
    routed = RoutedForwards(root, bank, report=lambda *problem: (told if told is not None else []).append(problem),
                            order=order, flat=flat)
    routed.install()
    with torch.no_grad(), routed.rows(branches, places):
        y = root(x)
    routed.remove()
    return y


def at_gains(layer: nn.Module, kinds, gains: list[float], x: Tensor) -> Tensor:
    """The layer's output with its weight really changed, float64; x is one entry."""
    weight = layer.weight.detach().double()
    bias = torch.zeros(weight.shape[0], dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
    for seed, (kind, gain) in enumerate(zip(kinds, gains, strict=True)):
        if gain:
            weight, bias = make_ops(kind, layer.weight.shape, seed)[1](weight, bias, gain)
    if isinstance(layer, nn.Linear):
        return nn.functional.linear(x.double(), weight, bias)
    convolve = nn.functional.conv2d if weight.ndim == 4 else nn.functional.conv3d
    return convolve(x.double()[None], weight, bias, layer.stride, layer.padding)[0]


def token_reference(layer: nn.Module, branches, x: Tensor, gain: Tensor, kinds=LORAS) -> Tensor:
    """Token by token; gain [rows, tokens, adapters]."""
    return torch.stack([torch.stack([
        at_gains(layer, kinds, [s * float(g) for s, g in zip(branch.gains, gain[row, t], strict=True)], x[row, t])
        for t in range(x.shape[1])]) for row, branch in enumerate(branches)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_of_a_picture(layout):
    torch.manual_seed(0)
    layer, branches = nn.Linear(6, 8), LAYOUTS[layout]
    x, m = torch.randn(len(branches), 16, 6), maps()
    places = Places(m, (0,) * len(branches), locate=lambda name, tokens: (Segment("picture", 16, (1, 4, 4)),))
    want = token_reference(layer, branches, x, m.flatten(2).mT.expand(len(branches), -1, -1))
    assert close(routed_output(layer, LORAS, branches, x, places), want)


@pytest.mark.parametrize(("kinds", "branch", "beneath", "said"), [
    (("lora", "dora out", "lora"), ALL, 0, ["1"]), (("dora out", "lora", "lora"), ALL, 0, []),
    (("lora", "dora out", "lora"), ALONE[1], 0, []), (("lora", "dora out", "lora"), ALL, 1, [])],
    ids=["before it", "behind it", "alone", "everywhere"])
def test_a_dora_over_loras_at_places_is_told(kinds, branch, beneath, said):
    """Its magnitudes are those of one weight, which holds what is before it."""
    torch.manual_seed(0)
    told: list = []
    places = Places(maps()[:, beneath:], (0,), locate=lambda name, tokens: (Segment("picture", 16, (1, 4, 4)),),
                    beneath=beneath)
    routed_output(nn.Linear(6, 8), kinds, [branch], torch.randn(1, 16, 6), places, told=told)
    assert [(adapter, layer) for adapter, layer, _ in told] == [(adapter, "0") for adapter in said]
    assert all("as if they did everywhere" in reason for *_, reason in told)


@pytest.mark.parametrize("first", ["text", "picture"])
def test_text_and_picture_in_one_stream(first):
    """Each row has a picture and a text of its own; tokens that are neither get all."""
    torch.manual_seed(0)
    layer, branches = nn.Linear(6, 8), LAYOUTS["composite"]
    m, words = maps(2), torch.rand(2, 3, 5)
    segments = [Segment("text", 5), Segment("picture", 16, (1, 4, 4)), Segment("other", 2)]
    if first == "picture":
        segments = [segments[1], segments[0], segments[2]]
    places = Places(m, (1, 0, 1), words, (0, 1, 1), lambda name, tokens: tuple(segments))
    x = torch.randn(3, 23, 6)
    parts = {"text": words.mT[[0, 1, 1]], "picture": m.flatten(2).mT[[1, 0, 1]], "other": torch.ones(3, 2, 3)}
    gain = torch.cat([parts[segment.kind] for segment in segments], dim=1)
    assert close(routed_output(layer, LORAS, branches, x, places), token_reference(layer, branches, x, gain))


@pytest.mark.parametrize("kinds", [LORAS, ("glora", "dora out", "lora")], ids=["side by side", "in order"])
def test_layers_without_a_dimension_for_entries(kinds):
    """One row, whose tokens come first: as the same layer with that dimension, and with places of ones as without any,
    bit for bit. Also of layers that see no tokens."""
    torch.manual_seed(0)
    layer, m, words = nn.Linear(6, 8), maps(), torch.rand(1, 3, 5)
    segments = Segment("text", 5), Segment("picture", 16, (1, 4, 4)), Segment("other", 2)
    places, ones = (Places(maps, (0,), tokens, (0,), lambda name, tokens: segments if tokens == 23 else ())
                    for maps, tokens in ((m, words), (torch.ones_like(m), torch.ones_like(words))))
    for x in (torch.randn(23, 6), torch.randn(4, 6)):
        for each in (places, ones, None):
            found = routed_output(layer, kinds, [ALL], x, each, flat=True)
            assert torch.equal(found, routed_output(layer, kinds, [ALL], x[None], each)[0])
        if kinds == LORAS:
            assert torch.equal(found, routed_output(layer, kinds, [ALL], x, ones, flat=True))
    x, gain = torch.randn(23, 6), torch.cat([words.mT, m.flatten(2).mT, torch.ones(1, 2, 3)], dim=1)
    want = token_reference(layer, [ALL], x[None], gain)[0]
    assert kinds != LORAS or close(routed_output(layer, kinds, [ALL], x, places, flat=True), want)


@pytest.mark.parametrize("kinds", [LORAS, ("lora", "lora", "slice"), ("glora", "dora out", "lora")], ids=str)
def test_tokens_in_several_dimensions(kinds):
    """Frames, rows and columns apart, as Cosmos Predict 2 and Anima have them: as the same tokens in one dimension, and
    so when places change."""
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 8), torch.randn(2, 12, 6)
    places, flat = (Places(maps(grid=(3, 2, 2)), (0, 0), locate=lambda name, tokens: (
        Segment("picture", 12, (3, 2, 2)),)) for _ in range(2))
    bank = Bank([{"0": [spanned(op, (0, 0, 4)) for op in make_ops("lora", (4, 6), seed)[0]] if kind == "slice" else
                  make_ops(kind, layer.weight.shape, seed)[0]} for seed, kind in enumerate(kinds)])
    root = nn.Sequential(layer)
    routed = RoutedForwards(root, bank, lambda name: root.get_parameter(name).detach().float())
    routed.install()

    def call(x: Tensor, places: Places) -> Tensor:
        with torch.no_grad(), routed.rows([ALL, ALL], places):
            return root(x)

    for seed in (1, 2):
        for each in (places, flat):
            each.update(maps(grid=(3, 2, 2), seed=seed))
        want = call(x, flat)
        assert close(call(x.unflatten(1, (3, 2, 2)), places), want.unflatten(1, (3, 2, 2)))
        assert not torch.allclose(want, layer(x), atol=0.05)
    routed.remove()


@pytest.mark.parametrize(("count", "tokens", "want"), [(6, 3, [0, 1, 2, 0, 1, 2]), (5, 3, [0, 1, 2, None, None]),
                                                       (2, 3, [0, 1])], ids=["repeated", "padded", "cut"])
def test_texts_that_were_made_longer_or_shorter(count, tokens, want):
    """The host repeats texts of unequal length to their common multiple; models pad them, or take so many tokens."""
    words = torch.rand(1, 3, tokens)
    places = Places(maps(), (0,), words, (0,))
    found = places.on_tokens((Segment("text", count),), (0,))
    assert torch.equal(found[0], torch.stack([torch.ones(3) if t is None else words[0, :, t] for t in want]))


@pytest.mark.parametrize(("grid", "size"), [((4, 4), (4, 4)), ((8, 4), (4, 2)), ((4, 4), (3, 3)), ((2, 2), (6, 6))],
                         ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolutions(layout, grid, size):
    """One map per size of a layer's output: at each place the convolution with that place's weight."""
    torch.manual_seed(0)
    layer, branches = nn.Conv2d(4, 8, 3, padding=1), LAYOUTS[layout]
    x, m = torch.randn(len(branches), 4, *size), maps(grid=grid)
    resized = nn.functional.adaptive_avg_pool2d(m, size) if grid[0] >= size[0] else nn.functional.interpolate(
        m, size=size, mode="bilinear")
    want = torch.stack([at_gains(layer, LORAS, [0.0] * 3, entry) for entry in x])
    for row, branch in enumerate(branches):
        for i in range(size[0]):
            for j in range(size[1]):
                gains = [s * float(g) for s, g in zip(branch.gains, resized[0, :, i, j], strict=True)]
                want[row, :, i, j] = at_gains(layer, LORAS, gains, x[row])[:, i, j]
    assert close(routed_output(layer, LORAS, branches, x, Places(m, (0,) * len(branches))), want)


@pytest.mark.parametrize(("size", "patch"), [((7, 9), (2, 2)), ((135, 240), (2, 2)), ((13, 8), (4, 4)),
                                             ((3, 5, 7), (2, 2, 2)), ((3, 6, 5), (1, 2, 2))], ids=str)
def test_tokens_have_the_gains_of_their_own_places(size, patch):
    """Of sizes that the host fills up to whole patches: no token takes of its neighbour's places."""
    m = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).round()
    grid = tuple(-(-n // p) for n, p in zip(size, patch, strict=True))
    found = Places(m, (0,)).on_grid(grid, (0,))
    for token in product(*map(range, grid)):
        own = tuple(slice(t * p, (t + 1) * p) for t, p in zip(token, patch, strict=True))
        assert torch.allclose(found[(0, slice(None), *token)], m[(0, slice(None), *own)].flatten(1).mean(dim=1))


def test_frames_with_maps_of_their_own():
    """In one token axis, frames first; in a 3-D convolution; folded into the batch."""
    torch.manual_seed(0)
    m, branches = maps(grid=(3, 2, 2)), LAYOUTS["merged"]
    layer, x = nn.Linear(6, 8), torch.randn(2, 12, 6)
    places = Places(m, (0, 0), locate=lambda name, tokens: (Segment("picture", tokens, (tokens // 4, 2, 2)),))
    want = token_reference(layer, branches, x, m.flatten(2).mT.expand(2, -1, -1))
    assert close(routed_output(layer, LORAS, branches, x, places), want)
    folded_x = x.unflatten(1, (3, 4)).flatten(0, 1)
    assert close(routed_output(layer, LORAS, branches, folded_x, places), want.unflatten(1, (3, 4)).flatten(0, 1))
    tiled = x.unflatten(1, (3, 4)).transpose(0, 1).flatten(0, 1)
    found = routed_output(layer, LORAS, branches, tiled, places, lambda name, entries, rows: "tile")
    assert close(found, want.unflatten(1, (3, 4)).transpose(0, 1).flatten(0, 1))
    conv, x = nn.Conv3d(4, 8, (1, 1, 1)), torch.randn(2, 4, 3, 2, 2)
    as_tokens = nn.Linear(4, 8)
    as_tokens.load_state_dict({"weight": conv.weight.flatten(1), "bias": conv.bias})
    want = torch.stack([at_gains(conv, LORAS, [0.0] * 3, entry) for entry in x])
    for i in range(12):
        gains = [s * float(g) for s, g in zip(ALL.gains, m.flatten(2)[0, :, i], strict=True)]
        for row in range(2):
            want.flatten(2)[row, :, i] = at_gains(conv, LORAS, gains, x[row]).flatten(1)[:, i]
    assert close(routed_output(conv, LORAS, branches, x, Places(m, (0, 0))), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_a_map_of_zeros_in_a_region_leaves_the_base_there(kind, layer):
    """And ones elsewhere leave what is there without a map: for every kind, beside another."""
    torch.manual_seed(0)
    kinds = (kind, "lora", "lora")
    m = torch.ones(1, 3, 4, 4)
    m[..., :2] = 0
    if layer == "linear":
        module, x = nn.Linear(8, 8), torch.randn(2, 16, 8)
        grid = lambda y: y.unflatten(1, (4, 4)).movedim(-1, 1)  # noqa: E731
    else:
        module, x = nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 4, 4)
        grid = lambda y: y  # noqa: E731
    places = Places(m, (0, 0), locate=lambda name, tokens: (Segment("picture", 16, (1, 4, 4)),))
    plain = grid(module(x).detach())
    without = grid(routed_output(module, kinds, [ALL, ALL], x, None))
    found = grid(routed_output(module, kinds, [ALL, ALL], x, places))
    tolerance = 1e-6 if kind in ("lora", "lora+bias", "dense") else 1e-5
    assert torch.allclose(found[..., :2], plain[..., :2], atol=tolerance)
    assert torch.allclose(found[..., 2:], without[..., 2:], atol=tolerance)
    assert not torch.allclose(found[..., 2:], plain[..., 2:], atol=0.05)
    if kind == "lora":
        assert torch.equal(found[..., :2], plain[..., :2])


@pytest.mark.parametrize("branches", [[ALL, ALL], [EQUAL, EQUAL], [ALONE[1]] * 2], ids=["merged", "equal", "alone"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_a_map_of_ones_is_no_map_bit_for_bit(layer, dtype, branches):
    torch.manual_seed(0)
    module, x = (nn.Linear(8, 8), torch.randn(2, 16, 8)) if layer == "linear" else (
        nn.Conv2d(8, 8, 3, padding=1), torch.randn(2, 8, 4, 4))
    module, x = module.to(dtype), x.to(dtype)
    places = Places(torch.ones(1, 3, 4, 4), (0, 0), locate=lambda name, tokens: (Segment("picture", 16, (1, 4, 4)),))
    assert torch.equal(routed_output(module, LORAS, branches, x, places),
                       routed_output(module, LORAS, branches, x, None))


def test_other_maps_come_into_the_same_tensors():
    """What was recorded or compiled reads where it read before; sizes are made once, not at every call."""
    torch.manual_seed(0)
    layer, conv = nn.Linear(6, 8), nn.Conv2d(4, 8, 3, padding=1)
    root = nn.ModuleDict({"tokens": layer, "conv": conv})
    bank = Bank([{name: make_ops("lora", root[name].weight.shape, i)[0] for name in root} for i in range(3)])
    routed = RoutedForwards(root, bank)
    routed.install()
    words = torch.rand(1, 3, 5)
    places = Places(maps(seed=1), (0, 0), words.clone(), (0, 0),
                    lambda name, tokens: (Segment("text", 5), Segment("picture", 4, (1, 2, 2))))
    x, pixels = torch.randn(2, 9, 6), torch.randn(2, 4, 4, 4)

    def call(places: Places) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), routed.rows([ALL, ALL], places):
            return root["tokens"](x), root["conv"](pixels)

    first = call(places)
    kept = {key: tensor.data_ptr() for key, (tensor, *_) in places._kept.items()}
    places.update(maps(seed=2), words * 0.5)
    second = call(places)
    assert {key: tensor.data_ptr() for key, (tensor, *_) in places._kept.items()} == kept
    other = Places(maps(seed=2), (0, 0), words * 0.5, (0, 0), places.locate)
    for y, z, before in zip(second, call(other), first, strict=True):
        assert torch.equal(y, z) and not torch.allclose(y, before)
    routed.remove()


@pytest.mark.parametrize("beneath", [0, 2])
def test_other_words_of_a_further_text_alone(beneath):
    """Those of the model's first text are not known. Adapters that act everywhere keep all of it."""
    words = torch.rand(1, 3, 5)
    places = Places(maps(), (0,), None, (0,), more={"t5": words.clone()}, beneath=beneath)
    found = places.on_tokens((Segment("text", 5, source="t5"),), (0,))
    places.update(maps(), more={"t5": words / 2})
    assert torch.equal(found, torch.cat([torch.ones(1, 5, beneath), words.mT / 2], dim=2))
    places = Places(maps(), (0,), words, (0,))
    assert (places.on_tokens((Segment("text", 5, source="another"),), (0,)) == 1).all()


@pytest.mark.parametrize("grid", [(4, 4), (3, 4, 4)], ids=["pictures", "films"])
def test_gains_are_kept_by_what_they_are_of(grid):
    """Of other tokens, rows or sizes, and after updates: as if nothing else had been asked for before. What is made of
    words alone is not made anew where these stay: an update is done in every step."""
    text, picture = Segment("text", 5), Segment("picture", 4, (1, 2, 2))
    asked = [(Places.on_tokens, (text,), (0, 1, 2)), (Places.on_tokens, (text,), (2, 0)),
             (Places.on_tokens, (text, picture), (0, 1, 2)), (Places.on_tokens, (picture, text), (0, 1, 2)),
             (Places.on_tokens, (text, picture), (2, 0)), (Places.on_grid, (2, 2), (0, 1, 2)),
             (Places.on_grid, (2, 3), (0, 1, 2)), (Places.on_grid, (3, 2, 2), (1, 2)),
             (Places.on_grid, (2, 2), (0, 0, 0, 1, 1, 1))]

    def made(seed: int, words: Tensor) -> Places:
        return Places(maps(2, grid, seed), (0, 1, 0), words.clone(), (1, 0, 1))

    words = torch.rand(2, 3, 5)
    places = made(1, words)
    kept = [ask(places, of, rows) for ask, of, rows in asked]
    for seed, new in ((2, words), (3, words / 2)):
        places.update(maps(2, grid, seed), None if new is words else new)
        for tensor, (ask, of, rows) in zip(kept, asked, strict=True):
            assert torch.equal(tensor, ask(made(seed, new), of, rows))
            assert ask(places, of, rows).data_ptr() == tensor.data_ptr()
    assert places.on_tokens((picture,), (0, 1, 2)).data_ptr() == places.on_grid((2, 2), (0, 1, 2)).data_ptr()
    kept[0].zero_()
    places.update(maps(2, grid))
    assert not kept[0].any()
    if len(grid) == 2:
        one = maps(2, grid)[[0, 1, 0]]
        assert torch.equal(kept[6], nn.functional.adaptive_avg_pool2d(one, (2, 3)))
        assert torch.equal(kept[7], nn.functional.avg_pool2d(one[[1, 2]], 2).unsqueeze(2).expand(-1, -1, 3, -1, -1))


def test_layers_without_places_act_everywhere_and_unknown_ones_say_so():
    torch.manual_seed(0)
    layer, told = nn.Linear(6, 8), []
    vectors, tokens = torch.randn(2, 6), torch.randn(2, 7, 6)
    places = Places(torch.zeros(1, 3, 4, 4), (0, 0), locate=lambda name, tokens: None)
    for x, problems in ((vectors, 0), (tokens, 1)):
        told.clear()
        found = routed_output(layer, LORAS, [ALL, ALL], x, places, told=told)
        assert torch.equal(found, routed_output(layer, LORAS, [ALL, ALL], x, None))
        assert len(told) == problems
    assert "not known" in told[0][2]
