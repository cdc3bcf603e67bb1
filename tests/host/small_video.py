"""Families of video, sound and shapes, small; see `small`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from unittest import mock

import pytest
import torch

from .blocks import Transformer, noise
from .small import PICTURES, extra, like, shallow

WAN = shallow("Wan", (16, 3, 6, 9), num_layers=1)
CLIP = (4, 1280)
"""Tokens of a picture for Wan's encoder of start pictures; its width is fixed."""

I2V = like(WAN, "Wan I2V", extra(clip_fea=CLIP), (36, 3, 6, 9), model_type="i2v", in_dim=36)
HUNYUAN = shallow("HunyuanVideo", depth=1, depth_single_blocks=1)
LTX, LTX_2 = shallow("LTX-Video", (16, 2, 3, 4), num_layers=1), shallow("LTX-2", num_layers=1)
COSMOS = Transformer("Cosmos Predict 2", ("cosmos.predict2", "MiniTrainDIT"),
                     dict(max_img_h=24, max_img_w=24, max_frames=8, in_channels=16, out_channels=16, patch_spatial=2,
                          patch_temporal=1, model_channels=48, num_blocks=1, num_heads=2, crossattn_emb_channels=24,
                          pos_emb_cls="rope3d", use_adaln_lora=True, adaln_lora_dim=8), (16, 2, 6, 9), (5, 24),
                     lambda rows: {"fps": 16.0, "padding_mask": torch.zeros(rows, 1, 6, 10)})
KANDINSKY = Transformer("Kandinsky 5", ("kandinsky5.model", "Kandinsky5"),
                        dict(in_visual_dim=16, visual_embed_dim=64, in_text_dim=24, in_text_dim2=20, time_dim=32,
                             model_dim=48, ff_dim=64, axes_dims=(8, 8, 8), num_text_blocks=1, num_visual_blocks=1),
                        (16, 2, 6, 8), (5, 24), extra(y=(20,)))
COGVIDEO = Transformer("CogVideoX", ("cogvideo.model", "CogVideoXTransformer3DModel"),
                       dict(num_attention_heads=2, attention_head_dim=16, time_embed_dim=32, text_embed_dim=24,
                            num_layers=1, sample_width=8, sample_height=6, sample_frames=5, max_text_seq_length=5,
                            use_rotary_positional_embeddings=True), (16, 2, 6, 8), (5, 24))
H3 = Transformer("MiniMax H3", ("minimax.model", "MiniMaxH3Model"),
                 dict(hidden_size=64, num_layers=1, token_refiner_num_layers=1, num_attention_heads=2,
                      attention_head_dim=32, ffn_hidden_size=64, latents_dim=8, audio_latents_dim=8, text_dim=24,
                      timestep_input_dim=32, time_embed_hidden_size=32, time_embed_dim=24, rope_inv_freq_len=4),
                 ((8, 2, 4, 6), (8, 2, 5)), (5, 24))
TRELLIS = dict(resolution=32, in_channels=8, out_channels=8, model_channels=48, cond_channels=24, num_blocks=1,
               num_heads=2, mlp_ratio=2.0)


def wan(name: str, cls: str, more, module: str = "wan.model", **config) -> Transformer:
    """A class derived from Wan's."""
    wide = (config.get("in_dim", 16), *WAN.latent[1:3], 8)
    return Transformer(f"Wan {name}", (module, cls), {**WAN.config, **config}, wide, WAN.context, more)


def vace(rows: int) -> dict:
    """Two control videos."""
    return {"vace_context": noise(rows, 2, 96, 3, 6, 8), "vace_strength": [0.7, 0.4]}


class AnimaTransformer(Transformer):
    """Cosmos Predict 2 with a language model in front, whose size the host leaves no choice of."""

    def build(self, device: str = "cpu"):
        module = pytest.importorskip("comfy.ldm.anima.model", reason="this ComfyUI has no Anima")
        adapter = partial(module.LLMAdapter, source_dim=24, target_dim=24, model_dim=24, num_layers=1, num_heads=2)
        with mock.patch.object(module, "LLMAdapter", adapter):
            return super().build(device)


