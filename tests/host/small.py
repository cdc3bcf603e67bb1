"""Every model family of the host that can be built with a block or two, and the calls that a sampler makes of it: plain
ones, and with reference pictures, masks and the like. Pictures here, video and sound in `small_video`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .blocks import TRANSFORMERS, Transformer, noise

More = Callable[[int], dict]


def shallow(name: str, latent: tuple | None = None, **config) -> Transformer:
    """A family of `blocks` with fewer blocks."""
    kind = TRANSFORMERS[name]
    return replace(kind, config={**kind.config, **config}, latent=latent or kind.latent, control=None)


def like(kind: Transformer, name: str, more: More | None = None, latent: tuple | None = None,
         context: tuple[int, ...] | None = None, times: tuple[int, ...] = (), **config) -> Transformer:
    """The same class called otherwise, or built a little otherwise. `more` comes on top of the kind's own."""
    both = kind.more if more is None else lambda rows: {**kind.more(rows), **more(rows)}
    return replace(kind, name=name, config={**kind.config, **config}, more=both, latent=latent or kind.latent,
                   context=context or kind.context, times=times)


def extra(**shapes: tuple[int, ...]) -> More:
    """Further inputs by name, [rows, *shape]."""
    return lambda rows: {name: noise(rows, *shape, seed=20 + k) for k, (name, shape) in enumerate(shapes.items())}


def references(*shapes: tuple[int, ...], method: str | None = None) -> More:
    """Reference pictures, and how they are numbered."""
    named = {} if method is None else {"ref_latents_method": method}
    return lambda rows: {"ref_latents": [noise(rows, *shape, seed=7 + k) for k, shape in enumerate(shapes)], **named}


UNET = Transformer("SD15", ("modules.diffusionmodules.openaimodel", "UNetModel"),
                   dict(image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1],
                        channel_mult=[1, 2], transformer_depth=[1, 1], transformer_depth_output=[1, 1, 1, 1],
                        transformer_depth_middle=1, num_heads=4, num_head_channels=-1, context_dim=24,
                        use_spatial_transformer=True, legacy=False), (4, 6, 9), (5, 24))
ADM = dict(num_classes="sequential", adm_in_channels=20, use_linear_in_transformer=True)
PLAIN_FLUX = shallow("Flux", (16, 6, 9), depth=1, depth_single_blocks=1)
FLUX_2 = replace(like(PLAIN_FLUX, "Flux 2", patch_size=1, vec_in_dim=None, qkv_bias=False, guidance_embed=False,
                      global_modulation=True, mlp_silu_act=True, ops_bias=False, axes_dim=[6, 6, 6, 6],
                      txt_ids_dims=[3]), more=lambda rows: {})
CHROMA = shallow("Chroma", (16, 6, 9), depth=1, depth_single_blocks=1)
RADIANCE = Transformer("Chroma Radiance", ("chroma_radiance.model", "ChromaRadiance"),
                       dict(CHROMA.config, in_channels=3, out_channels=3, patch_size=4, nerf_hidden_size=8,
                            nerf_mlp_ratio=2, nerf_depth=1, nerf_max_freqs=4, nerf_tile_size=4,
                            nerf_final_head_type="conv", nerf_embedder_dtype=None, use_x0=True,
                            use_sequential_txt_ids=True), (3, 12, 20), (5, 24), CHROMA.more, "ChromaRadianceParams")
QWEN = shallow("Qwen-Image", (16, 1, 6, 9), num_layers=2)
LUMINA = Transformer("Lumina 2", ("lumina.model", "NextDiT"),
                     dict(patch_size=2, in_channels=16, dim=48, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=1,
                          multiple_of=16, cap_feat_dim=24, axes_dims=[8, 8, 8], axes_lens=[30, 30, 30], qk_norm=True),
                     (16, 6, 9), (5, 24), lambda rows: {"num_tokens": 5})
Z_IMAGE = like(LUMINA, "Z-Image", dim=256, n_heads=8, axes_dims=[16, 8, 8], z_image_modulation=True,
               pad_tokens_multiple=8, time_scale=1000.0)
