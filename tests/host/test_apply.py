"""What a method node does besides routing: text encoders, baking, and what no forward can express."""

from __future__ import annotations

from dataclasses import replace

import comfy.lora
import comfy.sd
import pytest
import torch
from lora_ensemble.host.compose.apply import apply_method, bake
from lora_ensemble.host.compose.composition import KEY, record_of
from lora_ensemble.host.compose.measure import subjects_of
from lora_ensemble.host.files.ensemble import ALWAYS, LoRASpec, Mask
from lora_ensemble.host.look.info import infos
from lora_ensemble.host.look.info import told as told_of
from lora_ensemble.host.look.letters import short_names
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.switch import Switch
from lora_ensemble.nodes import baselines
from lora_ensemble.nodes.baselines import LoRAEnsembleSwitch
from lora_ensemble.nodes.cmlora import LoRAEnsembleCMLoRA
from lora_ensemble.nodes.selection import LoRAEnsembleLayerMap

from .builders import (
    Rand,
    file_of,
    kohya,
    lora,
    merge,
    method,
    plain,
    same,
    sample,
    shapes,
    stock,
    text_layers,
    three,
)
from .kinds import glora
from .models import base, small_clip


@pytest.fixture(scope="module")
def clip():
    return small_clip()


@pytest.mark.parametrize("mode", ["runtime", "baked"])
def test_a_part_for_a_text_encoder_that_is_not_connected_is_named(mode, loras, clip, caplog):
    """Nobody who forgot to connect it hears of it otherwise. Nodes that take none, and look alone, say nothing."""
    model = base("SD15")
    spec = LoRASpec(loras(with_text(clip, shapes(model), 1)), 0.8, 1.0)
    for given, changes, told in ((None, {}, 1), (clip, {}, 0), (None, {"strength_clip": 0.0}, 0)):
        caplog.clear()
        baselines.LoRAEnsembleMerge.execute(model, (replace(spec, **changes),), mode, clip=given)
        lines = [line for line in caplog.messages if "since no clip is connected" in line]
        assert len(lines) == told and all(f"LoRA '{spec.name}'" in line and "have no effect" in line for line in lines)
    caplog.clear()
    text = told_of(infos(model, None, (spec,), "LoRA Info"), "SD15")
    assert "since no clip" not in text and "which is not connected" in text
    pair = (replace(spec, role="character"), LoRASpec(loras(lora(shapes(model), 2)), 0.5, 0, "style"))
    LoRAEnsembleLayerMap.execute(model, pair)
    assert caplog.messages == []


def with_text(clip, layers: dict, seed: int) -> dict:
    """A file for both the diffusion model and the text encoder."""
    te = lora(text_layers(clip), seed, name=lambda layer: "lora_te_text_model_" + layer.replace(".", "_"))
    return {**lora(layers, seed), **te}


def patched(clip) -> dict[str, torch.Tensor]:
    """All weights of the text encoder with their patches."""
    return {key: comfy.lora.calculate_weight(clip.patcher.patches.get(key, []), value.clone(), key)
            for key, value in clip.cond_stage_model.state_dict().items()}


@pytest.mark.parametrize("how", ["runtime", "baked"])
def test_text_encoder_deltas_are_merged_as_the_loader_does(how, clip, loras):
    """Each at its clip strength, whatever the method; 0 leaves it out, also where the LoRA acts on the model."""
    model = base("SD15")
    files = [loras(with_text(clip, shapes(model), seed)) for seed in (1, 2, 3)]
    ensemble = tuple(LoRASpec(name, *strengths) for name, strengths in zip(files, ((0.8, 0.5), (0.0, 0.7), (0.6, 0.0)),
                                                                           strict=True))
    stock_model, stock_clip = model, clip
    for spec in ensemble:
        stock_model, stock_clip = comfy.sd.load_lora_for_models(stock_model, stock_clip, file_of(spec),
                                                                spec.strength_model, spec.strength_clip)
    if how == "baked":
        ours, our_clip, _ = bake(model, clip, ensemble, "Merge LoRAs")
        assert torch.equal(sample(ours), sample(stock_model))
    else:
        ours, our_clip = apply_method(model, clip, ensemble, plain(Composite), "Composite LoRAs")
        assert ours.get_attachment(KEY).applied[0].names == (files[0], files[2])
    reference, before, got = patched(stock_clip), patched(clip), patched(our_clip)
    assert any(not torch.equal(reference[key], before[key]) for key in reference)
    assert all(torch.equal(got[key], reference[key]) for key in reference)
    assert not clip.patcher.patches, "the CLIP that came in stays as it was"
    assert not ours.get_attachment(KEY) or not ours.get_attachment(KEY).applied[0].problems


