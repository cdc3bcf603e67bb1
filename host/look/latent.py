"""What a LATENT is to a sampler, for nodes that sample by themselves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import comfy.sample
from torch import Tensor

RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")


def latent_of(model, latent: Mapping[str, object]) -> Tensor:
    """The samples of a LATENT as a KSampler takes them for a model: an empty one gets the model's channels, its size,
    where the node that made it says for which factor it is, and its parts."""
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    return comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], **{name: latent.get(name) for name in RATIOS if name in known})
