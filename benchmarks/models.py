"""Models of true architectures with random weights inside ComfyUI, LoRA files for them, and ways to run them.

Speed does not depend on what the weights are. Nothing is downloaded; `scale` makes the same architecture narrower, with
as many layers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ..methods.composite import Composite
from .measure import Seconds, now, since, synchronize

STRENGTH = 0.8
UNET = {"image_size": 32, "in_channels": 4, "out_channels": 4, "use_spatial_transformer": True,
        "use_temporal_attention": False, "legacy": False}


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    kind        the class among ComfyUI's supported models
    config      its configuration at full size
    narrowed    (scale) -> what of the configuration a narrower model has otherwise
    attention   ends of the names of the linears of attention
    linear      ends of the names of all linears that LoRAs commonly act on
    context     key of the width of the text embedding in the configuration
    pooled      (configuration) -> width of the pooled text embedding, 0 for none
    cfg         scale of guidance; 1: the model is guidance-distilled and has no negative
    blocks      (number) -> what of the configuration a model of so few blocks has otherwise; speed has none of it
    frames      whether its latents have a dimension for frames
    dtype       that it is commonly computed in on a GPU
    """

    kind: str
    config: dict
    narrowed: Callable[[float], dict]
    attention: tuple[str, ...]
    linear: tuple[str, ...]
    context: str = "context_dim"
    pooled: Callable[[dict], int] = lambda config: 0
    cfg: float = 7.0
    blocks: Callable[[int], dict] = lambda number: {}
    frames: bool = False
    dtype: torch.dtype = torch.float16


def _multiple(width: float, of: int) -> int:
    return max(of, round(width / of) * of)


def _unet(context: int) -> Callable[[float], dict]:
    return lambda scale: {"model_channels": _multiple(320 * scale, 32), "context_dim": _multiple(context * scale, 32)}


def _flux(scale: float) -> dict:
    heads = max(1, round(24 * scale))
    return {"hidden_size": 128 * heads, "num_heads": heads, "context_in_dim": _multiple(4096 * scale, 32)}


def _wan(scale: float) -> dict:
    heads = max(1, round(40 * scale))
    return {"dim": 128 * heads, "num_heads": heads, "ffn_dim": _multiple(13824 * scale, 64),
            "text_dim": _multiple(4096 * scale, 32)}


def _qwen(scale: float) -> dict:
    return {"num_attention_heads": max(1, round(24 * scale)), "joint_attention_dim": _multiple(3584 * scale, 32)}


ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
TRANSFORMER = (*ATTENTION, ".ff.net.0.proj", ".ff.net.2", ".proj_in", ".proj_out")
QWEN = (*ATTENTION, ".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")
ADM = 1536  # of SDXL's `adm_in_channels`, for sizes and crops; the rest is the pooled text embedding

ARCHITECTURES = {
    "SD1.5": Architecture("SD15", {
        **UNET, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "num_heads": 8, "num_head_channels": -1,
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "use_linear_in_transformer": False, "adm_in_channels": None}, _unet(768), ATTENTION, TRANSFORMER),
    "SDXL": Architecture("SDXL", {
        **UNET, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "num_heads": -1, "num_head_channels": 64,
        "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": ADM + 1280},
        _unet(2048), ATTENTION, TRANSFORMER, pooled=lambda config: config["adm_in_channels"] - ADM),
    "Flux": Architecture("Flux", {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "mlp_ratio": 4.0, "depth": 19,
        "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True,
        "guidance_embed": True}, _flux, (".qkv", "_attn.proj"),
        (".qkv", "_attn.proj", "_mlp.0", "_mlp.2", ".linear1", ".linear2"), "context_in_dim",
        pooled=lambda config: config["vec_in_dim"], cfg=1.0,
        blocks=lambda number: {"depth": number, "depth_single_blocks": 2 * number}, dtype=torch.bfloat16),
    "Qwen-Image": Architecture("QwenImage", {"image_model": "qwen_image", "num_layers": 60}, _qwen, QWEN,
        (*QWEN, "_mlp.net.0.proj", "_mlp.net.2"), "joint_attention_dim", cfg=4.0,
        blocks=lambda number: {"num_layers": number}, frames=True, dtype=torch.bfloat16),
    "Wan": Architecture("WAN21_T2V", {
        "image_model": "wan2.1", "model_type": "t2v", "num_layers": 40, "in_dim": 16, "out_dim": 16}, _wan,
        ("attn.q", "attn.k", "attn.v", "attn.o"), ("attn.q", "attn.k", "attn.v", "attn.o", ".ffn.0", ".ffn.2"),
        "text_dim", cfg=5.0, blocks=lambda number: {"num_layers": number}, frames=True, dtype=torch.bfloat16),
}  # fmt: skip


