"""Strengths that change from step to step: what layers do is made once, and what they do it with follows."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.forwards import RoutedForwards
from lora_ensemble.engine.gains import OFF, ONE, Gains
from lora_ensemble.engine.positions import Places, Segment
from lora_ensemble.kernels.branch import Branch, one_hot
from lora_ensemble.tests.reference import close, expected, make_ops
from lora_ensemble.tests.test_engine_programs import watched
from lora_ensemble.tests.test_engine_rows import adapters, model  # noqa: F401  (a fixture)
from lora_ensemble.tests.test_positions import maps
from torch import Tensor, nn

FADING = [(0.7, 0.9, fade) for fade in (0.8, 0.6, 0.35, -0.2)]
"""Strengths of three LoRAs, of which the last one's window closes."""
LAYOUTS = {
    "merged": lambda s: [Branch(s)] * 2, "alone": lambda s: [one_hot(s, 2)] * 2,
    "composite": lambda s: [one_hot(s, i) for i in range(3) for _ in range(2)],
    "scattered": lambda s: [Branch(s), one_hot(s, 2), Branch((0.0,) * 3), Branch(s)],
    "at one strength": lambda s: [Branch((s[2],) * 3)] * 2,
    "other strengths in other rows": lambda s: [Branch(s), Branch((s[2], 0.0, 0.5))],
    "one beside two": lambda s: [one_hot(s, 0), Branch((0.0, s[2], s[1]))],
    "a choice per layer": lambda s: [Branch((s[0], 0.0, s[2]), (("linear", (0.0, s[1], s[2])),))] * 2,
}
KINDS = {"low-rank": ("lora", "lora wide", "lora"), "of two parts": ("lora parts", "lora", "two parts"),
         "products": ("kron", "lora+bias", "kron"), "in order": ("lora", "oft", "glora"),
         "a DoRA above": ("dense", "dora out", "dora in"), "a DoRA beneath": ("dora out", "lora", "lora")}


def placed(seed: int = 0) -> Places:
    """Places of two rows, each with a picture of its own."""
    return Places(maps(2, seed=seed), (0, 1), locate=lambda name, tokens: (Segment("picture", 16, (1, 4, 4)),))


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Layers whose program was made, one per program."""
    return watched(monkeypatch, "_program")


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Layers that asked for their program, as those do that have none yet for the batch."""
    return watched(monkeypatch, "program")


@pytest.fixture
def routed() -> Iterator[RoutedForwards]:
    """Three LoRAs on one layer, the strengths of which a test changes."""
    torch.manual_seed(0)
    root = nn.Sequential(nn.Linear(6, 8))
    found = RoutedForwards(root, Bank([{"0": make_ops("lora", (8, 6), seed)[0]} for seed in range(3)]))
    found.install()
    yield found
    found.remove()


@pytest.mark.parametrize("kinds", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_step_has_its_own_strengths(model, layout, kinds):  # noqa: F811
    """Against weights that are really changed: there and back, and while a second batch of every step has others."""
    bank, changes = adapters(model, kinds)
    steps = [*FADING, *reversed(FADING)]
    x = torch.randn(len(LAYOUTS[layout](steps[0])), 4, 5, 6)
    routed = RoutedForwards(model, bank)
    routed.install()
    found = []
    with torch.no_grad():
        for strengths in steps:
            for times in (1.0, 0.5):
                branches = LAYOUTS[layout](tuple(times * strength for strength in strengths))
                with routed.rows(branches):
                    found.append((branches, model(x)))
    routed.remove()
    for branches, out in found:
        assert close(out, expected(model, changes, branches, x))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "a choice per layer"])
@pytest.mark.parametrize("kinds", [KINDS[name] for name in ("low-rank", "products", "in order")], ids="-".join)
def test_a_strength_that_changes_needs_no_program_of_its_own(model, layout, kinds, asked):  # noqa: F811
    """Nor is one looked up. Guard: hundreds of layers whose products are chosen and put together anew in each step in
    which a LoRA fades."""
    bank, _ = adapters(model, kinds)
    x = torch.randn(len(LAYOUTS[layout](FADING[0])), 4, 5, 6)
    routed = RoutedForwards(model, bank)
    routed.install()
    counts = []
    with torch.no_grad():
        for strengths in FADING:
            with routed.rows(LAYOUTS[layout](strengths)):
                model(x)
            counts.append(len(asked))
    routed.remove()
    assert counts == [2] * len(FADING) and sorted(asked) == ["conv", "linear"]


