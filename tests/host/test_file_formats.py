"""Which format a file is in: names that ComfyUI's key map lacks, and what is said of files that are no LoRA."""

from __future__ import annotations

from dataclasses import replace

import comfy.lora
import comfy.model_management
import pytest
import torch
from lora_ensemble.host.compose.apply import apply_method, bake
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.files.files import read
from lora_ensemble.host.files.formats import lora_format, other_kind
from lora_ensemble.host.files.parse import parse
from lora_ensemble.host.files.patches import load
from lora_ensemble.methods.merge import Merge

from .builders import composite, lora, merge, plain, same, sample, shapes, stock, text_layers
from .models import FAMILIES, base, build, patcher, small_clip
from .small_checkpoints import CHECKPOINTS
from .test_kinds import diffusers_targets

PEFT = {"down": "lora_A.weight", "up": "lora_B.weight"}


def refused(tensors: dict, loras, *words: str, model: str = "SD15") -> None:
    spec = LoRASpec(loras(tensors), 1.0, 1.0)
    for use in (lambda: merge(base(model), [spec]), lambda: composite(base(model), [spec]),
                lambda: bake(base(model), None, (spec,), "Merge LoRAs")):
        with pytest.raises(ValueError) as caught:
            use()
        text = str(caught.value)
        assert f"'{spec.name}'" in text and "remove it from the ensemble" in text, text
        assert all(word in text for word in words) and "BaseModel" not in text, text


# --- names that are mapped ------------------------------------------------------------------------------------------


def modern(name: str) -> str:
    """The name that diffusers writes today for one in ComfyUI's key map."""
    return name.removeprefix("unet.").replace(".processor.to_out", ".to_out.0").replace(".processor.", ".")


@pytest.mark.parametrize("prefix", ["unet.", "base_model.model.", "unet.base_model.model.", "base_model.model.unet."])
@pytest.mark.parametrize("family", ["SD15", "SDXL"])
def test_names_of_diffusers_and_peft_on_unets(family, prefix, loras):
    """As the stock loader applies the same LoRA under names that it knows."""
    model = base(family)
    targets = diffusers_targets(model, "unet.")
    known, foreign = lora(targets, 1, name=str, **PEFT), lora(targets, 1, name=lambda n: prefix + modern(n), **PEFT)
    assert foreign.keys() != known.keys() and any("attn1.to_out.0" in key for key in foreign)
    spec, reference = (LoRASpec(loras(file), 0.8, 0) for file in (foreign, known))
    for ours in (merge(model, [spec]), bake(model, None, (spec,), "Merge LoRAs")[0]):
        same(sample(ours, family), sample(stock(model, [reference]), family), sample(model, family))
    assert merge(model, [spec]).get_attachment(KEY).applied[0].problems == ()


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
@pytest.mark.parametrize("family", ["Flux", "SD3"])
def test_names_of_peft_on_transformers(family, prefix, loras):
    model = base(family)
    targets = diffusers_targets(model, prefix)
    known = lora(targets, 1, name=str, **PEFT)
    foreign = {f"base_model.model.{key.removeprefix(prefix)}": value for key, value in known.items()}
    spec, reference = (LoRASpec(loras(file), 0.8, 0) for file in (foreign, known))
    same(sample(merge(model, [spec]), family), sample(stock(model, [reference]), family), sample(model, family))


@pytest.mark.parametrize("prefix", ["", "pipe.dit.", "model.diffusion_model.", "transformer."])
def test_own_names_with_another_prefix_or_none(prefix, loras):
    """As DiffSynth and extractors write them: for Wan the host knows its own prefix alone."""
    model = base("Wan")
    known = lora(shapes(model), 1, name="diffusion_model.{}".format, **PEFT)
    foreign = {prefix + key.removeprefix("diffusion_model."): value for key, value in known.items()}
    assert not stock(model, [LoRASpec(loras(foreign), 0.8, 0)]).patches
    spec, reference = (LoRASpec(loras(file), 0.8, 0) for file in (foreign, known))
    ours = merge(model, [spec])
    same(sample(ours, "Wan"), sample(stock(model, [reference]), "Wan"), sample(model, "Wan"))
    assert ours.get_attachment(KEY).applied[0].problems == ()


