"""What ComfyUI's own nodes put on prompts and models: the picture is what the host makes of its own LoRA loaders, for
several branches the mean of runs with one LoRA each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import comfy.gligen
import comfy.model_patcher
import comfy.sample
import pytest
import torch
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec, Mask
from torch import Tensor

import nodes

from .builders import composite, merge, same, stock, three
from .models import CPU, FAMILIES, Family, base, build, patcher, randomize
from .neighbours import core, cross_attentions

SD15, FLUX = FAMILIES["SD15"], FAMILIES["Flux"]


@dataclass(frozen=True)
class Case:
    """prompt   CONDITIONING -> CONDITIONING, on both sides
    model     MODEL -> MODEL
    config    changes of the family's configuration
    sampling  of `comfy.sample.sample`
    """

    prompt: Callable = lambda cond: cond
    model: Callable = lambda model: model
    family: Family = SD15
    config: dict = field(default_factory=dict)
    sampling: dict = field(default_factory=dict)


def valued(**values) -> Callable:
    return lambda cond: [[text, {**options, **values}] for text, options in cond]


def boxes(cond: list) -> list:
    """GLIGEN: a cat in a box."""
    made = [comfy.gligen.GatedSelfAttentionDense(each.to_q.in_features, 32, 4, each.to_q.in_features // 4)
            for each in cross_attentions(base("SD15")).values()]
    net = comfy.gligen.Gligen(made, comfy.gligen.PositionNet(32, 32), 32)
    randomize(net, 3)
    for layer in made:
        layer.alpha_attn.data.fill_(0.7)
        layer.alpha_dense.data.fill_(0.6)
    loaded = comfy.model_patcher.ModelPatcher(net, load_device=CPU, offload_device=CPU)
    cat = torch.randn(1, 32, generator=torch.Generator().manual_seed(8))
    return [[text, {**options, "gligen": ("position", loaded, [(cat, 4, 4, 1, 2)])}] for text, options in cond]


def regions(cond: list) -> list:
    half = torch.zeros(1, 64, 64)
    half[..., :40] = 1
    (text, options), = cond
    part = nodes.ConditioningSetMask().append([[0.8 * text, options]], half, "mask bounds", 1.0)[0]
    other = nodes.ConditioningSetArea().append([[1.2 * text, options]], 32, 64, 0, 0, 0.7)[0]
    late = nodes.ConditioningSetTimestepRange().set_range([[0.5 * text, options]], 0.2, 0.8)[0]
    return [*cond, *part, *other, *late]


HOLE = torch.zeros(1, 1, 64, 64)
HOLE[..., 16:48, 8:40] = 1
INPAINTED = dict(latent_image=SD15.noise(seed=5), noise_mask=HOLE, denoise=0.9)
CASES = {
    "GLIGEN": Case(boxes),
    "areas, masks and ranges": Case(regions),
    "areas, masks and ranges, Flux": Case(regions, family=FLUX),
    "inpainting model": Case(valued(concat_latent_image=SD15.noise(seed=6), concat_mask=HOLE),
                             config={"in_channels": 9}, sampling=INPAINTED),
    "Differential Diffusion": Case(model=core("nodes_differential_diffusion", "DifferentialDiffusion"),
                                   sampling=INPAINTED),
    "InstructPix2Pix": Case(valued(concat_latent_image=SD15.noise(seed=6)), family=replace(
        SD15, kind="SD15_instructpix2pix"), config={"in_channels": 8}),
    "Flux Fill": Case(valued(concat_latent_image=FLUX.noise(seed=6), concat_mask=HOLE), family=FLUX,
                      config={"in_channels": 96}),
    "Flux Kontext": Case(valued(reference_latents=[FLUX.noise(size=4, seed=7)]), family=FLUX),
    "PatchModelAddDownscale": Case(model=core("nodes_model_downscale", "PatchModelAddDownscale", 2, 2.0, 0.0, 1.0, True,
                                              "bicubic", "bicubic")),
    "FreeU": Case(model=core("nodes_freelunch", "FreeU_V2", 1.3, 1.4, 0.9, 0.2)),
}


def drawn(case: Case, model, steps: int) -> Tensor:
    noise, sampling = case.family.noise(seed=1), dict(case.sampling)
    latent = sampling.pop("latent_image", torch.zeros_like(noise))
    with torch.inference_mode():
        return comfy.sample.sample(case.model(model), noise, steps, 3.0, "euler", "normal",
                                   *(case.prompt(case.family.cond(seed)) for seed in (11, 12)), latent, seed=1,
                                   disable_pbar=True, **sampling)


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_the_host_makes_of_its_loaders(name, loras):
    case = CASES[name]
    if case.config:
        model = patcher(build(replace(case.family, config={**case.family.config, **case.config})))
        randomize(model.model)
    else:
        model = base(case.family.name)
        assert not torch.equal(drawn(case, model, 1), drawn(Case(family=case.family, sampling={}), model, 1))
    ensemble = three(model, loras)
    whole = [LoRASpec(spec.name, spec.strength_model, 0, mask=Mask(torch.ones(1, 5, 5))) for spec in ensemble]
    plain, merged = drawn(case, model, 2), drawn(case, stock(model, ensemble), 2)
    for ours in (merge(model, ensemble), merge(model, whole)):
        same(drawn(case, ours, 2), merged, plain, 1e-4)
        assert record_of(ours).problems == []
    mean = sum(drawn(case, stock(model, [spec]), 1) for spec in ensemble) / len(ensemble)
    same(drawn(case, composite(model, ensemble), 1), mean, drawn(case, model, 1), 1e-4)
