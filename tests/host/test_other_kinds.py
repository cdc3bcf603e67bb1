"""What a file is, told by the names of its tensors: of a kind that is no LoRA, or that ComfyUI cannot load, by one of
them; of a format by most of them."""

from __future__ import annotations

import pytest
from lora_ensemble.host.files.formats import lora_format, other_kind, with_aliases

KINDS = {
    "an IA3 file": ("lora_unet_mid.on_input", "base_model.model.mid.ia3_l", "mid.ia3_l.default"),
    "a list of OFT blocks": ("lora_unet_mid.oft_blocks.12", "mid.oft_R", "mid.oft_r.default.weight"),
    "an OFT file of kohya's scripts": ("oft_unet_mid.oft_blocks", "oft_te_mid.alpha", "oft_te2_mid.alpha"),
    "a PEFT file of a kind other than LoRA": ("mid.vera_lambda_b", "mid.vera_lambda_d.default", "mid.boft_R",
                                              "mid.boft_s.default", "mid.hra_u", "mid.hra_u.default"),
    "a LoRA that was converted for Nunchaku": ("transformer_blocks.0.qkv_proj.lora_down",
                                               "single_transformer_blocks.12.mlp_fc2.lora_up"),
    "a whole checkpoint": ("model.diffusion_model.out.2.weight", "first_stage_model.x.weight",
                           "cond_stage_model.x.weight", "conditioner.x.weight"),
    "a ControlNet": ("control_model.x.weight", "controlnet_x.weight", "lora_controlnet", "input_hint_block.0.weight",
                     "zero_convs.0.0.weight", "net.input_hint_block.0.weight"),
    "an IP-Adapter": ("ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"),
    "a textual-inversion embedding": ("emb_params", "clip_l", "clip_g", "string_to_param", "string_to_param.*",
                                      "<cat>"),
    "a text model with GGUF names": ("blk.12.attn_q.weight", "token_embd.weight", "output_norm.weight"),
    "a VAE": ("quant_conv.weight", "post_quant_conv.weight", "vae.quant_conv.weight", "encoder.conv_in.weight",
              "decoder.mid.block_1.conv1.weight", "vae.decoder.up_blocks.0.resnets.0.conv1.weight"),
    "an embedding that came with a LoRA": ("bundle_emb.cat.clip_l",),
}
LORAS = ("lora_unet_mid.oft_blocks", "lora_unet_mid.lora_up.weight", "transformer_blocks.0.attn.to_q.lora_down.weight",
         "unet.mid.diff_b", "model.diffusion_model.out.2.set_weight", "lora_te_clip_l.alpha", "clip_l.x.lora_A.weight",
         "lora_unet_encoder_mid.alpha", "boft_s.lora_up.weight")


@pytest.mark.parametrize(("key", "what"), [(key, what) for what, keys in KINDS.items() for key in keys])
def test_one_name_says_what_a_file_is(key, what):
    found = other_kind([key])
    assert found is not None and found.what == what
    beside = other_kind([LORAS[0], key])
    assert beside is None if key.startswith("bundle_emb") else beside is found


def test_names_of_loras_are_of_no_other_kind():
    assert [key for key in LORAS if other_kind([key]) is not None] == [] and other_kind([]) is None


@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_format_is_that_of_at_least_half_of_the_names(others):
    keys = ["lora_unet_mid.alpha", *(f"strange_{k}" for k in range(others))]
    assert lora_format(keys) == (("a kohya file", "lora_unet_") if others < 2 else None)


@pytest.mark.parametrize("others", [3, 4, 5])
def test_of_a_prefix_with_which_most_is_of_another_model_nothing_is_taken(others):
    """Most are more than two thirds. Diffusers' old names, whose layers end in `_lora`, are of this model, too."""
    keys = ["unet.mid.attn1.to_q.lora_A.weight", "unet.mid.attn1.processor.to_q_lora.up.weight",
            *(f"unet.strange.{k}.lora_A.weight" for k in range(others))]
    key_map = {"unet.mid.attn1.processor.to_q": "weight", "diffusion_model.mid.to_q": "weight"}
    names = with_aliases(key_map, keys)
    assert key_map.items() <= names.items() and ("unet.mid.attn1.to_q" in names) == (others <= 4)
