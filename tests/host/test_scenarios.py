"""What people do around a sampler (areas, masks, ranges, img2img, ControlNet, windows...) leaves parity as it is."""

from __future__ import annotations

import comfy.context_windows
import comfy.controlnet
import comfy.hooks
import pytest
import torch
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.methods.merge import Merge

from .builders import composite, hooked, lora, merge, method, same, sample, shapes, stock, three
from .models import FAMILIES, base, randomize

SD15 = FAMILIES["SD15"]


def left_half(**options) -> list:
    """A ConditioningSetArea entry beside an ordinary one."""
    return [*SD15.cond(21), *SD15.cond(22, area=(8, 4, 0, 0), strength=0.7, set_area_to_bounds=False, **options)]


def masked() -> list:
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:6, 1:5] = 1.0
    return [*SD15.cond(21), *SD15.cond(22, mask=mask, mask_strength=0.8, set_area_to_bounds=False)]


def ranges() -> list:
    """ConditioningSetTimestepRange: one prompt early, another late, a third throughout."""
    return [*SD15.cond(21, start_percent=0.0, end_percent=0.5), *SD15.cond(22, start_percent=0.5, end_percent=1.0),
            *SD15.cond(23)]


CONDS = {"area": left_half, "mask": masked, "ranges": ranges,
         "lengths": lambda: [*SD15.cond(21, tokens=5), *SD15.cond(22, tokens=9)]}
SAMPLING = {"img2img": dict(denoise=0.5, steps=3), "cfg1": dict(cfg=1.0), "wide": dict(batch=3, size=8)}


def latent_of(options: dict):
    return SD15.noise(1, seed=5) if "denoise" in options else None


@pytest.mark.parametrize("conds", CONDS)
def test_conds(conds, loras):
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    # The negative has the same areas: the host would add them, but only once for all the hooks of the reference.
    positive, negative = CONDS[conds](), CONDS[conds]()[::-1]
    plain = sample(model, "SD15", positive, negative, batch=2, steps=3)
    chain = sample(stock(model, ensemble), "SD15", positive, negative, batch=2, steps=3)
    hooks = sample(model, "SD15", hooked(positive, ensemble), hooked(negative, ensemble), batch=2, steps=3)
    same(sample(merge(model, ensemble), "SD15", positive, negative, batch=2, steps=3), chain, plain)
    same(sample(composite(model, ensemble), "SD15", positive, negative, batch=2, steps=3), hooks, plain)


@pytest.mark.parametrize("how", SAMPLING)
def test_sampling(how, loras):
    options = {**SAMPLING[how], "latent": latent_of(SAMPLING[how])}
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    positive, negative = SD15.cond(11), SD15.cond(12)
    plain, chain = sample(model, **options), sample(stock(model, ensemble), **options)
    hooks = sample(model, "SD15", hooked(positive, ensemble), hooked(negative, ensemble), **options)
    same(sample(merge(model, ensemble), **options), chain, plain)
    same(sample(composite(model, ensemble), **options), hooks, plain)


def test_cfg1_evaluates_no_negative(loras):
    model = composite(base("SD15"), three(base("SD15"), loras))
    sample(model, cfg=1.0)
    assert [step.rows for step in model.get_attachment(KEY).record.steps] == [3, 3]


class Watching(comfy.controlnet.ControlBase):
    """A control that leaves the picture alone in one place and writes down what it was told."""

    def __init__(self):
        super().__init__()
        self.told: list[tuple[list[int], int, int]] = []

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.told.append((list(transformer_options["cond_or_uncond"]), batched_number, x_noisy.shape[0]))
        return {"input": [], "middle": [torch.full((x_noisy.shape[0], 64, 4, 4), 0.5)], "output": []}

    def copy(self):
        return self


def test_control_sees_the_callers_conds(loras):
    """Guard: host/compose/control.py. Without its view a control is told of conds that its caller never had."""
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    control = Watching()
    positive, negative = SD15.cond(11, control=control), SD15.cond(12, control=control)
    ours = sample(composite(model, ensemble), "SD15", positive, negative)
    assert [sorted(conds) for conds, _, _ in control.told] == [[0, 0, 0, 1, 1, 1]] * 2, "one batch for each step"
    assert [(number, rows) for _, number, rows in control.told] == [(6, 6)] * 2
    control.told.clear()
    hooks = sample(model, "SD15", hooked(positive, ensemble), hooked(negative, ensemble))
    same(ours, hooks, sample(model, "SD15", positive, negative))


@pytest.fixture(scope="module")
def control_model():
    """A ControlNet of ComfyUI's own class, as small as its U-Net."""
    import comfy.cldm.cldm
    import comfy.ops

    net = comfy.cldm.cldm.ControlNet(
        image_size=32, in_channels=4, model_channels=32, hint_channels=3, num_res_blocks=[1, 1], channel_mult=[1, 2],
        transformer_depth=[0, 1], transformer_depth_middle=1, num_heads=4, context_dim=32, legacy=False,
        use_spatial_transformer=True, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    randomize(net, 9)
    return net


def test_real_controlnet(control_model, loras):
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))

    def conds(seed: int) -> list:
        net = comfy.controlnet.ControlNet(control_model, load_device=torch.device("cpu"))
        return SD15.cond(seed, control=net.set_cond_hint(hint, 0.4), control_apply_to_uncond=False)

    positive, negative = conds(11), conds(12)
    plain = sample(model, "SD15", positive, negative)
    assert not torch.allclose(plain, sample(model), rtol=0.1), "the ControlNet must matter"
    same(sample(merge(model, ensemble), "SD15", positive, negative),
         sample(stock(model, ensemble), "SD15", positive, negative), plain)
    same(sample(composite(model, ensemble), "SD15", positive, negative),
         sample(model, "SD15", hooked(positive, ensemble), hooked(negative, ensemble)), plain)


