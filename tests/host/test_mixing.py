"""LoRAtorio and CMLoRA through the real host: invariants, the conds of every guider, masks, counted evaluations."""

from __future__ import annotations

import comfy_extras.nodes_custom_sampler as guiders
import comfy_extras.nodes_pag as nodes_pag
import comfy_extras.nodes_perpneg as nodes_perpneg
import comfy_extras.nodes_sag as nodes_sag
import comfy_extras.nodes_slg as nodes_slg
import pytest
import torch
from lora_ensemble.host.compose.apply import apply_method
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.kernels.branch import Branch, one_hot
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.loratorio import LoRAtorio
from torch import Tensor

from .builders import composite, guided, lora, merge, method, same, sample, schedule, shapes, stock, three
from .models import FAMILIES, base

SD15 = FAMILIES["SD15"]


def loratorio(model, ensemble, **options):
    return method(model, ensemble, lambda strengths: LoRAtorio(strengths, **options))


def cmlora(model, ensemble, **options):
    return method(model, ensemble, lambda strengths: CMLoRA(strengths, **options))


def thrice(model, loras, strength: float = 0.7) -> tuple[LoRASpec, ...]:
    """The same LoRA three times."""
    name = loras(lora(shapes(model), 1, 4))
    return (LoRASpec(name, strength, 0),) * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, loras):
    """Pictures and video, with and without a negative pass; what comes out is a mix of the LoRAs' own pictures."""
    model = base(family)
    layers = shapes(model, lambda name: "block" in name)
    ensemble = [LoRASpec(loras(lora(layers, seed, 4)), 0.7, 0) for seed in (1, 2, 3)]
    plain = sample(model, family)
    for ours in (loratorio(model, ensemble, upsampling="bilinear"), cmlora(model, ensemble, order="online")):
        got = sample(ours, family)
        assert torch.isfinite(got).all() and (got - plain).abs().max() > 1e-3
        notes = [next(iter(step.notes.values())) for step in record_of(ours).steps]
        assert len(notes) == 2 and all(isinstance(note, dict) for note in notes)
        if "weights" in notes[0]:
            assert all(sum(note["weights"]) == pytest.approx(1, abs=1e-5) for note in notes)


def test_w_1_without_a_cache_is_composite_bit_for_bit(loras):
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    want = sample(composite(model, ensemble), steps=4, batch=2)
    for order in ("offline", "online", "async"):
        ours = cmlora(model, ensemble, order=order, start=1.0, caching=False)
        assert torch.equal(sample(ours, steps=4, batch=2), want)


def test_temperature_0_without_re_centring_is_composite(loras):
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    ours = loratorio(model, ensemble, kappa=0.0, recenter_lambda=1.0)
    same(sample(ours), sample(composite(model, ensemble)), sample(model), 1e-4)


@pytest.mark.parametrize("make", [lambda m, e: loratorio(m, e, recenter_lambda=1.0), cmlora,
                                  lambda m, e: cmlora(m, e, decay="linear", order="switch-a")],
                         ids=["LoRAtorio", "CMLoRA", "Switch-A"])
def test_identical_loras_and_one_lora_are_the_single_lora(make, loras):
    model = base("SD15")
    ensemble = thrice(model, loras)
    single, plain = sample(merge(model, ensemble[:1]), steps=3), sample(model, steps=3)
    same(sample(make(model, ensemble), steps=3), single, plain)
    same(sample(make(model, ensemble[:1]), steps=3), single, plain)


def test_the_single_lora_is_re_centred_at_half(loras):
    """lambda = 1/2 with one LoRA: the unconditional side is the mean of its own and the base's, by hand."""
    model = base("SD15")
    ensemble = thrice(model, loras)[:1]
    one_step = dict(steps=1, cfg=4.0)
    got = sample(loratorio(model, ensemble), **one_step)
    cond = sample(merge(model, ensemble), steps=1, cfg=1.0)
    own, ground = (sample(m, "SD15", SD15.cond(12), steps=1, cfg=1.0) for m in (merge(model, ensemble), model))
    uncond = (own + ground) / 2
    same(got, uncond + 4 * (cond - uncond), sample(model, **one_step))


