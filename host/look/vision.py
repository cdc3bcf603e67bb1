"""How alike two pictures look to a vision model."""

from __future__ import annotations

import torch
from torch import Tensor

CLASS_TOKENS = ("class_embedding", "cls_token")


def similarity(clip_vision, first: Tensor, second: Tensor) -> float:
    """Cosine of the class tokens of the last layer, in [-1, 1]; of batches, the mean over all pairs.

    Shape: pictures [B, height, width, 3] in [0, 1]. A model without a class token (SigLIP) gives the mean of its tokens
    instead. Raises ValueError for a picture of which the model makes no numbers.
    """
    found = {"subject_image": _embedding(clip_vision, first), "style_image": _embedding(clip_vision, second)}
    for name, embedding in found.items():
        if not torch.isfinite(embedding).all():
            raise ValueError(f"Style Discrepancy: the vision model makes no number (NaN or infinite) of {name}. If "
                             "that picture is black, its VAE failed: start ComfyUI with --fp32-vae or use another VAE. "
                             "Else use another vision model.")
    one, two = (torch.nn.functional.normalize(embedding, dim=1) for embedding in found.values())
    return (one @ two.T).mean().clamp(-1, 1).item()


def _embedding(clip_vision, images: Tensor) -> Tensor:
    """[B, width] in fp32, as the model leaves it: not normalised, not projected."""
    tokens = clip_vision.encode_image(images)["last_hidden_state"].float()
    has_class = any(name.endswith(CLASS_TOKENS) for name, _ in clip_vision.model.named_parameters())
    return tokens[:, 0] if has_class else tokens.mean(dim=1)