OMNI = like(Z_IMAGE, "Z-Image Omni", lambda rows: {"ref_latents": [noise(rows, 16, 4, 6, seed=7)],
                                                   "ref_contexts": [noise(rows, 3, 24, seed=8)],
                                                   "siglip_feats": [noise(rows, 2, 3, 20, seed=9)]}, siglip_feat_dim=20)
KREA = Transformer("Krea 2", ("krea2.model", "SingleStreamDiT"),
                   dict(features=64, tdim=32, txtdim=16, heads=4, kvheads=2, multiplier=2, layers=1, txtlayers=3,
                        txtheads=2, txtkvheads=2), (16, 6, 9), (5, 48))
OMNIGEN = Transformer("OmniGen 2", ("omnigen.omnigen2", "OmniGen2Transformer2DModel"),
                      dict(in_channels=16, hidden_size=48, num_layers=1, num_refiner_layers=1, num_attention_heads=2,
                           num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 8, 8), axes_lens=(30, 30, 30),
                           text_feat_dim=24), (16, 6, 9), (5, 24), lambda rows: {"num_tokens": 5})
BOOGU = Transformer("Boogu", ("boogu.model", "BooguTransformer2DModel"),
                    {**{k: v for k, v in OMNIGEN.config.items() if k != "text_feat_dim"}, "num_double_stream_layers": 1,
                     "instruction_feat_dim": 24}, OMNIGEN.latent, OMNIGEN.context, OMNIGEN.more)
PIXART = Transformer("PixArt", ("pixart.pixartms", "PixArtMS"),
                     dict(input_size=8, hidden_size=48, depth=1, num_heads=2, caption_channels=24, model_max_length=5,
                          pe_interpolation=1), (4, 32, 40), (5, 24))
PIXELDIT = Transformer("PixelDiT", ("pixeldit.model", "PixDiT_T2I"),
                       dict(num_groups=2, hidden_size=48, pixel_hidden_size=8, pixel_attn_hidden_size=32,
                            pixel_num_groups=2, patch_depth=2, pixel_depth=1, patch_size=4, txt_embed_dim=24,
                            txt_max_length=8), (3, 10, 18), (5, 24))
SD3 = shallow("SD3", (16, 6, 9), depth=2, context_embedder_config={"target": "torch.nn.Linear",
                                                                   "params": {"in_features": 24, "out_features": 128}})
JOY = shallow("JoyImage", (16, 1, 6, 9), num_layers=2)
REFERENCE = (16, 6, 4), (16, 5, 5)