def test_what_a_dora_does_is_looked_up_where_strengths_have_changed_alone(model, asked):  # noqa: F811
    bank, _ = adapters(model, KINDS["a DoRA above"])
    routed = RoutedForwards(model, bank)
    routed.install()
    counts = []
    with torch.no_grad():
        for strengths in (FADING[0], FADING[0], FADING[1], FADING[1], FADING[0]):
            with routed.rows([Branch(strengths)] * 2):
                model(torch.zeros(2, 4, 5, 6))
            counts.append(len(asked))
    routed.remove()
    assert counts == [2, 2, 4, 4, 6]


def test_nothing_is_kept_beyond_a_run(routed):
    """Guard: places and gains on a device for as long as the model is."""
    places = placed()
    with torch.no_grad(), routed.rows([Branch(FADING[0])] * 2, places):
        routed.root(torch.zeros(2, 16, 6))
    gone = [weakref.ref(each) for each in (places, *(tensor for tensor, *_ in places._kept.values()))]
    assert len(gone) > 2
    gone += [weakref.ref(tensor) for tensor in routed._gains._tensors.values()]
    routed.remove()
    del places
    gc.collect()
    assert [each() for each in gone] == [None] * len(gone)


def test_a_choice_per_layer_finds_what_layers_did_at_other_strengths(model, made):  # noqa: F811
    bank, _ = adapters(model)
    x = torch.randn(2, 4, 5, 6)
    routed = RoutedForwards(model, bank)
    routed.install()
    with torch.no_grad():
        for strengths in FADING:
            with routed.rows(LAYOUTS["a choice per layer"](strengths)):
                model(x)
    routed.remove()
    assert sorted(made) == ["conv", "linear"]


def test_what_is_off_one_or_equal_is_another_program(routed, made):
    """Each is of other products: without the LoRA, without a number, and with one number for all."""
    x = torch.randn(2, 5, 6)
    with torch.no_grad():
        for strengths in [(0.7, 0.9, 0.4), (0.7, 0.9, 0.0), (0.7, 0.9, 0.9), (0.7, 0.9, 1.0), (0.7, 0.9, 0.3)]:
            with routed.rows([Branch(strengths)] * 2):
                found = routed.root(x)
            changes = [{"0": make_ops("lora", (8, 6), seed)[1]} for seed in range(3)]
            plain = nn.Sequential(nn.Linear(6, 8))
            plain.load_state_dict(routed.root.state_dict())
            assert close(found, expected(plain, changes, [Branch(strengths)] * 2, x))
    assert len(made) == 4


@pytest.mark.parametrize("order", ["strengths first", "maps first"])
def test_gains_at_places_follow_strengths_and_maps(routed, order):
    """In place: each step as in a run of its own, and not a tensor more is kept than after the first."""
    x, held, kept = torch.randn(2, 16, 6), placed(), None
    with torch.no_grad():
        for step, strengths in enumerate([*FADING, FADING[0]]):
            branches = [Branch(strengths), Branch((strengths[2], 0.0, 0.5))]
            if order == "maps first":
                held.update(maps(2, seed=step))
            with routed.rows(branches, held):
                if order == "strengths first":
                    held.update(maps(2, seed=step))
                found = routed.root(x)
            with routed.rows(branches, placed(step)):
                want = routed.root(x)
            assert torch.equal(found, want)
            addresses = {key: tensor.data_ptr() for key, (tensor, *_) in held._kept.items()}
            assert kept is None or addresses == kept
            kept = addresses


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)],
                         ids=["inference first", "inference last"])
@pytest.mark.parametrize("where", [lambda: None, placed], ids=["everywhere", "at places"])
def test_strengths_change_in_and_out_of_inference(routed, where, modes):
    """As under nodes that leave the mode in which ComfyUI samples, for some evaluations of a run."""
    x, branches = torch.randn(2, 16, 6), [[Branch(strengths), one_hot(strengths, 2)] for strengths in FADING[:2]]
    places, fresh = where(), where()
    for mode, batch in zip((*modes, *modes), branches * 2, strict=True):
        with mode():
            with routed.rows(batch, places):
                found = routed.root(x)
            assert found.is_inference() == (mode is torch.inference_mode)
    with torch.inference_mode(), routed.rows(branches[1], fresh):
        assert torch.equal(found, routed.root(x))