@pytest.mark.parametrize(("family", "known", "prefix"), [
    ("Z-Image", "lycoris_", "lora_unet_"), ("Flux", "lycoris_", "lora_unet_"), ("Flux", "lora_unet_", "lycoris_"),
    ("SD3", "lora_unet_", "lora_transformer_"), ("Wan", "lora_unet_", "lycoris_")])
def test_names_with_underscores_of_other_trainers(family, known, prefix, loras, monkeypatch):
    """musubi-tuner puts kohya's prefix before diffusers' names, of which the host knows some layers' alone."""
    if family not in FAMILIES:
        monkeypatch.setitem(FAMILIES, family, CHECKPOINTS[family][0])
    model = base(family)
    file = lora(diffusers_targets(model, known), 1, name=str)
    foreign = {prefix + key.removeprefix(known): value for key, value in file.items()}
    spec, reference = (LoRASpec(loras(tensors), 0.8, 0) for tensors in (foreign, file))
    assert len(stock(model, [spec]).patches) < len(stock(model, [reference]).patches)
    ours = merge(model, [spec])
    same(sample(ours, family), sample(stock(model, [reference]), family), sample(model, family))
    assert ours.get_attachment(KEY).applied[0].problems == ()


def test_names_of_peft_on_a_text_encoder(loras):
    clip, model = small_clip(), base("SD15")
    layers = text_layers(clip)
    known = lora(layers, 1, name=lambda layer: f"text_encoder.text_model.{layer}", **PEFT)
    foreign = {key.replace("text_encoder.", "base_model.model."): value for key, value in known.items()}
    made = [apply_method(model, clip, (LoRASpec(loras(file), 0.8, 0.8),), plain(Merge), "Merge LoRAs")[1]
            for file in (known, foreign)]
    patches = [clip.patcher.patches for clip in made]
    assert len(patches[0]) == len(layers) and patches[0].keys() == patches[1].keys()
    for key in patches[0]:
        assert torch.equal(patches[0][key][0][1].weights[0], patches[1][key][0][1].weights[0])


# --- PEFT's other tensors -------------------------------------------------------------------------------------------

MAGNITUDE, BIAS = "lora_magnitude_vector", "lora_B.bias"


def weights_of(model) -> dict[str, torch.Tensor]:
    """Without the patches that a run has put there."""
    comfy.model_management.unload_all_models()
    return model.model.state_dict()


def peft_dora(model) -> tuple[dict, dict]:
    """(A DoRA as PEFT writes it, magnitudes of convolutions with the outputs in their second dimension; the same under
    the host's name)."""
    state, generator = weights_of(model), torch.Generator().manual_seed(5)
    layers = shapes(model)
    file = lora(layers, 1, name="diffusion_model.{}".format, **PEFT)
    known = dict(file)
    for layer, shape in layers.items():
        norm = state[f"diffusion_model.{layer}.weight"].float().flatten(1).norm(dim=1)
        values = norm * (1 + 0.2 * torch.randn(norm.shape, generator=generator))
        file[f"diffusion_model.{layer}.{MAGNITUDE}"] = values if len(shape) == 2 else values.reshape(
            1, -1, *[1] * (len(shape) - 2))
        known[f"diffusion_model.{layer}.dora_scale"] = values.reshape(-1, *[1] * (len(shape) - 1))
    return file, known


def in_weights(model, file: dict, strength: float):
    """The MODEL with weights as the definition has them, put there by the host as plain differences: W + B A, each
    output drawn to the length of its magnitude."""
    state, made = weights_of(model), {}
    for layer in shapes(model):
        weight = state[f"diffusion_model.{layer}.weight"].double()
        up, down, magnitude = (file[f"diffusion_model.{layer}.{part}"].double()
                               for part in (PEFT["up"], PEFT["down"], MAGNITUDE))
        turned = weight.flatten(1) + up.flatten(1) @ down.flatten(1)
        turned *= magnitude.reshape(-1, 1) / turned.norm(dim=1, keepdim=True)
        made[f"diffusion_model.{layer}.weight"] = ("diff", ((turned.view(weight.shape) - weight).float(),))
    model = model.clone()
    model.add_patches(made, strength)
    return model


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model."])
def test_a_dora_of_peft_is_a_dora(prefix, loras):
    """The host's loader passes over its magnitudes and applies the rest of it, which is another picture; under the name
    that it knows it draws outputs to another length than PEFT."""
    model = base("SD15")
    file, known = peft_dora(model)
    plain_file = {key: value for key, value in file.items() if not key.endswith(MAGNITUDE)}
    spec, other, without = (LoRASpec(loras(tensors), 0.8, 0) for tensors in (file, known, plain_file))
    assert torch.equal(sample(stock(model, [spec])), sample(stock(model, [without])))
    foreign = {key.replace("diffusion_model.", prefix): value for key, value in file.items()}
    spec = LoRASpec(loras(foreign), 0.8, 0)
    ours, wanted = merge(model, [spec]), sample(in_weights(model, file, 0.8))
    same(sample(ours), wanted, sample(model))
    same(sample(bake(model, None, (spec,), "Merge LoRAs")[0]), wanted, sample(model))
    same(sample(composite(model, [spec])), wanted, sample(model))
    for far in (without, other):
        with pytest.raises(AssertionError):
            same(sample(stock(model, [far])), wanted, sample(model), 0.02)
    assert ours.get_attachment(KEY).applied[0].problems == ()


