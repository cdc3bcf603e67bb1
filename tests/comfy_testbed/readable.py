"""The testbed's U-Net as ComfyUI's own models are: its attention calls the host's seam, and its tokens are known."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

NAME = "lora_ensemble_testbed"
OVERRIDE = "optimized_attention_override"


def readable(unet: nn.Module) -> nn.Module:
    """The same U-Net, of a class below `comfy.ldm`, where families of models are looked for."""
    plain = type(unet)

    class ReadableUNet(plain):
        def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: dict | None = None,
                    **more: Any) -> Tensor:
            override = (transformer_options or {}).get(OVERRIDE)
            layers = [module for name, module in self.named_modules() if override and name.endswith(".attn2")]
            for layer in layers:
                layer.observe = lambda q, k: override(lambda q, *_, **__: q, q, k, k, q.shape[1], skip_reshape=True)
            try:
                return super().forward(x, timesteps, context, **more)
            finally:
                for layer in layers:
                    del layer.observe

    ReadableUNet.__module__ = f"comfy.ldm.{NAME}"
    unet.__class__ = ReadableUNet
    for name, module in list(sys.modules.items()):  # the pack's own, and that of the tests where there are two
        if name.endswith(".host.families.token_order"):
            streams = sys.modules[name.replace("token_order", "token_streams")]
            module.FAMILIES[f"{NAME}.ReadableUNet"] = _family(streams)
            rows = sys.modules[name.replace("token_order", "row_order")]
            rows.FAMILIES[f"{NAME}.ReadableUNet"] = rows.PLAIN
    return unet


def _family(streams: Any) -> Any:
    def of(root: nn.Module, call: Any) -> dict:
        height, width = call.shape()
        sizes = ((height, width), (height // 2, width // 2))
        return {"img": tuple((streams.picture(size, 1),) for size in sizes), "txt": ((call.text(),),)}

    return streams.Family(of, ((streams.ROW, r"time_(in|out)|pooled|.*\.time"), ("txt", r".*\.attn2\.to_[kv]"),
                               ("img", r".*")))
