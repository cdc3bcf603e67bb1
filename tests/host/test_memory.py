"""The bank under ComfyUI's memory management. The device `meta` stands in for an accelerator: what the host moves there
and brings back are its own decisions, made by its own patchers."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from lora_ensemble.engine.adapters import Kron
from lora_ensemble.engine.bank import Bank
from lora_ensemble.engine.stack import Stack
from lora_ensemble.host.compose.banks import bank_patcher
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.host.compose.memory import is_lack_of_memory, to_spare
from lora_ensemble.tests.reference import KINDS, make_ops

from .builders import composite, sample, three
from .caches import cached, steps_of
from .models import CPU, base

DEVICE = torch.device("meta")


def every_kind(dtype: torch.dtype | None = None) -> Bank:
    """Ops of every kind on a layer of their own, and a layer that two low-rank adapters share."""
    return Bank([{kind: make_ops(kind, (16, 16), seed)[0] for seed, kind in enumerate(KINDS)},
                 {"lora": make_ops("lora", (16, 16), 99)[0]}], dtype=dtype)


def devices(bank: Bank) -> set[str]:
    return {parameter.device.type for parameter in bank.parameters()}


def test_a_bank_is_loaded_module_by_module():
    """Guards: a host that loads a model in part skips parameters of modules that have children."""
    bank = every_kind()
    patcher = bank_patcher(bank, DEVICE, CPU, disable_dynamic=True)
    patcher.load(DEVICE, lowvram_model_memory=10 * bank.nbytes())
    assert devices(bank) == {"meta"}
    assert patcher.loaded_size() == bank.nbytes() > 0


def test_adapters_are_held_in_the_dtype_that_the_model_computes_in(loras):
    """Guards: where a node has set another compute dtype, every run held a converted copy beside the bank."""
    model = base("SD15").clone()
    model.set_model_compute_dtype(torch.bfloat16)
    (patcher,) = composite(model, three(model, loras)).get_additional_models_with_key(KEY)
    assert {parameter.dtype for parameter in patcher.model.parameters()} == {torch.bfloat16}


def test_a_bank_in_another_dtype():
    """As if it had been made in it: what a forward multiplies by at every call, and nothing else; the bank stays."""
    bank = every_kind()
    other = bank.in_dtype(torch.bfloat16, CPU)
    assert other.dtype == torch.bfloat16 and other.names == bank.names and list(other.sites) == list(bank.sites)
    made, kinds = every_kind(torch.bfloat16), set()
    for ours, theirs, third in zip(bank.modules(), other.modules(), made.modules(), strict=True):
        for name, one in ours._parameters.items():
            two, held = theirs._parameters[name], type(ours) in (Stack, Kron)
            kinds.add(held)
            assert torch.equal(two, one.to(torch.bfloat16) if held else one), name
            assert two.dtype == (torch.bfloat16 if held else one.dtype) and one.dtype == torch.float32
            assert torch.equal(two, third._parameters[name]) and two.dtype == third._parameters[name].dtype, name
    assert kinds == {True, False}
    assert all(other.sites[site.name] is site for site in other.site_list)
    assert other.addresses() == [next(site.parameters()).data_ptr() for site in other.site_list], "not the bank's"
    assert devices(bank.in_dtype(torch.bfloat16, DEVICE)) == {"meta"}


def test_memory_to_spare(monkeypatch):
    """Half of what is free, once the host has made room for twice the least; nothing where that is less."""
    asked = []
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda size, device: asked.append((size, device)))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 2 * asked[-1][0] - 12)
    assert to_spare(DEVICE, 10) == 14 and to_spare(DEVICE, 5) == 0 and asked == [(20, DEVICE), (10, DEVICE)]


@pytest.mark.parametrize(("error", "lack"), [
    (torch.OutOfMemoryError("test"), True), (RuntimeError("MPS backend out of memory"), True),
    (RuntimeError("HIP error: Out of Memory"), True), (RuntimeError("lost"), False)], ids=str)
def test_a_lack_of_memory(error, lack):
    """Whatever the host's own name for it means in this torch."""
    assert is_lack_of_memory(error) is lack


