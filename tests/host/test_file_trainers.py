"""Files as trainers write them whose names, or whose order of rows, ComfyUI's own loader does not know."""

from __future__ import annotations

import comfy.lora
import comfy.lora_convert
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.host.compose.loading import load_ensemble
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.files.files import read
from lora_ensemble.host.files.formats import host_names, other_kind
from lora_ensemble.host.files.parse import parse
from lora_ensemble.host.files.patches import load

from .builders import Rand, lora, merge, same, sample, shapes, stock
from .kinds import EVERYWHERE
from .models import base
from .test_keymaps import MODELS, build, older
from .test_kinds import LINEAR, diffusers_targets, file_of, weights

PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}
DIFFSYNTH = {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}


def unsized(family: str) -> ModelPatcher:
    """A MODEL of the family without values."""
    kind, config = MODELS[family]
    while True:
        try:
            return ModelPatcher(build(kind, config), torch.device("cpu"), torch.device("cpu"))
        except TypeError as error:
            config = older(config, error)
            if config is None:
                raise


def found(model, name: str):
    return load(read(name, model.model), comfy.lora.model_lora_keys_unet(model.model, {}), model.model, {})


def same_patches(model, foreign: str, known: str) -> None:
    ours, wanted = found(model, foreign), found(model, known)
    assert ours.found.keys() == wanted.found.keys() and len(ours.found) > 1 and not wanted.misfits
    assert ours.used == read(foreign, model.model).keys()
    for key, patch in wanted.found.items():
        assert all(torch.equal(a, b) for a, b in zip(patch.weights[:2], ours.found[key].weights[:2], strict=True)), key


def stock_finds(model, name: str) -> int:
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    tensors = comfy.lora_convert.convert_lora(dict(read(name, model.model)))
    return len(comfy.lora.load_lora(tensors, key_map, log_missing=False))


XLABS = {"img_attn.qkv": "processor.qkv_lora1", "txt_attn.qkv": "processor.qkv_lora2",
         "img_attn.proj": "processor.proj_lora1", "txt_attn.proj": "processor.proj_lora2"}


@pytest.mark.parametrize("single", [False, True])
def test_xlabs_files_for_flux_with_whichever_blocks(single, loras):
    """The host knows them by the last blocks of the full model."""
    model = base("Flux")
    layers = shapes(model, lambda name: "double_blocks" in name and name.endswith(tuple(XLABS)))
    known = lora(layers, 1, name="diffusion_model.{}".format)
    foreign = {}
    for key, value in known.items():
        for own, theirs in XLABS.items():
            key = key.replace(own, theirs)
        foreign[key.removeprefix("diffusion_model.").replace("lora_down", "down").replace("lora_up", "up")] = value
    if single:
        for n, (end, shape) in enumerate((("linear1_qkv", (192, 64)), ("linear2", (64, 320)))):
            more = lora({f"single_blocks.0.{end}": torch.Size(shape)}, 2 + n, name="diffusion_model.{}".format)
            known |= more
            theirs = ("qkv_lora", "proj_lora")[n]
            foreign |= {f"single_blocks.0.processor.{theirs}.{key.rsplit('lora_')[-1]}": value
                        for key, value in more.items()}
    spec, reference = (LoRASpec(loras(file), 0.8, 0) for file in (foreign, known))
    assert not stock(model, [spec]).patches
    ours = merge(model, [spec])
    same(sample(ours, "Flux"), sample(stock(model, [reference]), "Flux"), sample(model, "Flux"))
    assert ours.get_attachment(KEY).applied[0].problems == ()


@pytest.mark.parametrize(("family", "known", "prefix"), [
    ("HunyuanVideo", "transformer.", "lora_unet_"),  # musubi-tuner, not converted
    ("AuraFlow", "transformer.", "lycoris_"), ("PixArt", "transformer.", "lycoris_")])  # SimpleTuner
def test_dotted_names_joined_with_underscores(family, known, prefix, loras):
    model = unsized(family)
    targets = diffusers_targets(model, known)
    file = lora(targets, 1, 2, name=str)
    foreign = loras({prefix + layer.removeprefix(known).replace(".", "_") + key.removeprefix(layer): value
                     for layer in targets for key, value in file.items() if key.startswith(f"{layer}.")})
    assert stock_finds(model, foreign) < len(targets)
    same_patches(model, foreign, loras(file))