@pytest.mark.parametrize("make", [loratorio, cmlora], ids=["LoRAtorio", "CMLoRA"])
def test_strength_zero_is_the_base_exactly(make, loras):
    """And told, since nothing that was asked for is done."""
    model = base("SD15")
    ours = make(model, thrice(model, loras, 0.0))
    assert torch.equal(sample(ours), sample(model))
    assert any("no LoRA acts on the model" in problem for problem in record_of(ours).problems)


class Zero(LoRAtorio):
    """LoRAtorio with branches whose gains are all 0, which the host would have left out."""

    def begin(self, facts):
        session = super().begin(facts)
        session.branches = lambda step: (*(one_hot((0.0,) * 3, i) for i in range(3)), Branch((0.0,) * 3))
        session._active = session.pool
        return session


def test_branches_without_any_gain_are_the_base(loras):
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    got, plain = sample(method(model, ensemble, Zero)), sample(model)
    # Rows of a wider batch round differently; the mix itself adds nothing (tests/test_loratorio.py).
    assert (got - plain).abs().max() < 1e-3 * plain.abs().max()


def test_all_of_the_pool_is_static(loras):
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    assert torch.equal(sample(loratorio(model, ensemble, top_k=3, recheck_every=2), steps=3),
                       sample(loratorio(model, ensemble), steps=3))


# --- the record -----------------------------------------------------------------------------------------------------


def test_the_record_says_who_led_and_what_was_not_re_centred(loras):
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    ours = cmlora(model, ensemble, high=(True, False, True))
    sample(ours, steps=10)
    assert [step.notes["CMLoRA"]["led"] for step in record_of(ours).steps] == [0, 0, 2, 2, 0, 0, 0, 1, 1, 1]
    for cfg, recentred in ((3.0, True), (1.0, False)):
        ours = loratorio(model, ensemble)
        sample(ours, cfg=cfg)
        assert [step.notes["LoRAtorio"]["recentred"] for step in record_of(ours).steps] == [recentred] * 2


# --- what callers ask for -------------------------------------------------------------------------------------------


def prediction(model, cond: list, seed: int = 1) -> Tensor:
    """The denoised prediction at the first step of one cond, as one Euler step to sigma 0 leaves it."""
    guider = guiders.Guider_Basic(model)
    guider.set_conds(cond)
    return guided(guider, schedule(model, 1), seed=seed)


def by_hand(model, ensemble, cond: list, share: float) -> Tensor:
    """At the first step all weights are equal: the mean over LoRAs, with the base beside it."""
    mean = torch.stack([prediction(merge(model, (one,)), cond) for one in ensemble]).mean(dim=0)
    return share * mean + (1 - share) * prediction(model, cond)


def test_dual_cfg(loras):
    """Positive and middle without the base, negative re-centred."""
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    conds = [SD15.cond(1), SD15.cond(2), SD15.cond(3)]

    def drawn(of) -> Tensor:
        guider = guiders.Guider_DualCFG(of)
        guider.set_conds(*conds)
        guider.set_cfg(3.0, 2.0)
        return guided(guider, schedule(model, 1))

    positive, middle, negative = (by_hand(model, ensemble, cond, share)
                                  for cond, share in zip(conds, (1.0, 1.0, 0.5), strict=True))
    want = negative + 2.0 * (middle - negative) + (positive - middle) * 3.0
    same(drawn(loratorio(model, ensemble)), want, drawn(model))


def test_perp_neg_guider(loras):
    """Negative and empty prompt are both re-centred."""
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    conds = [SD15.cond(1), SD15.cond(2), SD15.cond(3)]

    def drawn(of) -> Tensor:
        guider = nodes_perpneg.Guider_PerpNeg(of)
        guider.set_conds(*conds)
        guider.set_cfg(3.0, 0.8)
        return guided(guider, schedule(model, 1))

    positive, negative, empty = (by_hand(model, ensemble, cond, share)
                                 for cond, share in zip(conds, (1.0, 0.5, 0.5), strict=True))
    pos, neg = positive - empty, negative - empty
    perp = neg - (neg * pos).sum() / pos.norm() ** 2 * pos
    same(drawn(loratorio(model, ensemble)), empty + 3.0 * (pos - 0.8 * perp), drawn(model))


