"""Films as ComfyUI's own nodes start them: from a picture, guides, a control film, references, sound. A case is a small
model of the family's own class and the nodes between its prompts and its sampler."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature

import comfy.sample
import comfy.supported_models
import pytest
import torch
from comfy.clip_vision import Output
from torch import Tensor

from .blocks import TRANSFORMERS, VIDEO, noise
from .models import FAMILIES, Family, build, patcher, randomize
from .small_video import COSMOS
from .test_parity_families import parts

Begin = Callable[[list, list, int], tuple[list, list, dict]]
"""(positive, negative, films) -> (positive, negative, latent), as nodes hand them on"""
SIZE = dict(width=64, height=64, length=9)


def node(module: str, name: str, **inputs) -> tuple:
    """What a node of comfy_extras gives."""
    found = getattr(importlib.import_module(f"comfy_extras.{module}"), name, None)
    if found is None:
        pytest.skip(f"this ComfyUI has no {name}")
    if missing := inputs.keys() - signature(found.execute).parameters:
        pytest.skip(f"{name} of this ComfyUI has no {', '.join(missing)}")
    out = found.execute(**inputs)
    return out.args if hasattr(out, "args") else out


class VAE:
    """Latents of films [frames, height, width, 3], other ones for each."""

    def __init__(self, channels: int = 16, space: int = 8, time: int = 4):
        self.latent_channels, self.space, self.time = channels, space, time
        self.downscale_index_formula = time, space, space

    def encode(self, film: Tensor) -> Tensor:
        frames, height, width, _ = film.shape
        return noise(1, self.latent_channels, (frames - 1) // self.time + 1, height // self.space, width // self.space,
                     seed=int(1000 * film.double().sum()) % 2**31)

    def spacial_compression_encode(self) -> int:
        return self.space


def pixels(frames: int = 1, seed: int = 31) -> Tensor:
    return torch.rand(frames, 64, 64, 3, generator=torch.Generator().manual_seed(seed))


def seen(width: int = 1280) -> Output:
    """What CLIP vision says of a picture."""
    out = Output()
    out.penultimate_hidden_states = out.last_hidden_state = noise(1, 4, width, seed=32)
    return out


def wan(name: str, positive: list, negative: list, films: int, **inputs) -> tuple[list, list, dict]:
    found = node("nodes_wan", name, positive=positive, negative=negative, vae=VAE(), batch_size=films, **SIZE, **inputs)
    return found[0], found[1], found[-1] if name == "WanPhantomSubjectToVideo" else found[2]


def from_picture(*prompts) -> tuple[list, list, dict]:
    return wan("WanImageToVideo", *prompts, start_image=pixels(), clip_vision_output=seen())


def unseen(*prompts) -> tuple[list, list, dict]:
    """Without CLIP vision, which may be left out."""
    return wan("WanImageToVideo", *prompts, start_image=pixels())


def vace(*prompts) -> tuple[list, list, dict]:
    return wan("WanVaceToVideo", *prompts, strength=0.8, control_video=pixels(9, 4), reference_image=pixels())


def subjects(*prompts) -> tuple[list, list, dict]:
    return wan("WanPhantomSubjectToVideo", *prompts, images=pixels(2))


def sound_goes_on(positive: list, negative: list, films: int) -> tuple[list, list, dict]:
    """The next part of a longer film."""
    heard = {"encoded_audio_all_layers": [noise(1, 40, 16, seed=50 + k) for k in range(25)]}
    return node("nodes_wan", "WanSoundImageToVideoExtend", positive=positive, negative=negative, vae=VAE(), length=9,
                video_latent={"samples": noise(films, 16, 3, 8, 8, seed=3)}, audio_encoder_output=heard,
                ref_image=pixels())[:3]


def guided(positive: list, negative: list, films: int, smaller: int = 1) -> tuple[list, list, dict]:
    """LTX-Video with a film as guide, `smaller` than what it guides, as IC-LoRAs take it, and a picture at the end."""
    latent = {"samples": torch.zeros(films, 128, 3, 4, 4)}
    for frame, length, more in ((0, 17, {"iclora_parameters": {"reference_downscale_factor": smaller}}), (-1, 1, {})):
        positive, negative, latent = node(
            "nodes_lt", "LTXVAddGuide", positive=positive, negative=negative, vae=VAE(128, 32, 8), latent=latent,
            image=pixels(length), frame_idx=frame, strength=1.0, **(more if smaller > 1 else {}))[:3]
    return positive, negative, latent


def guided_small(*prompts) -> tuple[list, list, dict]:
    return guided(*prompts, smaller=2)


def guided_with_sound(*prompts, smaller: int = 1) -> tuple[list, list, dict]:
    positive, negative, latent = guided(*prompts, smaller=smaller)
    sound = {"samples": torch.zeros(prompts[2], 8, 6, 16)}
    return positive, negative, *node("nodes_lt", "LTXVConcatAVLatent", video_latent=latent, audio_latent=sound)


def with_sound(*prompts) -> tuple[list, list, dict]:
    return guided_with_sound(*prompts, smaller=2)


def hunyuan(positive: list, negative: list, films: int) -> tuple[list, list, dict]:
    return node("nodes_hunyuan", "HunyuanVideo15ImageToVideo", positive=positive, negative=negative, vae=VAE(32, 16),
                width=128, height=128, length=9, batch_size=films, start_image=pixels(),
                clip_vision_output=seen(20))[:3]


def cosmos(positive: list, negative: list, films: int) -> tuple[list, list, dict]:
    return positive, negative, *node("nodes_cosmos", "CosmosPredict2ImageToVideoLatent", vae=VAE(), batch_size=films,
                                     start_image=pixels(), **SIZE)


@dataclass(frozen=True)
class Started:
    """begin   what nodes put on prompts and latent
    options   of a prompt as it is encoded
    """

    family: Family
    begin: Begin
    options: tuple = ()

    def model(self):
        if not hasattr(comfy.supported_models, self.family.kind):
            pytest.skip(f"this ComfyUI has no {self.family.kind}")
        with torch.inference_mode(False):
            made = build(self.family)
            randomize(made)
            return patcher(made)

    def prompt(self, seed: int, **marks) -> list:
        return self.family.cond(seed, **dict(self.options), **marks)

    def drawn(self, model, films: int = 1, cfg: float = 1.0, seed: int = 11, **marks) -> Tensor:
        """One step of Euler. seed, marks   of the prompt"""
        prompts = self.prompt(seed, **marks), self.prompt(12)
        positive, negative, latent = self.begin(*prompts, films)
        empty = latent["samples"]
        if empty.is_nested:
            start = type(empty)([noise(*part.shape, seed=1 + k) for k, part in enumerate(empty.unbind())])
        else:
            start = noise(*empty.shape, seed=1)
        with torch.inference_mode():
            return parts(comfy.sample.sample(model, start, 1, cfg, "euler", "simple", positive, negative, empty, seed=1,
                                             noise_mask=latent.get("noise_mask"), disable_pbar=True))


def tiny(kind: str, like: dict, latent: int, context: int, pooled: int = 0, **config) -> Family:
    return Family(kind, kind, {**like, **config}, latent, context, pooled, 3)


WAN, LTX, LTX_2 = FAMILIES["Wan"].config, TRANSFORMERS["LTX-Video"].config, TRANSFORMERS["LTX-2"].config
MASK = (("attention_mask", torch.ones(1, 5, dtype=torch.long)),)
STARTED = {
    "Wan, picture": Started(tiny("WAN21_I2V", WAN, 16, 32, model_type="i2v", in_dim=36), from_picture),
    "Wan, picture without CLIP vision": Started(tiny("WAN21_I2V", WAN, 16, 32, model_type="i2v", in_dim=36), unseen),
    "Wan VACE, control and reference": Started(tiny("WAN21_Vace", WAN, 16, 32, model_type="vace", vace_layers=2,
                                                   vace_in_dim=96), vace),
    "Wan, subjects": Started(tiny("WAN21_T2V", WAN, 16, 32), subjects),
    "Wan, sound, next part": Started(tiny("WAN22_S2V", WAN, 16, 32, model_type="s2v", audio_dim=16,
                                         audio_inject_layers=[0]), sound_goes_on),
    "LTX-Video, guides": Started(tiny("LTXV", LTX, 128, 24, image_model="ltxv", in_channels=128, num_layers=1), guided,
                                 MASK),
    "LTX-2, small guides": Started(tiny("LTXAV", LTX_2, 128, 48, image_model="ltxav", in_channels=128, num_layers=1),
                                   with_sound),
    "HunyuanVideo 1.5, picture": Started(tiny(
        "HunyuanVideo15", {k: v for k, v in VIDEO.items() if k != "txt_ids_dims"}, 32, 24, 20,
        image_model="hunyuan_video", in_channels=65, out_channels=32, vec_in_dim=None, guidance_embed=False, byt5=True,
        use_cond_type_embedding=True, vision_in_dim=20, patch_size=[1, 1, 1], depth=1, depth_single_blocks=1), hunyuan),
    "Cosmos Predict 2, picture": Started(tiny("CosmosI2VPredict2", COSMOS.config, 16, 24, image_model="cosmos_predict2",
                                             in_channels=17), cosmos),
}
STARTED["LTX-Video, small guides"] = replace(STARTED["LTX-Video, guides"], begin=guided_small)