# --- dynamic VRAM ---------------------------------------------------------------------------------------------------


class Handle:
    """A piece of memory that comfy_aimdo's library holds and frees with the object: without a driver it cannot be
    had, and a copy of the object would free it once more."""

    def __init__(self, size, *_):
        self.size = size

    def __deepcopy__(self, memo):
        raise AssertionError("a handle of the host's memory was copied")


class Reserved(Handle):
    """Address space on the device."""

    def __init__(self, size, *_):
        super().__init__(size)
        if size <= 0:
            raise MemoryError("VBAR allocation failed")

    def prioritize(self):
        pass

    def loaded_size(self):
        return 0

    def free_memory(self, size):
        return 0


@pytest.fixture
def dynamic(monkeypatch):
    """ComfyUI's dynamic VRAM, as `main.py` switches it on."""
    if not hasattr(comfy.model_patcher, "ModelPatcherDynamic"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    monkeypatch.setattr("comfy_aimdo.host_buffer.HostBuffer", Handle)
    monkeypatch.setattr("comfy_aimdo.model_vbar.ModelVBAR", Reserved)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)


def test_dynamic_vram_loads_counts_and_gives_back(dynamic):
    bank = every_kind()
    before = {name: parameter.clone() for name, parameter in bank.named_parameters()}
    patcher = bank_patcher(bank, DEVICE, CPU)
    assert patcher.is_dynamic()
    for _ in range(2):  # a second run loads anew and counts no more
        patcher.partially_load(DEVICE)
        assert devices(bank) == {"meta"} and patcher.loaded_size() == bank.nbytes()
    assert patcher.partially_unload(CPU, bank.nbytes()) == bank.nbytes()
    assert devices(bank) == {"cpu"} and patcher.loaded_size() == 0
    assert all(torch.equal(before[name], parameter) for name, parameter in bank.named_parameters())


def test_a_copy_for_a_further_device_shares_nothing(dynamic):
    """What multi-GPU and Select Model Device do: the copy must not take the host's handles along."""
    bank = every_kind()
    patcher = bank_patcher(bank, DEVICE, CPU)
    patcher.partially_load(DEVICE)
    patcher.detach()
    again = patcher.deepclone_multigpu(new_load_device=torch.device("meta", 1))
    assert again.model is not bank and again.is_dynamic()
    made, arguments = patcher.cached_patcher_init
    assert not made(*arguments, disable_dynamic=True).is_dynamic()
    assert set(again.model.sites) == set(bank.sites) and again.model.names == bank.names
    here = dict(bank.named_parameters())
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, here[name]) and parameter.data_ptr() != here[name].data_ptr()
    again.partially_load(torch.device("meta", 1))
    assert devices(bank) == {"cpu"} and again.loaded_size() == bank.nbytes()


def test_a_bank_without_adapters(dynamic, loras):
    """Guards: address space of size 0 cannot be reserved, so sampling failed where no LoRA acts on the model."""
    model = base("SD15")
    ours = composite(model, three(model, loras, (0.0, 0.0, 0.0)))
    (patcher,) = ours.get_additional_models_with_key(KEY)
    bank_patcher(patcher.model, DEVICE, CPU).partially_load(DEVICE)
    assert torch.equal(sample(ours), sample(model))


def test_cached_features_may_take_what_dynamic_vram_would_free(dynamic, loras, monkeypatch):
    """Weights fill the device to the brim and make way for activations; the host's own batches count on that."""
    ours = cached(composite(base("SD15"), three(base("SD15"), loras)))
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device, both=False: (1, 1) if both else 1)
    monkeypatch.setattr("comfy_aimdo.model_vbar.vbars_analyze", lambda device: 2**40)
    sample(ours, steps=3)
    assert any(step["reused"] for step in steps_of(ours))