def test_without_a_clip(clip, loras):
    """Text-encoder keys are left alone, and named; a file that holds nothing else is refused."""
    model = base("SD15")
    spec = LoRASpec(loras(with_text(clip, shapes(model), 1)), 0.8, 1.0)
    ours, nothing = apply_method(model, None, (spec,), plain(Composite), "Composite LoRAs")
    assert nothing is None
    assert ["since no clip is connected" in line for line in ours.get_attachment(KEY).applied[0].problems] == [True]
    text_only = LoRASpec(loras(with_text(clip, {}, 1)), 0.8, 1.0)
    with pytest.raises(ValueError, match="changes the text encoder alone, .*Connect a CLIP"):
        apply_method(model, None, (text_only,), plain(Composite), "Composite LoRAs")
    assert apply_method(model, clip, (text_only,), plain(Composite), "Composite LoRAs")[1] is not clip


def test_a_lora_of_the_text_encoder_alone_takes_no_part_in_the_composition(clip, loras, caplog):
    """It would be a branch without any LoRA, or the subject that the others are styles to."""
    model = base("SD15")
    text, a, b = (LoRASpec(loras(file), 0.8, 1.0) for file in (
        with_text(clip, {}, 1), lora(shapes(model), 2), lora(shapes(model), 3)))
    for make in (plain(Composite), lambda active: subjects_of(active, "K-LoRA") and Composite(active.strengths)):
        with caplog.at_level("INFO", logger="lora_ensemble"):
            ours, our_clip = apply_method(model, clip, (text, a, b), make, "LoRAs")
        assert ours.get_attachment(KEY).applied[0].names == (a.name, b.name)
        assert f"LoRA '{text.name}' changes the text encoder alone" in caplog.text and "no part in" in caplog.text
        assert torch.equal(sample(ours), sample(method(model, (a, b), Composite)))
        assert any(not torch.equal(value, patched(clip)[key]) for key, value in patched(our_clip).items())
    assert f"subject: {a.name}; style: {b.name}" in caplog.text
    turns = LoRAEnsembleSwitch.execute(model, (text, a, b), 1, "3,1,2", "paper", clip).args[0]
    assert turns.get_attachment(KEY).applied[0].method.order == (1, 0), "numbers count all LoRAs of the chain"
    options = ("offline", 0.6, 0.4, 0.0, "none", 2, 3, "every_step", 5, 3)
    led = LoRAEnsembleCMLoRA.execute(model, (text, a, b), *options, clip).args[0]
    assert led.get_attachment(KEY).cache.max_age == 2 * 3, "two LoRAs of three steps each"
    alone, _ = apply_method(model, clip, (text,), plain(Composite), "LoRAs")
    assert torch.equal(sample(alone), sample(model))


def test_a_lora_of_the_text_encoder_alone_is_a_line_where_it_does_less_than_was_asked(clip, loras):
    """Merged, it does all that it can; with a strength of 0 there, nothing at all."""
    model = base("SD15")
    other = LoRASpec(loras(lora(shapes(model), 2)), 0.8, 1.0)
    name = loras(with_text(clip, {}, 1))

    def said(strength: float, make, role: str = "auto") -> list[str]:
        ensemble = (LoRASpec(name, 0.8, strength, role), other)
        problems = apply_method(model, clip, ensemble, make, "LoRAs")[0].get_attachment(KEY).applied[-1].problems
        return [line for line in problems if name in line]

    for role in ("auto", ALWAYS):
        (nothing,) = said(0.0, plain(Composite), role)
        assert "does nothing" in nothing and "strength there is 0" in nothing
        assert len(said(0.0, plain(Merge), role)) == 1 and said(0.8, plain(Merge), role) == []
    (part,) = said(0.8, plain(Composite))
    assert "acts there on every prompt, and takes no part in the composition" in part
    assert said(0.8, plain(Composite), ALWAYS) == []


