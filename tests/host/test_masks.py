"""Masks by hand in the layers of a model: each LoRA in its region, in one evaluation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_ensemble.host.compose.apply import apply_method
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.compose.places import crop, for_call, held, of_film, on_grid
from lora_ensemble.host.compose.placing import Placing
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.switch import Switch
from torch import Tensor
from torch.nn import functional as F

from .builders import Rand, composite, lora, merge, method, plain, same, sample, shapes, stock
from .models import FAMILIES, base, build, patcher, randomize

LAST = {"SD15": "out.2", "SDXL": "out.2", "SD3": "final_layer.linear", "Flux": "final_layer.linear", "Wan": "head.head"}
"""A layer behind all attention of each family: what it does at a place of the prediction stays there."""
ATTENTION_EVERYWHERE = {"transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1]}
LEFT = torch.zeros(1, 16, 16)
LEFT[..., :8] = 1


def pair(model, loras, layers: str | None = None, masks=(LEFT, 1 - LEFT)) -> list[LoRASpec]:
    chosen = shapes(model, lambda name: layers is None or name == layers)
    return [LoRASpec(loras(lora(chosen, seed, 4)), strength, 0, mask=None if mask is None else Mask(mask))
            for seed, strength, mask in zip((1, 2), (0.8, 0.6), masks, strict=True)]


def bare(specs: list[LoRASpec]) -> list[LoRASpec]:
    return [LoRASpec(spec.name, spec.strength_model, 0) for spec in specs]


@pytest.mark.parametrize("family", LAST)
def test_masks_of_ones_are_the_chain_of_loaders(family, loras):
    """Also beside a negative of another length, where tokens lie elsewhere."""
    model = base(family)
    specs = pair(model, loras, masks=(torch.ones(1, 5, 5), torch.ones(16, 16)))
    ours, negative = merge(model, specs), FAMILIES[family].cond(12, tokens=9)
    same(sample(ours, family, negative=negative, batch=2),
         sample(stock(model, bare(specs)), family, negative=negative, batch=2),
         sample(model, family, negative=negative, batch=2), 1e-4)
    assert record_of(ours).problems == [] and [step.rows for step in record_of(ours).steps] == [4, 4]


def test_everywhere_is_everywhere(loras):
    """Place *everywhere*: masks are not used, which one line says."""
    model, ensemble = base("SD15"), pair(base("SD15"), loras)
    ours, _ = apply_method(model, None, tuple(ensemble), plain(Merge), "Merge LoRAs", placing=Placing("everywhere"))
    assert torch.equal(sample(ours), sample(merge(model, bare(ensemble))))
    (line,) = record_of(ours).problems
    assert f"the mask of LoRA '{ensemble[0].name}' is not used: the LoRAs are to act everywhere" in line


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("family", LAST)
def test_each_lora_acts_in_its_region_and_nowhere_else(family, cfg, loras):
    """The left half of the picture is that of one LoRA alone, the right half that of the other."""
    model = base(family)
    specs = pair(model, loras, LAST[family])
    first, second = (sample(stock(model, [spec]), family, cfg=cfg, steps=1) for spec in bare(specs))
    plain, found = sample(model, family, cfg=cfg, steps=1), sample(merge(model, specs), family, cfg=cfg, steps=1)
    same(found[..., :4], first[..., :4], plain[..., :4], 1e-4)
    same(found[..., 4:], second[..., 4:], plain[..., 4:], 1e-4)


@pytest.mark.parametrize("family", LAST)
def test_a_region_without_a_lora_is_the_bases(family, loras):
    model = base(family)
    specs = pair(model, loras, LAST[family], (LEFT, torch.zeros(1, 8, 8)))
    found, plain = sample(merge(model, specs), family, steps=1), sample(model, family, steps=1)
    assert torch.equal(found[..., 4:], plain[..., 4:]) and not torch.allclose(found[..., :4], plain[..., :4], atol=1e-3)


@pytest.mark.parametrize("make", [Merge, Switch, Composite])
def test_a_black_mask_is_told(make, loras):
    """Such a LoRA does nothing, and a node that found nothing makes such masks."""
    model = base("SD15")
    first, second = pair(model, loras, masks=(LEFT, torch.zeros(2, 8, 8)))
    ours = method(model, [first, second], make)
    sample(ours, steps=2, batch=2)
    assert record_of(ours).problems == [f"the mask of LoRA '{second.name}' is black all over: it acts at no place of "
                                        "the picture"]


@pytest.mark.parametrize("make", [Merge, Switch, Composite])
def test_a_white_mask_is_none(make, loras):
    """Beside others it is how one says that a LoRA acts everywhere, whatever its words: no line is due."""
    model = base("SD15")
    first, second = pair(model, loras, masks=(LEFT, torch.ones(2, 8, 8)))
    ours = method(model, [first, second], make)
    found = sample(ours, steps=2, batch=2)
    assert record_of(ours).problems == []
    same(found, sample(method(model, [first, replace(second, mask=None)], make), steps=2, batch=2),
         sample(model, steps=2, batch=2))


@pytest.mark.parametrize("family", ["SD15", "Wan"])
def test_composite_beside_a_lora_without_a_mask(family, loras):
    """Guard: the base model was evaluated as well, though it has a share nowhere."""
    model = base(family)
    specs = pair(model, loras, masks=(LEFT, None))
    ours = method(model, specs, Composite)
    found, plain = sample(ours, family, steps=1), sample(model, family, steps=1)
    first, second = (sample(stock(model, [spec]), family, steps=1) for spec in bare(specs))
    same(found[..., :4], (first + second)[..., :4] / 2, plain[..., :4], 1e-4)
    same(found[..., 4:], second[..., 4:], plain[..., 4:], 1e-4)
    assert [step.rows for step in record_of(ours).steps] == [4]
    both = method(model, [replace(spec, mask=specs[0].mask) for spec in specs], Composite)
    sample(both, family, steps=1)
    assert [step.rows for step in record_of(both).steps] == [6]


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_masks_work_in_all_layers(family, loras):
    """With attention between, other halves change too, but each is nearer to its own LoRA's picture."""
    model = base(family)
    specs = pair(model, loras)
    found = sample(merge(model, specs), family, steps=1)
    whole = [sample(stock(model, [spec]), family, steps=1) for spec in bare(specs)]
    for own, other, half in ((0, 1, slice(0, 4)), (1, 0, slice(4, 8))):
        near, far = ((found - whole[k])[..., half].norm() for k in (own, other))
        assert near < far


