"""The model that samples, as ComfyUI has it during a run: its run, its modules, and the LoRAs on them."""

from __future__ import annotations

from functools import partial

import comfy.model_management
from comfy.patcher_extension import WrappersMP
from torch import nn

from ...engine.bank import Bank
from ...engine.forwards import RoutedForwards
from ..files.injected import layers_as_in_files
from .composition import KEY
from .read_weight import read_weight
from .run import Free, Run


def run_of(model) -> Run | None:
    """The run in which a model is evaluated, where it has methods on it (`Composition.run`)."""
    patcher = getattr(model, "current_patcher", None)
    composition = patcher.get_attachment(KEY) if patcher is not None else None
    return composition.run if composition is not None else None


def routed_on(run: Run, patcher, options: dict) -> list[RoutedForwards]:
    """The routed forwards on the diffusion model of a MODEL, installed on first sight. `options` as `is_compiled` has
    them."""
    module = patcher.model.diffusion_model
    root = unwrapped(module)
    return run.routed(root, partial(_banks, run, patcher), partial(read_weight, patcher),
                      partial(is_compiled, module, options), partial(layers_as_in_files, patcher, root))


def _banks(run: Run, patcher) -> list[Bank]:
    """The bank of each of `Run.banked`, on this model's device: a multi-GPU clone carries copies of its own."""
    banks = [bank.model for bank in patcher.get_additional_models_with_key(KEY)]
    return [banks[run.applied[joined.methods[0]].bank] for joined in run.banked]


def free_of(patcher) -> Free:
    """What the host's own batching goes by: under dynamic VRAM it counts weights that make way for activations."""
    return getattr(patcher, "get_free_memory", comfy.model_management.get_free_memory)


def is_compiled(module: nn.Module, options: dict) -> bool:
    """Whether torch.compile sees the model or some of its blocks: by the host's own wrapper, which may be further in,
    or by what stands in their places."""
    if "torch.compile" in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):
        return True
    return any(type(each).__name__ == "OptimizedModule" or getattr(each, "_compiled_call_impl", None) is not None
               for each in module.modules())


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself where torch.compile has put a shell around it."""
    return getattr(module, "_orig_mod", module)
