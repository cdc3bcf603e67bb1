"""LoRAs with a window in time: per step, what ComfyUI's own loader makes of the LoRAs that are open."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import comfy.hooks
import comfy.samplers
import pytest
import torch
from lora_ensemble.host.compose import context
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import ALWAYS, LoRASpec
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.switch import Switch
from torch import Tensor

from .builders import file_of, guided, merge, method, same, sample, schedule, stock, three
from .caches import cached, steps_of
from .models import FAMILIES, base
from .test_routed import prompt, routed, specs
from .test_selection import klora, method_of, pair

STEPS = 6
families = pytest.mark.parametrize("family", ["SD15", "Flux"])
APART = ((0.0, 0.15, 0.0), (0.5, 0.7, 0.0), (0.9, 1.0, 0.0))
FADED = ((0.0, 0.5, 0.0), (0.3, 1.0, 0.4), (0.0, 1.0, 0.0))
windows = pytest.mark.parametrize("windows", [APART, FADED], ids=["apart", "faded"])


def at(spec: LoRASpec, start: float, end: float, fade: float = 0.0, **options) -> LoRASpec:
    return LoRASpec(spec.name, spec.strength_model, 0, options.pop("role", spec.role), words=spec.words, start=start,
                    end=end, fade=fade, **options)


def times(model, sigmas: Tensor) -> list[float]:
    """ComfyUI's percent of each noise level, by a fine table of its own function."""
    sampling = model.get_model_object("model_sampling")
    table = [float(sampling.percent_to_sigma(k / 4000)) for k in range(4001)]
    return [min(range(4001), key=lambda k: abs(table[k] - sigma)) / 4000 for sigma in sigmas[:-1].tolist()]


def gains(spec: LoRASpec, found: list[float]) -> list[float]:
    """The definition, written out."""
    out = []
    for time in found:
        inside = spec.start - 1e-3 <= time and (time < spec.end - 1e-3 or spec.end == 1)
        rise = (time - spec.start) / spec.fade if spec.fade and spec.start else 1
        fall = (spec.end - time) / spec.fade if spec.fade and spec.end < 1 else 1
        out.append(max(0.0, min(1.0, rise, fall)) if inside else 0.0)
    return out


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_noise_levels_are_placed_once(family, loras, monkeypatch):
    """Each look at the host's function is a dozen operations: a second run takes a few, and not sixty. A sampling that
    has become another since is seen."""
    model, looks = base(family), []
    sampling = model.get_model_object("model_sampling")
    own, stretch = sampling.percent_to_sigma, [1.0]
    monkeypatch.setattr(sampling, "percent_to_sigma", lambda share: looks.append(share) or stretch[0] * own(share))
    monkeypatch.setattr(context, "_PERCENTS", WeakKeyDictionary())

    def anew(sigma: float) -> float:
        return next(k for k in range(1, 4097) if sampling.percent_to_sigma(k / 4096) <= sigma) / 4096

    composed, counts = merge(model, three(model, loras)), []
    for _ in range(2):
        looks.clear()
        sample(composed, family, steps=3)
        counts.append(len(looks))
    assert counts[0] >= 30 and 0 < counts[1] <= 6, counts
    sigmas = [own(share) for share in (0.2, 0.7)]
    for factor in (1.0, 1.0, 0.9, 1.0):
        stretch[0] = factor
        for sigma in sigmas:
            assert 0 <= anew(sigma) - context._percent(sampling, sigma) <= 1 / 4096
    for k in range(context.MOST_KNOWN + 1):
        context._percent(sampling, own(k / 99))
    assert len(context._PERCENTS[sampling]) <= context.MOST_KNOWN, "on a server that goes on for days"


def one_step(model, latent: Tensor, sigmas: Tensor, j: int, family: str, cfg: float, conds) -> Tensor:
    """A sampling of one step of a schedule, from where the one before it stopped."""
    kind = FAMILIES[family]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*(conds or (kind.cond(11), kind.cond(12))))
    guider.set_cfg(cfg)
    noise = kind.noise(1, seed=1) if j == 0 else torch.zeros_like(latent)
    with torch.inference_mode():
        return guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas[j:j + 2], disable_pbar=True,
                             seed=1)


def relay(step: Callable[[int, Callable[..., Tensor], Tensor], Tensor], sigmas: Tensor, family: str = "SD15",
          cfg: float = 3.0, conds=None) -> Tensor:
    """Step by step: `step(j, evaluate, latent)` -> the next latent, `evaluate(model)` -> that of one MODEL."""
    latent = torch.zeros_like(FAMILIES[family].noise())
    for j in range(len(sigmas) - 1):
        latent = step(j, lambda model, j=j, x=latent: one_step(model, x, sigmas, j, family, cfg, conds), latent)
    return latent


