"""LoRA keys of every model family: each target that the host's key map knows is a layer that can be routed.

Models are built on the meta device, so sizes are near the real ones and nothing is computed.
"""

from __future__ import annotations

import comfy.lora
import comfy.supported_models
import pytest
import torch
from lora_ensemble.engine.geometry import geometry_of, layer_of
from lora_ensemble.host.files.patches import weight_shape

from .models import FAMILIES

FLUX = dict(FAMILIES["Flux"].config, txt_ids_dims=[])
VIDEO = dict(in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=64, hidden_size=64, mlp_ratio=4.0,
             num_heads=2, depth=2, depth_single_blocks=2, axes_dim=[8, 12, 12], theta=256, patch_size=[1, 2, 2],
             qkv_bias=True, guidance_embed=True, byt5=False, meanflow=False, use_cond_type_embedding=False,
             vision_in_dim=None, meanflow_sum=False, image_model="hunyuan_video")
WAN = FAMILIES["Wan"].config
CHROMA = {key: value for key, value in dict(FLUX, image_model="chroma", in_channels=64, out_channels=64, in_dim=64,
                                            out_dim=64, hidden_dim=128, n_layers=2).items() if key != "guidance_embed"}
LUMINA = dict(image_model="lumina2", patch_size=2, in_channels=16, dim=96, cap_feat_dim=64, n_layers=2, qk_norm=True,
              n_heads=4, n_kv_heads=2, axes_dims=[8, 8, 8], axes_lens=[30, 51, 51])
COSMOS = dict(max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2,
              patch_temporal=1, model_channels=96, num_blocks=2, num_heads=4, crossattn_emb_channels=32,
              pos_emb_cls="rope3d", use_adaln_lora=True, adaln_lora_dim=16)

MODELS: dict[str, tuple[str, dict]] = {
    **{name: (family.kind, family.config) for name, family in FAMILIES.items() if name != "Flux"},
    "Flux": ("Flux", FLUX),
    "Flux2": ("Flux2", dict(FLUX, image_model="flux2", axes_dim=[8, 8, 8, 8], mlp_ratio=3.0, out_channels=128,
                            in_channels=128, global_modulation=True, mlp_silu_act=True, qkv_bias=False,
                            ops_bias=False, txt_ids_dims=[3], patch_size=1, vec_in_dim=None)),
    "Chroma": ("Chroma", CHROMA),
    "Chroma Radiance": ("ChromaRadiance", dict(CHROMA, image_model="chroma_radiance", in_channels=3, out_channels=3,
                                               patch_size=16, nerf_hidden_size=64, nerf_mlp_ratio=4, nerf_depth=2,
                                               nerf_max_freqs=8, nerf_tile_size=512, nerf_final_head_type="conv",
                                               nerf_embedder_dtype=torch.float32, use_x0=False,
                                               use_sequential_txt_ids=False)),
    "Qwen-Image": ("QwenImage", dict(image_model="qwen_image", num_layers=2, attention_head_dim=32,
                                     num_attention_heads=2, joint_attention_dim=64, axes_dims_rope=[8, 12, 12])),
    "Lumina2": ("Lumina2", LUMINA),
    "Z-Image": ("ZImage", dict(LUMINA, n_kv_heads=4, ffn_dim_multiplier=8.0 / 3.0, z_image_modulation=True)),
    "Wan I2V": ("WAN21_I2V", dict(WAN, model_type="i2v", in_dim=36)),
    "Wan VACE": ("WAN21_Vace", dict(WAN, model_type="vace", vace_layers=1, vace_in_dim=96)),
    "HunyuanVideo": ("HunyuanVideo", VIDEO),
    "HunyuanVideo 1.5": ("HunyuanVideo15", dict(VIDEO, byt5=True, vision_in_dim=32, use_cond_type_embedding=True,
                                                in_channels=65, vec_in_dim=None, guidance_embed=False)),
    "LTXV": ("LTXV", dict(image_model="ltxv", num_layers=2, attention_head_dim=8, cross_attention_dim=32,
                          caption_channels=64)),
    "LTX 2.5": ("LTXAV", dict(image_model="ltxav", num_layers=1, attention_head_dim=8, cross_attention_dim=32,
                              audio_attention_head_dim=4, audio_num_attention_heads=2, audio_cross_attention_dim=24,
                              connector_num_layers=1, caption_proj_before_connector=True, cross_attention_adaln=True,
                              caption_projection_first_linear=False, apply_gated_attention=True)),
    "MiniMax H3": ("MiniMaxH3", dict(image_model="minimax_h3", hidden_size=64, num_layers=1, token_refiner_num_layers=1,
                                     num_attention_heads=2, attention_head_dim=32, ffn_hidden_size=64, text_dim=24)),
    "Wan Animate 2": ("WAN_Animate2", dict(WAN, model_type="animate2", in_dim=36)),
    "MageFlow": ("MageFlow", dict(image_model="mage_flow", num_layers=1, attention_head_dim=24, num_attention_heads=2,
                                  joint_attention_dim=24, axes_dims_rope=(8, 8, 8))),
    "JoyImage": ("JoyImage", dict(image_model="joyimage", hidden_size=48, num_attention_heads=2, text_dim=24,
                                  num_layers=2, rope_dim_list=[8, 8, 8])),
    "HiDream": ("HiDream", dict(image_model="hidream", patch_size=2, in_channels=16, out_channels=16, num_layers=1,
                                num_single_layers=1, attention_head_dim=16, num_attention_heads=4,
                                caption_channels=[64, 64], text_emb_dim=32, axes_dims_rope=[8, 4, 4],
                                max_resolution=[128, 128], llama_layers=[0, 1])),
    "PixArt": ("PixArtSigma", dict(image_model="pixart_sigma", num_heads=4, patch_size=2, hidden_size=64,
                                   in_channels=4, depth=2, model_max_length=300, input_size=128, pe_interpolation=2,
                                   micro_condition=False, caption_channels=64)),
    "AuraFlow": ("AuraFlow", dict(cond_seq_dim=64, dim=64, n_heads=4, n_layers=2, n_double_layers=1,
                                  global_conddim=64, max_seq=64)),
    "HunyuanDiT": ("HunyuanDiT1", dict(image_model="hydit1", hidden_size=64, num_heads=4, depth=2, text_states_dim=32,
                                       text_states_dim_t5=32)),
    "Mochi": ("GenmoMochi", dict(image_model="mochi_preview", depth=2, hidden_size_x=3072, hidden_size_y=64,
                                 num_heads=24, mlp_ratio_x=4.0, t5_feat_dim=32, use_t5=True, in_channels=12,
                                 qk_norm=True)),
    "Cosmos": ("CosmosT2V", dict(COSMOS, image_model="cosmos", block_config="FA-CA-MLP", block_x_format="THWBD",
                                 affline_emb_norm=True)),
    "Cosmos Predict2": ("CosmosT2IPredict2", dict(COSMOS, image_model="cosmos_predict2")),
    "OmniGen2": ("Omnigen2", dict(image_model="omnigen2", hidden_size=96, num_layers=2, num_attention_heads=4,
                                  num_kv_heads=2, axes_dim_rope=[8, 8, 8], text_feat_dim=32)),
    "Kandinsky5": ("Kandinsky5", dict(image_model="kandinsky5", model_dim=64, ff_dim=64, num_visual_blocks=2,
                                      visual_embed_dim=132, axes_dims=[16, 8, 8], in_text_dim=32)),
    "ACE-Step": ("ACEStep", dict(audio_model="ace", num_layers=2, inner_dim=64, attention_head_dim=16,
                                 num_attention_heads=4, speaker_embedding_dim=32, text_embedding_dim=32,
                                 lyric_hidden_size=64)),
    "Ernie-Image": ("ErnieImage", dict(image_model="ernie", hidden_size=128, num_attention_heads=1, num_layers=2,
                                       ffn_hidden_size=64, text_in_dim=32)),
    "Krea2": ("Krea2", dict(image_model="krea2", features=128, txtdim=32, heads=4, kvheads=2, layers=2, txtlayers=2,
                            txtheads=2, txtkvheads=2)),
}