def ids(rows: int) -> dict:
    tokens = torch.randint(1, 30, (rows, 6), generator=torch.Generator().manual_seed(3))
    return {**COSMOS.more(rows), "t5xxl_ids": tokens}


class InTime(Transformer):
    """A class that looks up what time comes after this one."""

    def call(self, model, options: dict, *args, **kwargs):
        times = {"sigmas": torch.tensor([0.6]), "sample_sigmas": torch.tensor([1.0, 0.6, 0.0])}
        return super().call(model, {**times, **options}, *args, **kwargs)


class OneSide(Transformer):
    """A class that is told which of a batch's texts are the prompt's."""

    def call(self, model, options: dict, *args, **kwargs):
        return super().call(model, {"cond_or_uncond": [0], **options}, *args, **kwargs)


def voxels(rows: int) -> dict:
    """Twelve places of a body, which all rows have."""
    places = torch.cartesian_prod(*[torch.arange(n) for n in (3, 2, 2)])
    return {"embeds": noise(rows, 5, 24), "trellis2_generation_mode": "shape_generation",
            "trellis2_coords": torch.nn.functional.pad(places, (1, 0)).int()}


def guides(rows: int) -> dict:
    """The last of three frames guides the others."""
    return {"keyframe_idxs": noise(rows, 3, 12, 2).abs(), "denoise_mask": torch.ones(rows, 1, 3, 3, 4)}


def h3_references(rows: int) -> dict:
    """A picture and a spoken film; the host lays their tokens out before it samples."""
    from comfy.ldm.minimax.model import PackedLayout

    picture, film, sound = noise(1, 8, 1, 4, 4), noise(1, 8, 2, 4, 6), noise(1, 8, 2, 3)
    refs = [{"kind": "image", "latent_h": 4, "latent_w": 4, "latent": picture},
            {"kind": "video_audio", "latent_h": 4, "latent_w": 6, "latent_t": 2, "ref_audio_t": 3, "latent": film,
             "audio_latent": sound}]
    (_, frames, height, width), (*_, beats) = H3.latent
    return {"minimax_payload": {"refs": refs, "cond_video_latents": [picture, film], "cond_audio_latents": [sound],
                                "layout": PackedLayout(H3.context[0], frames, height, width, beats, refs=refs)}}


def lyrics(rows: int) -> dict:
    tokens = torch.randint(1, 30, (rows, 4), generator=torch.Generator().manual_seed(3))
    return {"speaker_embeds": noise(rows, 16), "lyric_token_idx": tokens, "lyric_mask": torch.ones(rows, 4)}


