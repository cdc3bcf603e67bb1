"""What every layer of a model sees in a call, and calls in which layers answer something else."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from lora_ensemble.engine.geometry import Geometry, geometry_of
from torch import Tensor, nn

See = Callable[[str, Geometry, Tensor, Tensor], "Tensor | None"]
"""(layer, its geometry, input, output) -> the output to go on with, or None for the one that it is"""


@contextmanager
def watching(model: nn.Module, see: See) -> Iterator[None]:
    """While open, `see` is called whenever a layer that can be routed has computed something."""
    hooks = [module.register_forward_hook(_hook(name, geometry_of(module), see), with_kwargs=True)
             for name, module in model.named_modules() if hasattr(module, "weight") and geometry_of(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hook(name: str, geometry: Geometry, see: See):
    def hook(module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        x = args[0] if args else next(iter(kwargs.values()))
        return see(name, geometry, x, out)

    return hook


def exists(name: str) -> bool:
    """Whether this ComfyUI has a class, by module below comfy.ldm and name."""
    module, cls = name.rsplit(".", 1)
    try:
        return hasattr(importlib.import_module(f"comfy.ldm.{module}"), cls)
    except ImportError:
        return False


def newest() -> bool:
    """Whether this ComfyUI is as new as the tests: what it cannot do is a failure."""
    return exists("minimax.model.MiniMaxH3Model")


@contextmanager
def skipped_where_older(name: str) -> Iterator[None]:
    """For a call of the host's own that an older release may not know or make wrong: skips there."""
    try:
        yield
    except (RuntimeError, AssertionError, ValueError) as error:
        if newest():
            raise
        pytest.skip(f"this ComfyUI makes no such call of {name}: {str(error).splitlines()[0]}")
