"""Models that swap the halves of a batch inside (Hunyuan3D 2.1): every branch still gets its own LoRA."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.kernels.branch import one_hot
from lora_ensemble.methods.session import Session

from .builders import lora, merge, method, same, sample, shapes
from .models import FAMILIES, Family, base


class Shape(Family):
    """A family whose latent is a sequence."""

    def noise(self, batch: int = 1, size: int = 8, seed: int = 0):
        return torch.randn(batch, self.latent, size, generator=torch.Generator().manual_seed(seed))


SHAPE = Shape("Hunyuan3D", "Hunyuan3Dv2_1", dict(
    image_model="hunyuan3d2_1", in_channels=64, hidden_size=32, context_dim=24, depth=3, num_heads=2, num_moe_layers=0,
    guidance_cond_proj_dim=32), 64, 24)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setitem(FAMILIES, "Hunyuan3D", SHAPE)
    return base("Hunyuan3D")


@dataclass(frozen=True)
class Keep:
    """A branch per LoRA, of which one is kept."""

    strengths: tuple[float, ...]
    kept: int

    def begin(self, facts) -> KeepSession:
        return KeepSession(self)


@dataclass
class KeepSession(Session):
    method: Keep

    def branches(self, step):
        return tuple(one_hot(self.method.strengths, i) for i in range(len(self.method.strengths)))

    def mix(self, step, call):
        return [None if p is None else p[self.method.kept] for p in call.predictions]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_every_branch_has_its_own_lora(model, loras, count, cfg):
    """Guard: in one batch, the LoRAs of other branches would be applied."""
    layers = shapes(model, lambda name: name.startswith("blocks."))
    specs = [LoRASpec(loras(lora(layers, seed)), 0.7, 0) for seed in range(1, count + 1)]
    try:
        plain = sample(model, "Hunyuan3D", cfg=cfg)
    except ValueError:
        pytest.skip("in this ComfyUI the model needs both prompts")
    for kept, spec in enumerate(specs):
        ours = method(model, specs, lambda strengths, kept=kept: Keep(strengths, kept))
        same(sample(ours, "Hunyuan3D", cfg=cfg), sample(merge(model, [spec]), "Hunyuan3D", cfg=cfg), plain)
        sides = 1 if cfg == 1.0 else 2
        assert [(step.calls, step.rows) for step in record_of(ours).steps] == [(count, count * sides)] * 2