def test_baked_says_what_does_nothing(clip, loras):
    model = base("SD15")
    name = loras(with_text(clip, {}, 1))
    assert bake(model, clip, (LoRASpec(name, 0.8, 0.8),), "Merge LoRAs")[2] == []
    (nothing,) = bake(model, clip, (LoRASpec(name, 0.8, 0.0),), "Merge LoRAs")[2]
    assert f"LoRA '{name}' does nothing" in nothing


def test_what_baked_leaves_undone_is_on_the_node(loras, monkeypatch):
    """There is no record of it."""
    model, told = base("SD15"), []
    name = loras(lora(shapes(model), 1))
    monkeypatch.setattr(baselines, "tell", lambda schema, lines: told.extend(lines))
    baselines.LoRAEnsembleMerge.execute(model, (LoRASpec(name, 0.8, 0.8, mask=Mask(torch.ones(1, 8, 8))),), "baked")
    assert told == [f"the mask of LoRA '{name}' is not used: what is in the weights acts everywhere"]


def test_a_lora_of_two_methods_in_a_row_is_named(loras):
    """Both act, which is what the same ensemble at two nodes of a chain does."""
    model = base("SD15")
    one, two = (loras(lora(shapes(model), seed)) for seed in (1, 2))
    first = method(model, (LoRASpec(one, 0.8, 0.0),), Merge)
    (line,) = method(first, (LoRASpec(one, 0.8, 0.0), LoRASpec(two, 0.8, 0.0)), Merge).get_attachment(KEY
                                                                                       ).applied[-1].problems
    assert line.startswith(f"acting twice, here and in the method before: '{one}'.")
    assert method(first, (LoRASpec(two, 0.8, 0.0),), Merge).get_attachment(KEY).applied[-1].problems == ()
    (line,) = method(first, (LoRASpec(one, 0.8, 0.0),) * 2, Merge).get_attachment(KEY).applied[-1].problems
    assert f"'{one} (row 1)', '{one} (row 2)'" in line, "by their file"


def test_rows_that_are_off_move_no_other(clip, loras):
    """Guard: the files of an ensemble are counted without them."""
    model = base("SD15")
    off, one, two = (loras(with_text(clip, shapes(model), seed)) for seed in (1, 2, 3))
    acting = (LoRASpec(one, 0.8, 0.5), LoRASpec(two, -0.3, 0.2))
    ours, our_clip = apply_method(model, clip, (LoRASpec(off, 0.0, 0.0), *acting), plain(Merge), "Merge LoRAs")
    without, clip_without = apply_method(model, clip, acting, plain(Merge), "Merge LoRAs")
    found, wanted = (each.get_attachment(KEY).applied[0] for each in (ours, without))
    assert (found.names, found.method) == (wanted.names, wanted.method) == ((one, two), Merge((0.8, -0.3)))
    got, want = patched(our_clip), patched(clip_without)
    assert all(torch.equal(got[key], value) for key, value in want.items())


def test_a_lora_that_was_baked_before_is_named(loras, monkeypatch):
    """What is in the weights acts beside what a method does: a line of its record, and of a second node that bakes."""
    model, told = base("SD15"), []
    one, two = (loras(lora(shapes(model), seed)) for seed in (1, 2))
    first, second = (LoRASpec(one, 0.8, 0.0),), (LoRASpec(two, 0.8, 0.0),)
    monkeypatch.setattr(baselines, "tell", lambda schema, lines: told.extend(lines))
    baked = baselines.LoRAEnsembleMerge.execute(model, first, "baked").args[0]
    assert told == []
    (line,) = method(baked.clone(), first + second, Merge).get_attachment(KEY).applied[-1].problems
    assert line.startswith("acting twice, here and in the weights, where Merge LoRAs in mode 'baked' before has put "
                           f"them: '{one}'.")
    assert method(baked, second, Merge).get_attachment(KEY).applied[-1].problems == ()
    twice = baselines.LoRAEnsembleMerge.execute(baked, second, "baked").args[0]
    assert told == []
    baselines.LoRAEnsembleMerge.execute(twice, first, "baked")
    baselines.LoRAEnsembleMerge.execute(method(model, first, Merge), first, "baked")
    assert [line.partition(": '")[0] for line in told] == [
        "acting twice, here and in the weights, where Merge LoRAs in mode 'baked' before has put them",
        "acting twice, here and in the method before"]