def test_context_windows(loras):
    """A video of three frames, evaluated in windows of two that overlap by one."""
    windows, base_model, kind = comfy.context_windows, base("Wan"), FAMILIES["Wan"]
    model = base_model.clone()
    model.model_options["context_handler"] = windows.IndexListContextHandler(
        windows.get_matching_context_schedule("standard_static"), windows.get_matching_fuse_method("pyramid"),
        context_length=2, context_overlap=1, dim=2)
    layers = shapes(base_model, lambda name: "blocks" in name)
    ensemble = [LoRASpec(loras(lora(layers, seed, 4)), 0.7, 0) for seed in (1, 2, 3)]
    plain = sample(model, "Wan")
    assert not torch.allclose(plain, sample(base_model, "Wan"), rtol=0.1), "the windows must matter"
    same(sample(merge(model, ensemble), "Wan"), sample(stock(model, ensemble), "Wan"), plain)
    hooks = sample(model, "Wan", hooked(kind.cond(11), ensemble), hooked(kind.cond(12), ensemble))
    ours = composite(model, ensemble)
    same(sample(ours, "Wan"), hooks, plain)
    assert [step.calls for step in ours.get_attachment(KEY).record.steps] == [2, 2], "two windows for each step"


@pytest.mark.parametrize("fits", [1, 2, 4])
def test_memory_fit_splitting(fits, loras, monkeypatch):
    """The host splits a batch that does not fit; a branch must not depend on what it shares a batch with."""
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    whole, plain = sample(composite(model, ensemble)), sample(model)
    monkeypatch.setattr(model.model, "memory_required", lambda shape, **_: 0 if shape[0] <= fits else 1e30)
    split = composite(model, ensemble)
    same(sample(split), whole, plain, 1e-4)
    calls = {1: 6, 2: 3, 4: 2}[fits]
    assert [step.calls for step in split.get_attachment(KEY).record.steps] == [calls] * 2


def test_chained_methods_multiply(loras):
    """Composite of two, then Composite of two more: the mean over all four pairs."""
    model = base("SD15")
    layers = shapes(model)
    a, b, c, d = (LoRASpec(loras(lora(layers, seed, 4)), 0.7, 0) for seed in (1, 2, 3, 4))
    chained = composite(composite(model, (a, b)), (c, d))
    pairs = [(x, y) for x in (a, b) for y in (c, d)]

    def hooks(cond: list) -> list:
        out = []
        for pair in pairs:
            (text, first), (_, second) = hooked(cond, pair)
            both = first["hooks"].clone_and_combine(second["hooks"])
            out.append([text, {**first, "hooks": both}])
        return out

    reference = sample(model, "SD15", hooks(SD15.cond(11)), hooks(SD15.cond(12)))
    same(sample(chained), reference, sample(model))
    record = chained.get_attachment(KEY).record
    assert record.methods == ["Composite", "Composite"] and [step.rows for step in record.steps] == [8, 8]


def test_a_merge_below_a_composite(loras):
    """Merge (C) then Composite (A, B): C rides along in both branches, as it does after a stock loader."""
    model = base("SD15")
    layers = shapes(model)
    a, b, c = (LoRASpec(loras(lora(layers, seed, rank)), 0.7, 0) for seed, rank in ((1, 4), (2, 4), (3, 2)))
    below = stock(model, (c,))
    reference = sample(below, "SD15", hooked(SD15.cond(11), (a, b)), hooked(SD15.cond(12), (a, b)))
    same(sample(composite(merge(model, (c,)), (a, b))), reference, sample(model))
    same(sample(composite(below, (a, b))), reference, sample(model))
    same(sample(merge(composite(model, (a, b)), (c,))), reference, sample(model))


def test_stock_loaders_below_and_above(loras):
    """Ordinary LoRA loaders before and after our node still do what they did."""
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    reference, plain = sample(stock(model, ensemble)), sample(model)
    same(sample(stock(method(model, ensemble[:2], Merge), ensemble[2:])), reference, plain)
    same(sample(method(stock(model, ensemble[:2]), ensemble[2:], Merge)), reference, plain)


def test_a_foreign_hook_on_one_cond(loras):
    """A LoRA hook on the positive alone, beside our Composite: hooked conds are batched apart and still expand."""
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    (text, options), = hooked(SD15.cond(11), ensemble[2:])
    ours = sample(composite(model, ensemble[:2]), "SD15", [[text, options]], SD15.cond(12))
    positive = [[text, {**one, "hooks": one["hooks"].clone_and_combine(options["hooks"])}]
                for _, one in hooked(SD15.cond(11), ensemble[:2])]
    reference = sample(model, "SD15", positive, hooked(SD15.cond(12), ensemble[:2]))
    same(ours, reference, sample(model))