def ours(model, sigmas: Tensor, family: str = "SD15", cfg: float = 3.0, conds=None, sampler: str = "euler") -> Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*(conds or (FAMILIES[family].cond(11), FAMILIES[family].cond(12))))
    guider.set_cfg(cfg)
    return guided(guider, sigmas, family, sampler)


def reference(model, ensemble, found: list[list[float]], mix) -> Callable:
    """`relay`'s step: `mix(j, open LoRAs, their latents, the base's, the latent before)`."""
    def step(j, evaluate, latent):
        may = [i for i, each in enumerate(found) if each[j]]
        alone = [evaluate(stock(model, [scaled(ensemble[i], found[i][j])])) for i in may]
        return mix(j, may, alone, lambda: evaluate(model), latent) if may else evaluate(model)

    return step


def scaled(spec: LoRASpec, gain: float) -> LoRASpec:
    return LoRASpec(spec.name, spec.strength_model * gain, 0)


def turns(found: list[list[float]]) -> list[int | None]:
    """One step for each LoRA, in turn: the next one whose window is open."""
    out, queue = [], list(range(len(found)))
    for j in range(len(found[0])):
        turn = next((i for i in queue if found[i][j]), None)
        out.append(turn)
        if turn is not None:
            queue = queue[queue.index(turn) + 1:] + queue[:queue.index(turn) + 1]
    return out


def softmin(j: int, alone: list[Tensor], plain: Tensor, before: Tensor) -> Tensor:
    """LoRAtorio's mix by its formula: patches of 2 x 2, inverse temperature 10 j. Cosines of the noise are those of
    what a step does to a latent."""
    def vectors(after: Tensor) -> Tensor:
        return (after - before).mean(1)[0].double().unfold(0, 2, 2).unfold(1, 2, 2).flatten(2)

    cosines = torch.stack([torch.nn.functional.cosine_similarity(vectors(each), vectors(plain), dim=-1)
                           for each in alone])
    weights = (-10.0 * j * cosines).softmax(0).float().repeat_interleave(2, 1).repeat_interleave(2, 2)
    return sum(weight * each for weight, each in zip(weights, alone, strict=True))


METHODS = {
    "Composite": (Composite, lambda j, may, alone, plain, x, found, record: sum(alone) / len(alone)),
    "Switch": (lambda s: Switch(s, 1),
               lambda j, may, alone, plain, x, found, record: alone[may.index(turns(found)[j])]),
    "LoRAtorio": (lambda s: LoRAtorio(s, recenter_lambda=1.0),
                  lambda j, may, alone, plain, x, found, record: softmin(j, alone, plain(), x)),
    "CMLoRA": (lambda s: CMLoRA(s, caching=False), lambda j, may, alone, plain, x, found, record: sum(
        (len(may) - 0.5 if i == record.steps[j].notes["CMLoRA"]["led"] and len(may) > 1 else 1) * each
        for i, each in zip(may, alone, strict=True)) / (2 * len(may) - 1.5 if len(may) > 1 else 1)),
}


# --- pictures ---


@windows
@families
def test_merge(family, windows, loras):
    """Step by step the stock loader's, with every LoRA at what its window leaves of its strength."""
    model = base(family)
    ensemble = [at(spec, *window) for spec, window in zip(three(model, loras), windows, strict=True)]
    sigmas = schedule(model, STEPS)
    found = [gains(spec, times(model, sigmas)) for spec in ensemble]
    assert any(0 < gain < 1 for each in found for gain in each) == (windows is FADED)
    composed = method(model, ensemble, Merge)
    want = relay(lambda j, evaluate, x: evaluate(stock(model, [
        scaled(spec, each[j]) for spec, each in zip(ensemble, found, strict=True) if each[j]])), sigmas, family)
    same(ours(composed, sigmas, family), want, ours(model, sigmas, family))
    record = record_of(composed)
    assert record.problems == []
    assert [step.branches[0][0] for step in record.steps] == [
        pytest.approx([spec.strength_model * each[j] for spec, each in zip(ensemble, found, strict=True)], abs=1e-3)
        for j in range(STEPS)]


