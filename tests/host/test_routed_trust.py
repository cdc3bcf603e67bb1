"""LoRAs that do little outside their place are let out of it, in the host's own models."""

from __future__ import annotations

import pytest
import torch
from lora_ensemble.host.compose import wrappers
from lora_ensemble.host.compose.composition import places_of, record_of
from lora_ensemble.host.compose.earlier import Runs
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.methods import routed as method
from torch import Tensor
from torch.nn import functional as F

from .builders import file_of, kohya, lora, same, sample, shapes, stock
from .models import base
from .runs import ROUNDING, STEPS, part
from .test_masks import LAST
from .test_routed import MARKS, prompt, rests, routed, specs

FAMILY = pytest.mark.parametrize("family", ["SD15", "Flux", "Wan"])
LOW, HIGH = 0.5, 2.0


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Random LoRAs reach as far outside as inside: between these bounds they are let out a part of the way."""
    monkeypatch.setattr(method, "LOW", LOW)
    monkeypatch.setattr(method, "HIGH", HIGH)


def free_by_hand(model, family: str, conds: list, ensemble, maps: Tensor) -> Tensor:
    """[pictures, LoRAs], from input and output of the only layer that LoRAs change, in an evaluation of the base."""
    layer, seen = model.model.diffusion_model.get_submodule(LAST[family]), []
    with layer.register_forward_hook(lambda module, args, out: seen.append((args[0].clone(), out.clone()))):
        sample(model, family, conds, steps=1, cfg=1.0, batch=2)
    (x, y), = seen[:1]
    names = [f"{kohya(LAST[family])}.lora_{part}.weight" for part in ("up", "down")]
    found = []
    for spec in ensemble:
        up, down = (file_of(spec)[name].double() for name in names)
        delta = (up.flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])
        if y.ndim == 4:
            added, size = F.conv2d(x.double(), delta, padding=1), y.double()
            energy, size = (each.square().sum(1) for each in (added, size))
        else:
            energy, size = (each.square().sum(-1) for each in (x.double() @ delta.T, y.double()))
        found.append(energy.flatten(1) / size.flatten(1).mean(1, keepdim=True))
    energy = torch.stack(found, dim=1)
    maps = maps.double()
    if family != "SD15":  # the layer's tokens are patches of two by two places
        maps = F.avg_pool3d(maps, (1, 2, 2)) if maps.ndim == 5 else F.avg_pool2d(maps, 2)
    gain = maps.flatten(2)
    outside = ((1 - gain) * energy).sum(-1) / (1 - gain).sum(-1)
    share = outside / ((gain * energy).sum(-1) / gain.sum(-1))
    return (torch.log(HIGH / share) / torch.log(torch.tensor(HIGH / LOW).double())).clamp(0, 1)


def loosened(maps: Tensor, free: Tensor) -> Tensor:
    free = free.reshape(*free.shape, *[1] * (maps.ndim - 2)).float()
    return free + (1 - free) * maps


@pytest.mark.parametrize(("mode", "start", "cfg"), [("once", 0.0, 1.0), ("once", 0.0, 3.0), ("once", 0.5, 3.0),
                                                    ("contrast", 0.0, 1.0)])
@FAMILY
def test_as_far_as_a_lora_does_little_outside(family, mode, start, cfg, loras):
    """m becomes m + (1 - m) f, f by the energy of each LoRA outside its place over that inside; it costs no evaluation
    more."""
    model = base(family)
    ensemble = specs(model, loras, wanted=lambda name: name == LAST[family])
    parts = rests(MARKS, [prompt(family, None, 20 + k)[0] for k in range(3)])
    conds = prompt(family, MARKS, lora_ensemble_without=parts)
    found = {}
    for trust in (False, True):
        ours = routed(model, ensemble, mode=mode, start=start, trust=trust)
        picture = sample(ours, family, conds, steps=2, cfg=cfg, batch=2)
        found[trust] = places_of(ours)[0].maps, [step.rows for step in record_of(ours).steps], picture
        notes = record_of(ours).steps[-1].notes["Merge"]
        assert record_of(ours).problems == [] and ("trust" in notes) is trust
    free = free_by_hand(model, family, conds, ensemble, found[False][0])
    assert ((free > 0.05) & (free < 0.95)).all()
    assert torch.allclose(found[True][0], loosened(found[False][0], free), atol=1e-4)
    assert torch.allclose(torch.tensor(notes["trust"]).double(), free.mean(0), atol=1e-4)
    assert found[True][1] == found[False][1] and not torch.allclose(found[True][2], found[False][2], atol=1e-4)


def test_it_holds_in_every_step(loras):
    """Places are found anew, how far a LoRA may leave them is not."""
    model = base("SD15")
    ours = routed(model, specs(model, loras), trust=True)
    sample(ours, "SD15", prompt(), steps=3)
    notes = [step.notes["Merge"] for step in record_of(ours).steps]
    assert len({tuple(note["places"]) for note in notes}) == 3 and len({tuple(note["trust"]) for note in notes}) == 1
    free, maps = torch.tensor(notes[0]["trust"]), places_of(ours)[0].maps
    assert (free > 0).all() and (maps.amin(dim=(0, 2, 3)) >= free - 1e-5).all()


def test_a_run_that_goes_on_with_the_picture_knows_it(loras, monkeypatch):
    """As Wan's two models do: the second run looks for nothing, and neither do its LoRAs leave their places otherwise.
    """
    monkeypatch.setattr(wrappers, "RUNS", Runs())
    model, text = base("SD15"), prompt("SD15")
    first, second = (routed(model, specs(model, loras), trust=True) for _ in range(2))
    whole = part(first, 0, STEPS, cfg=1.0, positive=text)
    half = part(first, 0, 3, cfg=1.0, positive=text)
    found = part(second, 3, STEPS, half, cfg=1.0, positive=text)
    notes = [record_of(each).steps[-1].notes["Merge"] for each in (first, second)]
    assert notes[0]["trust"] == pytest.approx(notes[1]["trust"]) and record_of(second).steps[0].rows == 1
    same(found, whole, part(model, 0, STEPS, cfg=1.0, positive=text), ROUNDING)


def test_beside_a_lora_that_is_always_on(loras):
    """It is part of the model: trust is as on a model whose weights have it."""
    model = base("SD15")
    ensemble, always = specs(model, loras), LoRASpec(loras(lora(shapes(model), 5, 4)), 0.7, 0, role="always")
    found = []
    for made, all_of_them in ((model, [*ensemble, always]), (stock(model, [always]), ensemble)):
        ours = routed(made, all_of_them, mode="once", trust=True)
        sample(ours, "SD15", prompt(), steps=2)
        found.append(record_of(ours).steps[-1].notes["Merge 2" if always in all_of_them else "Merge"]["trust"])
    assert found[0] == pytest.approx(found[1], rel=1e-3) and 0 < min(found[0]) < max(found[0]) < 1
