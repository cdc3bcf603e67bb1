"""The ways in which LoRAs get lost or stay behind in a host like this; every test fails without the guard it names."""

from __future__ import annotations

import copy
import inspect

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP
from lora_ensemble.host.compose.composition import KEY, Composition
from lora_ensemble.host.files import files
from lora_ensemble.host.files.ensemble import LoRASpec
from torch import nn

from .builders import Rand, composite, kohya, lora, merge, same, sample, shapes, stock, three
from .kinds import EVERYWHERE
from .models import FAMILIES, base, build, patcher, randomize


def fresh(family: str = "SD15"):
    """A model of this test's own, to be taken apart."""
    model = build(FAMILIES[family])
    randomize(model)
    return patcher(model)


def test_chained_nodes_all_act(loras):
    """Guard: apply_method keeps the layers and banks of the MODEL it is given."""
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    chained = model
    for spec in ensemble:
        chained = merge(chained, [spec])
    same(sample(chained), sample(stock(model, ensemble)), sample(model))
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE, WrappersMP.CALC_COND_BATCH,
                 WrappersMP.APPLY_MODEL):
        assert len(chained.get_wrappers(kind, KEY)) == 1, "a wrapper that runs twice would expand twice"


def test_one_file_at_several_strengths(loras):
    """Guard: strengths are gains of a branch, never written on the adapters of the cached file."""
    model = base("SD15")
    name = three(model, loras)[0].name
    before = {key: value.clone() for key, value in files.read(name, model.model).items()}
    strong, weak = LoRASpec(name, 0.8, 0), LoRASpec(name, -0.3, 0)
    plain = sample(model)
    alone = {spec: sample(stock(model, [spec])) for spec in (strong, weak)}
    models = {spec: merge(model, [spec]) for spec in (strong, weak)}
    for spec in (strong, weak, strong):
        same(sample(models[spec]), alone[spec], plain)
    same(sample(merge(model, [strong, weak])), sample(stock(model, [strong, weak])), plain)
    assert all(torch.equal(files.read(name, model.model)[key], value) for key, value in before.items())


@pytest.mark.parametrize("order", ["outer first", "inner first"])
def test_a_foreign_forward_during_a_run(order, loras):
    """Guard: a forward that somebody wrapped meanwhile is left alone, and ours inside it turns plain.

    Another pack replaces the same forwards while we run, and takes them off after us, or before us by what it found.
    """
    model = fresh()
    ours, layer = composite(model, three(model, loras)), model.model.diffusion_model.middle_block[1].proj_in
    plain, whole, kept = sample(model), sample(ours), []

    def wrap(step, *_):
        if step == 0:
            found = layer.forward
            kept.append(found)
            layer.forward = lambda x: found(x)
        elif order == "inner first":
            layer.forward = kept[0]

    assert torch.equal(sample(ours, callback=wrap), whole)
    assert torch.equal(sample(model), plain), "what is left of ours must be a plain call"
    assert torch.equal(sample(ours), whole)
    layer.__dict__.pop("forward", None)
    assert torch.equal(sample(ours), whole) and "forward" not in layer.__dict__


def test_layers_are_found_when_the_run_begins(loras):
    """Guard: Run.routed looks the modules up on the live model. Here the whole diffusion model is another object by
    then, as in delegates and clones for other devices."""
    model = fresh()
    ours = composite(model, three(model, loras))
    whole, other = sample(ours), copy.deepcopy(model.model.diffusion_model)
    swapped = ours.clone()
    swapped.add_object_patch("diffusion_model", other)
    assert torch.equal(sample(swapped), whole)
    assert not [m for m in other.modules() if "forward" in m.__dict__]


def test_a_clone_on_another_model_object(loras):
    """The same with the host's own delegates: `clone(model_override=...)`."""
    if "model_override" not in inspect.signature(comfy.model_patcher.ModelPatcher.clone).parameters:
        pytest.skip("this ComfyUI has no model_override")
    model, twin = fresh(), fresh()
    ours = composite(model, three(model, loras))
    whole = sample(ours)
    delegate = ours.clone(model_override=twin.get_clone_model_override())
    assert delegate.model is twin.model is not model.model
    assert torch.equal(sample(delegate), whole)


def test_clones_made_while_running(loras):
    """Guard: what a run installs belongs to the run, not to a flag that clones copy."""
    ours = composite(base("SD15"), three(base("SD15"), loras))
    whole, clones = sample(ours), []
    sample(ours, callback=lambda *_: clones.append(ours.clone()))
    assert all(torch.equal(sample(clone), whole) for clone in clones)
    assert torch.equal(sample(ours), whole)