@pytest.mark.parametrize("family", ["Flux", "Flux2", "Chroma"])
def test_names_of_diffusers_behind_the_hosts_prefix(family, loras):
    model = unsized(family)
    file = lora(diffusers_targets(model), 1, 2, name=str, **PEFT)
    foreign = loras({"diffusion_model." + key.removeprefix("transformer."): value for key, value in file.items()})
    assert not stock_finds(model, foreign)
    same_patches(model, foreign, loras(file))


HUNYUAN = {
    "transformer_blocks.{}.": ("double_blocks.{}.", {
        "attn.to_q": ("img_attn.qkv", 0, 64), "attn.to_k": ("img_attn.qkv", 64, 64),
        "attn.to_v": ("img_attn.qkv", 128, 64), "attn.to_out.0": ("img_attn.proj", 0, 64),
        "attn.add_q_proj": ("txt_attn.qkv", 0, 64), "attn.add_k_proj": ("txt_attn.qkv", 64, 64),
        "attn.add_v_proj": ("txt_attn.qkv", 128, 64), "attn.to_add_out": ("txt_attn.proj", 0, 64),
        "ff.net.0.proj": ("img_mlp.0", 0, 256), "ff.net.2": ("img_mlp.2", 0, 64),
        "ff_context.net.0.proj": ("txt_mlp.0", 0, 256), "ff_context.net.2": ("txt_mlp.2", 0, 64),
        "norm1.linear": ("img_mod.lin", 0, 384), "norm1_context.linear": ("txt_mod.lin", 0, 384)}),
    "single_transformer_blocks.{}.": ("single_blocks.{}.", {
        "attn.to_q": ("linear1", 0, 64), "attn.to_k": ("linear1", 64, 64), "attn.to_v": ("linear1", 128, 64),
        "proj_mlp": ("linear1", 192, 256), "proj_out": ("linear2", 0, 64), "norm.linear": ("modulation.lin", 0, 192)}),
}
"""Block of diffusers -> (the host's, {layer: (the host's, first row in it, rows)})."""


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", "lora_unet_"])
@pytest.mark.parametrize("family", ["HunyuanVideo", "HunyuanVideo 1.5"])
def test_hunyuan_video_in_the_names_of_diffusers(family, prefix, loras):
    """Of finetrainers and of FramePack, whose layers are the same; the host knows none of them. Each to the rows of the
    host's weight that its name says."""
    model, rand, file, changes = unsized(family), Rand(1), {}, {}
    state = model.model.state_dict()
    for number in range(2):
        for theirs, (own, layers) in HUNYUAN.items():
            for name, (layer, first, rows) in layers.items():
                key, place = f"{theirs}{name}".format(number), f"{own}{layer}".format(number)
                weight = state[f"diffusion_model.{place}.weight"]
                up, down = rand(rows, 2), rand(2, weight.shape[1])
                key = prefix + (key.replace(".", "_") if prefix == "lora_unet_" else key)
                file |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
                changes.setdefault(place, torch.zeros(weight.shape))[first:first + rows] += up @ down
    name = loras(file)
    assert not stock_finds(model, name)
    loaded = load_ensemble(model, None, (LoRASpec(name, 1.0, 0),), "Merge LoRAs", False)
    (part,) = loaded.loras
    assert not loaded.problems and part.parsed.layers.keys() == changes.keys()
    for layer, change in changes.items():
        made = torch.zeros_like(change)
        for op in part.parsed.layers[layer]:
            made = op.on_weight(made, 1.0)
        assert torch.allclose(made, change, atol=1e-4), layer


@pytest.mark.parametrize("family", ["HunyuanVideo", "HunyuanVideo 1.5"])
def test_names_are_added_of_layers_that_are_here_alone(family):
    """And none in the place of the host's own."""
    model = unsized(family).model
    own, names, there = comfy.lora.model_lora_keys_unet(model, {}), host_names(model), model.state_dict().keys()
    added = [names[name] for name in names.keys() - own.keys()]
    assert added and {target if isinstance(target, str) else target[0] for target in added} <= there
    assert {name: names[name] for name in own} == own


