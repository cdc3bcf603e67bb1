"""How the model that samples is seen."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_management
from comfy.patcher_extension import WrappersMP
from lora_ensemble.host.compose.sampled import free_of, is_compiled, unwrapped
from torch import nn


class OptimizedModule(nn.Module):
    """What torch.compile puts in a module's place."""


def test_a_compiled_model_is_known_however_it_was_compiled():
    """As a whole by the host's wrapper, which may be further in; block by block; in place."""
    def model(*layers: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 2), nn.Sequential(*layers))

    assert not is_compiled(model(nn.Linear(2, 2)), {})
    assert not is_compiled(model(), {"wrappers": {WrappersMP.APPLY_MODEL: {"other": []}}})
    assert is_compiled(model(), {"wrappers": {WrappersMP.APPLY_MODEL: {"torch.compile": []}}})
    assert is_compiled(model(OptimizedModule()), {})
    in_place = nn.Linear(2, 2)
    in_place._compiled_call_impl = object()
    assert is_compiled(model(in_place), {})


def test_a_model_in_a_shell_is_the_model():
    inner = nn.Linear(2, 2)
    assert unwrapped(SimpleNamespace(_orig_mod=inner)) is unwrapped(inner) is inner


def test_memory_is_counted_as_the_host_counts_it():
    assert free_of(SimpleNamespace(get_free_memory=len)) is len
    assert free_of(SimpleNamespace()) is comfy.model_management.get_free_memory