@pytest.mark.parametrize("family", ["SD15", "Flux"])
def test_one_mask_per_picture(family, loras):
    model = base(family)
    mask = torch.cat([LEFT, 1 - LEFT])
    spec, other = pair(model, loras, LAST[family], (mask, None))
    found = sample(merge(model, [spec]), family, batch=2, steps=1)
    plain = sample(model, family, batch=2, steps=1)
    alone = sample(stock(model, bare([spec])), family, batch=2, steps=1)
    same(found[0, ..., :4], alone[0, ..., :4], plain[0, ..., :4], 1e-4)
    same(found[1, ..., 4:], alone[1, ..., 4:], plain[1, ..., 4:], 1e-4)
    assert torch.equal(found[0, ..., 4:], plain[0, ..., 4:]) and torch.equal(found[1, ..., :4], plain[1, ..., :4])


def test_one_mask_per_frame_of_every_film(loras):
    """More masks than films are no masks of films."""
    model = base("Wan")
    masks = torch.zeros(9, 16, 16)
    masks[0], masks[5:, :, :8] = 1, 1  # nine frames are three of the latent's: one, four and four
    (spec, _) = pair(model, loras, LAST["Wan"], (masks, None))
    found, plain, alone = (sample(each, "Wan", batch=2, steps=1)
                           for each in (merge(model, [spec]), model, stock(model, bare([spec]))))
    where = torch.nn.functional.adaptive_avg_pool2d(torch.stack([masks[0], masks[1], masks[5]]), 8)
    same(found, plain + where * (alone - plain), plain, 1e-4)


