"""MODELs behind ComfyUI's torch.compile node."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import comfy.ldm.modules.attention
import pytest

compiling = pytest.importorskip("comfy_api.torch_helpers", reason="this ComfyUI has no torch.compile wrapper")


def compiled(model, backend: str | Callable = "eager", keys: Sequence[str] = ("diffusion_model",)):
    """The model, or the modules of it that `keys` name, behind the node, with torch's attention as on an accelerator:
    the one that ComfyUI takes on a CPU looks at the free memory, so that graphs break there and are compiled anew as
    memory changes."""
    model = model.clone()
    options = model.model_options["transformer_options"] = dict(model.model_options.get("transformer_options", {}))
    options["optimized_attention_override"] = torch_attention
    compiling.set_torch_compile_wrapper(model, backend=backend, keys=list(keys))
    return model


def torch_attention(chosen, *args, **kwargs):
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)