def test_a_batch_within_another_leaves_that_its_strengths(routed):
    """As where a guidance evaluates the model inside the evaluation of another."""
    x = torch.randn(2, 5, 6)
    first, second = ([Branch(strengths), one_hot(strengths, 2)] for strengths in FADING[:2])

    def alone(branches: list[Branch]) -> Tensor:
        with routed.rows(branches):
            return routed.root(x)

    with torch.no_grad():
        wants = alone(first), alone(second)
        with routed.rows(first):
            assert torch.equal(routed.root(x), wants[0])
            assert torch.equal(alone(second), wants[1])
            assert torch.equal(routed.root(x), wants[0])
    assert not torch.equal(*wants)


@pytest.mark.parametrize("layer", ["0", ""], ids=["a choice per layer", "one for all"])
def test_gradients_of_two_batches_of_other_strengths(routed, layer):
    """After a batch without gradients. Guard: what the first needs on the way back, overwritten for the second."""
    x = torch.randn(2, 5, 6, requires_grad=True)
    batches = [[Branch((0.5,) * 3, ((layer, strengths),)) if layer else Branch(strengths), one_hot(strengths, 2)]
               for strengths in FADING[:2]]
    outs, wants = [], []
    with torch.no_grad():
        for branches in batches:
            with routed.rows(branches):
                wants.append(routed.root(x))
    for branches in batches:
        with routed.rows(branches):
            outs.append(routed.root(x))
    assert torch.equal(torch.stack(outs), torch.stack(wants))
    both, = torch.autograd.grad(sum(outs).square().sum(), x)
    apart = []
    for branches in batches:
        with routed.rows(branches):
            apart.append(routed.root(x))
    assert both.abs().sum() > 0
    assert torch.allclose(both, torch.autograd.grad((apart[0] + apart[1]).square().sum(), x)[0])


def test_marks_are_those_of_adapters_whoever_else_acts():
    """What one adapter has is called alike, so that programs are found again where another is off or on."""
    gains = Gains()
    with torch.no_grad():
        first = gains.marked([Branch((0.7, 0.9, 0.0)), Branch((0.0, 0.9, 1.0))])
        second = gains.marked([Branch((0.0, 0.4, 0.2))])
    assert first.of[0.7, 0.9, 0.0][1] == first.of[0.0, 0.9, 1.0][1] == second.of[0.0, 0.4, 0.2][1]
    assert first.of[0.7, 0.9, 0.0][2] == OFF and first.of[0.0, 0.9, 1.0][2] == ONE
    assert len({first.of[0.7, 0.9, 0.0][0], first.of[0.7, 0.9, 0.0][1], second.of[0.0, 0.4, 0.2][2]}) == 3
    gains.hold(second)
    assert gains.values(second.of[0.0, 0.4, 0.2]) == (0.0, 0.4, 0.2)


def test_tensors_are_filled_where_their_gains_have_changed_and_nowhere_else():
    gains, like = Gains(), torch.zeros(1)
    with torch.no_grad():
        batches = [gains.marked([Branch((0.5, fade))]) for fade in (0.25, 0.75)]
        (row,) = batches[0].of.values()
        gains.hold(batches[0])
        both, fixed = (gains.tensor((2, 1), (marks,), 0, 1, like) for marks in (row, (row[0], ONE)))
        wide = gains.tensor((2, 1), (row,), 0, 1, like, (4, 3, 3))
        filled = []
        gains.after({row[0]}, lambda: filled.append("first"))
        gains.after({OFF, ONE}, lambda: filled.append("neither"))
        gains.after({ONE, row[1]}, lambda: filled.append("second"))
        addresses, versions = [t.data_ptr() for t in (both, fixed, wide)], fixed._version
        gains.hold(batches[1])
    assert both.flatten().tolist() == [0.5, 0.5, 0.75] and fixed.flatten().tolist() == [0.5, 0.5, 1.0]
    assert wide[2, 1].tolist() == [0.5, 0.5, 0.75] and filled == ["second"] and fixed._version == versions
    assert addresses == [t.data_ptr() for t in (both, fixed, wide)]
