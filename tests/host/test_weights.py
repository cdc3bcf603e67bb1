"""What reads a MODEL's weights behind a method: ComfyUI's own nodes, against the same graph with its own loader."""

from __future__ import annotations

from pathlib import Path

import comfy.controlnet
import comfy.model_patcher
import comfy.utils
import folder_paths
import pytest
import torch
from comfy_extras import nodes_lora_extract
from comfy_extras.nodes_model_merging import (
    ModelAdd,
    ModelMergeBlocks,
    ModelMergeSimple,
    ModelSubtract,
    save_checkpoint,
)
from comfy_extras.nodes_train import TrainLoraNode
from lora_ensemble.host.compose.apply import apply_method, with_cache
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import KEY, record_of
from lora_ensemble.host.compose.control import OF_WEIGHTS, made_of_weights
from lora_ensemble.host.compose.weights import SCALED
from lora_ensemble.host.files.ensemble import ALWAYS, LoRASpec, Mask
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.schedule import Uniform
from lora_ensemble.methods.switch import Switch

from .builders import composite, merge, method, plain, same, sample, stock, three
from .models import FAMILIES, base, build, patcher, randomize
from .test_apply import old_glora_on_kernels
from .test_routed import routed

NEW = hasattr(base("SD15"), "state_dict_for_saving")


@pytest.fixture(scope="module")
def other():
    """Another checkpoint of the same architecture."""
    model = build(FAMILIES["SD15"])
    randomize(model, 77)
    return patcher(model)


def simple(one, two, ratio: float = 0.3):
    return ModelMergeSimple().merge(one, two, ratio)[0]


def blocks(one, two):
    return ModelMergeBlocks().merge(one, two, input=0.2, middle=0.7, out=0.4)[0]


def subtract(one, two, multiplier: float = 1.0):
    return ModelSubtract().merge(one, two, multiplier)[0]


def add(one, two):
    return ModelAdd().merge(one, two)[0]