def start_comfyui(path: Path, device: str) -> str:
    """Make ComfyUI importable and set its device before it looks for one; its version."""
    sys.path.insert(0, str(path))
    import comfy.cli_args

    comfy.cli_args.args.cpu = device != "cuda"
    if device == "meta":  # an attention that does not ask how much memory there is
        comfy.cli_args.args.use_pytorch_cross_attention = True
    import comfyui_version

    return comfyui_version.__version__


def build(name: str, scale: float, dtype: torch.dtype, device: torch.device, blocks: int | None = None):
    """ComfyUI's own class of an architecture as a MODEL, widths times `scale` (of the channels: in steps that its
    normalisations and heads need), of a transformer some `blocks` only. On the device `meta` it has no weights."""
    import comfy.ldm.flux.model
    import comfy.model_patcher
    import comfy.sd  # noqa: F401  (its import order is the one the others rely on)
    import comfy.supported_models

    architecture = ARCHITECTURES[name]
    config = architecture.config | architecture.narrowed(scale)
    config |= {} if blocks is None else architecture.blocks(blocks)
    if name == "Flux" and "txt_ids_dims" in {f.name for f in fields(comfy.ldm.flux.model.FluxParams)}:
        config["txt_ids_dims"] = []
    config = getattr(comfy.supported_models, architecture.kind)(config)
    config.unet_config["dtype"] = dtype
    model, cpu = config.get_model({}, "", device=device), torch.device("cpu")
    if device.type == "meta":
        return comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)
    generator = torch.Generator(device).manual_seed(0)
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1:  # in their own dtype: Wan keeps some layers in float32
            values = torch.randn(parameter.shape, generator=generator, device=device, dtype=parameter.dtype)
            parameter.data = values.div_(parameter[0].numel() ** 0.5)
        else:
            parameter.data = torch.full_like(parameter, float(key.endswith(("weight", "scale"))))
    return comfy.model_patcher.ModelPatcher(model.eval(), load_device=device, offload_device=cpu)


def settle(patcher) -> None:
    """Tell ComfyUI that a model made on its device is there. It would make room for it a second time, and take a large
    one for one that does not fit."""
    inner = patcher.model
    inner.model_loaded_weight_memory, inner.current_weight_patches_uuid = patcher.model_size(), patcher.patches_uuid


