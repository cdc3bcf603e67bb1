"""On a real CUDA device (TESTS_ON=cuda): what no other machine can show, in the dtypes that people use there.

test_accelerator.py, run the same way, has every method beside the CPU and the waits of its steps.
"""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from lora_ensemble.host.compose.composition import places_of
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.switch import Switch
from lora_ensemble.tests.accelerator import DEVICE
from lora_ensemble.tests.on_gpu import REAL

from .builders import composite, hooked, merge, method, same, sample, stock, three
from .compiled import compiled
from .models import FAMILIES, base, build, patcher
from .test_routed import prompt, routed, specs

pytestmark = pytest.mark.skipif(not REAL, reason="TESTS_ON=cuda runs this on a GPU")

TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 0.2}
"""Error of a run over the LoRAs' effect on its latent: ComfyUI's way rounds the merged weights, ours the factors. On a
GPU ComfyUI multiplies factors in fp16 whatever the model's dtype; in full precision it is asked not to."""
SMALL = ["SD15", "SDXL", "SD3", "Flux", "Wan"]


@pytest.fixture(autouse=True)
def unloaded(accelerator):
    with torch.inference_mode():
        yield
        comfy.model_management.unload_all_models()
    torch.compiler.reset()


@pytest.fixture
def exactly(dtype, monkeypatch):
    """In full precision the host multiplies factors in it, too."""
    if dtype == torch.float32:
        monkeypatch.setattr(comfy.model_management, "lora_compute_dtype", lambda device: torch.float32)


def filled(family: str, dtype: torch.dtype) -> torch.nn.Module:
    model = build(FAMILIES[family], dtype=dtype)
    model.load_state_dict(base(family).model.state_dict())
    return model


def as_ever(family: str, dtype: torch.dtype = torch.float32, disable_dynamic: bool = True) -> ModelPatcher:
    """A MODEL without dynamic VRAM. What torch.compile records needs weights that stay where they are."""
    return ModelPatcher(filled(family, dtype).eval(), load_device=DEVICE, offload_device=torch.device("cpu"))


def on_gpu(family: str, dtype: torch.dtype = torch.float32) -> ModelPatcher:
    """A MODEL as loaders give it; for hooks, with dynamic VRAM, the host asks for one without it."""
    model = patcher(filled(family, dtype), DEVICE)
    model.cached_patcher_init = (as_ever, (family, dtype))
    return model


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", SMALL)
def test_merge_is_the_chain_of_loaders(family, dtype, loras, exactly):
    model = on_gpu(family, dtype)
    ensemble, plain = three(model, loras), sample(model, family)
    same(sample(merge(model, ensemble), family), sample(stock(model, ensemble), family), plain, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", SMALL)
def test_composite_is_the_hooks(family, dtype, loras, exactly):
    model, kind = on_gpu(family, dtype), FAMILIES[family]
    ensemble, plain = three(model, loras), sample(model, family)
    hooks = sample(model, family, hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble))
    same(sample(composite(model, ensemble), family), hooks, plain, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["inductor", "cudagraphs"])
@pytest.mark.parametrize("family", ["SD3", "Flux"])
def test_compiled(family, backend, loras):
    """One program for all LoRAs, turns and strengths; with `cudagraphs` one recording, which is repeated: a gain that
    were baked into it would draw the first step's picture for ever. That backend takes one number of rows alone, of the
    plain model as well: where it changes, the compiler begins anew."""
    model = as_ever(family)
    ensemble, plain = three(model, loras), sample(model, family, steps=4)
    first = compiled(model, backend)
    for make in (Switch, Merge, Composite):
        if make is Composite and backend == "cudagraphs":
            torch.compiler.reset()
        want = sample(method(model, ensemble, make), family, steps=4)
        for _ in range(2):
            same(sample(method(first, ensemble, make), family, steps=4), want, plain, 5e-3)
    torch.compiler.reset()
    same(sample(first, family, steps=4), plain, sample(merge(model, ensemble), family, steps=4), 5e-3)


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_places_in_half_precision(family, loras):
    """Attention is read, and places are found, as in full precision on the CPU."""
    ensemble = specs(base(family), loras)
    exact = routed(base(family), ensemble)
    plain, want = (sample(model, family, positive=prompt(family)) for model in (base(family), exact))
    ours = routed(on_gpu(family, torch.float16), ensemble)
    same(sample(ours, family, positive=prompt(family)), want, plain, 0.1)
    for got, right in zip(places_of(ours), places_of(exact), strict=True):
        torch.testing.assert_close(got.maps.float().cpu(), right.maps.float().cpu(), rtol=0, atol=0.05)


def test_memory_is_given_back(loras):
    """A run leaves nothing on the device but what the host holds, and unloading gives that back too."""
    model = on_gpu("SDXL", torch.float16)
    ensemble = three(model, loras)
    levels = []
    for _ in range(4):
        sample(composite(model, ensemble), "SDXL")
        comfy.model_management.unload_all_models()
        levels.append(torch.cuda.memory_allocated())
    assert levels[1] == levels[-1], levels
