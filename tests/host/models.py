"""Small real models: ComfyUI's own classes with random weights, in fp32."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields

import comfy.ldm.flux.model
import comfy.model_patcher
import comfy.sd  # noqa: F401  (its import order is the one the others rely on)
import comfy.sd1_clip
import comfy.supported_models
import torch
from torch import Tensor

CPU = torch.device("cpu")
_made: weakref.WeakSet = weakref.WeakSet()


def alive() -> list[torch.nn.Module]:
    """The models made by `patcher` that still exist."""
    return list(_made)


@dataclass(frozen=True)
class Family:
    """How to build one family small, and what its conds look like.

    config     (supported_models class name, model configuration)
    latent     channels of the latent
    context    width of the text embedding
    pooled     width of the pooled text embedding, 0 for none
    frames     frames of a video latent, 0 for pictures
    """

    name: str
    kind: str
    config: dict
    latent: int
    context: int
    pooled: int = 0
    frames: int = 0

    def noise(self, batch: int = 1, size: int = 8, seed: int = 0) -> Tensor:
        shape = (batch, self.latent, *([self.frames] if self.frames else []), size, size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def cond(self, seed: int, tokens: int = 5, **options) -> list:
        """A CONDITIONING with one entry."""
        g = torch.Generator().manual_seed(seed)
        extra = {"pooled_output": torch.randn(1, self.pooled, generator=g)} if self.pooled else {}
        return [[torch.randn(1, tokens, self.context, generator=g), {**extra, **options}]]


UNET = dict(image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1],
            channel_mult=[1, 2], transformer_depth=[0, 1], transformer_depth_output=[0, 0, 1, 1],
            transformer_depth_middle=1, num_heads=4, num_head_channels=-1, context_dim=32, use_spatial_transformer=True,
            use_temporal_attention=False, legacy=False)

FAMILIES = {
    family.name: family
    for family in (
        Family("SD15", "SD15", dict(UNET, use_linear_in_transformer=False, adm_in_channels=None), 4, 32),
        Family("SDXL", "SDXL", dict(UNET, use_linear_in_transformer=True, num_classes="sequential",
                                    adm_in_channels=1536 + 24, model_channels=64), 4, 32, 24),
        Family("SD3", "SD3", dict(in_channels=16, patch_size=2, depth=1, input_size=None, num_patches=192 * 192,
                                  adm_in_channels=24, pos_embed_max_size=192, pos_embed_scaling_factor=None,
                                  context_embedder_config={"target": "torch.nn.Linear",
                                                           "params": {"in_features": 48, "out_features": 64}}),
               16, 48, 24),
        Family("Flux", "Flux", dict(image_model="flux", in_channels=16, out_channels=16, vec_in_dim=24,
                                    context_in_dim=48, hidden_size=64, mlp_ratio=4.0, num_heads=2, depth=1,
                                    depth_single_blocks=2, axes_dim=[8, 12, 12], theta=10000, patch_size=2,
                                    qkv_bias=True, guidance_embed=True), 16, 48, 24),
        Family("Wan", "WAN21_T2V", dict(image_model="wan2.1", model_type="t2v", dim=48, ffn_dim=64, num_heads=2,
                                        num_layers=2, text_dim=32, in_dim=16, out_dim=16), 16, 32, frames=3),
    )
}


def build(family: Family, device: torch.device = CPU, dtype: torch.dtype = torch.float32, operations=None):
    """The family's base model as ComfyUI's own class makes it; weights as they come.

    operations   the classes of layers, as loaders hand them over; None: the host's own
    """
    config = dict(family.config)
    if family.kind == "Flux" and "txt_ids_dims" in {f.name for f in fields(comfy.ldm.flux.model.FluxParams)}:
        config["txt_ids_dims"] = []
    config = getattr(comfy.supported_models, family.kind)(config)
    config.set_inference_dtype(dtype, None)
    config.custom_operations = operations
    return config.get_model({}, "", device=device)


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights that keep activations near unit size, so that every layer matters in the output."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1 and p.numel():
                p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5)
            elif name.endswith(("weight", "scale")):
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=g))
            else:
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
        for name, buffer in model.named_buffers():
            # SD3's, Stable Audio's, SeedVR2's: a checkpoint fills them.
            if name.endswith(("pos_embed", "inv_freq", "_conditioning")):
                buffer.copy_(torch.randn(buffer.shape, generator=g))


def patcher(model: torch.nn.Module, device: torch.device = CPU) -> comfy.model_patcher.ModelPatcher:
    _made.add(model)
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(model.eval(), load_device=device, offload_device=CPU)


def small_clip():
    """A CLIP around a two-layer text encoder of ComfyUI's own class, without a tokenizer."""
    small = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2, vocab_size=99)
    model = comfy.sd1_clip.SD1ClipModel(model_options={"clip_l_model_config": small})
    randomize(model, 4)
    made = comfy.sd.CLIP(no_init=True)
    made.cond_stage_model, made.tokenizer = model, None
    made.patcher = comfy.model_patcher.ModelPatcher(model, load_device=CPU, offload_device=CPU)
    made.layer_idx, made.tokenizer_options = None, {}
    made.use_clip_schedule = made.apply_hooks_to_conds = False
    return made


_cache: dict[tuple, comfy.model_patcher.ModelPatcher] = {}


@torch.inference_mode(False)  # of ordinary tensors, wherever it is first asked for
def base(name: str, dtype: torch.dtype = torch.float32) -> comfy.model_patcher.ModelPatcher:
    """The small model of a family, made once; tests share it, which is what users do to theirs."""
    if (name, dtype) not in _cache:
        try:
            model = build(FAMILIES[name])
        except (TypeError, KeyError, AttributeError) as error:
            import pytest  # here, since a test server uses these models as well

            pytest.skip(f"this ComfyUI does not build {name} small: {error}")
        randomize(model)
        if dtype != torch.float32:
            typed = build(FAMILIES[name], dtype=dtype)
            typed.load_state_dict(model.state_dict())
            model = typed
        _cache[name, dtype] = patcher(model)
    return _cache[name, dtype]


def linear_layers(model: torch.nn.Module, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, torch.Size]:
    """Weight name -> shape, of all diffusion model weights with two or more dimensions."""
    return {key: value.shape for key, value in model.state_dict().items()
            if key.startswith("diffusion_model.") and key.endswith(".weight") and value.ndim >= 2 and wanted(key)}