@pytest.mark.parametrize("end", ["", ".weight", ".default", ".default.weight"])
def test_a_dora_of_peft_is_that_of_its_definition(end, loras):
    """W + B A, each output drawn to the length of its magnitude; PEFT writes the name in several ways."""
    model = base("SD15")
    file = {key + end * key.endswith(MAGNITUDE): value for key, value in peft_dora(model)[0].items()}
    tensors = read(loras(file), model.model)
    patches = load(tensors, comfy.lora.model_lora_keys_unet(model.model, {}), model.model, {})
    layers, state = parse(patches, model.model).layers, weights_of(model)
    assert patches.used == file.keys() and not patches.misfits and len(layers) == len(shapes(model))
    for layer, (op,) in layers.items():
        weight = state[f"diffusion_model.{layer}.weight"].double()
        up, down, magnitude = (file[f"diffusion_model.{layer}.{part}"].double()
                               for part in ("lora_B.weight", "lora_A.weight", MAGNITUDE + end))
        turned = (weight.flatten(1) + up.flatten(1) @ down.flatten(1))
        want = magnitude.reshape(-1, 1) * turned / turned.norm(dim=1, keepdim=True)
        assert torch.allclose(op.on_weight(weight, 1.0).flatten(1), want, rtol=1e-4, atol=1e-5), layer


def test_magnitudes_of_another_layer_are_named(loras):
    model = base("SD15")
    file, _ = peft_dora(model)
    key = next(key for key in file if key.endswith(MAGNITUDE))
    file[key] = torch.ones(7)
    ours = merge(model, [LoRASpec(loras(file), 0.8, 0)])
    (line,) = ours.get_attachment(KEY).applied[0].problems
    assert key.removesuffix(f".{MAGNITUDE}") in line and "7" in line and "left out" in line


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_a_bias_of_pefts_second_factor_is_added_at_the_scale_of_the_lora(alpha, loras):
    """`lora_bias`: B (A x) + v, times alpha over rank. The host's loader knows a change of the bias by another name."""
    model = base("SD15")
    state = model.model.state_dict()
    layers = shapes(model)
    known = lora(layers, 1, alpha=alpha, name="diffusion_model.{}".format, **PEFT)
    file, generator = dict(known), torch.Generator().manual_seed(5)
    there = [layer for layer in layers if f"diffusion_model.{layer}.bias" in state]
    for layer in there:
        values = torch.randn(layers[layer][0], generator=generator)
        file[f"diffusion_model.{layer}.{BIAS}"] = values
        known[f"diffusion_model.{layer}.diff_b"] = values * (1.0 if alpha is None else alpha / 4)
    spec, reference = (LoRASpec(loras(tensors), 0.8, 0) for tensors in (file, known))
    ours = merge(model, [spec])
    same(sample(ours), sample(stock(model, [reference])), sample(model))
    assert ours.get_attachment(KEY).applied[0].problems == ()
    assert len(stock(model, [spec]).patches) == len(stock(model, [reference]).patches) - len(there)


def test_a_bias_for_a_layer_without_one_is_named(loras):
    model = base("SD15")
    (layer, shape), state = next((layer, shape) for layer, shape in shapes(model).items()
                                 if layer.endswith("attn1.to_q")), model.model.state_dict()
    assert f"diffusion_model.{layer}.bias" not in state
    file = {**lora(shapes(model), 1, name="diffusion_model.{}".format, **PEFT),
            f"diffusion_model.{layer}.{BIAS}": torch.ones(shape[0])}
    (line,) = merge(model, [LoRASpec(loras(file), 0.8, 0)]).get_attachment(KEY).applied[0].problems
    assert layer in line and "the layer no bias" in line and "left out" in line


