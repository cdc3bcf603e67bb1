"""A MODEL of any small diffusion model of `small_video`, as ComfyUI samples it."""

from __future__ import annotations

import comfy.conds
import comfy.model_base
import comfy.supported_models_base
import torch
from torch import Tensor

from .blocks import Transformer, noise
from .models import patcher


class Config(comfy.supported_models_base.BASE):
    sampling_settings = {"multiplier": 1.0, "shift": 1.0}

    def __init__(self):
        super().__init__({"disable_unet_model_creation": True})


class AnyModel(comfy.model_base.BaseModel):
    """The host's base model around a diffusion model, with what the kind's calls take beside latent and prompt.

    channels  of the latent; what the diffusion model takes beyond them is put behind it, as for start pictures
    """

    def __init__(self, kind: Transformer, channels: int | None):
        super().__init__(Config(), comfy.model_base.ModelType.FLOW)
        self.kind, self.channels, self.diffusion_model = kind, channels, kind.build()

    def extra_conds(self, **kwargs):
        out = super().extra_conds(**kwargs)
        more = self.kind.more(kwargs["noise"].shape[0])
        out.update({name: cond_of(value) for name, value in more.items()})
        if self.channels is not None and self.channels < self.kind.latent[0]:
            rest = noise(1, self.kind.latent[0] - self.channels, *self.kind.latent[1:], seed=17)
            out["c_concat"] = comfy.conds.CONDNoiseShape(rest)
        if self.channels is None:
            out["latent_shapes"] = comfy.conds.CONDConstant(kwargs["latent_shapes"])
        return out

    def process_timestep(self, timestep, **kwargs):
        times = self.kind.times
        return timestep.reshape(-1, *[1] * len(times)).expand(-1, *times) if times else timestep


def cond_of(value):
    """Of short integers, which are places (`voxels`), all rows of a batch have the same."""
    if isinstance(value, Tensor) and value.dtype != torch.int32:
        return comfy.conds.CONDRegular(value)
    if isinstance(value, list) and all(isinstance(part, Tensor) for part in value):
        return comfy.conds.CONDList(value)
    return comfy.conds.CONDConstant(value)


@torch.inference_mode(False)
def any_model(kind: Transformer):
    """The MODEL of a kind; its latent has as many channels as the diffusion model predicts."""
    several = isinstance(kind.latent[0], tuple)
    made = AnyModel(kind, None)
    made.channels = None if several else kind.call(made.diffusion_model, {}).shape[1]
    return patcher(made.eval())


def latent_of(model, batch: int, seed: int = 1):
    """Noise for it, packed where it has several latents."""
    kind, channels = model.model.kind, model.model.channels
    if channels is not None:
        return noise(batch, channels, *kind.latent[1:], seed=seed)
    from comfy.nested_tensor import NestedTensor

    return NestedTensor([noise(batch, *shape, seed=seed + k) for k, shape in enumerate(kind.latent)])


def prompt_of(model, seed: int) -> list:
    """A CONDITIONING for it."""
    return [[noise(1, *model.model.kind.context, seed=seed), {}]]
