"""One bank for all nodes that put the same files on the same layers: made once, shared, and given back."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from lora_ensemble.engine.bank import Bank
from lora_ensemble.host.compose import apply, banks, loading, measure
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.look.layermap import layer_map
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.switch import Switch
from lora_ensemble.tests.accelerator import DEVICE

from .builders import (
    composite,
    file_of,
    lora,
    merge,
    method,
    nothing_known,
    plain,
    same,
    sample,
    shapes,
    stock,
    three,
)
from .models import CPU, FAMILIES, base, build, patcher, randomize
from .test_accelerator import on_device, transfers  # noqa: F401  (a fixture)
from .test_apply import clip, text_layers  # noqa: F401  (a fixture)
from .test_selection import est, klora, pair

METHODS: dict[str, Callable] = {
    "Merge": merge, "Composite": composite, "K-LoRA": klora, "EST-LoRA": est,
    "Switch": lambda model, ensemble: method(model, ensemble, Switch),
    "CMLoRA": lambda model, ensemble: method(model, ensemble, CMLoRA),
    "LoRAtorio": lambda model, ensemble: method(model, ensemble, LoRAtorio),
}


def banks_of(model) -> list:
    return [each.model for each in model.get_additional_models_with_key(KEY)]


def bank_of(model):
    (bank,) = banks_of(model)
    return bank


def devices(bank) -> set[str]:
    return {factor.device.type for factor in bank.parameters()}


def at(ensemble, *strengths: float) -> tuple[LoRASpec, ...]:
    return tuple(replace(spec, strength_model=s) for spec, s in zip(ensemble, strengths, strict=True))


def own(name: str = "SD15"):
    """A base model that no other test has."""
    model = build(FAMILIES[name])
    randomize(model)
    return patcher(model)


@pytest.fixture(autouse=True)
def forgotten():
    """No test finds what another one made."""
    nothing_known()


@pytest.fixture
def parsed(monkeypatch) -> list:
    """Grows with every file that is parsed."""
    calls, parse = [], loading.parse
    monkeypatch.setattr(loading, "parse", lambda *arguments: calls.append(1) or parse(*arguments))
    return calls


# --- made once -------------------------------------------------------------------------------------------------------


def test_another_strength_touches_no_tensor(loras, parsed):
    model = base("SD15")
    ensemble = three(model, loras)
    first = merge(model, ensemble)
    before = [(p.data_ptr(), p._version) for p in bank_of(first).parameters()]
    assert len(parsed) == 3 and before
    other = at(ensemble, -0.3, 1.1, 0.2)
    second = merge(model, other)
    assert bank_of(second) is bank_of(first) and len(parsed) == 3
    assert [(p.data_ptr(), p._version) for p in bank_of(second).parameters()] == before
    same(sample(second), sample(stock(model, other)), sample(model))
    same(sample(first), sample(stock(model, ensemble)), sample(model))


def test_a_bank_outlasts_the_node_s_last_output(loras, parsed):
    """The host drops a node's output before the node runs again."""
    model = base("SD15")
    ensemble = three(model, loras)
    ours = merge(model, ensemble)
    sample(ours)
    del ours
    gc.collect()
    merge(model, at(ensemble, 0.1, 0.2, 0.3))
    assert len(parsed) == 3


def test_all_methods_share_one(loras, parsed):
    model = base("SD15")
    ensemble = pair(model, loras)
    made = {name: make(model, ensemble) for name, make in METHODS.items()}
    layer_map(made["K-LoRA"])
    assert len({id(bank_of(each)) for each in made.values()}) == 1 and len(parsed) == 2
    for each in made.values():
        sample(each)
        loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
        assert sum(one.model is bank_of(each) for one in loaded) == 1, "the host holds it once, whoever sampled last"


