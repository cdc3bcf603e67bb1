"""A model of SD1.5's architecture with random weights inside ComfyUI, and LoRA files for it.

Speed does not depend on what the weights are. Nothing is downloaded; `scale` makes the same architecture narrower.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from .measure import Seconds, now, since, synchronize

UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "num_heads": 8, "num_head_channels": -1,
        "use_spatial_transformer": True, "use_linear_in_transformer": False, "adm_in_channels": None,
        "use_temporal_attention": False, "legacy": False, "context_dim": 768}
LINEARS = (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net.0.proj", ".ff.net.2")


def start_comfyui(path: Path, device: str) -> str:
    """Make ComfyUI importable and set its device before it looks for one; its version."""
    sys.path.insert(0, str(path))
    import comfy.cli_args

    comfy.cli_args.args.cpu = device == "cpu"
    import comfyui_version

    return comfyui_version.__version__


def build(scale: float, dtype: torch.dtype, device: torch.device):
    """ComfyUI's own SD1.5 class as a MODEL: 320 channels times `scale`, rounded to GroupNorm's 32."""
    import comfy.model_patcher
    import comfy.supported_models

    channels = max(32, round(320 * scale / 32) * 32)
    config = comfy.supported_models.SD15({**UNET, "model_channels": channels})
    config.unet_config["dtype"] = dtype
    model = config.get_model({}, "", device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data = (torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5).to(dtype)
        else:
            parameter.data = torch.full_like(parameter, float(name.endswith("weight")))
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def targets(model, scope: str) -> Iterator[tuple[str, Tensor]]:
    """(layer name, weight) of what the LoRAs act on: linears of attention and feed-forward, or also convolutions."""
    for key, weight in model.model.state_dict().items():
        name = key.removeprefix("diffusion_model.").removesuffix(".weight")
        if key.startswith("diffusion_model.") and key.endswith(".weight") and (
                name.endswith(LINEARS) or (scope == "conv" and weight.ndim == 4)):
            yield name, weight


def write_lora(path: Path, model, seed: int, rank: int, scope: str) -> None:
    """A LoRA file in the ordinary format whose deltas are a tenth of the weights."""
    import safetensors.torch

    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, weight in targets(model, scope):
        out, shape, inputs = weight.shape[0], weight.shape[1:], weight[0].numel()
        key = f"lora_unet_{name.replace('.', '_')}"
        down = torch.randn(rank, *shape, generator=generator) / inputs**0.5
        up = 0.1 * torch.randn(out, rank, *[1] * len(shape[1:]), generator=generator) / rank**0.5
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down.half(), up.half()
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    safetensors.torch.save_file(tensors, path)


def hooked(conds: list, files: list[Path], strength: float) -> list:
    """The stock composite: one copy of each cond per LoRA, with a hook that patches the model's weights for it."""
    import comfy.hooks
    import comfy.utils

    hooks = [comfy.hooks.create_hook_lora(comfy.utils.load_torch_file(str(file)), strength, 0.0) for file in files]
    return [[[embedding, {**extra, "hooks": hook}] for hook in hooks for embedding, extra in cond] for cond in conds]


def forward_of(model, conds: list, noise: Tensor, count: int) -> Callable[[], None]:
    """One forward of the model on a batch of `count` times a positive and a negative row, at one noise level."""
    device = model.load_device
    context = torch.cat([cond[0][0].to(device) for cond in conds] * count)
    x, sigma = noise.to(device).expand(2 * count, -1, -1, -1).contiguous(), torch.full((2 * count,), 5.0, device=device)

    def forward() -> None:
        with torch.inference_mode():
            model.model.apply_model(x, sigma, c_crossattn=context)

    return forward


def sampled(model, positive: list, negative: list, noise: Tensor, steps: int) -> tuple[Tensor, list[Seconds]]:
    """One run of ComfyUI's sampler: the latent, and what each step took."""
    import comfy.sample

    times, start = [], now()

    def told(*_) -> None:
        nonlocal start
        synchronize(model.load_device)
        times.append(since(start))
        start = now()

    with torch.inference_mode():
        latent = comfy.sample.sample(model, noise, steps, 7.0, "euler", "normal", positive, negative,
                                     torch.zeros_like(noise), callback=told, disable_pbar=True, seed=1)
    return latent, times