@windows
@families
@pytest.mark.parametrize("name", METHODS)
def test_methods(name, family, windows, loras):
    """The method's own formula over what the stock loader makes of each open LoRA alone."""
    if name == "LoRAtorio" and family == "Flux":
        pytest.skip("its latents are scaled between two runs, and cosines are of the change")
    model, (make, mix) = base(family), METHODS[name]
    ensemble = [at(spec, *window) for spec, window in zip(three(model, loras), windows, strict=True)]
    sigmas, cfg = schedule(model, STEPS), 1.0 if name == "LoRAtorio" else 3.0
    found = [gains(spec, times(model, sigmas)) for spec in ensemble]
    composed = method(model, ensemble, make)
    result, record = ours(composed, sigmas, family, cfg), record_of(composed)
    want = relay(reference(model, ensemble, found, lambda *each: mix(*each, found, record)), sigmas, family, cfg)
    same(result, want, ours(model, sigmas, family, cfg))
    for j, step in enumerate(record.steps):
        acting = {i for (branch,) in step.branches for i, gain in enumerate(branch) if gain}
        assert acting <= {i for i, each in enumerate(found) if each[j]}
        rows = {"Composite": sum(each[j] > 0 for each in found), "Switch": 1}.get(name)
        assert rows is None or step.rows == max(rows, 1) * 2


@families
def test_klora(family, loras):
    """With one of the two shut, the other acts at all layers; with both, each at its own."""
    model = base(family)
    subject, style = pair(model, loras)
    ensemble = [at(subject, 0, 0.7), at(style, 0.3, 1, 0.2)]
    sigmas = schedule(model, STEPS)
    found = [gains(spec, times(model, sigmas)) for spec in ensemble]
    composed = klora(model, ensemble)
    contest = method_of(composed)

    def step(j, evaluate, latent):
        may = [i for i in range(2) if found[i][j]]
        if len(may) < 2:
            return evaluate(stock(model, [scaled(ensemble[i], found[i][j]) for i in may]))
        acting = dict(zip(contest.contest.layers, contest.contest.acting(contest.scale(j / (STEPS - 1))), strict=True))
        parts = []
        for i in may:
            kept = {name.replace(".", "_") for name, winner in acting.items() if winner == i}
            file = {key: value for key, value in file_of(ensemble[i]).items()
                    if key.split(".")[0].removeprefix("lora_unet_") in kept}
            parts += [LoRASpec(loras(file), ensemble[i].strength_model * found[i][j], 0)] if file else []
        return evaluate(stock(model, parts))

    want = relay(step, sigmas, family)
    same(ours(composed, sigmas, family), want, ours(model, sigmas, family))
    counts = [each.notes["KLoRA"]["layers"] for each in record_of(composed).steps]
    assert [[bool(n) for n in each] for each in counts] != [[True, True]] * STEPS
    assert all(not n for j, each in enumerate(counts) for n, own in zip(each, found, strict=True) if not own[j])


@families
def test_always_has_a_window_too(family, loras):
    """Beneath the method, in its time alone."""
    model = base(family)
    first, second, turbo = three(model, loras)
    ensemble = [at(turbo, 0.3, 1, 0.2, role=ALWAYS), LoRASpec(first.name, 0.8, 0), LoRASpec(second.name, 0.6, 0)]
    sigmas = schedule(model, STEPS)
    (always,) = [gains(ensemble[0], times(model, sigmas))]
    assert 0.0 in always and 1.0 in always
    composed = method(model, ensemble, Composite)

    def step(j, evaluate, latent):
        beneath = stock(model, [scaled(ensemble[0], always[j])] if always[j] else [])
        return sum(evaluate(stock(beneath, [spec])) for spec in ensemble[1:]) / 2

    same(ours(composed, sigmas, family), relay(step, sigmas, family), ours(model, sigmas, family))


@families
def test_routed_without_one_is_as_if_it_were_muted(family, loras):
    """Its words compete as those of no LoRA do, and it acts nowhere: up to its window, the run with strength 0."""
    model, conds = base(family), (prompt(family), FAMILIES[family].cond(12))
    first, second = specs(model, loras)
    sigmas = schedule(model, STEPS)
    opens = next(j for j, time in enumerate(times(model, sigmas)) if time >= 0.5)
    seen = {}

    def run(ensemble, name):
        guider = comfy.samplers.CFGGuider(routed(model, ensemble))
        guider.set_conds(*conds)
        guider.set_cfg(3.0)
        noise = FAMILIES[family].noise(1, seed=1)
        with torch.inference_mode():
            guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas, seed=1,
                          disable_pbar=True, callback=lambda j, x0, x, total: seen.setdefault(name, []).append(x0))

    run([first, at(second, 0.5, 1)], "windowed")
    run([first, LoRASpec(second.name, 0, 0, words=second.words)], "muted")
    run([first, second], "both")
    for j, (windowed, muted) in enumerate(zip(seen["windowed"], seen["muted"], strict=True)):
        assert torch.allclose(windowed, muted, atol=1e-4 * muted.abs().max()) == (j < opens)
    assert not torch.allclose(seen["both"][0], seen["windowed"][0], atol=1e-3)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_ancestral", "uni_pc"])