def test_what_was_found_in_a_file_is_said_every_time(loras, clip, parsed, caplog):  # noqa: F811
    model = base("SD15")
    layers = shapes(model)
    file = lora(layers, 1)
    file["lora_unet_nowhere.lora_up.weight"] = torch.ones(4, 4)
    file["lora_unet_nowhere.lora_down.weight"] = torch.ones(4, 4)
    text = lora(text_layers(clip), 2, name=lambda layer: "lora_te_text_model_" + layer.replace(".", "_"))
    ensemble = [LoRASpec("off.safetensors", 0, 0), LoRASpec(loras(file), 0.8, 0), LoRASpec(loras(text), 0.5, 0.5)]
    caplog.set_level("INFO", "lora_ensemble")
    said = []
    for strength in (0.8, 0.4):
        caplog.clear()
        ours, words = apply.apply_method(model, clip, at(ensemble, 0, strength, 0.5), plain(Composite),
                                         "Composite LoRAs")
        applied = ours.get_attachment(KEY).applied[0]
        assert (applied.names, applied.method.strengths) == ((ensemble[1].name,), (strength,)), "not those that are off"
        assert {patch[0] for each in words.patcher.patches.values() for patch in each} == {0.5}
        said.append((ours.get_attachment(KEY).applied[0].problems, [r.getMessage() for r in caplog.records]))
    assert said[0] == said[1] and len(parsed) == 1, "the other file changes no layer of the model"
    assert any("nowhere" in problem for problem in said[0][0]) and any("text encoder alone" in t for t in said[0][1])


def test_an_empty_ensemble_is_refused_also_after_one_without_effect(loras):
    model = base("SD15")
    composite(model, three(model, loras, (0.0, 0.0, 0.0)))
    with pytest.raises(ValueError, match="empty"):
        composite(model, ())


# --- told apart ------------------------------------------------------------------------------------------------------


def test_what_makes_another_bank(loras):
    model = base("SD15")
    ensemble = three(model, loras)
    ours = merge(model, ensemble)
    narrow = model.clone()
    narrow.set_model_compute_dtype(torch.bfloat16)
    elsewhere, beyond = model.clone(), model.clone()
    elsewhere.load_device = beyond.offload_device = torch.device("cpu", 0)
    wide = replace(FAMILIES["SD15"], config=FAMILIES["SD15"].config | {"context_dim": 48})  # where most layers fit
    others = [merge(narrow, ensemble), merge(elsewhere, ensemble), merge(beyond, ensemble),
              merge(patcher(build(wide)), ensemble), merge(model, ensemble[::-1]), merge(model, ensemble[:2]),
              merge(model, at(ensemble, 0.8, 0.0, -0.6))]
    assert len({id(bank_of(each)) for each in (ours, *others)}) == 8
    assert bank_of(merge(model, ensemble)) is bank_of(ours)
    for each in (elsewhere, beyond):
        (bank,) = merge(each, ensemble).get_additional_models_with_key(KEY)
        assert (bank.load_device, bank.offload_device) == (each.load_device, each.offload_device)


def test_a_file_that_was_replaced(loras):
    model = base("SD15")
    layers = shapes(model)
    spec = LoRASpec(loras(lora(layers, 1), "changing.safetensors"), 0.8, 0)
    old = merge(model, [spec])
    before = sample(old)
    loras(lora(layers, 2), "changing.safetensors")
    new = merge(model, [spec])
    assert bank_of(new) is not bank_of(old)
    same(sample(new), sample(stock(model, [spec])), sample(model))
    assert torch.equal(sample(old), before)


def test_models_of_one_kind_share_it(loras, parsed):
    """Another checkpoint, with other weights."""
    first, second = own(), own()
    ensemble = three(first, loras)
    one, other = merge(first, ensemble), merge(second, ensemble)
    assert bank_of(one) is bank_of(other) and len(parsed) == 3 and banks.kept_bytes() == bank_of(one).nbytes()
    same(sample(other), sample(stock(second, ensemble)), sample(second))


class Other(torch.nn.Linear):
    """A class of its own."""


