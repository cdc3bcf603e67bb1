"""K-LoRA and EST-LoRA on real models inside ComfyUI: one LoRA's picture where one side is forced, the same choice at
the same progress however it is sampled, measuring with progress and cancelling."""

from __future__ import annotations

from dataclasses import replace

import comfy.lora
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import pytest
import torch
from lora_ensemble.engine.sizes import measure
from lora_ensemble.host.compose import measure as host_measure
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.compose.context import _span
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.files.files import read
from lora_ensemble.kernels.branch import Step
from lora_ensemble.methods.selection import Selection
from lora_ensemble.methods.session import RunContext
from lora_ensemble.nodes.klora import LoRAEnsembleESTLoRA, LoRAEnsembleKLoRA

from .builders import Rand, lora, merge, sample, schedule, shapes, stock
from .models import FAMILIES, base, build, patcher

each_family = pytest.mark.parametrize("family", ["SD15", "SDXL", "Flux"])


@pytest.fixture(autouse=True)
def nothing_kept():
    host_measure._kept.clear()


def pair(model, loras, layers=None) -> tuple[LoRASpec, LoRASpec]:
    """A subject and a style on all layers, of unequal rank, alpha and strength; layers differ in which is larger."""
    layers = layers or shapes(model)
    sizes = Rand(7)
    files = []
    for seed, rank, alpha in ((1, 4, None), (2, 8, 6.0)):
        file = lora(layers, seed, rank, alpha)
        for key in file:
            if key.endswith("lora_up.weight"):
                file[key] = file[key] * torch.exp(0.4 * sizes(1))
        files.append(loras(file))
    return (LoRASpec(files[0], 0.8, 0.0, "character"), LoRASpec(files[1], 0.7, 0.0, "style"))


def klora(model, ensemble, **options):
    settings = dict(alpha=1.5, beta=-1.0, pattern="s", gamma="paper", k=0, deltas="as applied") | options
    return LoRAEnsembleKLoRA.execute(model, ensemble, **settings).args[0]


def est(model, ensemble, **options):
    settings = dict(alpha=1.5, style_discrepancy=0.5, balance="energy") | options
    return LoRAEnsembleESTLoRA.execute(model, ensemble, **settings).args[0]


def method_of(model) -> Selection:
    return model.get_attachment("lora_ensemble").applied[-1].method


def acting(model) -> list[list[int]]:
    """Per step of the last run, the number of layers of each LoRA."""
    (name,) = record_of(model).methods
    return [step.notes[name]["layers"] for step in record_of(model).steps]


def expected(method: Selection, progress: float) -> list[int]:
    found = method.contest.acting(method.scale(progress))
    return [found.count(i) for i in range(2)]


# --- pictures ---


@each_family
@pytest.mark.parametrize("side", [0, 1], ids=["subject", "style"])
def test_forced_to_one_side_it_is_the_stock_loader_with_that_lora(family, side, loras):
    """fp32, 1e-4 of the picture."""
    model = base(family)
    ensemble = pair(model, loras)
    reference = sample(stock(model, ensemble[side:side + 1]), family, batch=2)
    tolerance = 1e-4 * reference.abs().max()
    forced = [klora(model, ensemble, alpha=0.0, beta=(0.0, 100.0)[side])]
    if side == 0:
        forced.append(est(model, ensemble, alpha=0.0, style_discrepancy=1.0))  # the scale is 0 throughout
    for composed in forced:
        assert (sample(composed, family, batch=2) - reference).abs().max() < tolerance
    assert (sample(model, family, batch=2) - reference).abs().max() > 100 * tolerance


