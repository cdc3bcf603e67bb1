"""What the loaders of the example workflows give, small: a model of the family with random weights, the host's own text
encoder with its tokenizer, and something that makes pictures and sound of latents."""

from __future__ import annotations

from inspect import signature

import comfy.supported_models
import comfy.text_encoders
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor
from torch.nn import functional as F

from . import text_encoders
from .models import UNET, Family, build, patcher, randomize

WIDTH = 16  # of every text encoder that `text_encoders` makes
FLUX = dict(image_model="flux", in_channels=16, out_channels=16, vec_in_dim=WIDTH, context_in_dim=WIDTH, hidden_size=64,
            mlp_ratio=4.0, num_heads=2, depth=1, depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000, patch_size=2,
            qkv_bias=True, guidance_embed=True)
CHECKPOINTS = {
    "SDXL": (Family("SDXL", "SDXL", dict(UNET, use_linear_in_transformer=True, num_classes="sequential",
                                         adm_in_channels=1536 + WIDTH, context_dim=2 * WIDTH), 4, 2 * WIDTH, WIDTH),
             "SDXL"),
    "Flux": (Family("Flux", "Flux", FLUX, 16, WIDTH, WIDTH), "Flux"),
    "Qwen-Image": (Family("Qwen-Image", "QwenImage", dict(
        image_model="qwen_image", num_layers=2, attention_head_dim=24, num_attention_heads=2, in_channels=64,
        joint_attention_dim=WIDTH, axes_dims_rope=(8, 8, 8)), 16, WIDTH), "Qwen-Image"),
    "Z-Image": (Family("Z-Image", "ZImage", dict(
        image_model="lumina2", patch_size=2, in_channels=16, dim=256, n_layers=2, n_refiner_layers=1, n_heads=8,
        n_kv_heads=8, multiple_of=16, cap_feat_dim=WIDTH, axes_dims=[16, 8, 8], axes_lens=[300, 64, 64], qk_norm=True,
        z_image_modulation=True, pad_tokens_multiple=8, time_scale=1000.0), 16, WIDTH), "Z-Image"),
    "Krea 2": (Family("Krea 2", "Krea2", dict(
        image_model="krea2", features=64, tdim=32, txtdim=WIDTH, heads=4, kvheads=2, multiplier=2, layers=2,
        txtlayers=12, txtheads=2, txtkvheads=2), 16, 12 * WIDTH), "Krea 2"),
    "Flux.2": (Family("Flux.2", "Flux2", dict(
        FLUX, image_model="flux2", in_channels=128, out_channels=128, vec_in_dim=None, context_in_dim=3 * WIDTH,
        patch_size=1, qkv_bias=False, guidance_embed=False, axes_dim=[8, 8, 8, 8], txt_ids_dims=[3],
        global_modulation=True, mlp_silu_act=True, ops_bias=False), 128, 3 * WIDTH), "Flux2 Klein"),
    "Wan": (Family("Wan", "WAN21_T2V", dict(image_model="wan2.1", model_type="t2v", dim=48, ffn_dim=64, num_heads=2,
                                            num_layers=2, text_dim=WIDTH, in_dim=16, out_dim=16), 16, WIDTH, frames=3),
            "Wan"),
    "LTX-2": (Family("LTX-2", "LTXAV", dict(
        image_model="ltxav", in_channels=128, num_layers=2, attention_head_dim=24, num_attention_heads=2,
        cross_attention_dim=48, audio_attention_head_dim=12, audio_num_attention_heads=2, audio_cross_attention_dim=24,
        connector_attention_head_dim=24, audio_connector_attention_head_dim=12, connector_num_attention_heads=2,
        connector_num_layers=1, caption_proj_before_connector=True, caption_projection_first_linear=False,
        cross_attention_adaln=True, apply_gated_attention=True), 128, 72), "LTX-2"),
    "MiniMax H3": (Family("MiniMax H3", "MiniMaxH3", dict(
        image_model="minimax_h3", hidden_size=64, num_layers=2, token_refiner_num_layers=1, num_attention_heads=2,
        attention_head_dim=32, ffn_hidden_size=64, text_dim=WIDTH, timestep_input_dim=32, time_embed_hidden_size=32,
        time_embed_dim=24, rope_inv_freq_len=4), 24, WIDTH), "MiniMax H3"),
}
"""Name -> (the model, its text encoder in `text_encoders.ENCODERS`)."""


def lack_of(name: str) -> str:
    """Why the running release has no such family; nothing where it has."""
    family, encoder = CHECKPOINTS[name]
    if not hasattr(comfy.supported_models, family.kind):
        return f"this release has no {family.kind}"
    if encoder == "LTX-2" and "video_projection_dim" not in signature(comfy.text_encoders.lt.ltxav_te).parameters:
        return "LTX-2 of this release has fixed widths"
    return ""


@torch.inference_mode(False)  # of ordinary tensors, wherever it is first asked for
def model(name: str, seed: int = 0) -> ModelPatcher:
    """A MODEL."""
    made = build(CHECKPOINTS[name][0])
    randomize(made, seed)
    return patcher(made)


@torch.inference_mode(False)
def text_encoder(name: str):
    """A CLIP."""
    return text_encoders.clip(CHECKPOINTS[name][1])


class SoundVAE:
    """Stereo waves [n, 40 t, 2] of latents [n, 8, t, 16], of which there are 25 in a second, or [n, 32, 2, t]."""

    latent_channels, latent_frequency_bins = 8, 16
    audio_sample_rate = output_sample_rate = 8000

    @property
    def first_stage_model(self) -> SoundVAE:
        return self

    def num_of_latents_from_frames(self, frames: int, rate: float) -> int:
        return max(1, round(25 * frames / rate))

    def decode(self, samples: Tensor) -> Tensor:
        in_time = samples.movedim(1, -1).flatten(2) if samples.shape[1] == self.latent_channels else (
            samples.flatten(1, 2).movedim(1, -1))
        return in_time[..., :2].float().tanh().repeat_interleave(40, 1)


class VAE:
    """Pictures [n, 8 h, 8 w, 3] in [0, 1] of latents [n, channels, (frames,) h, w], by the first three channels."""

    def decode(self, samples: Tensor) -> Tensor:
        planes = samples[:, :3] if samples.ndim == 4 else samples[:, :3].movedim(2, 1).flatten(0, 1)
        pictures = F.interpolate(planes.float().sigmoid(), scale_factor=8).movedim(1, -1)
        return pictures if samples.ndim == 4 else pictures.unflatten(0, (len(samples), -1))

    def spacial_compression_encode(self) -> int:
        return 8

    spacial_compression_decode = spacial_compression_encode