def test_hunyuan_video_in_the_names_of_musubi_tuner(loras):
    """As it comes out of training, before it is converted."""
    model = unsized("HunyuanVideo 1.5")
    ends = {"attn.to_q": "img_attn_q", "attn.to_k": "img_attn_k", "attn.to_v": "img_attn_v",
            "attn.to_out.0": "img_attn_proj", "attn.add_q_proj": "txt_attn_q", "attn.add_k_proj": "txt_attn_k",
            "attn.add_v_proj": "txt_attn_v", "attn.to_add_out": "txt_attn_proj", "ff.net.0.proj": "img_mlp_fc1",
            "ff.net.2": "img_mlp_fc2", "norm1.linear": "img_mod_linear"}
    shape = {"ff.net.0.proj": (256, 64), "ff.net.2": (64, 256), "norm1.linear": (384, 64)}
    made = {(number, end): torch.Size(shape.get(end, (64, 64))) for number in range(2) for end in ends}
    known = lora(made, 1, 2, 1.0, name=lambda key: "transformer.transformer_blocks.{}.{}".format(*key))
    foreign = lora(made, 1, 2, 1.0, name=lambda key: f"lora_unet_double_blocks_{key[0]}_{ends[key[1]]}")
    ours, wanted = (load_ensemble(model, None, (LoRASpec(loras(file), 1.0, 0),), "Merge LoRAs", False)
                    for file in (foreign, known))
    assert not ours.problems and not wanted.problems
    (ours,), (wanted,) = ours.loras, wanted.loras
    assert ours.patches.found.keys() == wanted.patches.found.keys() and len(ours.patches.found) == len(made)
    for key, patch in wanted.patches.found.items():
        assert torch.equal(patch.weights[0], ours.patches.found[key].weights[0]), key


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model.", "lora_unet_"])
def test_layers_that_two_families_have_in_common_are_no_place_for_the_rest(prefix, loras):
    """Qwen-Image has 60 blocks of a width that Flux has too, and names its attention alike: the host finds none of
    these layers in Flux by such names."""
    model = base("Flux")
    layers = {f"transformer_blocks.{block}.{end}": torch.Size((64, 64)) for block in range(3) for end in (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
        "attn.to_add_out", "img_mlp.net.2", "txt_mlp.net.2", "img_mod.1", "txt_mod.1")}
    name = loras(lora(layers, 1, name=lambda layer: prefix + (layer.replace(".", "_") if prefix[-1] == "_" else layer)))
    assert not stock_finds(model, name)
    with pytest.raises(ValueError, match="matches no layer of this model .*another architecture, or by a tool"):
        merge(model, [LoRASpec(name, 1.0, 0)])


def test_the_prefix_of_ideograms_trainers(loras):
    model = base("SD15")
    file = lora(shapes(model), 1, 2, name="diffusion_model.{}".format, **PEFT)
    foreign = loras({"conditional_transformer." + key.removeprefix("diffusion_model."): value
                     for key, value in file.items()})
    assert not stock_finds(model, foreign)
    same_patches(model, foreign, loras(file))


def diffusers_cosmos(layer: str) -> str:
    """What diffusers' CosmosTransformer3DModel calls a layer of the original."""
    for own, theirs in (("final_layer.adaln_modulation.", "norm_out.linear_"), ("final_layer.linear", "proj_out"),
                        ("adaln_modulation_self_attn.", "norm1.linear_"),
                        ("adaln_modulation_cross_attn.", "norm2.linear_"),
                        ("adaln_modulation_mlp.", "norm3.linear_"), ("x_embedder.proj.1", "patch_embed.proj"),
                        ("t_embedder.1", "time_embed.t_embedder"), ("self_attn.", "attn1."), ("cross_attn.", "attn2."),
                        ("output_proj", "to_out.0"), ("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"),
                        ("mlp.layer1", "ff.net.0.proj"), ("mlp.layer2", "ff.net.2")):
        layer = layer.replace(own, theirs)
    return layer.replace("blocks.", "transformer_blocks.")


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model.", "", "lycoris_"])
def test_cosmos_in_the_names_of_diffusers(prefix, loras):
    """Anima is of the same class."""
    model = unsized("Cosmos Predict2")
    file = lora(shapes(model), 1, 2, name="diffusion_model.{}".format, **PEFT)
    foreign = loras(lora(shapes(model), 1, 2, name=lambda layer: prefix + diffusers_cosmos(layer).replace(
        ".", "_" if prefix == "lycoris_" else "."), **PEFT))
    assert not stock_finds(model, foreign)
    same_patches(model, foreign, loras(file))