@each_family
@pytest.mark.parametrize("make", [klora, est])
def test_layers_of_both_are_a_merge_of_their_parts(make, family, loras):
    """One step: the picture is the stock loader's with, of either file, the layers on which that LoRA acts."""
    model = base(family)
    ensemble = pair(model, loras)
    composed = make(model, ensemble)
    method = method_of(composed)
    acting = dict(zip(method.contest.layers, method.contest.acting(method.scale(0.0)), strict=True))
    assert len(set(acting.values())) == 2, "both LoRAs must act somewhere for this to show anything"
    everything = shapes(model)
    assert set(acting) == set(everything)
    parts = pair(model, loras), []
    for i, spec in enumerate(parts[0]):
        kept = {name.replace(".", "_") for name, winner in acting.items() if winner == i}
        file = {key: value for key, value in read(spec.name, model.model).items()
                if key.split(".")[0].removeprefix("lora_unet_") in kept}
        parts[1].append(LoRASpec(loras(file), spec.strength_model, 0.0))
    reference = sample(stock(model, parts[1]), family, steps=1)
    ours = sample(composed, family, steps=1)
    assert (ours - reference).abs().max() < 1e-4 * reference.abs().max()
    both = sample(merge(model, ensemble), family, steps=1)
    assert (ours - both).abs().max() > 1e-2 * reference.abs().max()


@pytest.mark.parametrize("make", [klora, est])
def test_a_second_run_is_the_same(make, loras):
    composed = make(base("SD15"), pair(base("SD15"), loras))
    first, acted = sample(composed, steps=5), acting(composed)
    assert torch.equal(sample(composed, steps=5), first) and acting(composed) == acted
    assert len({tuple(counts) for counts in acted}) > 1, "nothing changes hands in this run"


# --- time ---


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "uni_pc"])
@pytest.mark.parametrize("steps", [3, 5, 9])
def test_the_choice_depends_on_the_progress_alone(sampler, steps, loras):
    """Samplers that call the model once a step, twice, or at levels between; a step is known by its noise level."""
    composed = klora(base("SD15"), pair(base("SD15"), loras))
    sample(composed, steps=steps, sampler=sampler)
    method, record = method_of(composed), record_of(composed)
    sigmas = comfy.samplers.KSampler(composed, steps, composed.load_device, sampler, "normal").sigmas.tolist()
    assert all(sigmas[step.index] * (1 + 1e-4) >= step.sigma > sigmas[step.index + 1] for step in record.steps)
    assert [step.index for step in record.steps] == sorted({step.index for step in record.steps})
    for step, counts in zip(record.steps, acting(composed), strict=True):
        assert counts == expected(method, step.index / (steps - 1)), step.index


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_two_samplers_in_a_row_are_one(family, loras):
    """Steps 0 to 4 and 4 to 9 in two runs, as two KSampler (Advanced) nodes do: the second goes on where the first was
    left, and both together are the picture of one run."""
    model = base(family)
    composed = klora(model, pair(model, loras))
    kind, sigmas = FAMILIES[family], schedule(model, 9)
    sampler = comfy.samplers.sampler_object("euler")

    def run(noise, latent, part):
        with torch.inference_mode():
            return comfy.sample.sample_custom(composed, noise, 3.0, sampler, part, kind.cond(11), kind.cond(12), latent,
                                              disable_pbar=True, seed=1)

    noise = kind.noise()
    whole, acted = run(noise, torch.zeros_like(noise), sigmas), acting(composed)
    half = run(noise, torch.zeros_like(noise), sigmas[:5])
    first = acting(composed)
    both = run(torch.zeros_like(noise), half, sigmas[4:])
    assert first + acting(composed) == acted and len({tuple(counts) for counts in acted}) > 2
    assert (both - whole).abs().max() < 1e-4 * whole.abs().max()


def test_denoise_starts_in_the_middle(loras):
    composed = klora(base("SD15"), pair(base("SD15"), loras))
    latent = FAMILIES["SD15"].noise(seed=5)
    sample(composed, steps=4, denoise=0.5, latent=latent)
    method, acted = method_of(composed), acting(composed)
    assert acted[0] == expected(method, 4 / 7) and acted[-1] == expected(method, 1.0)