def test_masks_without_a_picture_are_told(loras):
    model = base("SD15")
    spec, other = pair(model, loras, masks=(torch.cat([LEFT, 1 - LEFT, LEFT]), LEFT))
    ours = merge(model, [spec, other])
    sample(ours, batch=2, steps=1)
    assert record_of(ours).problems == [f"LoRA '{spec.name}' has 3 masks for 2 pictures: those behind are not used"]
    sample(ours, batch=4, steps=1)
    assert record_of(ours).problems == []


def test_the_area_of_a_cond_takes_its_part_of_the_mask(loras):
    """Guard: the host gives the model a piece of the latent, and the mask's left half is not that piece's left half."""
    model, kind = base("SD15"), FAMILIES["SD15"]
    specs = pair(model, loras, LAST["SD15"])
    areas = [kind.cond(5, area=(8, 4, 0, 0))[0], kind.cond(6, area=(8, 4, 0, 4))[0]]
    first, second = (sample(stock(model, [spec]), positive=areas, steps=1) for spec in bare(specs))
    found, plain = sample(merge(model, specs), positive=areas, steps=1), sample(model, positive=areas, steps=1)
    same(found[..., :4], first[..., :4], plain[..., :4], 1e-4)
    same(found[..., 4:], second[..., 4:], plain[..., 4:], 1e-4)


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_an_area_of_some_frames_takes_their_masks(start, loras):
    """ConditioningSetAreaPercentageVideo. The first of three frames has the LoRA."""
    model, area = base("Wan"), ("percentage", 0.5, 1.0, 1.0, start, 0.0, 0.0)
    spec, _ = pair(model, loras, LAST["Wan"], (torch.cat([torch.ones(1, 8, 8), torch.zeros(2, 8, 8)]), None))
    found, plain, alone = (sample(each, "Wan", FAMILIES["Wan"].cond(5, area=area), steps=1)
                           for each in (merge(model, [spec]), model, stock(model, bare([spec]))))
    same(found[:, :, :1], alone[:, :, :1], plain[:, :, :1], 1e-4)
    assert torch.equal(found[:, :, 1:], plain[:, :, 1:])


def test_turns_are_confined_too(loras):
    model = base("SD15")
    specs = pair(model, loras, LAST["SD15"])
    ours = method(model, specs, lambda strengths: Switch(strengths, 1))
    first, plain = sample(stock(model, bare(specs)[:1]), steps=1), sample(model, steps=1)
    found = sample(ours, steps=1)
    same(found[..., :4], first[..., :4], plain[..., :4], 1e-4)
    assert torch.equal(found[..., 4:], plain[..., 4:])


@pytest.mark.parametrize("family", LAST)
def test_composite_mixes_by_masks(family, loras):
    """Soft edges fade into the base, LoRAs that share a place share it evenly, one without a mask acts everywhere."""
    model = base(family)
    soft = torch.linspace(0, 1, 8).expand(1, 8, 8)
    specs = pair(model, loras, masks=(soft, LEFT))
    alone = [sample(stock(model, [spec]), family, steps=1, batch=2) for spec in bare(specs)]
    plain = sample(model, family, steps=1, batch=2)
    left = (torch.arange(8) < 4).float()
    for masks, used in (((soft[0, 0], left), specs), ((soft[0, 0], torch.ones(8)), [specs[0], bare(specs)[1]])):
        total = sum(masks).clamp_min(1)
        want = plain + sum(mask / total * (picture - plain) for mask, picture in zip(masks, alone, strict=True))
        same(sample(composite(model, used), family, steps=1, batch=2), want, plain, 1e-4)


