"""A ControlNet works once for all branches of a cond, and the picture is the one that it is when asked for each."""

from __future__ import annotations

from collections.abc import Callable

import comfy.conds
import comfy.controlnet
import comfy.model_patcher
import pytest
import torch
from lora_ensemble.host.compose import control
from lora_ensemble.host.compose.composition import record_of

from .builders import composite, hooked, same, sample, three
from .caches import in_turn, steps_of
from .models import CPU, FAMILIES, base
from .test_scenarios import control_model  # noqa: F401  (a fixture)

SD15 = FAMILIES["SD15"]


def hint(pictures: int = 1, seed: int = 3):
    return torch.rand(pictures, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


class Adapter(torch.nn.Module):
    """What a T2I adapter's model gives: residuals of one row for all."""

    unshuffle_amount = 8

    def forward(self, x):
        pooled = torch.nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 8)
        return {"input": [pooled.expand(-1, 32, -1, -1) * 0.5], "middle": [], "output": []}


@pytest.fixture
def asked(control_model, monkeypatch) -> list[int]:  # noqa: F811
    """Rows of every evaluation of the ControlNet."""
    rows: list[int] = []
    handle = control_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["x"])), with_kwargs=True)
    yield rows
    handle.remove()


@pytest.fixture
def net(control_model) -> Callable:  # noqa: F811
    def make(image=None, strength: float = 0.4, span=(0.0, 1.0)):
        made = comfy.controlnet.ControlNet(control_model, load_device=CPU)
        return made.set_cond_hint(hint() if image is None else image, strength, span)

    return make


def under(control_net, *seeds: int, **options) -> list[list]:
    """Conds under one control, as ControlNetApplyAdvanced puts it on the positive and the negative."""
    return [SD15.cond(seed, control=control_net, control_apply_to_uncond=False, **options) for seed in seeds]


def checked(asked, monkeypatch, positive, negative, loras, make=composite, tolerance=1e-5, **options) -> list[int]:
    """Samples with the control asked once and asked for every branch: the same picture; the rows it was asked for."""
    model, ensemble = base("SD15"), three(base("SD15"), loras)
    ours = make(model, ensemble)
    asked.clear()
    shared = sample(ours, "SD15", positive, negative, **options)
    rows = list(asked)
    with monkeypatch.context() as patched:
        patched.setattr(control, "_is_the_hosts", lambda one: False)
        asked.clear()
        each = sample(ours, "SD15", positive, negative, **options)
    assert sum(asked) > sum(rows) or rows == list(asked)
    same(shared, each, sample(model, "SD15", positive, negative, **options), tolerance)
    return rows


@pytest.mark.parametrize("batch", [1, 2])
def test_once_for_all_branches(batch, asked, net, loras, monkeypatch):
    positive, negative = under(net(), 11, 12)
    rows = checked(asked, monkeypatch, positive, negative, loras, batch=batch)
    assert rows == [2 * batch] * 2, "the two conds of each step, not the six rows of the model"
    if batch == 1:
        model, ensemble = base("SD15"), three(base("SD15"), loras)
        plain = sample(model, "SD15", positive, negative)
        same(sample(composite(model, ensemble), "SD15", positive, negative),
             sample(model, "SD15", hooked(positive, ensemble), hooked(negative, ensemble)), plain)


def test_a_hint_for_each_picture(asked, net, loras, monkeypatch):
    positive, negative = under(net(hint(3)), 11, 12)
    assert checked(asked, monkeypatch, positive, negative, loras, batch=3) == [6] * 2


def test_one_control_after_another(asked, net, loras, monkeypatch):
    """Two ControlNets of which one ends early, and a T2I adapter, whose residuals have one row for all."""
    adapter = comfy.controlnet.T2IAdapter(Adapter(), 3, 8, "nearest-exact", CPU)
    adapter.set_cond_hint(hint(seed=4), 0.7)
    early = net(hint(seed=5), span=(0.0, 0.3)).set_previous_controlnet(adapter)
    positive, negative = under(net().set_previous_controlnet(early), 11, 12)
    rows = checked(asked, monkeypatch, positive, negative, loras, batch=2, steps=3)
    assert rows == [4] * 4, "one in three steps, the other in the first"


def test_a_control_that_has_ended(asked, net, loras, monkeypatch):
    positive, negative = under(net(span=(0.0, 0.3)), 11, 12)
    rows = checked(asked, monkeypatch, positive, negative, loras, steps=4)
    assert 0 < len(rows) < 4 and set(rows) == {2}


@pytest.mark.parametrize("fits", [1, 2, 4])
def test_batches_that_the_host_splits(fits, asked, net, loras, monkeypatch):
    """What is known from one batch serves the next ones of the same call."""
    monkeypatch.setattr(base("SD15").model, "memory_required", lambda shape, **_: 0 if shape[0] <= fits else 1e30)
    positive, negative = under(net(), 11, 12)
    rows = checked(asked, monkeypatch, positive, negative, loras)
    assert sum(rows) == 2 * 2


