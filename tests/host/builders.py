"""LoRA files of every kind, samplings, and what ComfyUI itself makes of the same files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, cached_property
from pathlib import Path

import comfy.hooks
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import torch
from lora_ensemble.host.compose import banks, measure
from lora_ensemble.host.compose.apply import Active, apply_method
from lora_ensemble.host.files import files
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.methods import Method
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.merge import Merge
from safetensors.torch import save
from torch import Tensor

from .models import FAMILIES

Shapes = dict[str, torch.Size]


class Rand:
    """Random tensors from one seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, size: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * size


def shapes(model, wanted: Callable[[str], bool] = lambda layer: True) -> Shapes:
    """Layer name (below the diffusion model) -> weight shape, of all weights with two or more dimensions."""
    prefix, leaf = "diffusion_model.", ".weight"
    return {key[len(prefix):-len(leaf)]: value.shape for key, value in model.model.state_dict().items()
            if key.startswith(prefix) and key.endswith(leaf) and value.ndim >= 2
            and wanted(key[len(prefix):-len(leaf)])}


def text_layers(clip) -> Shapes:
    """Layer name (below the text model) -> weight shape, of the matrices in the layers of a small CLIP."""
    prefix, end = "clip_l.transformer.text_model.", ".weight"
    return {key[len(prefix):-len(end)]: value.shape for key, value in clip.cond_stage_model.state_dict().items()
            if key.startswith(prefix) and "layers" in key and key.endswith(end) and value.ndim == 2}


def kohya(layer: str) -> str:
    return "lora_unet_" + layer.replace(".", "_")


def factors(shape: Iterable[int], rank: int, rand: Rand, size: float = 0.3) -> tuple[Tensor, Tensor]:
    """(up, down) of a delta whose product has about `size` times the spread of a unit-gain weight of that shape."""
    out, *rest = shape
    down = rand(rank, *rest) / torch.Size(rest).numel() ** 0.5
    return rand(out, rank, *[1] * (len(rest) - 1), size=size / rank**0.5), down


def lora(layers: Shapes, seed: int, rank: int = 4, alpha: float | None = None, size: float = 0.3,
         name: Callable[[str], str] = kohya, down: str = "lora_down.weight", up: str = "lora_up.weight") -> dict:
    """An ordinary LoRA (LoCon on convolutions)."""
    rand, out = Rand(seed), {}
    for layer, shape in layers.items():
        left, right = factors(shape, rank, rand, size)
        out[f"{name(layer)}.{up}"], out[f"{name(layer)}.{down}"] = left, right
        if alpha is not None:
            out[f"{name(layer)}.alpha"] = torch.tensor(float(alpha))
    return out


class Tensors(dict[str, Tensor]):
    """Tensors that no test changes: what is written of them is made once."""

    @cached_property
    def content(self) -> bytes:
        return save({key: value.contiguous() for key, value in self.items()})


@cache
def _three(layers: tuple[tuple[str, torch.Size], ...]) -> tuple[Tensors, ...]:
    every = dict(layers)
    return Tensors(lora(every, 1, 4)), Tensors(lora(every, 2, 8, alpha=6.0)), Tensors(lora(every, 3, 4, alpha=4.0))


def three(model, loras: Callable[[dict], str], strengths=(0.8, 0.5, -0.6)) -> tuple[LoRASpec, ...]:
    """Three LoRAs over all layers, of unequal rank and strength, with and without alpha."""
    made = _three(tuple(shapes(model).items()))
    return tuple(LoRASpec(loras(file), s, s) for file, s in zip(made, strengths, strict=True))


def written_once(folder: Path, prefix: str) -> Callable[..., str]:
    """Writes LoRA files into a folder of ComfyUI's, each content once and beside whatever is there already:
    `loras(tensors)` -> name in ComfyUI's list."""
    def loras(tensors: dict, name: str | None = None) -> str:
        content = save({key: value.contiguous() for key, value in tensors.items()})
        known = {path.read_bytes(): path.name for path in folder.glob(f"{prefix}_*.safetensors")}
        if content not in known:
            known[content] = f"{prefix}_{len(known)}.safetensors"
            (folder / known[content]).write_bytes(content)
            folder_paths.filename_list_cache.clear()
        return known[content]

    return loras