@pytest.mark.parametrize("name", ["SD15", "SDXL", "SD3", "Flux", "Wan"])
@pytest.mark.parametrize("scheduler", ["normal", "karras", "simple", "beta"])
def test_every_full_run_spans_the_whole_progress(name, scheduler):
    sampling = base(name).get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, 8).tolist()
    first, last = _span(sampling, sigmas)
    assert first == pytest.approx(0.0, abs=2e-3) and last == 1.0
    later = [_span(sampling, sigmas[j:])[0] for j in range(8)]
    assert later == sorted(later) and later[-1] <= 1.0
    assert _span(sampling, sigmas[:5])[1] == pytest.approx(later[3])


# --- layers and kinds ---


def test_a_layer_of_one_lora_uses_that_one(loras):
    model = base("SD15")
    names = list(shapes(model))
    shared, own = names[::2], names[1::2]
    ensemble = pair(model, loras)
    small = lora({name: shapes(model)[name] for name in shared}, 3)
    ensemble = (LoRASpec(loras(small), 1.0, 0.0, "character"), ensemble[1])
    composed = klora(model, ensemble, alpha=0.0, beta=0.0)  # the subject wherever it can
    branch = method_of(composed).at(0.5)
    assert {branch.at(name) for name in shared} == {(1.0, 0.0)} and {branch.at(name) for name in own} == {(0.0, 0.7)}


def test_kinds_that_depend_on_the_weight_take_part(loras):
    """A DoRA against a LoRA: its size is that of the change that it makes to this model's weights."""
    model = base("SD15")
    layers = {name: shape for name, shape in shapes(model).items() if name.endswith(("to_q", "to_k"))}
    dora = lora(layers, 1)
    for name, shape in layers.items():
        dora[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = Rand(5)(shape[0], 1).abs() + 0.5
    ensemble = (LoRASpec(loras(dora), 1.0, 0.0, "character"), LoRASpec(loras(lora(layers, 2)), 1.0, 0.0, "style"))
    composed = klora(model, ensemble)
    weights, contest = model.model.state_dict(), method_of(composed).contest
    name = contest.layers[0]
    stocked = stock(model, ensemble[:1])
    key = f"diffusion_model.{name}.weight"
    changed = comfy.lora.calculate_weight(stocked.patches[key], weights[key].clone(), key)
    bank = composed.get_additional_models_with_key("lora_ensemble")[0].model
    size = measure(bank, (True, False), reader=lambda key: weights[f"diffusion_model.{key}"])[name][0]
    assert size.energy == pytest.approx((changed - weights[key]).double().square().sum().item(), rel=1e-4)
    assert not host_measure._kept, "sizes that depend on the model's weights must not be kept by file"
    same_lora = sample(klora(model, ensemble, alpha=0.0, beta=0.0))
    assert (same_lora - sample(stock(model, ensemble[:1]))).abs().max() < 1e-4 * same_lora.abs().max()


# --- measuring ---


def test_sizes_are_kept_for_other_settings_and_forgotten_with_the_file(loras, monkeypatch):
    model, measured = base("SD15"), []
    real = host_measure.measure
    monkeypatch.setattr(host_measure, "measure", lambda *a, **k: measured.append(1) or real(*a, **k))
    ensemble = pair(model, loras)
    first = klora(model, ensemble)
    klora(model, ensemble, alpha=1.0, beta=0.3, pattern="s*")
    stronger = (LoRASpec(ensemble[0].name, 2.0, 0.0, "character"), ensemble[1])
    assert method_of(klora(model, stronger)).contest.ratios == pytest.approx(method_of(first).contest.ratios)
    assert len(measured) == 1
    klora(model, ensemble, k=5)
    assert len(measured) == 2
    loras(lora(shapes(model), 99, 4), ensemble[0].name)
    assert method_of(klora(model, ensemble)).contest.ratios != method_of(first).contest.ratios
    assert len(measured) == 3


def test_sizes_are_kept_by_the_layers_of_each_lora(loras):
    """One LoRA more than the other fits each of two models, on the same layer: as names of layers both are the same."""
    wide = replace(FAMILIES["SD15"], config={**FAMILIES["SD15"].config, "context_dim": 48})
    models = base("SD15"), patcher(build(wide))
    layers = [name for name in shapes(models[0]) if name.startswith("middle_block") and name.endswith(
        ("attn1.to_q", "attn2.to_k"))]
    files = [lora({name: shapes(model)[name] for name in layers}, seed, 2) for seed, model in enumerate(models)]
    ensemble = tuple(LoRASpec(loras(file), 1.0, 0.0) for file in files)
    for number, model in enumerate(models):
        contest = method_of(klora(model, ensemble)).contest
        assert contest.layers == tuple(layers) and contest.acting(1.0)[1] == number


def test_measuring_shows_its_progress_and_can_be_cancelled(loras, monkeypatch):
    model, seen = base("SD15"), []
    ensemble = pair(model, loras)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, preview, **_: seen.append((done, total)))
    klora(model, ensemble)
    layers = len(shapes(model))
    assert seen[-1] == (layers, layers)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        klora(model, ensemble, k=3)
    assert klora(model, ensemble, k=3) is not model  # the next attempt works