def test_layers_that_differ_in_one_thing_alone():
    narrow, wide = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.nn.Sequential(torch.nn.Linear(4, 8))
    assert banks.layers_of(narrow) != banks.layers_of(wide)
    assert banks.layers_of(narrow) != banks.layers_of(torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False)))
    assert banks.layers_of(narrow) != banks.layers_of(torch.nn.Sequential(Other(4, 4)))
    assert banks.layers_of(narrow) != banks.layers_of(torch.nn.Sequential(OrderedDict(other=torch.nn.Linear(4, 4))))
    assert banks.layers_of(narrow) == banks.layers_of(torch.nn.Sequential(torch.nn.Linear(4, 4)))


# --- one bank under several methods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("makes", [(merge, merge), (merge, composite), (composite, composite)])
def test_methods_in_a_row_with_the_same_files(makes, loras):
    """Against the same chain over copies of the files, which have banks of their own; the host loads the shared one
    once."""
    model = base("SD15")
    ensemble = three(model, loras)
    copies = tuple(replace(spec, name=loras(file_of(spec))) for spec in ensemble)
    first, second = makes
    below = first(model, ensemble)
    ours, apart = second(below, at(ensemble, 0.3, 0.4, 0.5)), second(below, at(copies, 0.3, 0.4, 0.5))
    assert (len(banks_of(ours)), len(banks_of(apart))) == (1, 2)
    wanted = sample(apart)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(ours), wanted)
    loaded = [entry.model.model for entry in comfy.model_management.current_loaded_models]
    assert sum(one is bank_of(ours) for one in loaded) == 1
    assert torch.equal(sample(ours.clone()), wanted), "a clone has its banks in the same places"
    three_deep = merge(second(second(model, copies), ensemble), copies)
    assert [each.bank for each in three_deep.get_attachment(KEY).applied] == [0, 1, 0]


def test_on_two_devices(loras):
    """The host copies a bank once for a second device, also where two methods use it."""
    if not hasattr(comfy.model_management, "unload_model_and_clones"):
        pytest.skip("this ComfyUI has no multi-GPU scheduler")
    multigpu = pytest.importorskip("lora_ensemble.tests.host.test_multigpu")
    model, _ = multigpu.two_devices()
    ensemble = three(model, loras)
    other = at(ensemble, 0.3, 0.4, 0.5)
    alone = sample(composite(merge(base("SD15"), ensemble), other))
    for _ in range(2):
        both = composite(merge(model, ensemble), other)
        torch.testing.assert_close(sample(both), alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())


def test_sizes_of_a_bank_that_a_run_has_left_on_its_device(transfers, loras, monkeypatch):  # noqa: F811
    """They are put together in main memory, whatever the kinds, and measured on the device."""
    model = on_device("SD15")
    ensemble = pair(model, loras)
    sample(merge(model, ensemble))
    assert DEVICE.type in devices(bank_of(merge(model, ensemble)))
    measured, original = [], measure.measure
    monkeypatch.setattr(measure, "measure", lambda bank, *rest, **options: measured.append(devices(bank)) or original(
        bank, *rest, **options))
    ours = klora(model, ensemble)
    measure._kept.clear()
    here = klora(base("SD15"), ensemble)
    assert measured[0] == {"cpu"} and DEVICE.type in devices(bank_of(ours))
    assert layer_map(ours).as_json() == layer_map(here).as_json()


# --- given back ------------------------------------------------------------------------------------------------------


def test_banks_go_with_their_base_model(loras):
    """Nothing waits for Python to look for circles."""
    model = own()
    ours = composite(model, three(model, loras))
    sample(ours)
    bank = weakref.ref(bank_of(ours))
    comfy.model_management.unload_all_models()
    gc.collect()
    gc.disable()
    try:
        del ours
        assert bank() is not None
        del model
        assert bank() is None
    finally:
        gc.enable()