@pytest.mark.parametrize("numbered", [True, False])
def test_two_rows_of_one_file_are_told_apart(numbered, loras):
    """By their numbers on the node that they come from, else as they are counted; rows that are off have no name to be
    confused with. One object may stand for several rows."""
    model = base("SD15")
    one, two = (loras(lora(shapes(model), seed)) for seed in (1, 2))
    rows = (3, 5, 6, 9) if numbered else (0,) * 4
    ensemble = [LoRASpec(name, strength, 0.0, row=row) for name, strength, row in zip(
        (one, two, one, two), (0.8, 0.5, 0.3, 0.0), rows, strict=True)]
    first, second = (3, 6) if numbered else (1, 3)
    ours = method(model, ensemble, Composite)
    names = (f"{one} (row {first})", two, f"{one} (row {second})")
    assert ours.get_attachment(KEY).applied[0].names == names
    assert short_names(names) == [f"{one[:-12]} (row {first})", two[:-12], f"{one[:-12]} (row {second})"]
    same(sample(ours), sample(method(model, [LoRASpec(name, strength, 0.0) for name, strength in (
        (one, 0.8), (two, 0.5), (one, 0.3))], Composite)), sample(model))
    assert [list(record_of(ours).adapters[0])] == [list(names)]
    sample(ours := method(model, ensemble, lambda strengths: Switch(strengths, 1)), steps=2)
    (line,) = [line for line in record_of(ours).problems if "did not act" in line]
    assert line.startswith(f"LoRA '{names[2]}'")
    twice = LoRASpec(one, 0.8, 0.0)
    sample(ours := method(model, (twice, twice), Composite))
    assert record_of(ours).adapters[0] == [f"{one} (row 1)", f"{one} (row 2)"]


def test_baked_is_the_chain_of_loaders_bit_for_bit(loras):
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    baked = bake(model, None, ensemble, "Merge LoRAs")[0]
    assert torch.equal(sample(baked), sample(stock(model, ensemble)))
    assert baked.get_attachment(KEY) is None


def old_glora_on_kernels(loras) -> LoRASpec:
    """It mixes kernel positions, which no forward beside a convolution can do."""
    model, rand = base("SD15"), Rand(1)
    state, tensors = model.model.state_dict(), {}
    for layer in shapes(model, lambda name: name.endswith("in_layers.2")):
        made = glora(state[f"diffusion_model.{layer}.weight"], rand, old=True)
        tensors |= {f"{kohya(layer)}.{end}": value for end, value in made.items()}
    return LoRASpec(loras({**lora(shapes(model, lambda name: "attn" in name), 2), **tensors}), 0.7, 0)


def test_what_no_forward_can_express_is_merged_by_merge(loras, caplog):
    model, spec = base("SD15"), old_glora_on_kernels(loras)
    ours = merge(model, (spec,), rest_on_weights=True)
    same(sample(ours), sample(stock(model, (spec,))), sample(model))
    problem, = ours.get_attachment(KEY).record.problems
    assert spec.name in problem and "merged into the weight instead" in problem
    assert sum("merged into the weight instead" in message for message in caplog.messages) == 1


def test_and_named_and_left_out_by_the_others(loras):
    model, spec = base("SD15"), old_glora_on_kernels(loras)
    ours = method(model, (spec,), Composite)
    rest = LoRASpec(loras({key: value for key, value in file_of(spec).items() if "in_layers" not in key}), 0.7, 0)
    same(sample(ours), sample(stock(model, (rest,))), sample(model))
    problem, = ours.get_attachment(KEY).record.problems
    assert spec.name in problem and "left out" in problem and "in_layers" in problem