def test_roles_decide_and_auto_goes_by_order(loras, caplog):
    model = base("SD15")
    a, b = pair(model, loras)
    auto = [LoRASpec(spec.name, spec.strength_model, 0.0) for spec in (a, b)]
    with caplog.at_level("INFO", logger="lora_ensemble"):
        by_order = method_of(klora(model, tuple(auto)))
    assert by_order == method_of(klora(model, (a, b)))
    assert f"subject: {a.name}; style: {b.name} (roles 'auto' decided by order)" in caplog.text
    swapped = method_of(klora(model, (LoRASpec(b.name, 0.7, 0.0, "style"), LoRASpec(a.name, 0.8, 0.0, "object"))))
    assert swapped.contest.ratios == pytest.approx(by_order.contest.ratios)
    assert swapped.at(0.5).gains in ((0.7, 0.0), (0.0, 0.8))


@pytest.mark.parametrize(("role", "other"), [("style", "subject"), ("object", "style")])
@pytest.mark.parametrize("make", [klora, est])
def test_loras_of_one_side_leave_nothing_to_balance(make, role, other, loras):
    """Settings that do nothing are told of."""
    model = base("SD15")
    a, b = (replace(spec, role=role) for spec in pair(model, loras))
    one_sided = make(model, (a, b))
    sample(one_sided, steps=2)
    assert [line for line in record_of(one_sided).problems if line.startswith(f"no LoRA is a {other}")]
    for ensemble in ((a,), pair(model, loras)):
        fine = make(model, ensemble)
        sample(fine, steps=1)
        assert not [line for line in record_of(fine).problems if "no LoRA is a" in line]


def test_the_released_balance_refuses_three(loras):
    model = base("SD15")
    a, b = pair(model, loras)
    with pytest.raises(ValueError, match="one subject and one style"):
        klora(model, (a, b, LoRASpec(a.name, 1.0, 0.0, "background")), gamma="released code")


def test_three_loras_and_steps_of_a_composed_model_stay_facts_of_the_run(loras):
    """More LoRAs than two sample, and who acts adds up to the layers."""
    model = base("SD15")
    a, b = pair(model, loras)
    third = LoRASpec(loras(lora(shapes(model), 5, 4)), 0.9, 0.0, "clothing")
    composed = klora(model, (a, b, third))
    sample(composed, steps=4)
    counts = acting(composed)
    assert all(sum(each) == len(shapes(model)) for each in counts) and all(any(c[i] for c in counts) for i in range(3))
    session = method_of(composed).begin(RunContext((1.0, 0.0)))
    assert session.branches(Step(0, 1, 1.0))[0] is method_of(composed).at(0.0)
