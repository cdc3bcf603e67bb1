"""Modules that a node puts between the layers of a model while it is loaded (AnimateDiff-Evolved's motion modules): the
layers behind them have other names meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management
from torch import nn


@contextmanager
def as_in_files(model) -> Iterator[None]:
    """While open, the layers of a MODEL have the names by which files know them, whoever has loaded it."""
    loaded = (each.model for each in comfy.model_management.current_loaded_models)
    holder = next((each for each in loaded if each is not None and each.model is model.model and each.is_injected),
                  model)
    with holder.use_ejected():
        yield


def layers_as_in_files(model, root: nn.Module) -> dict[str, nn.Module]:
    """The layers of its diffusion model by these names."""
    with as_in_files(model):
        return dict(root.named_modules())
