"""Whole runs on an accelerator, a pretended one where there is none: every method draws what it draws on the CPU, no
operation mixes devices, and once a run is under way no step of ours waits for the device, sends anything to it or asks
it for float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import comfy.model_management
import pytest
import torch
from lora_ensemble.engine import products
from lora_ensemble.host.compose import measure
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.host.guidance.apply import guidance_record_of
from lora_ensemble.host.guidance.calibrate import calibrate
from lora_ensemble.kernels import lowrank
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.switch import Switch
from lora_ensemble.tests.accelerator import DEVICE
from lora_ensemble.tests.on_gpu import REAL
from torch.utils._python_dispatch import _disable_current_modes

from .builders import composite, merge, method, sample, three
from .caches import cached, cmlora
from .guidance_tools import ag, extrapolated
from .kinds import CONVOLUTIONS, EVERYWHERE
from .models import FAMILIES, base, build, patcher
from .test_calibration import STEPS as CALIBRATED
from .test_calibration import guide, paths
from .test_kinds import KERNEL, LINEAR, POINTWISE, file_of, weights
from .test_routed import prompt, routed, specs
from .test_selection import est, klora, method_of, pair

STEPS, KNOWN = 6, 4
"""From step KNOWN on the clock knows the sampler, and every layout of a batch was met."""
PLENTY = 1 << 36


@pytest.fixture
def transfers(accelerator, monkeypatch):
    """The host believes in the device; what it cannot pretend is turned off."""
    management = comfy.model_management
    if REAL:
        with torch.inference_mode():
            yield accelerator.transfers
            management.unload_all_models()
        return
    answers = {"get_torch_device": lambda: DEVICE, "soft_empty_cache": lambda force=False: None,
               "get_free_memory": lambda dev=None, torch_free_too=False: (PLENTY,) * 2 if torch_free_too else PLENTY,
               "get_total_memory": lambda dev=None, torch_total_too=False: (PLENTY,) * 2 if torch_total_too else PLENTY,
               "synchronize": lambda: None, "cuda_device_context": lambda device: nullcontext()}
    for name, answer in answers.items():
        monkeypatch.setattr(management, name, answer, raising=False)
    # The same products as on the CPU: results are compared bit for bit.
    monkeypatch.setitem(products.RATES, DEVICE.type, products.RATES["cpu"])
    with torch.inference_mode():  # as the host runs its nodes
        yield accelerator.transfers
        management.unload_all_models()


def unwatched() -> AbstractContextManager:
    """The pretended device does not look: every operation on the CPU would take several times as long."""
    return nullcontext() if REAL else _disable_current_modes()


def on_device(family: str):
    """The small model of a family, to be loaded on the device."""
    with unwatched():
        model = build(FAMILIES[family])
        model.load_state_dict(base(family).model.state_dict())
    return patcher(model, DEVICE)


def masked(ensemble) -> list[LoRASpec]:
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    return [LoRASpec(spec.name, spec.strength_model, 0, mask=mask)
            for spec, mask in zip(ensemble, (Mask(left), Mask(1 - left), None), strict=True)]


def loratorio(**options) -> Callable:
    return lambda model, ensemble: method(model, ensemble, lambda strengths: LoRAtorio(strengths, **options))


METHODS: dict[str, Callable] = {
    "Merge": merge,
    "Switch": lambda model, ensemble: method(model, ensemble, lambda strengths: Switch(strengths, 2)),
    "Composite": composite,
    "LoRAtorio": loratorio(upsampling="bilinear"),
    "LoRAtorio, a pool": loratorio(top_k=2, recheck_every=2),
    "LoRAtorio, masks": lambda model, ensemble: loratorio()(model, masked(ensemble)),
    "CMLoRA": lambda model, ensemble: cmlora(model, ensemble, 1),
    "CMLoRA, online": lambda model, ensemble: method(model, ensemble, lambda s: CMLoRA(s, order="online")),
    "CMLoRA, async": lambda model, ensemble: method(model, ensemble, lambda s: CMLoRA(s, order="async")),
    "Composite, cached": lambda model, ensemble: cached(composite(model, ensemble)),
    "Merge, Composite": lambda model, ensemble: composite(merge(model, ensemble[:1]), ensemble[1:]),
}


def run(model, family: str, transfers: list, **options) -> tuple[torch.Tensor, list]:
    """(the latent, what our code did between host and device from step KNOWN on)"""
    marks = []
    out = sample(model, family, steps=STEPS, callback=lambda step, *rest: marks.append(len(transfers)), **options)
    assert type(out) is torch.Tensor, "the host gives a run's result back on the CPU"
    return out, [t for t in transfers[marks[KNOWN - 1]:marks[-1]] if t.ours]


def wanted(make: Callable, family: str, *given, **options) -> torch.Tensor:
    """The latent on the CPU, of `make(the small model of the family, *given)`, by the products that a GPU takes:
    in fp32 a linear layer into the ranks, whose last bits are not those of `bmm`."""
    def into_ranks(down: torch.Tensor, entries: int | None) -> tuple[Callable, torch.Tensor]:
        return chosen(down, None) if entries is None else (torch.nn.functional.linear, down)

    chosen = lowrank._into_ranks
    with unwatched(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowrank, "_into_ranks", into_ranks)
        return sample(make(base(family), *given), family, steps=STEPS, **options)


def agree(got: torch.Tensor, want: torch.Tensor, tolerance: float = 0.0) -> None:
    """Within so much of the largest number; a real device, which adds in another order, within 2e-3 in any case."""
    tolerance = max(tolerance, 2e-3 if REAL else 0.0)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def harmless(transfers: list) -> list:
    """Without what is part of the plan: a value sent ahead and read steps later, when it has long arrived."""
    return [t for t in transfers if t.kind not in ("send", "settle")]


@pytest.mark.parametrize(("name", "family"), [*((name, "SD15") for name in METHODS), ("Composite", "Flux"),
                                             ("LoRAtorio", "Flux"), ("CMLoRA", "Flux"), ("Composite", "Wan")])
def test_every_method(name, family, loras, transfers):
    make, ensemble = METHODS[name], three(base(family), loras)
    want = wanted(make, family, ensemble)
    model = make(on_device(family), ensemble)
    transfers.clear()
    got, late = run(model, family, transfers)
    # Bit for bit but for enlarged weights: on the pretended device torch computes those in parts of its own.
    agree(got, want, 1e-5 if "LoRAtorio" in name else 0)
    assert harmless(late) == []
    assert "double" not in {t.kind for t in transfers if t.ours}


@pytest.mark.parametrize("mode", ["every step", "once"])
@pytest.mark.parametrize("make", [Merge, Composite, LoRAtorio], ids=lambda make: make.__name__)
@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_places_by_words(family, make, mode, loras, transfers):
    """Attention is read, and places are renewed, on the device alone."""
    ensemble = specs(base(family), loras)
    want = wanted(lambda model: routed(model, ensemble, make, mode=mode), family, positive=prompt(family))
    transfers.clear()
    got, late = run(routed(on_device(family), ensemble, make, mode=mode), family, transfers, positive=prompt(family))
    agree(got, want, 1e-4)
    assert harmless(late) == []
    assert "double" not in {t.kind for t in transfers if t.ours}


@pytest.mark.parametrize("make", [klora, est])
def test_a_choice_per_layer(make, loras, transfers):
    ensemble = pair(base("SD15"), loras)
    want = wanted(make, "SD15", ensemble)
    got, late = run(make(on_device("SD15"), ensemble), "SD15", transfers)
    agree(got, want)
    assert late == []


@pytest.mark.parametrize("make", [klora, lambda *which: est(*which, balance="energy"),
                                  lambda *which: est(*which, balance="l1")], ids=["K-LoRA", "energy", "l1"])
@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_what_layers_are_chosen_by_is_measured_on_the_device(family, make, loras, transfers):
    """The numbers come to the host together, agree with the processor's to 1e-6, and serve it as well."""
    ensemble = pair(base(family), loras)
    measure._kept.clear()
    transfers.clear()
    there = make(on_device(family), ensemble)
    assert [t.kind for t in transfers if t.ours and t.kind not in ("upload", "double")] == ["wait"]
    assert method_of(make(base(family), ensemble)).contest == method_of(there).contest, "kept"
    measure._kept.clear()
    here = make(base(family), ensemble)
    contests = method_of(here).contest, method_of(there).contest
    assert contests[0].ratios == pytest.approx(contests[1].ratios, rel=2e-6)
    assert [contests[0].acting(0.1 * n) for n in range(20)] == [contests[1].acting(0.1 * n) for n in range(20)]
    assert record_of(there) is None


