"""Routed LoRAs beside nodes that people have installed: each LoRA where its words are, as far as it is trusted beyond,
of what the node makes of ComfyUI's own LoRA loaders.
"""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from torch import Tensor
from torch.nn import functional as F

from .builders import same, sample, stock
from .models import FAMILIES, base
from .neighbour_packs import REAL, REAL_SKIPPING
from .neighbours import FIRST_OF_A_SIDE, SKIPPING, STAND_INS, ip_adapter
from .test_masks import LAST
from .test_neighbours import anew, unloaded  # noqa: F401  (a fixture)
from .test_routed import MARKS, bare, prompt, rests, routed, specs

ALL = {name: each for name, each in (STAND_INS | FIRST_OF_A_SIDE | REAL).items() if name not in (
    "KJNodes: CFG-Zero*", "SelfAttentionGuidance")}
"""These are behind the LoRAs, on the two sides of guidance, and what they do is no sum over LoRAs."""
COMPILED = "KJNodes: compiled blocks"
LEAVING_OUT = SKIPPING | REAL_SKIPPING


def masked(ensemble: list[LoRASpec], maps: Tensor) -> list[LoRASpec]:
    return [LoRASpec(spec.name, spec.strength_model, 0, words=spec.words, mask=Mask(place[None] if place.ndim < 3 else
                                                                                   place))
            for spec, place in zip(ensemble, maps, strict=True)]


def drawn(model, family: str, marks, cfg: float = 3.0) -> Tensor:
    return sample(model, family, prompt(family, marks), steps=8, cfg=cfg)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_each_lora_acts_where_its_words_are(name, trust, loras):
    """In a layer behind all attention: what the node makes of the base, and m_i of what it makes of LoRA i alone,
    before and behind Routed in the chain, with the same places."""
    neighbour = ALL[name]
    family, make, cfg = neighbour.family, neighbour.make, neighbour.cfg
    kind, model = FAMILIES[family], base(family)
    ensemble = specs(model, loras, wanted=lambda layer: layer == LAST[family])

    def drawn(model):
        return sample(model, family, prompt(family), steps=1, cfg=cfg)

    alone = [drawn(anew(make)(stock(model, [spec]))) for spec in bare(ensemble)]
    without, found = drawn(anew(make)(model)), []
    for behind in (True, False):
        picture = drawn(ours := make(anew(routed)(model, ensemble, trust=trust)) if behind else
                        routed(anew(make)(model), ensemble, trust=trust))
        maps, problems = places_of(ours)[0].maps, record_of(ours).problems
        if name == COMPILED:
            assert len(problems) == 1 and "torch.compile hides the attention" in problems[0] and (maps == 1).all()
        else:
            assert problems == [] and 0 < maps.mean() < 1
        found.append(maps)
        if family != "SD15":  # the layer is one of patches of two by two places
            pooled = F.avg_pool3d(maps, (1, 2, 2)) if kind.frames else F.avg_pool2d(maps, 2)
            maps = pooled.repeat_interleave(2, -1).repeat_interleave(2, -2)
        want = without + sum(maps[:, i:i + 1] * (each - without) for i, each in enumerate(alone))
        same(picture, want, without, neighbour.tolerance)
    assert torch.allclose(*found, atol=1e-4)


def first_row(model):
    """What counts on one prompt of each side in a batch, as BrushNet does, and finds the positive's row by its place.
    """
    model = model.clone()
    model.model_options["transformer_options"]["model_patch"] = {"forward": None}
    model.set_model_output_block_patch(lambda h, skip, options: (torch.cat([h[:1] * 1.5, h[1:]]), skip))
    return model


@pytest.mark.parametrize("make", [ip_adapter, first_row, *(each.make for name, each in FIRST_OF_A_SIDE.items()
                                                           if each.family == "SD15")])
def test_prompts_that_are_compared_are_all_on_the_positive_side(make, loras, monkeypatch):
    """As if the host had evaluated one after the other. Guard: `alone` in `calc_cond_batch`, without which IP-Adapter
    stopped at the third side of guidance, and each prompt but one was taken for another side's."""
    model = make(base("SD15"))
    others = [prompt("SD15", None, 20 + k)[0] for k in range(3)]
    conds = prompt("SD15", lora_ensemble_without=rests(MARKS, others))

    def places() -> Tensor:
        ours = routed(model, specs(model, loras), mode="contrast")
        sample(ours, "SD15", conds, steps=1, cfg=1.0)
        assert [line for line in record_of(ours).problems if "BrushNet" not in line] == []
        return places_of(ours)[0].maps

    found = places()
    monkeypatch.setattr(base("SD15").model, "memory_required", lambda shape, **_: 0 if shape[0] == 1 else 1e30)
    assert torch.allclose(found, places(), atol=1e-4)


@pytest.mark.parametrize("name", LEAVING_OUT)
def test_what_is_left_out_with_places_everywhere_is_left_out_with_the_loaders(name, loras):
    neighbour = LEAVING_OUT[name]
    family, make, model = neighbour.family, neighbour.make, base(neighbour.family)
    ensemble = specs(model, loras)
    ours = make(routed(model, masked(ensemble, torch.ones(2, 8, 8))))
    same(drawn(ours, family, None), drawn(make(stock(model, bare(ensemble))), family, None),
         drawn(make(model), family, None))
    assert not any(name.split(",")[0] in line for line in record_of(ours).problems)


@pytest.mark.parametrize("name", LEAVING_OUT)
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_the_look_for_words_is_nothing_to_go_by(name, cfg, loras):
    """With the same places given as masks, for which nobody looks, the same steps are left out. Guard:
    `Neighbours.aside`."""
    neighbour = LEAVING_OUT[name]
    family, make, model = neighbour.family, neighbour.make, base(neighbour.family)
    ensemble = specs(model, loras, wanted=lambda layer: layer == LAST[family])
    ours = make(routed(model, ensemble, mode="once", trust=False))
    found = drawn(ours, family, MARKS, cfg)
    maps, problems = places_of(ours)[0].maps[0], record_of(ours).problems
    if name in REAL_SKIPPING and "Block" not in name:  # they compute the model's blocks in their own way
        assert len(problems) == 1 and f"{name.split(',')[0]}" in problems[0] and "contrast" in problems[0]
        assert (maps == 1).all()
    else:
        assert problems == [] and 0 < maps.mean() < 1
    assert not torch.equal(found, drawn(routed(model, ensemble, mode="once", trust=False), family, MARKS, cfg))
    known = make(routed(model, masked(ensemble, maps)))
    same(found, drawn(known, family, MARKS, cfg), drawn(make(model), family, MARKS, cfg))
    assert [step.rows for step in record_of(known).steps][0] < [step.rows for step in record_of(ours).steps][0]
