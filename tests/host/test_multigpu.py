"""Several devices at once (ComfyUI's multi-GPU scheduler). A CPU with an index stands in for the second device: the
scheduler, its threads, the cloned patchers and the second set of modules are the real ones."""

from __future__ import annotations

import comfy.model_patcher
import pytest
import torch

from .builders import composite, sample, three
from .models import FAMILIES, base, build

if not hasattr(comfy.model_patcher.ModelPatcher, "match_multigpu_clones"):
    pytest.skip("this ComfyUI has no multi-GPU scheduler", allow_module_level=True)

SECOND = torch.device("cpu", 0)


def two_devices():
    """The small SD1.5 on the CPU, with a copy of its own on the second device."""
    first = base("SD15")
    twin = build(FAMILIES["SD15"])
    twin.load_state_dict(first.model.state_dict())
    second = comfy.model_patcher.ModelPatcher(twin, load_device=SECOND, offload_device=torch.device("cpu"))
    second.is_multigpu_base_clone = True
    model = first.clone()
    model.set_additional_models("multigpu", [second])
    return model, second


def test_branches_are_spread_over_devices_and_agree_with_one_device(loras, monkeypatch):
    """Guards: forwards are installed on the modules that the call runs on (`executor.class_obj`), with the bank that
    the host cloned for that device (`cached_patcher_init`); host.md c.4 #6."""
    from lora_ensemble.host.compose.composition import Run

    roots = []
    routed = Run.routed
    monkeypatch.setattr(Run, "routed", lambda run, root, *rest: roots.append(root) or routed(run, root, *rest))
    model, second = two_devices()
    ensemble = three(model, loras)
    alone = sample(composite(base("SD15"), ensemble))
    roots.clear()
    both = composite(model, ensemble)
    for _ in range(2):  # the clone's bank is reused by the second run
        # Another batch size is another matrix product: equal to rounding, not bit for bit.
        torch.testing.assert_close(sample(both), alone, rtol=1e-4, atol=1e-4 * alone.abs().max().item())
    assert {id(root) for root in roots} == {id(model.model.diffusion_model), id(second.model.diffusion_model)}
    left = [name for name, module in second.model.named_modules() if "forward" in module.__dict__]
    assert not left