def diffusers_wan(layer: str) -> str:
    """What diffusers' WanTransformer3DModel calls a layer of the original."""
    for own, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"), ("ffn.0", "ffn.net.0.proj"),
                        ("ffn.2", "ffn.net.2"), ("_embedding.0", "_embedder.linear_1"),
                        ("_embedding.2", "_embedder.linear_2"), ("time_projection.1", "time_proj"),
                        ("img_emb.proj.1", "image_embedder.ff.net.0.proj"), ("head.head", "proj_out"),
                        ("img_emb.proj.3", "image_embedder.ff.net.2")):
        layer = layer.replace(own, theirs)
    block, _, leaf = layer.rpartition(".")
    leaf = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "k_img": "add_k_proj", "v_img": "add_v_proj"}.get(
        leaf, leaf)
    outside = ("_embedder.linear" in layer or "time_proj" in layer or "image_embedder" in layer)
    return "condition_embedder." * outside + (f"{block}.{leaf}" if block else leaf)


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model.", "lycoris_"])
def test_wan_in_the_names_of_diffusers(prefix, kind, loras):
    """The host knows none of them: its loader leaves all of such a file out."""
    wan = FAMILIES["Wan"]
    model = base("Wan") if kind == "t2v" else patcher(build(
        replace(wan, kind="WAN21_I2V", config={**wan.config, "model_type": "i2v", "in_dim": 36})))
    layers = shapes(model, lambda layer: layer != "patch_embedding")
    known = lora(layers, 1, name="diffusion_model.{}".format, **PEFT)
    foreign = lora(layers, 1, name=lambda layer: prefix + diffusers_wan(layer).replace(
        ".", "_" if prefix == "lycoris_" else "."), **PEFT)
    assert sum("attn1" in key for key in foreign) and len(foreign) == len(known)
    spec, reference = (LoRASpec(loras(file), 0.8, 0) for file in (foreign, known))
    assert not stock(model, [spec]).patches
    ours = merge(model, [spec])
    assert ours.get_attachment(KEY).applied[0].problems == ()
    found, wanted = (patches_of(model, each) for each in (spec, reference))
    assert found.keys() == wanted.keys() and len(found) == len(layers)
    assert all(torch.equal(found[key].weights[0], wanted[key].weights[0]) for key in found)
    if kind == "t2v":
        same(sample(ours, "Wan"), sample(stock(model, [reference]), "Wan"), sample(model, "Wan"))


def test_wan_in_the_names_of_diffusers_whatever_layers_were_trained(loras):
    model = base("Wan")
    layers = shapes(model, lambda layer: ".ffn." in layer)
    spec = LoRASpec(loras(lora(layers, 1, name=diffusers_wan, **PEFT)), 0.8, 0)
    assert {key.removeprefix("diffusion_model.") for key in patches_of(model, spec)} == {
        f"{layer}.weight" for layer in layers}


def patches_of(model, spec: LoRASpec) -> dict:
    return load(read(spec.name, model.model), comfy.lora.model_lora_keys_unet(model.model, {}), model.model, {}).found


# --- what is said of the others -------------------------------------------------------------------------------------