PICTURES = [
    UNET,
    like(UNET, "SDXL", extra(y=(20,)), **ADM),
    like(UNET, "x4 upscaler", latent=(7, *UNET.latent[1:]), in_channels=7, disable_self_attentions=[False, True]),
    like(UNET, "SVD", lambda rows: {"y": noise(rows, 20), "num_video_frames": rows}, context=(1, 24), **ADM,
         use_temporal_resblock=True, use_temporal_attention=True, extra_ff_mix_layer=True, merge_factor=0.0,
         merge_strategy="learned_with_images", video_kernel_size=[3, 1, 1]),
    Transformer("Stable Cascade C", ("cascade.stage_c", "StageC"),
                dict(c_in=4, c_out=4, c_r=8, c_cond=32, c_hidden=[32, 32], nhead=[2, 2], blocks=[[1, 1], [1, 1]],
                     c_clip_text=24, c_clip_text_pooled=20, c_clip_img=12), (4, 6, 8), (5, 24),
                extra(clip_text=(5, 24), clip_text_pooled=(1, 20), clip_img=(1, 12))),
    Transformer("Stable Cascade B", ("cascade.stage_b", "StageB"),
                dict(c_in=4, c_out=4, c_r=8, c_cond=32, c_hidden=[32, 32], nhead=[-1, 2], blocks=[[1, 1], [1, 1]],
                     block_repeat=[[1, 1], [2, 1]], level_config=["CT", "CTA"], c_clip=24, dropout=[0.0, 0.0]),
                (4, 8, 12), (5, 24), extra(effnet=(16, 3, 4), clip=(1, 24))),
    PLAIN_FLUX,
    like(PLAIN_FLUX, "Flux Kontext", references(*REFERENCE), guidance_embed=True),
    FLUX_2,
    like(FLUX_2, "Flux 2 edit", references(*REFERENCE)),
    like(FLUX_2, "Flux 2 timestep zero", references(*REFERENCE, method="index_timestep_zero")),
    CHROMA,
    RADIANCE,
    QWEN,
    like(QWEN, "Qwen-Image layers", latent=(16, 3, 6, 9)),
    like(QWEN, "Qwen-Edit", references(*((c, 1, h, w) for c, h, w in REFERENCE))),
    like(QWEN, "Qwen-Edit timestep zero", references((16, 1, 6, 4)), default_ref_method="index_timestep_zero"),
    LUMINA,
    like(LUMINA, "NewBie", extra(clip_text_pooled=(20,)), clip_text_dim=20),
    Z_IMAGE,
    OMNI,
    like(replace(LUMINA, where=("lumina.model", "NextDiTPixelSpace")), "Z-Image pixels", latent=(3, 6, 8),
         in_channels=3, decoder_hidden_size=16, decoder_num_res_blocks=1),
    KREA,
    like(KREA, "Krea 2 index", references(*REFERENCE, method="index")),
    like(KREA, "Krea 2 timestep zero", references(*REFERENCE, method="index_timestep_zero")),
    SD3,
    like(SD3, "SD 3.5", latent=(16, 7, 9), qk_norm="rms", x_block_self_attn_layers=[0], register_length=3),
    shallow("AuraFlow", (4, 6, 9), n_layers=2, n_double_layers=1),
    shallow("HunyuanDiT", (4, 6, 10), depth=2),
    shallow("Lens", (16, 3, 4), num_layers=2),
    JOY,
    like(JOY, "JoyImage edit", references(*((c, 1, h, w) for c, h, w in REFERENCE))),
    Transformer("HiDream", ("hidream.model", "HiDreamImageTransformer2DModel"),
                dict(patch_size=2, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=24,
                     num_attention_heads=2, caption_channels=[24, 24], text_emb_dim=20, num_routed_experts=4,
                     num_activated_experts=2, axes_dims_rope=(8, 8, 8), max_resolution=(16, 16), llama_layers=[0, 1]),
                (16, 6, 9), (5, 24), extra(y=(20,), encoder_hidden_states_llama3=(2, 4, 24))),
    Transformer("MageFlow", ("mage_flow.model", "MageFlowTransformer2DModel"),
                dict(in_channels=16, out_channels=16, num_layers=1, attention_head_dim=24, num_attention_heads=2,
                     joint_attention_dim=24, axes_dims_rope=(8, 8, 8)), (16, 3, 4), (5, 24), references((16, 2, 3))),
    Transformer("Ernie-Image", ("ernie.model", "ErnieImageModel"),
                dict(hidden_size=48, num_attention_heads=2, num_layers=2, ffn_hidden_size=64, in_channels=16,
                     out_channels=16, text_in_dim=24, rope_axes_dim=(8, 8, 8)), (16, 3, 4), (5, 24)),
    OMNIGEN,
    like(OMNIGEN, "OmniGen 2 edit", references(*REFERENCE)),
    BOOGU,
    like(BOOGU, "Boogu edit", references(*REFERENCE)),
    PIXART,
    like(PIXART, "PixArt Alpha", extra(c_size=(2,), c_ar=(1,)), micro_condition=True),
    PIXELDIT,
    Transformer("PiD", ("pixeldit.pid", "PidNet"), dict(PIXELDIT.config, patch_size=16, lq_hidden_dim=16,
                                                        lq_num_res_blocks=1), (3, 32, 64), (5, 24),
                lambda rows: {"lq_latent": noise(rows, 16, 2, 4), "degrade_sigma": torch.full((rows,), 0.1)}),
    Transformer("Ideogram 4", ("ideogram4.model", "Ideogram4Transformer2DModel"),
                dict(in_channels=16, num_layers=1, num_attention_heads=2, attention_head_dim=24, intermediate_size=64,
                     adaln_dim=16, llm_features_dim=24, mrope_section=(4, 4, 4)), (16, 3, 4), (5, 24)),
]
