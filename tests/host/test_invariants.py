"""What must hold of LoRAtorio's and CMLoRA's weights whatever the LoRAs, and how many evaluations each method costs,
through the real host."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.methods.cmlora import CMLoRA
from lora_ensemble.methods.loratorio import LoRAtorio
from lora_ensemble.methods.switch import Switch
from lora_ensemble.nodes.klora import LoRAEnsembleESTLoRA, LoRAEnsembleKLoRA

from .builders import composite, lora, merge, method, same, sample, shapes, three
from .models import FAMILIES, base
from .watched import watched


def loratorio(model, ensemble, **options):
    return method(model, ensemble, lambda strengths: LoRAtorio(strengths, **options))


def cmlora(model, ensemble, **options):
    return method(model, ensemble, lambda strengths: CMLoRA(strengths, **options))


def switch(model, ensemble, **options):
    return method(model, ensemble, lambda strengths: Switch(strengths, **options))


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upsampling", ["nearest", "bilinear"])
@pytest.mark.parametrize(("family", "size"), [("SD15", 8), ("SD15", 11), ("Flux", 8), ("Wan", 8)])
def test_weights_sum_to_one_at_every_pixel(family, size, upsampling, loras):
    model = base(family)
    layers = shapes(model, lambda name: "block" in name)
    ensemble = [LoRASpec(loras(lora(layers, seed, 4)), 0.7, 0) for seed in (1, 2, 3)]
    ours, seen = watched(model, ensemble, upsampling=upsampling)
    sample(ours, family, steps=3, batch=2, size=size)
    assert [step.index for step, *_ in seen] == [0, 1, 2]
    for _, call, weights in seen:
        assert weights.shape == (3, 2, 1, *call.x.shape[2:]) and weights.min() >= 0
        torch.testing.assert_close(weights.sum(dim=0), torch.ones_like(weights[0]), atol=1e-5, rtol=0)
    assert seen[-1][2].std() > 1e-3, "the LoRAs differ, and so do their weights"


def test_order_of_the_loras_does_not_matter(loras):
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    turned = (ensemble[2], ensemble[0], ensemble[1])
    options = dict(kappa=2.0, top_k=2)
    same(sample(loratorio(model, turned, **options), steps=3), sample(loratorio(model, ensemble, **options), steps=3),
         sample(model, steps=3))


def test_one_of_a_pool_is_one_lora_for_the_whole_picture(loras):
    """One step, no guidance: every picture of the batch is the picture of one LoRA alone."""
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    once = dict(steps=1, cfg=1.0, batch=2)
    found, ground = sample(loratorio(model, ensemble, top_k=1), **once), sample(model, **once)
    alone = [sample(merge(model, (spec,)), **once) for spec in ensemble]
    for b in range(2):
        chosen = min(alone, key=lambda picture, b=b: (picture[b] - found[b]).abs().max())
        same(found[b], chosen[b], ground[b])


def test_what_hardly_differs_from_the_base_weighs_least(loras):
    model = base("SD15")
    names = [spec.name for spec in three(model, loras)]
    ours = loratorio(model, [LoRASpec(name, s, 0) for name, s in zip(names, (0.8, 1e-3, 0.6), strict=True)])
    sample(ours, steps=4)
    for step in record_of(ours).steps[1:]:
        first, faint, last = step.notes["LoRAtorio"]["weights"]
        assert faint < min(first, last)


@pytest.mark.parametrize("w", [None, 0.5, 1.0, 4.0])
def test_the_leader_has_its_share(w, loras):
    """One step, no guidance: sum_i lambda_i of the pictures of each LoRA alone; w below 1 leads with less."""
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    once = dict(steps=1, cfg=1.0)
    ours = cmlora(model, ensemble, start=w)
    found = sample(ours, **once)
    w = 2.5 if w is None else w
    shares = [w / (w + 2), 1 / (w + 2), 1 / (w + 2)]
    assert sum(shares) == pytest.approx(1) and (shares[0] >= shares[1]) == (w >= 1)
    want = sum(share * sample(merge(model, (spec,)), **once) for share, spec in zip(shares, ensemble, strict=True))
    same(found, want, sample(model, **once))
    note = record_of(ours).steps[0].notes["CMLoRA"]
    assert note["led"] == 0 and note["weight"] == pytest.approx(shares[0])


@pytest.mark.parametrize("options", [{"start": 0.5}, {"start": 9.0, "decay": "halving"}, {"order": "async"},
                                     {"order": "online", "c1": 1, "c2": 5}, {"order": "switch-a"}], ids=str)
def test_identical_loras_are_the_single_lora_for_any_w_and_schedule(options, loras):
    model = base("SD15")
    one = (LoRASpec(loras(lora(shapes(model), 1, 4)), 0.7, 0),)
    single, plain = sample(merge(model, one), steps=5), sample(model, steps=5)
    same(sample(cmlora(model, one * 3, high=(True, False, True), **options), steps=5), single, plain)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 4, 9, 13), (2, 4, 16, 10), (1, 4, 31, 8)], ids=str)
def test_latents_of_any_size(shape, loras, monkeypatch):
    """The share of high frequencies is a number, and pictures are sound, for sizes that no patch divides."""
    kind = FAMILIES["SD15"]
    monkeypatch.setattr(type(kind), "noise", lambda self, batch=1, size=8, seed=0: torch.randn(
        shape, generator=torch.Generator().manual_seed(seed)))
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    ours = cmlora(model, ensemble, order="online")
    for made in (ours, loratorio(model, ensemble, patch=3), loratorio(model, ensemble, upsampling="bilinear")):
        found = sample(made)
        assert found.shape == shape and torch.isfinite(found).all()
    assert all(0 < step.notes["CMLoRA"]["high_share"] <= 1 for step in record_of(ours).steps)


# --- evaluations ----------------------------------------------------------------------------------------------------


def klora(model, ensemble):
    return LoRAEnsembleKLoRA.execute(model, ensemble, 1.5, -1.0, "s", "paper", 0, "as applied").args[0]


def est(model, ensemble):
    return LoRAEnsembleESTLoRA.execute(model, ensemble, 1.5, 0.5, "energy").args[0]


@pytest.mark.parametrize(("cfg", "sides"), [(3.0, 2), (1.0, 1)])
@pytest.mark.parametrize(("make", "options", "branches"), [
    (merge, {}, [1] * 6), (switch, {"steps_per_lora": 2}, [1] * 6), (composite, {}, [3] * 6),
    (loratorio, {}, [4] * 6), (loratorio, {"top_k": 1}, [4] * 6),
    (loratorio, {"top_k": 1, "recheck_every": 3}, [4, 4, 2, 4, 2, 2]),
    (cmlora, {}, [3] * 6), (cmlora, {"order": "switch-a", "steps_per_lora": 2}, [1] * 6),
    (klora, {}, [1] * 6), (est, {}, [1] * 6),
], ids=["Merge", "Switch", "Composite", "LoRAtorio", "top 1", "top 1, every 3", "CMLoRA", "Switch-A", "K-LoRA",
        "EST-LoRA"])  # fmt: skip
def test_evaluations_are_the_formulas(make, options, branches, cfg, sides, loras):
    """1 or N or N + 1 branches, times positive and negative. (Pictures of a batch may choose different members.)"""
    ours = make(base("SD15"), three(base("SD15"), loras), **options)
    sample(ours, steps=6, cfg=cfg)
    assert [step.rows for step in record_of(ours).steps] == [sides * count for count in branches]
    assert [len(step.branches) for step in record_of(ours).steps] == branches
