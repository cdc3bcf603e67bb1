"""Every adapter kind, through ComfyUI's own parser, against ComfyUI's own weight patches."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.compose.apply import bake
from lora_ensemble.host.compose.composition import KEY, record_of
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.look.info import infos, told

from .any_model import any_model
from .builders import Rand, composite, hooked, kohya, lora, merge, same, sample, shapes, stock
from .kinds import (
    CONVOLUTIONS,
    EVERYWHERE,
    bias_difference,
    boft,
    difference,
    dora,
    glora,
    lokr,
    low_rank,
    oft,
    replacement,
)
from .models import FAMILIES, base
from .small_video import SMALL
from .test_parity_families import drawn, layers_of

LINEAR = ("attn1.to_q", "attn2.to_k", "attn1.to_out.0", "ff.net.0.proj", "time_embed.0", "emb_layers.1")
POINTWISE = ("proj_in", "proj_out", "skip_connection")
KERNEL = ("in_layers.2", "out_layers.3", "out.2", ".op", ".conv", "input_blocks.0.0")


def weights(ends: tuple[str, ...], model=None) -> dict[str, torch.Tensor]:
    model = model or base("SD15")
    state = model.model.state_dict()
    return {name: state[f"diffusion_model.{name}.weight"] for name in shapes(model, lambda n: n.endswith(ends))}


def file_of(layers: dict[str, torch.Tensor], make, seed: int = 1) -> dict:
    rand = Rand(seed)
    if make is bias_difference:
        unet = base("SD15").model.diffusion_model
        layers = {name: weight for name, weight in layers.items() if unet.get_submodule(name).bias is not None}
    return {f"{kohya(name)}.{end}": value for name, weight in layers.items()
            for end, value in make(weight, rand).items()}


def check(ensemble, model=None, family: str = "SD15") -> None:
    model = model or base(family)
    ours = merge(model, ensemble)
    same(sample(ours, family, steps=1), sample(stock(model, ensemble), family, steps=1), sample(model, family, steps=1))
    assert ours.get_attachment(KEY).record.problems == []


@pytest.mark.parametrize("kind", EVERYWHERE)
@pytest.mark.parametrize("where", [LINEAR, POINTWISE, KERNEL], ids=["linear", "1x1", "3x3"])
def test_kind(kind, where, loras):
    check([LoRASpec(loras(file_of(weights(where), EVERYWHERE[kind])), 0.7, 0)])


@pytest.mark.parametrize("strength", [1.0, -0.6])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "DoRA inputs", "GLoRA", "OFT", "BOFT", "diff_b", "set_weight"])
def test_strengths(kind, strength, loras):
    """Each kind has its own rule: some take the strength once, some squared, one not at all."""
    check([LoRASpec(loras(file_of(weights(LINEAR), EVERYWHERE[kind])), strength, 0)])


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_kind_of_convolutions(kind, loras):
    check([LoRASpec(loras(file_of(weights(KERNEL), CONVOLUTIONS[kind])), 0.7, 0)])


@pytest.mark.parametrize("first", ["whole", "factors"])
def test_lokr_tucker(first, loras):
    """The host's own weight path fails on these (a Kronecker product of a tensor that is not contiguous, logged and
    left out), so the reference is their delta, written out as a plain difference."""
    layers, dense = weights(KERNEL), {}
    tensors = file_of(layers, lambda weight, rand: lokr(weight, rand, first, "tucker", alpha=8.0))
    for name, weight in layers.items():
        held = {key.removeprefix(f"{kohya(name)}."): value for key, value in tensors.items()
                if key.startswith(f"{kohya(name)}.")}
        small = held["lokr_w1"] if first == "whole" else held["lokr_w1_a"] @ held["lokr_w1_b"]
        large = torch.einsum("abkl,ao,bi->oikl", held["lokr_t2"], held["lokr_w2_a"], held["lokr_w2_b"])
        delta = torch.einsum("pq,stkl->psqtkl", small, large)
        dense[f"{kohya(name)}.diff"] = delta.reshape(weight.shape) * 8.0 / held["lokr_w2_b"].shape[0]
    model, ensemble = base("SD15"), [LoRASpec(loras(tensors), 0.7, 0)]
    reference = sample(stock(model, [LoRASpec(loras(dense), 0.7, 0)]), steps=1)
    same(sample(merge(model, ensemble), steps=1), reference, sample(model, steps=1))


@pytest.mark.parametrize("where", [LINEAR, POINTWISE], ids=["linear", "1x1"])
def test_old_glora(where, loras):
    """Files of the first LyCORIS releases order the factors the other way round."""
    check([LoRASpec(loras(file_of(weights(where), lambda w, rand: glora(w, rand, old=True))), 0.7, 0)])


@pytest.mark.parametrize("ends", [("w_norm", "b_norm"), ("diff", "diff_b")])
def test_norms(ends, loras):
    """Scale and shift of group and layer norms."""
    rand, tensors = Rand(1), {}
    norms = [name for name, p in base("SD15").model.diffusion_model.named_parameters()
             if name.endswith((".norm1.weight", ".norm2.weight", "in_layers.0.weight", ".norm.weight"))
             or name == "out.0.weight"]
    assert len(norms) > 5
    for name in norms:
        size = base("SD15").model.diffusion_model.get_parameter(name).shape
        for end in ends:
            tensors[f"{kohya(name.removesuffix('.weight'))}.{end}"] = rand(*size, size=0.3)
    check([LoRASpec(loras(tensors), 0.7, 0)])


def test_bare_bias_keys(loras):
    """`diffusion_model.<layer>.bias.diff`: the loader's generic format for everything that is not a weight."""
    rand = Rand(1)
    tensors = {f"diffusion_model.{name}.bias.diff": rand(weight.shape[0], size=0.3)
               for name, weight in weights(KERNEL).items()}
    check([LoRASpec(loras(tensors), 0.7, 0)])


