"""Nodes of other packs, where NEIGHBOUR_PACKS names a folder that holds clones of them (and what they import, for
Python to find)."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from .models import FAMILIES, base, build, patcher
from .neighbours import Neighbour, picture_prompt

PACKS = os.environ.get("NEIGHBOUR_PACKS")


def pack(name: str, module: str) -> ModuleType:
    """A module of a pack, by the name of its repository; the rest of the pack is not imported."""
    if not PACKS:
        pytest.skip("no packs of others; name a folder with clones of them in NEIGHBOUR_PACKS")
    folder = Path(PACKS) / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not in the folder of NEIGHBOUR_PACKS")
    package = "neighbour_" + "".join(letter if letter.isalnum() else "_" for letter in name)
    if package not in sys.modules:
        sys.modules[package] = root = ModuleType(package)
        root.__path__ = [str(folder)]
    try:
        return importlib.import_module(f"{package}.{module}")
    except ImportError as error:
        pytest.skip(f"{name} does not run on this ComfyUI: {error}")


def kj(node: str, *arguments, method: str = "patch", **options) -> Callable:
    """A node of KJNodes."""
    def make(model):
        sys.modules.setdefault("sageattention", Sage())
        made = getattr(pack("ComfyUI-KJNodes", "nodes.model_optimization_nodes"), node)
        node_of = made() if not hasattr(made, "execute") else made
        return getattr(node_of, method)(model, *arguments, **options)[0]

    return make


class Sage(ModuleType):
    """The kernels of SageAttention want a GPU; the node calls them by these names."""

    def __init__(self):
        super().__init__("sageattention")

    @staticmethod
    def sageattn(q: Tensor, k: Tensor, v: Tensor, is_causal=False, attn_mask=None, tensor_layout="NHD") -> Tensor:
        if tensor_layout == "NHD":
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = nn.functional.scaled_dot_product_attention((q * 4).round() / 4, (k * 4).round() / 4, v, attn_mask)
        return out.transpose(1, 2) if tensor_layout == "NHD" else out


def cond(family: str) -> list:
    return FAMILIES[family].cond(13)


def picture_attention(name: str, function: str) -> Callable:
    """The attention to a picture of IP-Adapter's author, with weights as they come."""
    def make(model):
        module = pack(name, "CrossAttentionPatch")

        def replaces(attention: nn.Module) -> Callable:
            made = torch.Generator().manual_seed(attention.to_k.out_features)
            layers = nn.ModuleDict({f"1_to_{part}_ip": nn.Linear(32, attention.to_k.out_features, bias=False)
                                    for part in "kv"})
            for parameter in layers.parameters():
                nn.init.normal_(parameter, std=0.3, generator=made).requires_grad_(False)
            adapter = type("Adapter", (), {"ip_layers": type("Layers", (), {"to_kvs": layers})(),
                                           "get_multigpu_clone": lambda self, device: self})()
            pictures = torch.randn(2, 1, 4, 32, generator=made)
            return module.Attn2Replace(getattr(module, function), module_key="1", ipadapter=adapter, weight=1.0,
                                       cond=pictures[0], uncond=pictures[1], sigma_start=1e9, sigma_end=0.0)

        return picture_prompt(model, replaces)

    return make


def fooocus_inpaint(model):
    """Patches of a kind of its own on all weights, and a picture behind the first block."""
    module, made = pack("comfyui-inpaint-nodes", "nodes"), torch.Generator().manual_seed(5)
    head = module.InpaintHead()
    head.head = nn.Parameter(0.3 * torch.randn(32, 5, 3, 3, generator=made), requires_grad=False)
    changes = {name: [torch.randint(0, 256, value.shape, generator=made, dtype=torch.uint8), torch.tensor(-0.05),
                      torch.tensor(0.05)] for name, value in model.model.state_dict().items() if value.ndim > 1}
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    latent = {"samples": torch.randn(1, 4, 8, 8, generator=made), "noise_mask": mask}
    return module.ApplyFooocusInpaint.execute(model, (head, changes), latent).args[0]