@pytest.mark.parametrize("how", ["none free", "lost while it measures", "another error"])
def test_without_memory_the_processor_measures(how, loras, transfers, monkeypatch):
    """And the record says so; who acts where is the same. What is no lack of memory is not taken for one."""
    ensemble, tried, real = pair(base("SD15"), loras), [], measure.measure
    error = {"lost while it measures": torch.cuda.OutOfMemoryError("out of memory"),
             "another error": RuntimeError("lost")}.get(how)

    def measured(*given, **options):
        tried.append(options.get("device"))
        found = real(*given, **options)
        if "device" in options:
            raise error
        return found

    measure._kept.clear()
    model = on_device("SD15")
    with monkeypatch.context() as patched:
        patched.setattr(measure, "measure", measured)
        if how == "none free":
            patched.setattr(comfy.model_management, "get_free_memory", lambda device, both=False: 2**20)
            patched.setattr(comfy.model_management, "free_memory", lambda *given, **options: [])
        if how == "another error":
            with pytest.raises(RuntimeError, match="lost"):
                klora(model, ensemble)
            return
        there = klora(model, ensemble)
    assert tried == ([None] if how == "none free" else [model.load_device, None])
    sample(there, steps=1)
    assert sum("no memory to measure the LoRAs there" in line for line in record_of(there).problems) == 1
    measure._kept.clear()
    assert method_of(there).contest == method_of(klora(base("SD15"), ensemble)).contest


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("space", ["noise", "x0"])
def test_adaptive_guidance(space, exact, loras, transfers):
    """What is decided on the device is the picture, whenever the host learns of it: equal but for sizes of batches."""
    ensemble = three(base("SD15"), loras)
    want = wanted(lambda model: ag(composite(model, ensemble), 0.9, space=space), "SD15", cfg=12.0)
    got, late = run(ag(composite(on_device("SD15"), ensemble), 0.9, exact, space=space), "SD15", transfers, cfg=12.0)
    agree(got, want, 1e-4)
    assert harmless(late) == []


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_extrapolated_guidance(tolerance, loras, transfers):
    """Nothing is waited for, whether turns are planned or found."""
    ensemble = three(base("SD15"), loras)
    want = wanted(lambda model: extrapolated(composite(model, ensemble), tolerance=tolerance), "SD15", cfg=12.0)
    ours = extrapolated(composite(on_device("SD15"), ensemble), tolerance=tolerance)
    got, late = run(ours, "SD15", transfers, cfg=12.0)
    agree(got, want, 1e-4)
    assert harmless(late) == [] and not all(step.negative for step in guidance_record_of(ours).steps)


