"""What a run keeps on the device is in the host's books, and what it draws does not depend on what they say is free: on
a pretended accelerator, every tensor of which can be looked at."""

from __future__ import annotations

import gc
from collections.abc import Callable

import comfy.model_management
import pytest
import torch
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.tests.accelerator import DEVICE, OnDevice

from .builders import merge, same, sample, three
from .caches import steps_of
from .guidance_tools import extrapolated
from .models import FAMILIES, base, build, patcher
from .test_accelerator import METHODS, transfers  # noqa: F401  (a fixture)
from .test_routed import prompt, routed, specs
from .test_selection import klora, pair

SPLIT: dict[str, Callable] = {
    "Routed": lambda model, loras: routed(model, specs(model, loras)),
    "CMLoRA": lambda model, loras: METHODS["CMLoRA"](model, three(model, loras)),
    "LoRAtorio, a pool": lambda model, loras: METHODS["LoRAtorio, a pool"](model, three(model, loras)),
    "K-LoRA": lambda model, loras: klora(model, pair(model, loras)),
    "guidance": lambda model, loras: extrapolated(merge(model, three(model, loras))),
}


def on_device_in(dtype: torch.dtype):
    model = build(FAMILIES["SD15"], dtype=dtype)
    model.load_state_dict(base("SD15").model.state_dict())
    return patcher(model, DEVICE)


def memory(tensors) -> dict[int, int]:
    """Pieces of the device's memory -> their bytes."""
    pieces = [each.value.untyped_storage() for each in tensors if isinstance(each, OnDevice)]
    return {piece.data_ptr(): piece.nbytes() for piece in pieces}


def books() -> dict[int, int]:
    loaded = [entry.model.model for entry in comfy.model_management.current_loaded_models]
    return memory(tensor for model in loaded for tensor in (*model.parameters(), *model.buffers()))


def all_of_it() -> dict[int, int]:
    gc.collect()
    return memory(gc.get_objects())


@pytest.mark.parametrize("name, dtype", [("Merge, Composite", torch.bfloat16), ("Composite, cached", torch.float32)])
def test_factors_are_on_the_device_once(name, dtype, transfers, loras):  # noqa: F811
    """What is left beside the books are numbers, places and latents; and the features of a cache, which are on the
    record."""
    model, beside, cache = on_device_in(dtype), [], 0
    ours = METHODS[name](model, three(model, loras))
    banks = [bank.model for bank in ours.get_additional_models_with_key(KEY)]
    held = sum(bank.nbytes() for bank in banks)

    def look(*_):
        known = books()
        assert all(set(memory(bank.parameters())) <= set(known) for bank in banks)
        beside.append(sum(size for piece, size in all_of_it().items() if piece not in known))

    sample(ours, steps=2, callback=look)
    if "cached" in name:
        cache = steps_of(ours)[0]["bytes"]
        assert cache > 0
    assert len(beside) == 2 and max(beside) - cache < held / 20


@pytest.mark.parametrize("name", SPLIT)
def test_the_picture_does_not_depend_on_what_is_free(name, loras, monkeypatch):
    """Where a batch does not fit, the host evaluates it row by row. Composite and caches: `test_scenarios` and
    `test_cache_memory`."""
    model, asked = base("SD15"), []
    ours, steps = SPLIT[name](model, loras), 4 if name == "guidance" else 2

    def drawn(model):
        return sample(model, "SD15", prompt(), steps=steps)

    whole, plain = drawn(ours), drawn(model)
    monkeypatch.setattr(model.model, "memory_required",
                        lambda shape, **_: asked.append(shape[0]) or (0 if shape[0] == 1 else 1e30))
    same(drawn(ours), whole, plain, 1e-4)
    assert max(asked) > 1