def test_an_own_forward_of_a_layer_comes_back(loras):
    """A layer that already had a replaced forward (another pack's, for good) keeps it, and it acts below ours."""
    model = fresh()
    layer = model.model.diffusion_model.middle_block[1].proj_in
    plain = sample(model)

    def doubled(x):
        return 2 * type(layer).forward(layer, x)

    layer.forward = doubled
    with_double = sample(model)
    assert not torch.allclose(with_double, plain)
    ours = composite(model, three(model, loras))
    first = sample(ours)
    assert layer.forward is doubled and torch.equal(sample(model), with_double)
    assert torch.equal(sample(ours), first)
    del layer.forward


def tensors_in(value, seen: set[int]):
    """Everything that is no plain data, anywhere in model options."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (torch.Tensor, nn.Module, Composition)):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item, seen)
    elif callable(value):
        for cell in getattr(value, "__closure__", None) or ():
            yield from tensors_in(cell.cell_contents, seen)


def test_no_tensors_in_model_options(loras):
    """Guard: the adapters are an additional model, the state an attachment; options hold functions only."""
    ours = composite(base("SD15"), three(base("SD15"), loras))
    sample(ours)
    assert not list(tensors_in(ours.model_options, set())) and not list(tensors_in(ours.wrappers, set()))


def test_memory_is_the_hosts_to_manage(loras):
    """Guard: the bank is a patcher that the host loads with the model, counts, and unloads."""
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    ours = merge(composite(model, ensemble[:2]), ensemble[2:])
    banks = ours.get_additional_models_with_key(KEY)
    assert len(banks) == 2 and all(bank in ours.get_nested_additional_models() for bank in banks)
    held = sum(t.nbytes for spec in ensemble for key, t in files.read(spec.name, model.model).items()
               if key.endswith(".weight"))
    assert sum(bank.model_size() for bank in banks) >= held > 0
    loaded: list[set] = []

    def note(*_):
        loaded.append({id(entry.model.model) for entry in comfy.model_management.current_loaded_models})

    sample(ours, callback=note)
    assert all({id(bank.model) for bank in banks} <= during for during in loaded) and len(loaded) == 2
    comfy.model_management.unload_all_models()
    left = {id(entry.model.model) for entry in comfy.model_management.current_loaded_models}
    assert not left & {id(bank.model) for bank in banks}


def without_weights(layer: nn.Module) -> type:
    """The layer's class, with a `weight` that nobody outside its own forward may touch."""
    kind = type(layer)

    def weight(self):
        raise AssertionError("module.weight was read in a forward")

    def forward(self, x):
        own = self._parameters
        if isinstance(self, nn.Linear):
            return F.linear(x, own["weight"], own["bias"])
        return F.conv2d(x, own["weight"], own["bias"], self.stride, self.padding, self.dilation, self.groups)

    return type(f"Unreadable{kind.__name__}", (kind,), {"weight": property(weight), "forward": forward})


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr w1a w2a", "GLoRA", "OFT", "BOFT", "diff"])
def test_weights_are_never_read_in_a_forward(kind, loras):
    """Guard: engine/forwards.py works on inputs and outputs; the weight may be packed or elsewhere."""
    model, rand, tensors = fresh(), Rand(1), {}
    state = model.model.state_dict()
    for layer in shapes(model, lambda name: "attn" in name or "in_layers.2" in name):
        made = EVERYWHERE[kind](state[f"diffusion_model.{layer}.weight"], rand)
        tensors |= {f"{kohya(layer)}.{end}": value for end, value in made.items()}
    guarded = {name: module for name, module in model.model.diffusion_model.named_modules()
               if isinstance(module, (nn.Linear, nn.Conv2d))}

    def lock(executor, *args, **kwargs):
        kinds = {module: type(module) for module in guarded.values()}
        for module in kinds:
            module.__class__ = without_weights(module)
        try:
            return executor(*args, **kwargs)
        finally:
            for module, own in kinds.items():
                module.__class__ = own

    outer = model.clone()
    outer.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "lock", lock)  # ahead of where ours are put on
    ensemble = [LoRASpec(loras(tensors), 0.7, 0), LoRASpec(loras(lora(shapes(model), 5)), 0.5, 0)]
    same(sample(merge(outer, ensemble), steps=1), sample(stock(model, ensemble), steps=1), sample(model, steps=1))


def test_a_forward_that_stays_behind_is_seen(nothing_left):
    """What every test here is asked afterwards, asked while there is something to see."""
    model = base("SD15").model
    layer = model.diffusion_model.out[2]
    layer.forward = layer.forward
    try:
        assert nothing_left() == [f"{type(model).__name__}.diffusion_model.out.2"]
    finally:
        del layer.forward