def test_what_does_not_fit_is_named_before_the_run(loras):
    """A bias for a layer that has none, and more stages of rotations than the channels can be shuffled in: the host
    drops both with a line in its log; the rest of the file acts."""
    model, layers = base("SD15"), weights(("attn1.to_q", "out.2"))
    tensors = file_of(layers, lambda weight, rand: {"oft_blocks": rand(2, weight.shape[0] // 4, 4, 4, size=0.1),
                                                    "alpha": torch.tensor(0.0)})
    tensors |= file_of(weights(("attn2.to_k",)), lambda *made: bias_difference(*made))
    tensors |= file_of(weights(("proj_in",)), low_rank)
    ensemble = [LoRASpec(loras(tensors), 0.7, 0)]
    ours = merge(model, ensemble)
    same(sample(ours, steps=1), sample(stock(model, ensemble), steps=1), sample(model, steps=1))
    problems = ours.get_attachment(KEY).record.problems
    assert len(problems) == 2 and all(ensemble[0].name in problem for problem in problems)
    assert any("no bias" in problem for problem in problems) and any("out.2" in problem for problem in problems)


MIXED = {
    "ranks": [low_rank, lambda w, r: low_rank(w, r, rank=7), lambda w, r: low_rank(w, r, alpha=1.0, rank=1)],
    "additive": [low_rank, difference, EVERYWHERE["LoHa"], EVERYWHERE["LoKr w1a w2a"], bias_difference],
    "not additive": [dora, oft, glora, low_rank, boft],
    "two magnitudes": [dora, EVERYWHERE["DoRA inputs"], EVERYWHERE["DoRA of LoHa"]],
    "bias first": [bias_difference, dora, oft],
    "replaced": [low_rank, replacement, dora, difference],
}


@pytest.mark.parametrize("where", [LINEAR, KERNEL], ids=["linear", "3x3"])
@pytest.mark.parametrize("mix", MIXED)
def test_kinds_on_the_same_layers(mix, where, loras):
    """The chain of loaders applies each to the weight that the one before left; order matters for some."""
    ensemble = [LoRASpec(loras(file_of(weights(where), make, seed)), 0.8 - 0.1 * seed, 0)
                for seed, make in enumerate(MIXED[mix])]
    check(ensemble)


@pytest.mark.parametrize("mix", MIXED)
def test_composite_of_kinds(mix, loras):
    model, kind = base("SD15"), FAMILIES["SD15"]
    ensemble = [LoRASpec(loras(file_of(weights(LINEAR + KERNEL), make, seed)), 0.9 - 0.1 * seed, 0)
                for seed, make in enumerate(MIXED[mix])]
    reference = sample(model, "SD15", hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble), steps=1)
    same(sample(composite(model, ensemble), steps=1), reference, sample(model, steps=1))