def patched(node, model, *options):
    return node.execute(model, *options)[0] if hasattr(node, "execute") else node().patch(model, *options)[0]


EXTRA = {
    "PAG": lambda model: patched(nodes_pag.PerturbedAttentionGuidance, model, 3.0),
    "SAG": lambda model: patched(nodes_sag.SelfAttentionGuidance, model, 0.5, 2.0),
}


@pytest.mark.parametrize("extra", EXTRA)
@pytest.mark.parametrize("make", [loratorio, cmlora], ids=["LoRAtorio", "CMLoRA"])
def test_extra_passes(extra, make, loras):
    """Identical LoRAs make every mix the single LoRA's prediction, in the extra pass as well."""
    model = base("SD15")
    ensemble = thrice(model, loras)
    options = dict(steps=3, size=16)
    plain = sample(EXTRA[extra](model), **options)
    assert not torch.allclose(plain, sample(model, **options), rtol=1e-2), "the extra pass must matter"
    ours = make(model, ensemble, **({"recenter_lambda": 1.0} if make is loratorio else {}))
    same(sample(EXTRA[extra](ours), **options), sample(EXTRA[extra](merge(model, ensemble[:1])), **options), plain)


def test_skipped_layers_on_a_transformer(loras):
    """SLG on SD3: an extra pass of the positive with layers left out."""
    model = base("SD3")
    ensemble = thrice(model, loras)
    node = nodes_slg.SkipLayerGuidanceDiT

    def skipping(of):
        name = "execute" if hasattr(node, "execute") else "skip_guidance"
        target = node if name == "execute" else node()
        return getattr(target, name)(model=of, double_layers="0", single_layers="", scale=3.0, start_percent=0.0,
                                     end_percent=1.0)[0]

    ours = loratorio(model, ensemble, recenter_lambda=1.0)
    same(sample(skipping(ours), "SD3"), sample(skipping(merge(model, ensemble[:1])), "SD3"),
         sample(skipping(model), "SD3"))


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [loratorio, composite])
def test_a_mask_confines_its_lora(make, loras):
    """One step, no guidance: where a LoRA may not act, the picture is the other's; where none may, the base's."""
    model = base("SD15")
    layers = shapes(model)
    names = [loras(lora(layers, seed, 4)) for seed in (1, 2)]
    left, right = torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)
    left[..., :32], right[..., 32:48] = 1, 1
    ensemble = [LoRASpec(name, 0.7, 0, mask=Mask(mask)) for name, mask in zip(names, (left, right), strict=True)]
    once = dict(steps=1, cfg=1.0)
    got, ground = sample(make(model, ensemble), **once), sample(model, **once)
    for columns, spec in ((slice(0, 4), ensemble[0]), (slice(4, 6), ensemble[1])):
        alone = sample(merge(model, (LoRASpec(spec.name, 0.7, 0),)), **once)
        same(got[..., columns], alone[..., columns], ground[..., columns])
    torch.testing.assert_close(got[..., 6:], ground[..., 6:], rtol=1e-4, atol=1e-4)


def test_every_method_can_use_a_mask(loras):
    model = base("SD15")
    spec = LoRASpec(loras(lora(shapes(model), 1, 4)), 0.7, 0, mask=Mask(torch.eye(8)[None]))
    for make in (cmlora, composite, loratorio, merge):
        ours = make(model, (spec,))
        sample(ours, steps=1)
        assert record_of(ours).problems == []


def test_cmlora_has_each_lora_in_its_region(loras):
    """The left half of the picture is that of one LoRA alone, the right half that of the other."""
    model = base("SD15")
    left = torch.zeros(1, 8, 8)
    left[..., :4] = 1
    files = [loras(lora(shapes(model, lambda name: name == "out.2"), seed, 4)) for seed in (1, 2)]
    both = tuple(LoRASpec(file, 0.7, 0, mask=Mask(mask)) for file, mask in zip(files, (left, 1 - left), strict=True))
    found, plain = sample(cmlora(model, both), steps=1), sample(model, steps=1)
    for k, half in enumerate((slice(0, 4), slice(4, 8))):
        alone = sample(stock(model, [LoRASpec(files[k], 0.7, 0)]), steps=1)
        same(found[..., half], alone[..., half], plain[..., half], 1e-4)