OTHERS = {
    "an IA3 file": {"lora_unet_mid.weight": (4,), "lora_unet_mid.on_input": ()},
    "a list of OFT blocks": {f"lora_unet_mid.oft_blocks.{k}": (4, 4) for k in range(3)},
    "an OFT file of kohya's scripts": {"oft_unet_mid.oft_blocks": (2, 4, 4), "oft_unet_mid.alpha": ()},
    "a LoRA that was converted for Nunchaku": {f"transformer_blocks.0.mlp_fc1.lora_{end}": (4, 4)
                                               for end in ("down", "up")},
    "a whole checkpoint": {"model.diffusion_model.out.2.weight": (4, 4), "first_stage_model.x.weight": (3,)},
    "a ControlNet": {"input_hint_block.0.weight": (4, 3, 3, 3), "zero_convs.0.0.weight": (4, 4)},
    "an IP-Adapter": {"image_proj.proj.weight": (4, 4), "ip_adapter.1.to_k_ip.weight": (4, 4)},
    "a textual-inversion embedding": {"clip_l": (2, 768), "clip_g": (2, 1280)},
    "a text model with GGUF names": {"token_embd.weight": (4, 4), "blk.0.attn_q.weight": (4, 4)},
    "a VAE": {"encoder.conv_in.weight": (4, 3, 3, 3), "decoder.up.0.block.0.conv1.weight": (4, 4)},
    "a whole model or a part of one": {f"double_blocks.{k}.img_attn.qkv.weight": (4, 4) for k in range(9)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_lora_is_called_by_its_name(what, loras):
    tensors = {key: torch.ones(shape) for key, shape in OTHERS[what].items()}
    refused(tensors, loras, f"is {what} and no LoRA for this model (SD15)", f"none of its {len(tensors)} keys")
    assert other_kind(tensors).what == what


@pytest.mark.parametrize(("name", "words"), [
    ("lora_unet_double_blocks_{}_img_attn_qkv", "a kohya file with the prefix lora_unet_"),
    ("lycoris_strange_{}_attn1_to_q", "a LyCORIS file with the prefix lycoris_"),
    ("transformer.strange.{}.attn1.to_q", "a diffusers file with the prefix transformer."),
    ("base_model.model.blocks.{}.q", "a PEFT file with the prefix base_model.model."),
    ("unet.strange.{}", "a diffusers or OneTrainer file with the prefix unet."),
])
@pytest.mark.parametrize("model", ["SD15", "Wan"])
def test_a_lora_without_a_layer_here_is_called_by_its_format(name, words, model, loras):
    """Of some it cannot be known whether it is of another architecture, or of this one in names of diffusers."""
    refused(lora({str(k): torch.Size((4, 4)) for k in range(4)}, 1, name=name.format), loras,
            f"matches no layer of this model ({FAMILIES[model].kind})", words, "another architecture, or by a tool",
            model=model)


def test_loras_of_a_checkpoints_layers_are_no_checkpoint():
    names = ["model.diffusion_model.x.lora_A.weight", "model.diffusion_model.x.diff", "model.diffusion_model.x.alpha"]
    assert other_kind(names) is None and other_kind([*names, "model.diffusion_model.y.weight"]).remedy


def test_an_unknown_format_is_not_called_another_architecture(loras):
    spec = LoRASpec(loras(lora({"k": torch.Size((4, 4))}, 1, name="strange_{}".format)), 1.0, 0)
    with pytest.raises(ValueError, match="is in a format that is known here. If it is for") as caught:
        merge(base("SD15"), [spec])
    assert "architecture" not in str(caught.value) and lora_format(["strange_k.alpha"]) is None


def test_text_encoders_of_stable_cascade_are_text_encoders(loras):
    refused({"lora_prior_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(4, 4)}, loras,
            "changes the text encoder alone")


@pytest.mark.parametrize("make", ["runtime", "baked"])
def test_layers_that_the_model_lacks_and_unknown_keys(make, loras, caplog):
    """Of plain differences too, and named by baking too: they are left out, for nothing could apply them."""
    model, state = base("SD15"), base("SD15").model.state_dict()
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    lacking = next(name for name, target in key_map.items() if name.startswith("lora_unet_") and target not in state)
    odd = {f"diffusion_model.{name}.diff": torch.ones(shape) for name, shape in list(shapes(model).items())[:4]}
    spec = LoRASpec(loras(odd | {f"{lacking}.diff": torch.ones(3), "strange.diff": torch.ones(3)}), 0.8, 0)
    if make == "runtime":
        merge(model, [spec])
        text = "\n".join(caplog.messages)
    else:
        text = "\n".join(bake(model, None, (spec,), "Merge LoRAs")[2])
    assert "1 of its 6 keys has no place in this model, 'strange.diff' for one" in text
    assert f"{key_map[lacking]}: the model has no such layer" in text and "bare parameter" not in text


@pytest.mark.parametrize(("keys", "whole"), [
    ([f"lora_unet_block_{k}.lora_up.weight" for k in range(20)], False),
    ([f"block_{k}.weight" for k in range(8)], False), ([f"block_{k}.weight" for k in range(9)], True),
    ([*(f"block_{k}.weight" for k in range(20)), "block_0.lora_up.weight"], False)])
def test_a_whole_model_is_many_keys_of_which_none_is_a_loras(keys, whole):
    found = other_kind(keys)
    assert (found is not None and found.what == "a whole model or a part of one") if whole else found is None
