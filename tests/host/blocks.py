"""Transformers of ComfyUI with as many blocks as their checkpoints have (SD3 and Mochi fewer), narrow enough for a
CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import comfy.ops
import pytest
import torch
from torch import Tensor, nn

from .models import randomize


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Transformer:
    """How to build one and call it.

    where    module below comfy.ldm and class
    config   arguments of the class
    latent   shape of its input, without the batch; several where it takes several
    context  shape of its text, without the batch
    more     further arguments of a call, for a batch of so many rows
    control  residuals of a ControlNet, for a batch of so many rows and a seed, if it takes any
    times    shape of a row's time: () for one, (n,) for one for each frame or token
    fields   dataclass of the class's parameters, from which a release takes what it knows; others fall away
    """

    name: str
    where: tuple[str, str]
    config: dict
    latent: tuple
    context: tuple[int, ...]
    more: Callable[[int], dict] = field(default=lambda rows: {})
    fields: str | None = None
    control: Callable[[int, int], dict] | None = None
    times: tuple[int, ...] = ()

    def build(self, device: str = "cpu") -> nn.Module:
        try:
            module = importlib.import_module(f"comfy.ldm.{self.where[0]}")
            config = dict(self.config)
            if self.fields:
                known = {f.name for f in fields(getattr(module, self.fields))}
                config = {key: value for key, value in config.items() if key in known}
            model = getattr(module, self.where[1])(**config, dtype=torch.float32, device=torch.device(device),
                                                   operations=comfy.ops.disable_weight_init).eval().requires_grad_(False)
        except (ImportError, AttributeError, TypeError) as error:
            pytest.skip(f"this ComfyUI does not build {self.name} small: {error}")
        if device == "cpu":
            randomize(model)
        return model

    def call(self, model: nn.Module, options: dict, seed: int = 0, rows: int = 1, control: dict | None = None,
             device: str = "cpu") -> Tensor:
        """A prediction at time 0.6, for noise and text that differ from row to row."""
        shapes = self.latent if isinstance(self.latent[0], tuple) else (self.latent,)
        x = [noise(rows, *shape, seed=seed).to(device) for shape in shapes]
        more = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in self.more(rows).items()}
        if control is not None:
            more["control"] = control
        with torch.inference_mode():
            out = model(x if len(x) > 1 else x[0], torch.full((rows, *self.times), 0.6, device=device),
                        context=noise(rows, *self.context, seed=5).to(device), transformer_options=options, **more)
        return out if isinstance(out, Tensor) else torch.cat([part.flatten(1) for part in out], dim=1)


def residuals(rows: int, seed: int, tokens: int, width: int, **counts: int) -> dict:
    """ControlNet residuals [rows, tokens, width] for so many blocks of each kind."""
    return {name: [0.3 * noise(rows, tokens, width, seed=seed + i) for i in range(count)]
            for name, count in counts.items()}


FLUX = dict(in_channels=16, out_channels=16, context_in_dim=24, hidden_size=48, mlp_ratio=4.0, num_heads=2,
            depth=19, depth_single_blocks=38, axes_dim=[8, 8, 8], theta=10000, patch_size=2, qkv_bias=True,
            vec_in_dim=20, txt_ids_dims=[])
VIDEO = dict(FLUX, patch_size=[1, 2, 2], depth=20, depth_single_blocks=40, theta=256, guidance_embed=True,
             byt5=False, meanflow=False, use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False)

TRANSFORMERS = {t.name: t for t in (
    Transformer("Flux", ("flux.model", "Flux"), dict(FLUX, guidance_embed=True), (16, 8, 8), (5, 24),
                lambda rows: {"y": noise(rows, 20), "guidance": torch.full((rows,), 3.5)}, "FluxParams",
                lambda rows, seed: residuals(rows, seed, 16, 48, input=19, output=38)),
    Transformer("Chroma", ("chroma.model", "Chroma"),
                dict(FLUX, in_channels=64, out_channels=64, in_dim=64, out_dim=48, hidden_dim=32, n_layers=2),
                (16, 8, 8), (5, 24), lambda rows: {"guidance": torch.zeros(rows)}, "ChromaParams"),
    Transformer("HunyuanVideo", ("hunyuan_video.model", "HunyuanVideo"), VIDEO, (16, 2, 8, 8), (5, 24),
                lambda rows: {"y": noise(rows, 20), "guidance": torch.full((rows,), 6.0)}, "HunyuanVideoParams"),
    Transformer("Qwen-Image", ("qwen_image.model", "QwenImageTransformer2DModel"),
                dict(num_layers=60, attention_head_dim=24, num_attention_heads=2, joint_attention_dim=24,
                     axes_dims_rope=(8, 8, 8)), (16, 1, 8, 8), (5, 24),
                control=lambda rows, seed: residuals(rows, seed, 16, 48, input=60)),
    Transformer("Wan", ("wan.model", "WanModel"),
                dict(model_type="t2v", dim=48, ffn_dim=96, freq_dim=32, text_dim=24, num_heads=2, num_layers=40),
                (16, 2, 8, 8), (5, 24)),
    Transformer("Wan VACE", ("wan.model", "VaceWanModel"),
                dict(model_type="vace", dim=48, ffn_dim=96, freq_dim=32, text_dim=24, num_heads=2, num_layers=30,
                     vace_layers=15, vace_in_dim=96), (16, 2, 8, 8), (5, 24),
                lambda rows: {"vace_context": noise(rows, 1, 96, 2, 8, 8), "vace_strength": [0.7]}),
    Transformer("LTX-Video", ("lightricks.model", "LTXVModel"),
                dict(in_channels=16, cross_attention_dim=48, attention_head_dim=24, num_attention_heads=2,
                     caption_channels=24, num_layers=28), (16, 2, 4, 4), (5, 24),
                lambda rows: {"attention_mask": None}),
    Transformer("LTX-2", ("lightricks.av_model", "LTXAVModel"),
                dict(in_channels=16, cross_attention_dim=48, attention_head_dim=24, num_attention_heads=2,
                     caption_channels=24, num_layers=48, audio_in_channels=128, audio_cross_attention_dim=24,
                     audio_attention_head_dim=12, audio_num_attention_heads=2, audio_out_channels=128,
                     connector_attention_head_dim=12, connector_num_attention_heads=2, connector_num_layers=1),
                ((16, 2, 4, 4), (8, 6, 16)), (5, 48), lambda rows: {"attention_mask": None}),
    Transformer("SD3", ("modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper"),
                dict(in_channels=16, patch_size=2, depth=6, input_size=None, num_patches=16 * 16, adm_in_channels=20,
                     pos_embed_max_size=16, pos_embed_scaling_factor=None,
                     context_embedder_config={"target": "torch.nn.Linear",
                                              "params": {"in_features": 24, "out_features": 6 * 64}}), (16, 8, 8),
                (5, 24), lambda rows: {"y": noise(rows, 20)},
                control=lambda rows, seed: residuals(rows, seed, 16, 6 * 64, output=6)),
    Transformer("AuraFlow", ("aura.mmdit", "MMDiT"),
                dict(dim=48, n_layers=36, n_double_layers=4, n_heads=2, cond_seq_dim=24, max_seq=64),
                (4, 8, 8), (5, 24)),
    Transformer("Mochi", ("genmo.joint_model.asymm_models_joint", "AsymmDiTJoint"),
                dict(hidden_size_x=48, hidden_size_y=24, mlp_ratio_x=256.0, depth=6, num_heads=2, t5_feat_dim=24,
                     t5_token_length=5, in_channels=12, patch_size=2, qkv_bias=False, qk_norm=True, use_t5=True),
                (12, 2, 8, 8), (5, 24),
                lambda rows: {"attention_mask": torch.ones(rows, 5, dtype=torch.bool), "num_tokens": 5}),
    Transformer("HunyuanDiT", ("hydit.models", "HunYuanDiT"),
                dict(hidden_size=64, depth=40, num_heads=4, text_states_dim=24, text_states_dim_t5=24, text_len=5,
                     text_len_t5=5), (4, 8, 8), (5, 24),
                lambda rows: {"encoder_hidden_states_t5": noise(rows, 5, 24),
                              "text_embedding_mask": torch.ones(rows, 5), "text_embedding_mask_t5": torch.ones(rows, 5),
                              "image_meta_size": noise(rows, 6), "style": torch.zeros(rows, dtype=torch.long)}),
    Transformer("Lens", ("lens.model", "LensTransformer2DModel"),
                dict(in_channels=16, out_channels=16, num_layers=48, attention_head_dim=24, num_attention_heads=2,
                     enc_hidden_dim=24, axes_dims_rope=(8, 8, 8), patch_size=1, selected_layer_index=(0, 1)),
                (16, 4, 4), (5, 48)),
    Transformer("JoyImage", ("joyimage.model", "JoyImageTransformer3DModel"),
                dict(hidden_size=48, num_attention_heads=2, text_dim=24, num_layers=20, rope_dim_list=[8, 8, 8]),
                (16, 1, 8, 8), (5, 24)),
    Transformer("Stable Audio", ("audio.dit", "AudioDiffusionTransformer"),
                dict(io_channels=16, embed_dim=128, cond_token_dim=64, global_cond_dim=20, depth=24, num_heads=2),
                (16, 12), (5, 64), lambda rows: {"global_embed": noise(rows, 20)}),
    Transformer("Hunyuan3D", ("hunyuan3d.model", "Hunyuan3Dv2"),
                dict(in_channels=16, context_in_dim=24, hidden_size=48, num_heads=2, depth=16, depth_single_blocks=32),
                (16, 12), (5, 24)),
)}
"""The families whose blocks ComfyUI lets nodes replace, as 0.28.0 has them."""
