"""Which format a file is in: names that ComfyUI's key map lacks, and what is said of files that are no LoRA."""

from __future__ import annotations

import comfy.lora
import pytest
import torch
from lora_ensemble.host.compose.apply import apply_method, bake
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.host.files.formats import lora_format, other_kind
from lora_ensemble.methods.merge import Merge

from .builders import composite, lora, merge, plain, same, sample, shapes, stock, text_layers
from .models import FAMILIES, base, small_clip
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


# --- what is said of the others -------------------------------------------------------------------------------------

OTHERS = {
    "an IA3 file": {"lora_unet_mid.weight": (4,), "lora_unet_mid.on_input": ()},
    "a list of OFT blocks": {f"lora_unet_mid.oft_blocks.{k}": (4, 4) for k in range(3)},
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
    ("lycoris_blocks_{}_attn1_to_q", "a LyCORIS file with the prefix lycoris_"),
    ("transformer.blocks.{}.attn1.to_q", "a diffusers file with the prefix transformer."),
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
    spec = LoRASpec(loras(lora({"k": torch.Size((4, 4))}, 1, name="oft_unet_{}".format)), 1.0, 0)
    with pytest.raises(ValueError, match="is in a format that is known here. Convert it") as caught:
        merge(base("SD15"), [spec])
    assert "architecture" not in str(caught.value) and lora_format(["oft_unet_k.alpha"]) is None


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
    else:
        bake(model, None, (spec,), "Merge LoRAs")
    text = "\n".join(caplog.messages)
    assert "1 keys have no place in this model, 'strange.diff' for one" in text
    assert f"{key_map[lacking]}: the model has no such layer" in text and "bare parameter" not in text


@pytest.mark.parametrize(("keys", "whole"), [
    ([f"lora_unet_block_{k}.lora_up.weight" for k in range(20)], False),
    ([f"block_{k}.weight" for k in range(8)], False), ([f"block_{k}.weight" for k in range(9)], True),
    ([*(f"block_{k}.weight" for k in range(20)), "block_0.lora_up.weight"], False)])
def test_a_whole_model_is_many_keys_of_which_none_is_a_loras(keys, whole):
    found = other_kind(keys)
    assert (found is not None and found.what == "a whole model or a part of one") if whole else found is None