def test_branches_of_which_some_are_cached(asked, net, loras, monkeypatch):
    """Two batches per step: those that run whole, and those on cached features."""
    positive, negative = under(net(), 11, 12)
    rows = checked(asked, monkeypatch, positive, negative, loras, make=in_turn, steps=4)
    ours = in_turn(base("SD15"), three(base("SD15"), loras))
    sample(ours, "SD15", positive, negative, steps=4)
    assert [step["calls"] for step in steps_of(ours)] == [1, 2, 2, 2] and sum(rows) == 4 * 2


def test_areas(asked, net, loras, monkeypatch):
    """Every area of a prompt has residuals of its own."""
    one = net()
    positive = [*under(one, 21)[0], *under(one, 22, area=(8, 4, 0, 0), strength=0.7, set_area_to_bounds=False)[0]]
    negative = [*under(one, 23)[0], *under(one, 24, area=(8, 4, 0, 0), strength=0.7, set_area_to_bounds=False)[0]]
    assert sum(checked(asked, monkeypatch, positive, negative, loras, batch=2)) == 2 * 4 * 2


def test_an_area_of_one_side_alone(asked, net, loras, monkeypatch):
    """The host makes the other side's prompt one, under the name of the cond that has it (`with_own_names`)."""
    one = net()
    positive = [*under(one, 21)[0], *under(one, 22, area=(8, 4, 0, 0), strength=0.7, set_area_to_bounds=False)[0]]
    assert checked(asked, monkeypatch, positive, under(one, 23)[0], loras) == [2, 2] * 2


def test_conds_under_one_identity_are_not_taken_for_another():
    """As another node may hand them to a call."""
    controls = control.Controls()
    controls.begin([[{"uuid": 1}, {"uuid": 2}], [{"uuid": 1}]], 1)
    for cond, identity in ((1, 10), (2, 20)):
        controls.view(object(), cond, identity)
    assert controls.sources([20]) == [2] and controls.sources([10]) is None and controls.sources([20, 30]) is None


def test_a_control_that_another_pack_has_changed_is_asked_for_all(asked, net, loras):
    """It may look at more than its answer says."""
    changed = net()
    original = changed.get_control
    changed.get_control = lambda *arguments: original(*arguments)
    sample(composite(base("SD15"), three(base("SD15"), loras)), "SD15", *under(changed, 11, 12))
    assert asked == [6, 6]


def test_conds_of_unknown_make_are_asked_for_all():
    """A tensor that does not have the batch's rows and is no constant cannot be narrowed."""
    controls = control.Controls()
    controls.begin([[{"uuid": 1, "model_conds": {"fixed": comfy.conds.CONDConstant(torch.ones(6, 2))}}]], 3)
    cond = {"c_crossattn": torch.arange(6).reshape(6, 1), "fixed": torch.ones(6, 2), "number": 4}
    found = controls.narrowed(cond, [0, 1], 3, 6)
    assert found["c_crossattn"].flatten().tolist() == [0, 1, 2, 3] and found["fixed"].shape == (6, 2)
    assert controls.narrowed({**cond, "other": torch.ones(5)}, [0, 1], 3, 6) is None
    listed = controls.narrowed({"pictures": [torch.ones(6, 1), torch.zeros(6, 2)]}, [2], 3, 6)["pictures"]
    assert [each.shape for each in listed] == [(2, 1), (2, 2)]


def test_shared_residuals_stay_shared():
    """Blocks of a model that take one residual must not make it many."""
    one, other = torch.arange(4.0).reshape(2, 2), torch.ones(1, 2)
    parts = control._split({"input": [one, None, one], "output": [other]}, 2, 1)
    joined = control._joined([parts[0], parts[1], parts[0]], 1)
    assert joined["input"][0] is joined["input"][2] and joined["input"][1] is None
    assert joined["input"][0].tolist() == [[0, 1], [2, 3], [0, 1]] and joined["output"][0].shape == (3, 2)
    parts = control._split({"input": [torch.ones(4, 2), other]}, 2, 2)
    joined = control._joined([parts[0], parts[1], parts[0]], 2)
    assert joined["input"][0].shape == (6, 2) and joined["input"][1] is other, "one row for all stays one"
    assert control._split({"input": [torch.ones(3, 2)]}, 2, 2) is None


def test_on_two_devices(asked, net, loras):
    """Each device asks its own copy, for the rows that it has."""
    if not hasattr(comfy.model_patcher.ModelPatcher, "match_multigpu_clones"):
        pytest.skip("this ComfyUI has no multi-GPU scheduler")
    from .test_multigpu import two_devices

    model, _ = two_devices()
    ensemble = three(model, loras)
    positive, negative = under(net(), 11, 12)
    alone = sample(composite(base("SD15"), ensemble), "SD15", positive, negative)
    both = composite(model, ensemble)
    torch.testing.assert_close(sample(both, "SD15", positive, negative), alone, rtol=1e-4,
                               atol=1e-4 * alone.abs().max().item())
    assert all(step.rows == 6 for step in record_of(both).steps)