def test_few_are_held_that_no_model_uses(loras, monkeypatch):
    model = own()
    ensemble = three(model, loras)
    used = merge(model, ensemble)
    made = [weakref.ref(bank_of(merge(model, part))) for part in (ensemble[:1], ensemble[1:2], ensemble[2:])]
    gc.collect()
    assert [bank() is not None for bank in made] == [False, True, True], f"the last {banks.KEPT}"
    assert banks.kept_bytes() == made[1]().nbytes() + made[2]().nbytes()
    assert bank_of(merge(model, ensemble)) is bank_of(used), "and all that are in use"
    merge(model, ensemble[2:])
    merge(model, ensemble[:2])
    gc.collect()
    assert [bank() is not None for bank in made] == [False, False, True], "those asked for last, whenever made"
    monkeypatch.setattr(banks, "KEPT_BYTES", 1)
    last = weakref.ref(bank_of(merge(model, ensemble[:2])))
    del used
    gc.collect()
    assert last() is not None and not any(bank() for bank in made), "one, where they are large"


def test_files_are_not_held_by_what_was_made_of_them(loras):
    """A bank has the factors in stacks of its own; what is kept for the messages must not hold them once more."""
    model = own()
    ours = merge(model, three(model, loras))
    (shared,) = ours.get_additional_models_with_key(KEY)
    kept, size = shared.get_attachment(banks.NOTES)
    assert size == 0
    assert len(kept.loras) == 3 and not any(lora.parsed.layers or lora.patches.found for lora in kept.loras)
    assert shared.load_device == CPU and shared.model_size() == bank_of(ours).nbytes()


def test_tensors_in_notes_are_counted(loras, clip):  # noqa: F811
    """The text encoders' part of a file, which every MODEL of the bank adds to its CLIP."""
    model, before = own(), banks.kept_bytes()
    text = lora(text_layers(clip), 2, name=lambda layer: "lora_te_text_model_" + layer.replace(".", "_"))
    ours, _ = apply.apply_method(model, clip, [LoRASpec(loras(lora(shapes(model), 1) | text), 0.8, 0.5)], plain(Merge),
                                 "Merge LoRAs")
    size = sum(tensor.nbytes for tensor in text.values())
    assert banks.kept_bytes() - before == bank_of(ours).nbytes() + size > size > 0


def test_a_dtype_node_behind_a_method(loras, monkeypatch):
    """The run's banks are in the dtype that is computed in, in the host's books; the MODEL's own are as they were."""
    model = base("SD3").clone()
    model.offload_device = torch.device("cpu", 0)
    ours = merge(model, three(model, loras))
    exact = sample(ours, "SD3")
    narrow, (own,) = ours.clone(), ours.get_additional_models_with_key(KEY)
    narrow.set_model_compute_dtype(torch.bfloat16)
    seen, before, fails, made, convert = [], banks.kept_bytes(), True, [], Bank.in_dtype
    monkeypatch.setattr(Bank, "in_dtype", lambda bank, dtype, device: made.append(device) or convert(
        bank, dtype, device))

    def look(executor, *args, **kwargs):
        if fails:
            raise InterruptedError
        (bank,) = narrow.get_additional_models_with_key(KEY)
        loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
        seen.append((bank.model.dtype, any(each.model is bank.model for each in loaded)))
        assert (bank.load_device, bank.offload_device) == (model.load_device, model.offload_device)
        return executor(*args, **kwargs)

    narrow.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "look", look)
    with pytest.raises(InterruptedError):
        sample(narrow, "SD3")
    assert bank_of(narrow) is own.model, "also behind a run that was stopped"
    fails = False
    found = sample(narrow, "SD3")
    assert banks.kept_bytes() == before + own.model.nbytes() / 2, "what was made for it is held, and counted"
    assert {*seen} == {(torch.bfloat16, True)}
    assert narrow.get_additional_models_with_key(KEY)[0].model is own.model and own.model.dtype == torch.float32
    assert all(factor.dtype == torch.float32 for factor in own.model.parameters())
    assert 0 < (found - exact).abs().max() < 0.05 * exact.abs().max()
    sample(narrow, "SD3")
    assert made == [model.offload_device], "it is made once, where the host has what it has not loaded"
    assert torch.equal(sample(ours, "SD3"), exact)
