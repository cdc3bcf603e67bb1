"""ComfyUI's own vision models, tiny, with random weights: CLIP and DINOv2."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch

CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "hidden_act": "quick_gelu", "num_channels": 3, "patch_size": 8, "image_size": 32,
        "projection_dim": 16}
DINOV2 = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
          "layer_norm_eps": 1e-6, "use_swiglu_ffn": False, "image_size": 518, "num_channels": 3, "patch_size": 14}
SIGLIP = {**{key: value for key, value in CLIP.items() if key != "projection_dim"}, "model_type": "siglip_vision_model"}


def load_vision(config: dict = CLIP, seed: int = 0):
    """A CLIP_VISION as Load CLIP Vision gives it."""
    import comfy.clip_vision

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        vision = comfy.clip_vision.ClipVisionModel(str(path))
    g = torch.Generator().manual_seed(seed)
    for name, parameter in vision.model.named_parameters():
        bias = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = (bias + 0.3 * torch.randn(parameter.shape, generator=g)).to(parameter.dtype)
    return vision