def test_one_lora_lacks_layers_of_another(loras):
    layers = shapes(base("SD15"))
    first, second = dict(list(layers.items())[::2]), dict(list(layers.items())[1::3])
    assert first.keys() - second.keys() and second.keys() - first.keys() and first.keys() & second.keys()
    check([LoRASpec(loras(lora(first, 1)), 0.8, 0), LoRASpec(loras(lora(second, 2, 6)), 0.7, 0)])


# --- slices of fused weights, and other models' key formats --------------------------------------------------------


def diffusers_targets(model, prefix: str = "transformer.") -> dict[str, torch.Size]:
    """Diffusers-style key -> shape of the weight, or of the slice of one, that it stands for; each target once."""
    import comfy.lora

    state, found, seen = model.model.state_dict(), {}, set()
    for key, target in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        name, span = (target, None) if isinstance(target, str) else target[:2]
        if not isinstance(key, str) or not key.startswith(prefix) or (name, span) in seen:
            continue
        if name not in state or state[name].ndim < 2:
            continue
        seen.add((name, span))
        shape = list(state[name].shape)
        if span is not None:
            shape[span[0]] = span[2]
        found[key] = torch.Size(shape)
    return found


@pytest.mark.parametrize("family", ["SD3", "Flux"])
def test_diffusers_keys(family, loras):
    """q, k and v of diffusers are slices of one weight here; the final modulation comes with its halves swapped."""
    model = base(family)
    targets = diffusers_targets(model)
    assert sum("to_q" in key or "add_k" in key for key in targets) >= 2
    files = [lora(targets, seed, rank, name=str, down="lora_A.weight", up="lora_B.weight")
             for seed, rank in ((1, 4), (2, 2))]
    ensemble = [LoRASpec(loras(file), 0.8, 0) for file in files]
    check(ensemble, model, family)
    kind = FAMILIES[family]
    reference = sample(model, family, hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble), steps=1)
    same(sample(composite(model, ensemble), family, steps=1), reference, sample(model, family, steps=1))


@pytest.mark.parametrize("kind", ["LoRA", "LoHa", "LoKr w1a w2a", "GLoRA", "DoRA", "OFT", "BOFT rescale", "diff",
                                  "set_weight"])
def test_kinds_on_slices(kind, loras):
    """Guard: parse() reads tuple targets; they must reach the forwards, for every kind."""
    model, rand, tensors = base("Flux"), Rand(1), {}
    for key, shape in diffusers_targets(model).items():
        if any(part in key for part in ("to_q", "to_v", "add_k", "proj_mlp")):
            weight = rand(*shape) / shape[1] ** 0.5
            tensors |= {f"{key}.{end}": value for end, value in EVERYWHERE[kind](weight, rand).items()}
    assert len(tensors) >= 8
    check([LoRASpec(loras(tensors), 0.7, 0)], model, "Flux")


def test_whole_and_slices_of_one_weight(loras):
    """One file trained on the fused weight, one on its slices, one on BFL's `linear1_qkv`."""
    model = base("Flux")
    blocks = shapes(model, lambda n: n.endswith(("linear1", "img_attn.qkv")))
    fused = {f"diffusion_model.{n}_qkv": torch.Size((192, 64)) for n in blocks if n.endswith("linear1")}
    assert fused
    files = [lora(blocks, 1), lora(diffusers_targets(model), 2, name=str, down="lora_A.weight", up="lora_B.weight"),
             lora(fused, 3, name=str), file_of(weights(("linear1", "img_attn.qkv"), model), dora, 4)]
    check([LoRASpec(loras(file), 0.6, 0) for file in files], model, "Flux")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", ["SD3", "Flux"])