def test_calibration_and_linear_ag(loras, transfers):
    ensemble = three(base("SD15"), loras)
    with unwatched():
        want = calibrate(merge(base("SD15"), ensemble), paths(seeds=1))
    transfers.clear()
    model = merge(on_device("SD15"), ensemble)
    found = calibrate(model, paths(seeds=1))
    near = 1e-3 if REAL else 1e-4  # a solution of least squares: the last digit of its numbers is multiplied
    torch.testing.assert_close(found.found.coefficients, want.found.coefficients, rtol=1e-3, atol=near)
    assert "double" not in {t.kind for t in transfers if t.ours}
    transfers.clear()
    out = sample(guide(model, found), steps=CALIBRATED, cfg=12.0)
    again = sample(guide(merge(base("SD15"), ensemble), found, nearest=True), steps=CALIBRATED, cfg=12.0)
    agree(out, again, 1e-4)


@pytest.mark.parametrize("make", [merge, composite])
@pytest.mark.parametrize("where", [LINEAR[2:4], POINTWISE[:1], KERNEL[:1]], ids=["linear", "1x1", "3x3"])
def test_every_kind_of_adapter(where, make, loras, transfers):
    kinds = EVERYWHERE if where[0] not in KERNEL else {**EVERYWHERE, **CONVOLUTIONS}
    ensemble = [LoRASpec(loras(file_of(weights(where), kind)), 0.3, 0) for kind in kinds.values()]
    with unwatched():
        want = sample(make(base("SD15"), ensemble), steps=2)
    got = sample(make(on_device("SD15"), ensemble), steps=2)
    agree(got, want)


@pytest.mark.parametrize("make", [composite, klora, METHODS["CMLoRA"]], ids=["Composite", "K-LoRA", "CMLoRA"])
def test_weights_that_are_streamed(make, loras, transfers, monkeypatch):
    """Without memory to spare the host keeps weights on the CPU and sends each when its layer is called."""
    management, ensemble = comfy.model_management, pair(base("SD15"), loras)
    want = wanted(make, "SD15", ensemble)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    model = on_device("SD15")
    got, late = run(make(model, ensemble), "SD15", transfers)
    weight = model.model.diffusion_model.middle_block[1].proj_in.weight
    assert weight.device.type == "cpu", "nothing is streamed"
    agree(got, want)
    assert harmless(late) == []