GRAPHS = {
    "first of a merge": lambda ours, plain_, other: simple(ours, other),
    "second of a merge": lambda ours, plain_, other: simple(other, ours),
    "first of a merge by blocks": lambda ours, plain_, other: blocks(ours, other),
    "second of a merge by blocks": lambda ours, plain_, other: blocks(other, ours),
    "its difference on another model": lambda ours, plain_, other: add(other, subtract(ours, plain_)),
    "taken from itself": lambda ours, plain_, other: add(plain_, subtract(ours, other, 0.5)),
    "taken off again": lambda ours, plain_, other: subtract(other, subtract(ours, plain_), 0.5),
    "added to": lambda ours, plain_, other: add(ours, subtract(other, plain_)),
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_merge_is_in_what_is_made_of_its_weights(graph, other, loras):
    model = base("SD15")
    ensemble = three(model, loras)
    make = GRAPHS[graph]
    ours, reference = make(merge(model, ensemble), model, other), make(stock(model, ensemble), model, other)
    same(sample(ours), sample(reference), sample(make(model, model, other)), 1e-4)


def test_what_cannot_be_beside_the_weights_is_in_them_once(other, loras):
    model = base("SD15")
    ensemble = (old_glora_on_kernels(loras), *three(model, loras)[:1])
    ours = merge(model, ensemble, rest_on_weights=True)
    same(sample(simple(other, ours)), sample(simple(other, stock(model, ensemble))), sample(simple(other, model)), 1e-4)


def test_rows_of_one_file_are_in_the_weights_as_well(other, loras):
    """They are called by their rows, and their file is read all the same."""
    model = base("SD15")
    spec, *_ = three(model, loras)
    ensemble = (spec, LoRASpec(spec.name, -0.3, 0.0))
    same(sample(simple(other, merge(model, ensemble))), sample(simple(other, stock(model, ensemble))),
         sample(simple(other, model)), 1e-4)


def test_the_model_itself_stays_as_it_was(other, loras):
    model = base("SD15")
    ensemble = three(model, loras)
    ours = merge(model, ensemble)
    before = sample(ours)
    patches = {key: len(entries) for key, entries in ours.patches.items()}
    simple(ours, other), simple(other, ours)
    assert {key: len(entries) for key, entries in ours.patches.items()} == patches
    assert torch.equal(sample(ours), before) and len(record_of(ours).methods) == 1


def test_the_part_that_is_always_on_is_in_the_weights_and_the_method_stays(other, loras):
    """First of a merge: Composite acts on, at full strength, and says so."""
    model = base("SD15")
    one, two, three_ = three(model, loras)
    always = LoRASpec(one.name, one.strength_model, 0.0, ALWAYS)
    ours = apply_method(model, None, (always, two, three_), plain(Merge), "x")[0]
    composed = composite(merge(model, (one,)), (two, three_))
    assert len(ours.get_attachment(KEY).applied) == 2
    for made in (simple(composed, other), with_cache(simple(composed, other), CacheSpec(Uniform(1)))):
        reference = composite(simple(stock(model, (one,)), other), (two, three_))
        same(sample(made), sample(reference), sample(simple(model, other)), 1e-4)
        assert record_of(made).problems.count(SCALED) == 1 and record_of(made).methods == ["Composite"]
    assert SCALED not in composed.get_attachment(KEY).applied[-1].problems


def test_a_merge_of_which_the_cache_alone_is_left_is_a_model_like_any_other(other, loras):
    """Once its LoRAs are in the weights, nothing acts beside them that others would have to be told of."""
    model = base("SD15")
    ensemble = three(model, loras)
    made = simple(with_cache(merge(model, ensemble), CacheSpec(Uniform(1))), other)
    assert made.get_attachment(KEY).applied == ()
    for read in (lambda each: simple(each, other), lambda each: simple(other, each)):
        wanted, plain_ = (read(simple(each, other)) for each in (stock(model, ensemble), model))
        same(sample(read(made)), sample(wanted), sample(plain_), 1e-4)


CHANGING = {
    "Composite": composite,
    "Switch": lambda model, ensemble: method(model, ensemble, lambda strengths: Switch(strengths, 1)),
    "a mask": lambda model, ensemble: apply_method(
        model, None, tuple(LoRASpec(spec.name, 1.0, 0.0, mask=Mask(torch.ones(1, 8, 8))) for spec in ensemble),
        plain(Merge), "Merge LoRAs")[0],
    "a window": lambda model, ensemble: merge(model, [LoRASpec(spec.name, 1.0, 0.0, end=0.5) for spec in ensemble]),
    "Routed": lambda model, ensemble: routed(model, ensemble),
}


@pytest.mark.parametrize("kind", CHANGING)
def test_what_is_in_no_weights_is_an_error_with_the_remedy(kind, other, loras):
    model = base("SD15")
    ours = CHANGING[kind](model, three(model, loras))
    for read in (lambda: simple(other, ours), lambda: subtract(other, ours), lambda: subtract(ours, other, 0.7),
                 lambda: ours.clone().get_key_patches("diffusion_model.")):
        called = "Merge" if kind.startswith("a ") else kind
        with pytest.raises(ValueError, match=f"^{called}: .*no weights hold what they do.*use Merge LoRAs"):
            read()
    assert sample(ours).isfinite().all()


def test_loras_that_are_off_are_nothing_to_read(other, loras):
    model = base("SD15")
    ours = composite(model, [LoRASpec(spec.name, 0.0, 1.0) for spec in three(model, loras)])
    assert torch.equal(sample(simple(other, ours)), sample(simple(other, model)))


class Rewriting(comfy.model_patcher.ModelPatcher):
    """As patchers of other packs: it names the class of its copies itself."""

    def clone(self, *arguments, **named):
        mine, self.__class__ = self.__class__, Rewriting
        copy = super().clone(*arguments, **named)
        copy.__class__, self.__class__ = Rewriting, mine
        return copy


def test_a_patcher_of_another_class_keeps_it(other, loras):
    model = base("SD15").clone()
    model.__class__ = Rewriting
    ensemble = three(model, loras)
    ours = merge(model, ensemble)
    made = simple(other, ours.clone().clone())
    assert isinstance(ours.clone(), Rewriting) and type(model) is Rewriting and type(ours).__name__ == "Rewriting"
    same(sample(made), sample(simple(other, stock(model, ensemble))), sample(simple(other, model)), 1e-4)


# --- training ---


def trained(model) -> dict[str, torch.Tensor]:
    """The LoRA that ComfyUI's own node trains on a MODEL in two steps."""
    def loaded(disable_dynamic=False):
        whole = build(FAMILIES["SD15"])
        randomize(whole)
        return patcher(whole)

    model = model.clone()
    model.cached_patcher_init = loaded, ()  # the node asks the loader for weights of its own
    latent = {"samples": torch.ones(1, 4, 8, 8)}
    inputs = dict(model=model, latents=latent, positive=FAMILIES["SD15"].cond(11), batch_size=1,
                  grad_accumulation_steps=1, steps=2, learning_rate=0.1, rank=2, optimizer="SGD", loss_function="MSE",
                  seed=1, training_dtype="fp32", lora_dtype="fp32", algorithm="LoRA", gradient_checkpointing=True,
                  existing_lora="[None]")
    with torch.inference_mode():  # as in a prompt
        if not hasattr(TrainLoraNode, "execute"):
            torch.manual_seed(1)
            try:
                return TrainLoraNode().train(**inputs)[1]
            finally:
                for module in model.model.modules():  # the node puts back what the class has anyway
                    module.__dict__.pop("forward", None)
        new = dict(quantized_backward=False, checkpoint_depth=1, offloading=False, bucket_mode=False, bypass_mode=False)
        torch.manual_seed(1)
        return TrainLoraNode.execute(**{name: [value] for name, value in (inputs | new).items()}).result[0]


def test_training_on_a_merge_is_training_on_a_chain_of_loaders(loras):
    model = base("SD15")
    ensemble = three(model, loras)
    with torch.inference_mode():
        ours, reference = merge(model, ensemble), stock(model, ensemble)
    before = sample(ours)
    made, wanted, alone = trained(ours), trained(reference), trained(model)
    assert made.keys() == wanted.keys() and any(not torch.equal(wanted[key], alone[key]) for key in wanted)
    for key in wanted:
        torch.testing.assert_close(made[key], wanted[key])
    assert torch.equal(sample(ours), before) and len(record_of(ours).methods) == 1


@pytest.mark.parametrize("kind", [*CHANGING, "Branch Cache"])
def test_what_cannot_be_trained_through_is_an_error_with_the_remedy(kind, loras):
    model = base("SD15")
    with torch.inference_mode():
        ensemble = three(model, loras)
        ours = with_cache(merge(model, ensemble), CacheSpec(Uniform(2))) if kind == "Branch Cache" \
            else CHANGING[kind](model, ensemble)
    called = "Merge" if kind.startswith("a ") else kind
    with pytest.raises(ValueError, match=f"^{called}: nothing can be trained through it .*Connect the MODEL"):
        trained(ours)
    assert sample(ours).isfinite().all()


def test_a_wrapper_that_nobody_trains_is_nobodys_business(loras):
    model = base("SD15")
    ours = composite(model, three(model, loras))
    for wrapper in (lambda weight: weight, torch.nn.Identity()):
        ours.clone().add_weight_wrapper("diffusion_model.out.2.weight", wrapper)


# --- files ---


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves a MODEL by one of ComfyUI's nodes: the tensors of its file."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))

    def save(node, *arguments) -> dict[str, torch.Tensor]:
        node(*arguments)
        (path,) = Path(tmp_path).rglob("*.safetensors")
        tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
        path.unlink()
        return {key: value.clone() for key, value in tensors.items()}

    return save


def checkpoint(model) -> None:
    """What CheckpointSave and ModelSave do."""
    with torch.inference_mode():
        save_checkpoint(model, filename_prefix="x", output_dir=folder_paths.get_output_directory())


def extracted(model) -> None:
    node, arguments = nodes_lora_extract.LoraSave, ("x", 4, "full_diff", True)
    with torch.inference_mode():
        if hasattr(node, "execute"):
            node.execute(*arguments, model_diff=model)
        else:
            made = node()
            made.output_dir = folder_paths.get_output_directory()
            made.save(*arguments, model_diff=model)


def test_a_saved_checkpoint_holds_the_loras_of_a_merge(saved, loras):
    model = base("SD15")
    ensemble = three(model, loras)
    ours = merge(model, ensemble)
    before = sample(ours)
    if not NEW:
        with pytest.raises(ValueError, match="Use Merge LoRAs in mode 'baked'"):
            checkpoint(ours)
        assert torch.equal(sample(ours), before)
        return
    found, reference, bare = (saved(checkpoint, each) for each in (ours, stock(model, ensemble), model))
    assert found.keys() == reference.keys()
    changed = [key for key in found if not torch.equal(reference[key], bare[key])]
    assert len(changed) > 20
    for key in found:
        assert torch.allclose(found[key].float(), reference[key].float(), rtol=1e-4, atol=1e-5), key
    assert torch.equal(sample(ours), before)


def test_a_lora_that_is_extracted_of_a_merge_is_the_merged_one(saved, loras):
    model = base("SD15")
    ensemble = three(model, loras)
    found, reference = (saved(extracted, subtract(each, model)) for each in (merge(model, ensemble),
                                                                             stock(model, ensemble)))
    assert found.keys() == reference.keys() and max(value.abs().max() for value in reference.values()) > 0.01
    for key in found:
        assert torch.allclose(found[key].float(), reference[key].float(), rtol=1e-2, atol=1e-3), key


@pytest.mark.parametrize("kind", CHANGING)
def test_no_checkpoint_without_the_loras_is_saved(kind, saved, loras):
    ours = CHANGING[kind](base("SD15"), three(base("SD15"), loras))
    with pytest.raises(ValueError, match="Use Merge LoRAs in mode|use Merge LoRAs"):
        saved(checkpoint, ours)
    assert sample(ours).isfinite().all()


# --- controls ---


def test_a_control_lora_is_told_of(loras):
    control = comfy.controlnet.ControlLora({})
    behind = comfy.controlnet.ControlLora({})
    behind.previous_controlnet = control
    whole = comfy.controlnet.ControlBase()
    assert made_of_weights({"positive": [{"control": behind}], "negative": [{}]})
    whole.previous_controlnet = behind
    assert made_of_weights({"positive": [{}], "negative": [{"control": whole}]})
    assert not made_of_weights({"positive": [{"control": comfy.controlnet.ControlBase()}], "negative": [], "x": None})


def test_the_record_tells_of_a_control_lora(loras, monkeypatch):
    model = base("SD15")
    ours, cached = composite(model, three(model, loras)), with_cache(model, CacheSpec(Uniform(2)))
    monkeypatch.setattr("lora_ensemble.host.compose.wrappers.made_of_weights", lambda conds: "positive" in conds)
    for each, told in ((ours, 1), (cached, 0)):
        sample(each)
        assert record_of(each).problems.count(OF_WEIGHTS) == told