def test_different_loras_on_slices(family, batch, loras):
    """Files for all slices, of unequal ranks, for some of them, and for the fused weights, merged and in rows of their
    own."""
    model = base(family)
    targets = diffusers_targets(model)
    some = {key: shape for key, shape in targets.items() if "to_k" not in key and "add_q" not in key}
    files = [lora(each, seed, rank, name=str, down="lora_A.weight", up="lora_B.weight")
             for seed, (each, rank) in enumerate([(targets, 4), (some, 2), (targets, 3)], start=1)]
    files.append(lora(shapes(model, lambda name: name.endswith(("qkv", "linear1"))), 5))
    ensemble = [LoRASpec(loras(file), strength, 0) for file, strength in zip(files, (0.8, -0.6, 0.5, 0.7), strict=True)]
    plain = sample(model, family, steps=1, batch=batch)
    same(sample(merge(model, ensemble), family, steps=1, batch=batch),
         sample(stock(model, ensemble), family, steps=1, batch=batch), plain, 1e-4)
    mean = torch.stack([sample(stock(model, [spec]), family, steps=1, batch=batch) for spec in ensemble]).mean(dim=0)
    ours = composite(model, ensemble)
    same(sample(ours, family, steps=1, batch=batch), mean, plain, 1e-4)
    assert ours.get_attachment(KEY).record.problems == []


def test_diffusers_keys_of_unets(loras):
    """`unet.` and PEFT names on SD1.5 and SDXL."""
    for family in ("SD15", "SDXL"):
        model = base(family)
        targets = diffusers_targets(model, "unet.")
        assert len(targets) > 10
        check([LoRASpec(loras(lora(targets, 1, name=str, down="lora_A.weight", up="lora_B.weight")), 0.8, 0)],
              model, family)


def test_a_dora_of_a_second_method_says_what_it_goes_by(loras):
    """In one ensemble, or below the other method, it is the chain of loaders."""
    model = base("SD15")
    low, high = (LoRASpec(loras(file_of(weights(LINEAR), EVERYWHERE[kind], seed)), 0.7, 0)
                 for seed, kind in ((1, "LoRA"), (2, "DoRA")))
    plain = sample(model, steps=1)
    for ours, order in ((merge(model, [low, high]), [low, high]), (merge(merge(model, [high]), [low]), [high, low])):
        same(sample(ours, steps=1), sample(stock(model, order), steps=1), plain)
        assert record_of(ours).problems == []
    ours = merge(merge(model, [low]), [high])
    sample(ours, steps=1)
    (found,) = record_of(ours).problems
    assert found.startswith(f"{high.name}: ") and "in one ensemble" in found


@pytest.mark.parametrize("name", ["Stable Audio", "Wan"])
def test_lokr_of_convolutions_in_one_and_three_dimensions(name, loras):
    """As trained (LyCORIS' make_kron, and the host's own trainer), where the host's loader scrambles it; and said."""
    model, rand = any_model(SMALL[name]), Rand(1)
    layers = {layer: shape for layer, shape in layers_of(model).items() if len(shape) in (3, 5)}
    made, dense = {}, {}
    for layer, shape in layers.items():
        values = lokr(torch.empty(shape), rand)
        made |= {f"{layer}.{end}": value for end, value in values.items()}
        small, large = values["lokr_w1"], values["lokr_w2"]
        dense[f"{layer}.diff"] = torch.einsum("pq,st...->psqt...", small, large).reshape(shape)
    ours = merge(model, [LoRASpec(loras(made), 0.7, 0)])
    same(drawn(ours, 1, 1.0), drawn(stock(model, [LoRASpec(loras(dense), 0.7, 0)]), 1, 1.0), drawn(model, 1, 1.0), 1e-4)
    (problem,) = record_of(ours).problems
    assert "LoKr" in problem and "applied as trained" in problem
    file = LoRASpec(loras(made), 0.7, 0)
    baked, _, (said,) = bake(model, None, (file,), "Merge LoRAs")
    same(drawn(baked, 1, 1.0), drawn(stock(model, [file]), 1, 1.0), drawn(model, 1, 1.0), 1e-4)
    assert "LoKr" in said and "as the loader has them" in said and "'runtime'" in said
    assert "applied as trained" in told(infos(model, None, (file,), "LoRA Info"), name)
