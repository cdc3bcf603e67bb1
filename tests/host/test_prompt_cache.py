"""HiDream-O1 keeps keys and values of its prompt from call to call: they must be those of the LoRAs at work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.look.leave_one_out import leave_one_out
from lora_ensemble.host.look.spectrum import Sampling
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.switch import Switch

from .builders import lora, merge, method, same, sample, shapes
from .models import FAMILIES, Family, base

SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             head_dim=32)
SIGHT = dict(hidden_size=32, num_heads=2, intermediate_size=32, depth=1, deepstack_visual_indexes=())


class Pixels(Family):
    """A family that takes the tokens of its prompt."""

    def cond(self, seed: int, tokens: int = 5, **options) -> list:
        ids = torch.randint(10, 1000, (1, tokens), generator=torch.Generator().manual_seed(seed))
        return [[torch.zeros(1, tokens, self.context), {"text_input_ids": ids, **options}]]


O1 = Pixels("HiDream-O1", "HiDreamO1", dict(image_model="hidream_o1", text_config_overrides=SMALL,
                                            vision_config_overrides=SIGHT), 3, 64)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setitem(FAMILIES, "HiDream-O1", O1)
    return base("HiDream-O1")


@pytest.fixture
def pair(model, loras):
    layers = shapes(model, lambda name: name.startswith("language_model.layers."))
    return [LoRASpec(loras(lora(layers, seed)), 0.7, 0) for seed in (1, 2)]


def drawn(model, steps: int = 2):
    model.model.diffusion_model.clear_kv_cache()
    return again(model, steps)


def again(model, steps: int = 2):
    return sample(model, "HiDream-O1", size=64, steps=steps)


@contextmanager
def never_kept(model) -> Iterator[None]:
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: module.clear_kv_cache())
    try:
        yield
    finally:
        handle.remove()


def test_the_model_does_keep_its_prompt(model):
    drawn(model)
    assert model.model.diffusion_model._kv_cache_entries


def test_a_run_leaves_nothing_of_its_loras(model, pair):
    plain = drawn(model)
    assert not torch.equal(drawn(merge(model, pair)), plain)
    assert torch.equal(again(model), plain)


def test_a_run_takes_nothing_from_the_one_before(model, pair):
    want = drawn(merge(model, pair[1:]))
    drawn(merge(model, pair[:1]))
    assert torch.equal(again(merge(model, pair[1:])), want)


def test_taking_turns(model, pair):
    """Switch with a step per LoRA: the second step is the second LoRA's, prompt included."""
    turns = method(model, pair, lambda strengths: Switch(strengths, 1))
    ours = drawn(turns)
    with never_kept(model):
        want = drawn(turns)
    same(ours, want, drawn(model))


def test_side_by_side(model, pair):
    """The rows of a batch keep what is theirs."""
    plain = drawn(model)
    identical = drawn(method(model, pair[:1] * 2, Composite))
    same(identical, drawn(merge(model, pair[:1])), plain)


def test_a_lora_that_is_left_out_is_left_out_of_the_prompt(model, pair):
    """What did each LoRA do? evaluates the model beside a run, with other LoRAs in a prompt that has been kept."""
    how = Sampling(O1.cond(11), O1.cond(12), torch.zeros_like(O1.noise(1, 64)), 5, 2, 3.0, "euler", "normal")
    found = leave_one_out(merge(model, pair), how)
    assert found.batches == [1] * 4 and "in an order that is not known" in found.why
    with never_kept(model):
        want = leave_one_out(merge(model, pair), how)
    assert torch.tensor(found.shares).allclose(torch.tensor(want.shares), rtol=1e-3) and min(want.shares[0]) > 0