REAL = {
    "KJNodes: SageAttention": Neighbour(kj("PathchSageAttentionKJ", "auto"), "Flux"),
    "KJNodes: torch settings": Neighbour(kj("ModelPatchTorchSettings", False), "Flux"),
    "KJNodes: compiled blocks": Neighbour(kj("TorchCompileModelAdvanced", "eager", False, "default", "auto", 64, True,
                                             False), "Flux"),
    "KJNodes: NAG": Neighbour(lambda model: kj("WanVideoNAG", cond("Wan"), 5.0, 0.25, 2.5)(model), "Wan", cfg=1.0),
    "KJNodes: Enhance-A-Video": Neighbour(kj("WanVideoEnhanceAVideoKJ", 2.0, {"samples": torch.zeros(1, 16, 3, 8, 8)},
                                             method="enhance"), "Wan", 2e-2),
    "KJNodes: chunked feed-forward": Neighbour(kj("WanChunkFeedForward", 2, 4, method="execute"), "Wan"),
    "KJNodes: CFG-Zero*": Neighbour(kj("CFGZeroStarAndInit", False, 0), "Wan"),
    "IPAdapter plus": Neighbour(picture_attention("ComfyUI_IPAdapter_plus", "ipadapter_attention")),
    "InstantID": Neighbour(picture_attention("ComfyUI_InstantID", "instantid_attention")),
    "Fooocus inpaint": Neighbour(fooocus_inpaint),
}


def tea_cache(kind: str, threshold: float = 1e9) -> Callable:
    return lambda model: pack("ComfyUI-TeaCache", "nodes").TeaCache().apply_teacache(
        model, kind, threshold, 0.0, 1.0, "cpu")[0]


def mag_cache(kind: str) -> Callable:
    return lambda model: pack("ComfyUI-MagCache", "nodes").MagCache().apply_magcache(
        model, kind, 0.3, 0.3, 2, 0, -1)[0]


def wave_speed(model):
    """With a threshold at which it leaves out two of three calls."""
    node = pack("Comfy-WaveSpeed", "fbcache_nodes").ApplyFBCacheOnModel()
    return node.patch(model, "diffusion_model", 1e9, 2)[0]


REAL_SKIPPING = {
    "TeaCache, Flux": Neighbour(tea_cache("flux"), "Flux"),
    "TeaCache, Wan": Neighbour(tea_cache("wan2.1_t2v_1.3B"), "Wan"),
    "MagCache, Flux": Neighbour(mag_cache("flux"), "Flux"),
    "MagCache, Wan": Neighbour(mag_cache("wan2.1_t2v_1.3B"), "Wan"),
    "First Block Cache, SDXL": Neighbour(wave_speed, "SDXL"),
}


def attention_couple(positive: list, others: list) -> list:
    """Regional prompts by prompt-control: the others are seen in their masks."""
    couple = pack("comfyui-prompt-control", "prompt_control.attention_couple_ppm")
    return couple.set_cond_attnmask(positive, others, fill=True)


def gguf(family: str, folder: Path) -> tuple:
    """(a MODEL of ComfyUI-GGUF, the same with ordinary weights): linear layers in 8 bits, out of a real file."""
    gguf = pytest.importorskip("gguf", reason="no package gguf")
    ops, loader, nodes = (pack("ComfyUI-GGUF", name) for name in ("ops", "loader", "nodes"))
    writer, plain = gguf.GGUFWriter(folder / "model.gguf", "flux"), {}
    for name, tensor in base(family).model.diffusion_model.state_dict().items():
        values = tensor.numpy()
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            values = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
        plain[name] = torch.tensor(values)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file,
                  writer.close):
        write()
    layers = ops.GGMLOps()
    layers.Linear.dequant_dtype = torch.float32
    packed = build(FAMILIES[family], operations=layers)
    found = loader.gguf_sd_loader(str(folder / "model.gguf"))
    packed.diffusion_model.load_state_dict(found[0] if isinstance(found, tuple) else found)
    ordinary = build(FAMILIES[family])
    ordinary.diffusion_model.load_state_dict(plain)
    return nodes.GGUFModelPatcher.clone(patcher(packed)), patcher(ordinary)