FILMS = [
    WAN,
    like(WAN, "Wan 2.2", times=(3,)),
    like(WAN, "Wan references", lambda rows: {"reference_latent": noise(rows, 16, 6, 10),
                                              "context_latents": [noise(rows, 16, 1, 4, 4)],
                                              "time_dim_concat": noise(rows, 16, 1, 6, 9)}, in_dim_ref_conv=16),
    I2V,
    like(shallow("Wan VACE", (16, 3, 6, 8), num_layers=2, vace_layers=2), "Wan VACE", vace),
    wan("Camera", "CameraWanModel", extra(camera_conditions=(6, 3, 48, 64), clip_fea=CLIP), model_type="camera",
        in_dim=36, in_dim_control_adapter=6),
    wan("HuMo", "HumoWanModel", extra(audio_embed=(3, 8, 5, 1280), reference_latent=(16, 1, 6, 8)), model_type="humo"),
    wan("S2V", "WanModel_S2V", extra(audio_embed=(25, 16, 12), reference_latent=(16, 1, 6, 8),
                                     control_video=(16, 3, 6, 8)), model_type="s2v", audio_dim=16,
        audio_inject_layers=[0]),
    wan("Animate", "AnimateWanModel", extra(clip_fea=CLIP, pose_latents=(16, 2, 6, 8)), "wan.model_animate",
        model_type="animate", in_dim=36, num_layers=5),
    wan("Animate 2", "WanAnimate2Model", extra(clip_fea=CLIP, pose_latents=(16, 2, 6, 8)), "wan.model_animate2",
        model_type="animate2", in_dim=36),
    wan("SCAIL", "SCAILWanModel", extra(clip_fea=CLIP, pose_latents=(20, 3, 4, 4), reference_latent=(20, 1, 6, 8)),
        model_type="scail", in_dim=20),
    wan("SCAIL 2", "SCAIL2WanModel", extra(clip_fea=CLIP, pose_latents=(20, 3, 4, 4), reference_latent=(20, 1, 6, 8),
                                           ref_mask_latents=(28, 4, 6, 8), sam_latents=(28, 3, 4, 4)),
        model_type="scail2", in_dim=20),
    replace(wan("Dancer", "WanDancerModel", extra(clip_fea=CLIP, audio_embed=(9, 35)), "wan.model_wandancer",
                model_type="wandancer", in_dim=36, audio_inject_layers=[0], music_dim=32, music_latent_dim=32),
            latent=(36, 3, 8, 16)),
    HUNYUAN,
    like(HUNYUAN, "HunyuanVideo I2V", lambda rows: {"guiding_frame_index": torch.zeros(rows)}, guidance_embed=False),
    like(HUNYUAN, "HunyuanVideo 1.5", extra(txt_byt5=(3, 1472), clip_fea=(4, 20)), vec_in_dim=None,
         guidance_embed=False, byt5=True, use_cond_type_embedding=True, vision_in_dim=20, patch_size=[1, 1, 1]),
    InTime("HunyuanVideo 1.5 SR", HUNYUAN.where,
           dict(HUNYUAN.config, in_channels=34, vec_in_dim=None, guidance_embed=False, byt5=True, meanflow=True,
                use_cond_type_embedding=True, patch_size=[1, 1, 1]), (34, 2, 6, 8), (5, 24), extra(txt_byt5=(3, 1472)),
           HUNYUAN.fields),
    like(HUNYUAN, "HunyuanImage 2.1", extra(txt_byt5=(3, 1472)), (16, 6, 8), vec_in_dim=None, guidance_embed=False,
         byt5=True, patch_size=[2, 2], axes_dim=[12, 12]),
    shallow("Mochi", depth=2, learn_sigma=False),
    LTX,
    like(LTX, "LTX-Video mask", times=(24,)),
    like(LTX, "LTX-Video guides", guides, (16, 3, 3, 4), times=(36,)),
    LTX_2,
    like(LTX_2, "LTX 2.5", lambda rows: {"ref_audio": {"tokens": noise(1, 3, 128)}}, context=(5, 72),
         cross_attention_adaln=True, caption_proj_before_connector=True, apply_gated_attention=True),
    COSMOS,
    AnimaTransformer("Anima", ("anima.model", "Anima"), COSMOS.config, COSMOS.latent, COSMOS.context, ids),
    Transformer("Cosmos", ("cosmos.model", "GeneralDIT"),
                dict(COSMOS.config, num_blocks=2, block_x_format="THWBD", extra_per_block_abs_pos_emb=True,
                     extra_per_block_abs_pos_emb_type="learnable"), (16, 2, 6, 8), COSMOS.context,
                lambda rows: {"fps": 16.0, "padding_mask": torch.zeros(rows, 1, 6, 8)}),
    KANDINSKY,
    like(KANDINSKY, "Kandinsky 5 Image", latent=(16, 6, 8)),
    H3,
    like(H3, "MiniMax H3 references", h3_references),
    COGVIDEO,
    like(COGVIDEO, "CogVideoX 1.5", lambda rows: {"ofs": torch.full((rows,), 2.0)}, (32, 2, 6, 8), in_channels=32,
         patch_size_t=2, ofs_embed_dim=32),
    shallow("Stable Audio", depth=2),
    Transformer("Stable Audio 3", ("audio.dit", "AudioDiffusionTransformer"),
                dict(io_channels=16, embed_dim=128, cond_token_dim=64, global_cond_dim=20, depth=2, num_heads=2,
                     global_cond_type="adaLN", global_cond_shared_embed=True, local_add_cond_dim=17,
                     num_memory_tokens=4, timestep_features_type="expo"), (16, 12), (5, 64),
                extra(global_embed=(20,), local_add_cond=(17, 12))),
    Transformer("ACE-Step", ("ace.model", "ACEStepTransformer2DModel"),
                dict(num_layers=1, inner_dim=48, attention_head_dim=24, num_attention_heads=2, speaker_embedding_dim=16,
                     text_embedding_dim=24, lyric_encoder_vocab_size=30, ssl_latent_dims=[8, 8],
                     ssl_encoder_depths=[1, 1]), (8, 16, 12), (5, 24), lyrics),
    Transformer("ACE-Step 1.5", ("ace.ace_step15", "AceStepConditionGenerationModel"),
                dict(in_channels=48, hidden_size=32, text_hidden_dim=24, timbre_hidden_dim=16,
                     audio_acoustic_hidden_dim=16, num_dit_layers=2, num_lyric_layers=1, num_timbre_layers=1,
                     num_tokenizer_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=48,
                     fsq_dim=32, encoder_hidden_size=32, encoder_intermediate_size=48, encoder_num_heads=2), (16, 12),
                (5, 24), extra(lyric_embed=(4, 24), refer_audio=(16, 12))),
    shallow("Hunyuan3D", depth=1, depth_single_blocks=1),
    Transformer("Hunyuan3D 2.1", ("hunyuan3dv2_1.hunyuandit", "HunYuanDiTPlain"),
                dict(in_channels=16, hidden_size=32, context_dim=24, depth=3, num_heads=2, num_moe_layers=1,
                     num_experts=4, guidance_cond_proj_dim=32), (16, 12), (5, 24)),
    Transformer("TripoSplat", ("triposplat.model", "LatentSeqMMFlowModel"),
                dict(q_token_length=12, in_channels=16, model_channels=32, cond_channels=24, out_channels=16,
                     num_blocks=1, num_refiner_blocks=1, num_head_channels=16, cond2_channels=8), ((12, 16), (1, 5)),
                (5, 24)),
    Transformer("Trellis 2", ("trellis2.model", "Trellis2"), TRELLIS, (32, 16, 16, 16), (5, 24), extra(embeds=(5, 24))),
    Transformer("Trellis 2 shape", ("trellis2.model", "Trellis2"), TRELLIS, (8, 12, 1), (5, 24), voxels),
    OneSide("SeedVR2", ("seedvr.model", "NaDiT"),
            dict(norm_eps=1e-5, num_layers=2, mlp_type="swiglu", vid_dim=48, txt_in_dim=24, heads=2, head_dim=24,
                 mm_layers=1, rope_dim=24, vid_out_norm=True), (16, 2, 4, 6), (5, 24), extra(condition=(17, 2, 4, 6))),
]
SMALL = {kind.name: kind for kind in (*PICTURES, *FILMS)}
"""By name; the names say what is asked of the family where that is more than a picture of a prompt."""


@cache
def built(name: str) -> torch.nn.Module:
    """The small model of that name, made once; `forgotten` lets all of them go."""
    return SMALL[name].build()


@pytest.fixture(scope="module")
def forgotten():
    """For modules that call `built`."""
    yield
    built.cache_clear()


@pytest.fixture
def nothing_left():
    """In the place of the check after every test, for modules whose models ComfyUI never loads: it collects garbage,
    which takes longer than such a test."""