def inputs(name: str, model, size: int, tokens: int = 77, batch: int = 1, frames: int = 1) -> tuple[Tensor, list]:
    """Noise for a picture of `size` pixels, or for so many latent frames of that size, and [positive, negative] conds
    of random text embeddings."""
    architecture, config = ARCHITECTURES[name], model.model.model_config.unet_config
    generator = torch.Generator().manual_seed(0)
    channels = model.model.latent_format.latent_channels
    time = [frames] if architecture.frames else []
    noise = torch.randn(batch, channels, *time, size // 8, size // 8, generator=generator)
    pooled = architecture.pooled(config)

    def cond() -> list:
        extra = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        return [[torch.randn(1, tokens, config[architecture.context], generator=generator), extra]]

    return noise, [cond(), cond()]


def targets(name: str, model, scope: str) -> Iterator[tuple[str, Tensor]]:
    """(layer name, weight) of what the LoRAs act on: linears of `attention`, all common ones (`linear`), or of a U-Net
    also the convolutions (`conv`)."""
    architecture = ARCHITECTURES[name]
    ends = architecture.attention if scope == "attention" else architecture.linear
    for key, weight in model.model.state_dict().items():
        layer = key.removeprefix("diffusion_model.").removesuffix(".weight")
        if key.startswith("diffusion_model.") and key.endswith(".weight") and (
                (layer.endswith(ends) and weight.ndim == 2) or (scope == "conv" and weight.ndim == 4)):
            yield layer, weight


def write_lora(path: Path, layers: Iterator[tuple[str, Tensor]], seed: int, rank: int, device: str = "cpu") -> None:
    """A LoRA file in the ordinary format whose deltas are a tenth of the weights. device: where it is drawn; of large
    ones a CPU draws for minutes."""
    import safetensors.torch

    generator, tensors = torch.Generator(device).manual_seed(seed), {}
    for name, weight in layers:
        out, shape, wide = weight.shape[0], weight.shape[1:], weight[0].numel()
        key = f"lora_unet_{name.replace('.', '_')}"
        down = torch.randn(rank, *shape, generator=generator, device=device) / wide**0.5
        up = 0.1 * torch.randn(out, rank, *[1] * (len(shape) - 1), generator=generator, device=device) / rank**0.5
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down.half().cpu(), up.half().cpu()
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    safetensors.torch.save_file(tensors, path)


def write_loras(folder: Path, name: str, model, ranks: Sequence[int], scope: str = "linear", device: str = "cpu"
                ) -> list[Path]:
    """A LoRA file for each rank, in a folder that ComfyUI lists as `loras`."""
    import folder_paths

    folder_paths.add_model_folder_path("loras", str(folder), is_default=True)
    files = [folder / f"{name}-{i}-rank{rank}.safetensors" for i, rank in enumerate(ranks)]
    for seed, (file, rank) in enumerate(zip(files, ranks, strict=True)):
        write_lora(file, targets(name, model, scope), seed, rank, device)
    return files


def compose(model, files: Sequence[Path], make=lambda active: Composite(active.strengths), always: Sequence[Path] = ()):
    """The MODEL that a method's node would give, and the seconds that takes with the files read already. The LoRAs of
    `always` are of that role."""
    from ..host.compose.apply import apply_method
    from ..host.files.ensemble import ALWAYS, LoRASpec
    from ..host.files.files import read

    ensemble = tuple(LoRASpec(file.name, STRENGTH, 0.0) for file in files)
    ensemble += tuple(LoRASpec(file.name, 1.0, 0.0, ALWAYS) for file in always)
    for spec in ensemble:
        read(spec.name, model.model)
    start = now()
    composed, _ = apply_method(model, None, ensemble, make, "Composite")
    return composed, since(start).wall


def banks_of(composed) -> list:
    """The patchers that hold the banks of a composed MODEL: of its method, and of LoRAs that are always on."""
    from ..host.compose.composition import KEY

    return composed.get_additional_models_with_key(KEY)


def bank_of(composed):
    """The one of its method alone."""
    return banks_of(composed)[0]


def stock(model, files: Sequence[Path], bypass: bool = False):
    """A chain of ComfyUI's own LoRA loaders; bypass: the one that adds its LoRA in the forward. None where this release
    has no such loader."""
    import comfy.sd
    import comfy.utils

    load = getattr(comfy.sd, "load_bypass_lora_for_models" if bypass else "load_lora_for_models", None)
    if load is None:
        return None
    for file in files:
        model, _ = load(model, None, comfy.utils.load_torch_file(str(file)), STRENGTH, 0.0)
    return model


def hooked(conds: list, files: Sequence[Path], base: bool = False, strength: float = STRENGTH) -> list:
    """The stock composite: one copy of each cond per LoRA, with a hook that patches the model's weights for it; base:
    and one without a LoRA."""
    import comfy.hooks
    import comfy.utils

    hooks = [comfy.hooks.create_hook_lora(comfy.utils.load_torch_file(str(file)), strength, 0.0) for file in files]
    return [[[embedding, {**extra, "hooks": hook}] for hook in hooks for embedding, extra in cond]
            + (cond if base else []) for cond in conds]


def sampled(model, positive: list, negative: list, noise: Tensor, steps: int,
            cfg: float = 7.0) -> tuple[Tensor, list[Seconds]]:
    """One run of ComfyUI's sampler: the latent, and what each step took; `thread` only until all of it is queued."""
    import comfy.sample

    times, start = [], now()

    def told(*_) -> None:
        nonlocal start
        queued = since(start).thread  # waiting for a GPU takes processor time too
        synchronize(model.load_device)
        times.append(since(start)._replace(thread=queued))
        start = now()

    with torch.inference_mode():
        latent = comfy.sample.sample(model, noise, steps, cfg, "euler", "normal", positive, negative,
                                     torch.zeros_like(noise), callback=told, disable_pbar=True, seed=1)
    return latent, times


def forward_of(model, conds: list, noise: Tensor, count: int, cfg: float = 7.0) -> Callable[[], Tensor]:
    """One forward of the model on `count` times the batch that the sampler makes of these conds, at one noise level."""
    caught: dict = {}

    def catch(apply, args: dict) -> Tensor:
        caught.update(args)
        return apply(args["input"], args["timestep"], **args["c"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(catch)
    sampled(watched, *conds, noise, 1, cfg)
    rows = caught["input"].shape[0]

    def repeated(value):
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
            return value.repeat(count, *[1] * (value.ndim - 1))
        return value

    x, sigma = repeated(caught["input"]), repeated(caught["timestep"])
    with_it = {key: repeated(value) for key, value in caught["c"].items() if key != "transformer_options"}

    def forward() -> Tensor:
        with torch.inference_mode():
            return model.model.apply_model(x, sigma, **with_it)

    return forward