UNROUTED = {
    "HunyuanVideo 1.5": {"cond_type_embedding"},  # an embedding
    "ACE-Step": {"lyric_embs"},  # an embedding
    "HiDream": {"double_stream_blocks.0.block.ff_i.gate", "single_stream_blocks.0.block.ff_i.gate"},  # bare parameters
}
"""What no forward can express: targets that are no linear layer, convolution or norm, by family."""


def build(kind: str, config: dict):
    known = getattr(comfy.supported_models, kind, None)
    if known is None:
        pytest.skip(f"this ComfyUI has no {kind}")
    model_config = known(dict(config))
    model_config.set_inference_dtype(torch.float32, None)
    return model_config.get_model({}, "", device=torch.device("meta"))


def older(config: dict, error: Exception) -> dict | None:
    """The configuration without the entry that an older release does not know."""
    unknown = [key for key in config if f"'{key}'" in str(error)]
    return {key: value for key, value in config.items() if key not in unknown} if unknown else None


@pytest.mark.parametrize("family", MODELS)
def test_every_target_is_a_routable_layer(family):
    kind, config = MODELS[family]
    while True:
        try:
            model = build(kind, config)
            break
        except TypeError as error:
            config = older(config, error)
            if config is None:
                raise
    state = model.state_dict()
    targets = {target if isinstance(target, str) else target[0]
               for target in comfy.lora.model_lora_keys_unet(model, {}).values()}
    weights = {name for name in targets if name.endswith(".weight") and name in state and state[name].ndim >= 2}
    assert len(weights) >= 10
    unrouted = set()
    for name in weights:
        layer = name.removeprefix("diffusion_model.").removesuffix(".weight")
        module = layer_of(model.diffusion_model, layer)
        if module is None or geometry_of(module) is None:
            unrouted.add(layer)
        else:
            assert tuple(weight_shape(module)) == tuple(state[name].shape), layer
    assert unrouted == UNROUTED.get(family, set())


def test_the_table_covers_the_key_map():
    """Every architecture that the host's key map treats apart is in the table above."""
    import inspect
    import re

    named = set(re.findall(r"comfy\.model_base\.(\w+)", inspect.getsource(comfy.lora.model_lora_keys_unet)))
    covered = set()
    for kind, _ in MODELS.values():
        get_model = getattr(getattr(comfy.supported_models, kind, None), "get_model", None)
        covered |= set(re.findall(r"model_base\.(\w+)", inspect.getsource(get_model))) if get_model else set()
    assert named - covered <= {"StableCascade_C", "ACEStep15"}, "families without a test"