def test_masks_are_compared_by_identity():
    mask = Mask(torch.ones(1, 8, 8))
    one, other = (LoRASpec("a", 1.0, 1.0, mask=m) for m in (mask, Mask(torch.ones(1, 8, 8))))
    assert one == LoRASpec("a", 1.0, 1.0, mask=mask) and one != other and len({one, other}) == 2


def test_the_nodes_hand_their_widgets_over(loras):
    from lora_ensemble.nodes.cmlora import LoRAEnsembleCMLoRA
    from lora_ensemble.nodes.loratorio import LoRAEnsembleLoRAtorio

    model = base("SD15")
    ensemble = three(model, loras)
    ensemble = (ensemble[0], LoRASpec(ensemble[1].name, 0.5, 0, "background"), ensemble[2])
    out = LoRAEnsembleLoRAtorio.execute(model, ensemble, 3, 5.0, "progress", 0.25, "bilinear", "x0", 2, "patch", 4)
    assert out.args[0].get_attachment("lora_ensemble").applied[0].method == LoRAtorio(
        (0.8, 0.5, -0.6), 3, 5.0, "progress", 0.25, "bilinear", "x0", 2, "patch", 4)
    options = (0.5, 0.3, 0.0, "halving", 4, 5, "on_refresh", 7, 2)
    out = LoRAEnsembleCMLoRA.execute(model, ensemble, "Switch-A", *options)
    assert out.args[0].get_attachment("lora_ensemble").applied[0].method == CMLoRA(
        (0.8, 0.5, -0.6), (True, False, True), "switch-a", 0.5, 0.3, None, "halving", 4, 5,
        dominant_full="on_refresh", steps_per_lora=7)
    assert out.args[0].get_attachment("lora_ensemble").cache is None, "one LoRA at a time has nothing to cache"
    out = LoRAEnsembleCMLoRA.execute(model, ensemble, "offline", *options)
    assert out.args[0].get_attachment("lora_ensemble").cache == CacheSpec(
        max_age=15, depth=2, whose="The cache of CMLoRA")
    with pytest.raises(ValueError, match="CMLoRA \\(Cached Multi-LoRA\\): order is 'sometimes'"):
        LoRAEnsembleCMLoRA.execute(model, ensemble, "sometimes", *options)
    with pytest.raises(ValueError, match="LoRAtorio: the ensemble is empty"):
        apply_method(model, None, (), lambda active: LoRAtorio(active.strengths), node="LoRAtorio")


# --- caching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", ["every_step", "on_refresh"])
def test_those_who_do_not_lead_ride_on_the_cache(full, loras):
    """As many rows come from the cache as the method allows, and the picture stays near the uncached one."""
    from lora_ensemble.nodes.cmlora import LoRAEnsembleCMLoRA

    model = base("SD15")
    ensemble, total = three(model, loras, (0.3, 0.2, -0.3)), 12

    def drawn(depth: int):
        ours = LoRAEnsembleCMLoRA.execute(model, ensemble, "async", 0.6, 0.4, 0.0, "none", 2, 3, full, 5,
                                          depth).args[0]
        return sample(ours, steps=total), record_of(ours)

    cached, record = drawn(1)
    whole = [step.notes["CMLoRA"]["whole"] for step in record.steps]
    assert whole[0] == [0, 1, 2] and sum(map(len, whole)) < 2 * total
    assert [step.notes["cache"]["reused"] for step in record.steps] == [2 * (3 - len(ran)) for ran in whole]
    uncached, record = drawn(0)
    assert all("cache" not in step.notes for step in record.steps)
    assert (cached - uncached).norm() < 0.2 * uncached.norm() and not torch.equal(cached, uncached)