def test_rows_of_minimax_h3_in_diffsynths_order(loras):
    """It has q, k and v of one head after those of another, in names without a prefix; ComfyUI has all q first."""
    model = unsized("MiniMax H3")
    layers = shapes(model, lambda name: name.endswith("attn.qkv_proj"))
    width = model.model.state_dict()["diffusion_model.blocks.0.attn.q_norm.weight"].numel()
    assert len(layers) == 2 and all(shape[0] // width == 6 for shape in layers.values())
    file = lora(layers, 1, 2, name=str, **DIFFSYNTH)
    order = [3 * width * head + width * kind + row for kind in range(3) for head in range(2) for row in range(width)]
    known = {f"diffusion_model.{key}": value[order] if "lora_B" in key else value for key, value in file.items()}
    foreign, prefixed = loras(file), loras({f"diffusion_model.{key}": value for key, value in file.items()})
    ours, wanted = (parse(found(model, name), model.model).layers for name in (foreign, loras(known)))
    as_it_is = parse(found(model, prefixed), model.model).layers
    for layer, shape in layers.items():
        one, two, three = (ops[layer][0].on_weight(torch.zeros(shape), 1.0) for ops in (ours, wanted, as_it_is))
        assert torch.allclose(one, two)
        assert not torch.allclose(one, three)  # as the host's loader reads it
    plain = lora(layers, 1, 2, name=str)  # of another tool
    same_patches(model, loras(plain), loras({f"diffusion_model.{key}": value for key, value in plain.items()}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_alpha_of_a_lokr_of_whole_matrices_is_not_asked(dtype, loras, monkeypatch):
    """ai-toolkit writes 9999999999, which is infinite in fp16; nothing is computed for fear of it either."""
    model = base("SD15")
    made = file_of(weights(LINEAR), EVERYWHERE["LoKr w1 w2"])
    file = {key: torch.tensor(9999999999).to(dtype) if key.endswith(".alpha") else value.to(dtype)
            for key, value in made.items()}
    assert dtype != torch.float16 or any(value.isinf().any() for value in file.values())
    with monkeypatch.context() as patched:
        patched.setattr(comfy.lora, "calculate_weight", None)
        ours = merge(model, [spec := LoRASpec(loras(file), 0.7, 0)])
    same(sample(ours), sample(stock(model, [spec])), sample(model))
    assert ours.get_attachment(KEY).applied[0].problems == ()


@pytest.mark.parametrize("kind", ["LoKr w1 w2a", "LoKr w1a w2", "LoKr w1a w2a", "LoHa alpha", "LoRA alpha", "GLoRA"])
def test_an_alpha_that_is_asked_has_to_be_a_number(kind, loras):
    made = file_of(weights(LINEAR), EVERYWHERE[kind])
    file = {key: torch.tensor(float("inf")) if key.endswith(".alpha") else value for key, value in made.items()}
    with pytest.raises(ValueError, match="not numbers .*\\.alpha' for one"):
        merge(base("SD15"), [LoRASpec(loras(file), 0.7, 0)])


# --- kinds that the host cannot load, on layers that it knows ---------------------------------------------------------


@pytest.mark.parametrize(("end", "prefix", "what"), [
    ("fourierft_spectrum", "base_model.model.", "is a PEFT file with the prefix base_model.model., for layers of"),
    ("lora_A.my_style.weight", "transformer.", "is a diffusers file with the prefix transformer., for layers of"),
    ("lora_down", "diffusion_model.", "is a file in ComfyUI's own names with the prefix diffusion_model., for layers"),
    ("miss_block", "", "is for layers of this model (SD15)")])
def test_layers_that_are_here_and_what_nobody_can_load(end, prefix, what, loras):
    """Not called another architecture, nor a whole model."""
    model, rand = base("SD15"), Rand(1)
    name = loras({f"{prefix}{layer}.{end}": rand(4, 4) for layer in shapes(model)})
    with pytest.raises(ValueError) as caught:
        load_ensemble(model, None, (LoRASpec(name, 1.0, 0),), "Merge LoRAs", False)
    text = str(caught.value)
    assert what in text and f".{end}' for one" in text and "kind or named in a way" in text, text
    assert "architecture" not in text and "whole model" not in text, text


def test_embeddings_in_the_file_of_a_lora_are_called_so(loras):
    """As OneTrainer puts them there. ComfyUI reads them where the file is an embedding, too."""
    model = base("SD15")
    file = lora(shapes(model), 1)
    name = loras({**file, "bundle_emb.ohwx.clip_l": torch.ones(2, 32)})
    (line,) = merge(model, [LoRASpec(name, 1.0, 0)]).get_attachment(KEY).applied[0].problems
    assert f"1 of its {len(file) + 1} keys has no place" in line and "models/embeddings, too" in line


def test_a_whole_model_has_weights():
    names = [f"blocks.{k}.fourierft_spectrum" for k in range(20)]
    assert other_kind(names) is None and other_kind([*names, "blocks.0.weight"]) is not None
