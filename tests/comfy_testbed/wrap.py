"""The testbed's plain torch modules behind the interfaces that ComfyUI's own nodes expect."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
from functools import partial
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import torch
from torch import Tensor, nn

from .readable import readable

ROOT = Path(os.environ.get("LORA_ENSEMBLE_ROOT") or Path(__file__).resolve().parents[2])


def load_pack() -> None:
    """Make the pack importable by the name under which tests import it."""
    if "lora_ensemble" not in sys.modules:
        spec = importlib.util.spec_from_file_location("lora_ensemble_run", ROOT / "run.py")
        sys.modules[spec.name] = run = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(run)
        run.load_pack()


def testbed(name: str) -> ModuleType:
    """A module of the pack's testbed."""
    load_pack()
    return importlib.import_module(f"lora_ensemble.testbed.{name}")


class Latent(comfy.latent_formats.LatentFormat):
    """Pixel-unshuffled pictures: no scaling, half the size in pixels."""

    latent_channels = 12
    spacial_downscale_ratio = 2


class Config(comfy.supported_models_base.BASE):
    """What a BaseModel asks of its configuration. Timesteps are sigmas: hence the multiplier."""

    unet_extra_config = {}
    sampling_settings = {"shift": 1.0, "multiplier": 1.0}
    latent_format = Latent
    memory_usage_factor = 0.1


class TextModel(nn.Module):
    """The testbed's text encoder with the methods that comfy.sd.CLIP calls."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text
        self.dtypes = {torch.float32}
        self.device: torch.device | None = None

    def set_clip_options(self, options: dict[str, Any]) -> None:
        self.device = options.get("execution_device", self.device)

    def reset_clip_options(self) -> None:
        self.device = None

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[Tensor, Tensor]:
        """Weights in prompts are not a thing here: tokens count as they are."""
        device = self.device or next(self.text.parameters()).device
        ids = torch.tensor([[token for token, _ in row] for row in tokens["testbed"]], device=device)
        context = self.text(ids).float().to(comfy.model_management.intermediate_device())
        return context, context.mean(dim=1)


class Words:
    """A body's tokenizer with the interface of those of the library that ComfyUI uses: one token per word."""

    is_fast = True

    def __init__(self, body: nn.Module) -> None:
        self.tokenize = body.tokenize

    def __call__(self, text: str, **_: Any) -> dict[str, list]:
        (ids,) = self.tokenize([text]).tolist()
        words = [found.span() for found in re.finditer(r"[^\s,]+", text)][:len(ids)]
        return {"input_ids": ids, "offset_mapping": words + [(0, 0)] * (len(ids) - len(words))}


class Tokenizer:
    """Words to ids of fixed length, by a body's tokenizer; made by comfy.sd.CLIP."""

    def __init__(self, body: nn.Module, **_: Any) -> None:
        self.tokenizer = Words(body)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: Any) -> dict[str, list]:
        return {"testbed": [[(token, 1.0) for token in self.tokenizer(text)["input_ids"]]]}

    def state_dict(self) -> dict[str, Tensor]:
        return {}


class VAE:
    """Pixels [n, h, w, 3] in [0, 1] to latents [n, 12, h/2, w/2] and back, exactly."""

    def encode(self, pixels: Tensor) -> Tensor:
        return testbed("model").encode(pixels[..., :3].movedim(-1, 1).float())

    def decode(self, samples: Tensor) -> Tensor:
        return testbed("model").decode(samples.float()).movedim(1, -1)

    def spacial_compression_encode(self) -> int:
        return 2

    spacial_compression_decode = spacial_compression_encode


class PooledModel(comfy.model_base.BaseModel):
    """A model that is also told the mean of the text, as Flux is."""

    def encode_adm(self, **kwargs: Any) -> Tensor | None:
        return kwargs.get("pooled_output")


def wrap_model(net: nn.Module, kind: type = comfy.model_base.BaseModel) -> comfy.model_patcher.ModelPatcher:
    """A MODEL around a network of the testbed's latents."""
    net.dtype = torch.float32
    config = Config({"disable_unet_model_creation": True})
    model = kind(config, model_type=comfy.model_base.ModelType.FLOW)
    model.diffusion_model = net.eval()
    # with dynamic VRAM the host leaves LoRAs out of layers that are not its own, without a word
    own = any(hasattr(module, "comfy_cast_weights") for module in net.modules())
    kind = getattr(comfy.model_patcher, "CoreModelPatcher" if own else "ModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def wrap_clip(body: nn.Module) -> comfy.sd.CLIP:
    """A CLIP around the text encoder of one of the testbed's bodies."""
    text = body.text.eval()
    target = comfy.supported_models_base.ClipTarget(partial(Tokenizer, body), lambda **_: TextModel(text))
    plain = {"disable_dynamic": True} if "disable_dynamic" in signature(comfy.sd.CLIP).parameters else {}
    return comfy.sd.CLIP(target, parameters=sum(p.numel() for p in text.parameters()), **plain)  # as in wrap_model


def load_testbed(body: str = "unet") -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, VAE]:
    """The trained testbed as MODEL, CLIP, VAE; fresh objects with every call. The joint body's model is ComfyUI's own
    class."""
    base = testbed("beds").BEDS[body].load_base()
    model = wrap_model(readable(base.net)) if body == "unet" else wrap_model(host_flux(base.net), PooledModel)
    return model, wrap_clip(base), VAE()


def host_flux(flux: nn.Module) -> nn.Module:
    """ComfyUI's own Flux with the weights of the joint body. Older releases have fewer settings, and another name for
    the scales of query and key norms."""
    import comfy.ldm.flux.model as host
    import comfy.ops

    known = host.FluxParams.__dataclass_fields__
    config = {key: value for key, value in testbed("joint.model").CONFIG.items() if key in known}
    net = host.Flux(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config)
    names = {name.replace("_norm.scale", "_norm.weight"): name for name in net.state_dict()}
    net.load_state_dict({names[name]: tensor for name, tensor in flux.state_dict().items()})
    return net


def load_unet() -> comfy.model_patcher.ModelPatcher:
    """ComfyUI's own U-Net with two levels and random weights, in the place of the testbed's."""
    import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
    import comfy.ops

    unet = openaimodel.UNetModel(
        image_size=32, in_channels=12, out_channels=12, model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 2],
        transformer_depth=[0, 1], transformer_depth_output=[0, 0, 1, 1], transformer_depth_middle=1, num_heads=4,
        context_dim=96, use_spatial_transformer=True, legacy=False, dtype=torch.float32,
        operations=comfy.ops.disable_weight_init)
    g = torch.Generator().manual_seed(0)
    for name, p in unet.named_parameters():
        spread = torch.randn(p.shape, generator=g)
        p.data = spread / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1 * spread + name.endswith("weight")
    return wrap_model(unet)