# --- the pack -------------------------------------------------------------------------------------------------------


def nothing_known() -> None:
    """The pack knows no LoRA file, nor what it has made and measured of any."""
    banks.forget()
    files.forget()
    measure._kept.clear()


def plain(make: Callable[[tuple[float, ...]], Method]) -> Callable[[Active], Method]:
    """For a method that needs to know no more of its LoRAs than their strengths."""
    return lambda active: make(active.strengths)


def merge(model, ensemble, rest_on_weights: bool = False):
    return apply_method(model, None, tuple(ensemble), plain(Merge), "Merge LoRAs", rest_on_weights)[0]


def composite(model, ensemble):
    return method(model, ensemble, Composite)


def method(model, ensemble, make):
    return apply_method(model, None, tuple(ensemble), plain(make), "LoRAs")[0]


# --- the host's own way ---------------------------------------------------------------------------------------------


def file_of(spec: LoRASpec) -> dict[str, Tensor]:
    return comfy.utils.load_torch_file(folder_paths.get_full_path("loras", spec.name), safe_load=True)


def stock(model, ensemble):
    """A chain of ComfyUI's LoRA loaders."""
    for spec in ensemble:
        model, _ = comfy.sd.load_lora_for_models(model, None, file_of(spec), spec.strength_model, 0)
    return model


def hooked(cond: list, ensemble) -> list:
    """One copy of a CONDITIONING per LoRA, each with that LoRA as a hook: ComfyUI averages them."""
    return [[text, {**options, "hooks": comfy.hooks.create_hook_lora(file_of(spec), spec.strength_model, 0.0)}]
            for spec in ensemble for text, options in cond]


# --- sampling -------------------------------------------------------------------------------------------------------


def sample(model, family: str = "SD15", positive: list | None = None, negative: list | None = None, *, batch: int = 1,
           steps: int = 2, cfg: float = 3.0, sampler: str = "euler", denoise: float = 1.0, latent: Tensor | None = None,
           size: int = 8, seed: int = 1, callback: Callable | None = None) -> Tensor:
    """What a KSampler node does."""
    kind = FAMILIES[family]
    noise = kind.noise(batch, size, seed)
    positive = kind.cond(11) if positive is None else positive
    negative = kind.cond(12) if negative is None else negative
    latent = torch.zeros_like(noise) if latent is None else latent
    with torch.inference_mode():
        return comfy.sample.sample(model, noise, steps, cfg, sampler, "normal", positive, negative, latent,
                                   denoise=denoise, seed=seed, callback=callback, disable_pbar=True)


def guided(guider, sigmas: Tensor, family: str = "SD15", sampler: str = "euler", seed: int = 1, batch: int = 1,
           latent: Tensor | None = None) -> Tensor:
    """What SamplerCustomAdvanced does."""
    noise = FAMILIES[family].noise(batch, seed=seed)
    latent = torch.zeros_like(noise) if latent is None else latent
    with torch.inference_mode():
        return guider.sample(noise, latent, comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True,
                             seed=seed)


def schedule(model, steps: int) -> Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)


def error(ours: Tensor, reference: Tensor, base: Tensor) -> float:
    """Largest difference, relative to the largest change that the LoRAs make; that change must be one."""
    effect = (reference - base).abs().max()
    assert torch.isfinite(reference).all() and effect > 1e-2 * base.abs().max(), "the LoRAs have no effect to compare"
    return ((ours - reference).abs().max() / effect).item()


def same(ours: Tensor, reference: Tensor, base: Tensor, tolerance: float = 1e-3) -> None:
    found = error(ours, reference, base)
    assert found < tolerance, f"differs from the reference by {found:.2e} of the LoRAs' effect"