def test_comfyuis_own_keyframes(sampler, loras):
    """Its hook LoRAs with keyframes on the same scale, where a step is one call, and where it is two."""
    model = base("SD15")
    first, second, _ = three(model, loras)
    ensemble = [at(first, 0.0, 0.5), at(second, 0.3, 1.0)]
    groups = []
    for spec in ensemble:
        frames = comfy.hooks.HookKeyframeGroup()
        edges = {0.0: 0.0, spec.start: 1.0} | ({spec.end: 0.0} if spec.end < 1 else {})
        for percent, strength in edges.items():
            frames.add(comfy.hooks.HookKeyframe(strength, percent))
        group = comfy.hooks.create_hook_lora(file_of(spec), spec.strength_model, 0)
        group.set_keyframes_on_hooks(frames)
        groups.append(group)
    hooks = comfy.hooks.HookGroup.combine_all_hooks(groups)
    conds = [[[text, {**options, "hooks": hooks}] for text, options in FAMILIES["SD15"].cond(seed)]
             for seed in (11, 12)]
    sigmas = schedule(model, STEPS)
    want = ours(model, sigmas, conds=conds, sampler=sampler)
    same(ours(method(model, ensemble, Merge), sigmas, sampler=sampler), want, ours(model, sigmas, sampler=sampler))


@families
def test_a_run_that_begins_in_the_middle(family, loras):
    """Time is the noise level's, not the run's: the same windows hold in the second of two samplers."""
    model = base(family)
    ensemble = [at(spec, *window) for spec, window in zip(three(model, loras), FADED, strict=True)]
    composed, sigmas = method(model, ensemble, Merge), schedule(model, STEPS)
    whole = ours(composed, sigmas, family)
    conds = FAMILIES[family].cond(11), FAMILIES[family].cond(12)
    latent = torch.zeros_like(whole)
    for part, noise in ((sigmas[:4], FAMILIES[family].noise(1, seed=1)), (sigmas[3:], torch.zeros_like(whole))):
        guider = comfy.samplers.CFGGuider(composed)
        guider.set_conds(*conds)
        guider.set_cfg(3.0)
        with torch.inference_mode():
            latent = guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), part, disable_pbar=True,
                                   seed=1)
    same(latent, whole, ours(model, sigmas, family), 1e-4)


# --- what it costs ---


@pytest.mark.parametrize("name", ["Merge", "K-LoRA", *METHODS])
def test_whole_windows_change_no_bit(name, loras):
    model = base("SD15")
    listed = pair(model, loras)
    whole = [at(spec, 0, 1, 0.3) for spec in listed]

    def make(ensemble):
        if name == "K-LoRA":
            return klora(model, ensemble)
        return method(model, ensemble, Merge if name == "Merge" else METHODS[name][0])

    found = make(whole)
    assert torch.equal(sample(found, steps=3), sample(make(listed), steps=3))
    assert found.get_attachment("lora_ensemble").applied[-1].windows == ()


def test_a_step_without_a_lora_is_the_base_models(loras):
    """To the bit, at the cost of one evaluation."""
    model = base("SD15")
    ensemble = [at(spec, 0.0, 0.3) for spec in three(model, loras)]
    sigmas = schedule(model, STEPS)
    late = sigmas[4:]
    for make in (Merge, Composite, Switch, LoRAtorio, CMLoRA):
        composed = method(model, ensemble, make)
        assert torch.equal(ours(composed, late), ours(model, late)), make.__name__
        assert [step.rows for step in record_of(composed).steps] == [2, 2]


@pytest.mark.parametrize("make", [Merge, Composite])
def test_features_of_other_gains_are_not_used(make, loras):
    """While a LoRA fades, nothing of an earlier step serves; where gains stand still, all of it does."""
    model = base("SD15")
    first, second, _ = three(model, loras)
    faded = method(model, [at(first, 0.0, 0.99, 0.99), at(second, 0.0, 0.99, 0.99)], make)
    same_bits = ours(cached(faded, 9), schedule(model, STEPS))
    assert torch.equal(same_bits, ours(faded, schedule(model, STEPS)))
    split = cached(method(model, [at(first, 0.0, 0.5), at(second, 0.5, 1.0)], make), 9)
    ours(split, schedule(model, STEPS))
    reused = [each["reused"] > 0 for each in steps_of(split)]
    assert reused == [False, True, True, False, True, True]


def test_strengths_follow_without_a_new_bank(loras):
    model = base("SD15")
    spec = three(model, loras)[0]
    banks = {id(method(model, [at(spec, *window)], Merge).get_additional_models_with_key("lora_ensemble")[0].model)
             for window in ((0, 1, 0), (0, 0.5, 0), (0.2, 0.9, 0.3))}
    assert len(banks) == 1