def test_the_same_mask_serves_other_sizes(loras):
    model = base("SD15")
    specs = pair(model, loras, LAST["SD15"])
    ours = merge(model, specs)
    for size in (8, 16, 8):
        first, plain = (sample(m, steps=1, size=size) for m in (stock(model, bare(specs)[:1]), model))
        found = sample(ours, steps=1, size=size)
        same(found[..., :size // 2], first[..., :size // 2], plain[..., :size // 2], 1e-4)


@pytest.mark.parametrize("ratio", [0.4, 0.75, 1.0])
def test_merged_tokens_have_no_places(ratio, loras):
    """Guard: `Merging`. ToMe leaves a quarter of the tokens at most, as many as the next level of the U-Net has, where
    they do have places."""
    node = pytest.importorskip("comfy_extras.nodes_tomesd").TomePatchModel
    kind = replace(FAMILIES["SD15"], config=FAMILIES["SD15"].config | ATTENTION_EVERYWHERE)
    model = patcher(build(kind))
    randomize(model.model)
    merging = node.execute(model, ratio)[0] if hasattr(node, "execute") else node().patch(model, ratio)[0]

    def drawn(one) -> Tensor:
        torch.manual_seed(3)  # the node throws dice
        return sample(one, steps=1)

    for layer, known in (("input_blocks.1.1", False), ("input_blocks.3.1", True)):
        specs = pair(model, loras, f"{layer}.transformer_blocks.0.attn1.to_q")[:1]
        ours, everywhere, plain = merge(merging, specs), drawn(stock(merging, bare(specs))), drawn(merging)
        if known:
            assert not torch.allclose(drawn(ours), everywhere, rtol=1e-3) and record_of(ours).problems == []
        else:
            same(drawn(ours), everywhere, plain, 1e-4)
            (problem,) = record_of(ours).problems
            assert "where its tokens lie in the picture is not known" in problem and layer in problem
        alone = merge(model, specs)
        assert not torch.allclose(drawn(alone), drawn(stock(model, bare(specs))), rtol=1e-3)
        assert record_of(alone).problems == []


def test_parts_of_masks():
    """Of a context window, with ones for the frames that guide it, of an area, of a film without what guides it."""
    rand = Rand(0)
    pictures, film = rand(2, 1, 4, 4), rand(1, 1, 6, 4, 4)
    frames, some = (2, (1, 2), 0), (0, (1,), 0)
    assert torch.equal(held(film, frames, 5), film[:, :, 1:3]) and held(pictures, frames, 5) is pictures
    assert all(torch.equal(held(pictures, some, dimensions), pictures[1:]) for dimensions in (4, 5))
    assert held(pictures, (0, (0, 1, 2), 0), 4) is pictures
    with_guides = torch.cat([film[:, :, 1:3], torch.ones(1, 1, 2, 4, 4)], dim=2)
    assert torch.equal(for_call(film, frames, torch.zeros(1, 8, 4, 4, 4)), with_guides)
    assert torch.equal(for_call(film, frames, torch.zeros(1, 8, 4, 8, 8)),
                       F.interpolate(with_guides, (4, 8, 8), mode="trilinear"))
    assert torch.equal(for_call(pictures, some, torch.zeros(1, 8, 8, 8)),
                       F.interpolate(pictures[1:], (8, 8), mode="bilinear"))
    assert on_grid(pictures, (3, 4, 4)).shape == (2, 1, 1, 4, 4)
    assert on_grid(pictures, (4, 4)) is pictures and on_grid(film, (6, 4, 4)) is film
    assert torch.equal(of_film(film, 4), film[:, :, :4]) and of_film(pictures, 1) is pictures
    assert torch.equal(crop(film, (6, 2, 3, 0, 1, 0)), film[..., 1:3, :3]) and crop(film, None) is film


def test_a_family_whose_tokens_are_not_known_says_so(loras, monkeypatch):
    from lora_ensemble.host.compose import places

    monkeypatch.setattr(places, "token_order", lambda root: None)
    model = base("Flux")
    ours = method(model, pair(model, loras), Merge)
    same(sample(ours, "Flux"), sample(stock(model, bare(pair(model, loras))), "Flux"), sample(model, "Flux"), 1e-4)
    (problem,) = record_of(ours).problems
    assert "where its tokens lie in the picture is not known" in problem
