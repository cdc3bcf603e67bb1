"""A budget of the Branch Cache: operations counted without weights, and what a run makes of them, on real ComfyUI."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import pytest
import torch
from comfy.ldm.modules.attention import attention_basic
from lora_ensemble.host.compose.apply import with_cache
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.families import work
from lora_ensemble.host.families.split_points import split_point_of
from lora_ensemble.methods.schedule import BySteps, Uniform
from lora_ensemble.nodes.cache import LoRAEnsembleBranchCache
from torch.utils.flop_counter import FlopCounterMode

from .builders import composite, sample, three
from .caches import steps_of
from .models import FAMILIES, base, build, patcher, randomize

COUNTED = {"optimized_attention_override": lambda _, *args, **kwargs: attention_basic(*args, **kwargs)}
"""torch's counter does not know the product that ComfyUI's attention takes on a processor."""
DEEPER = {"Flux": dict(depth=3, depth_single_blocks=5), "Wan": dict(num_layers=7), "SD3": dict(depth=6)}
"""The small families with enough blocks for several depths."""


def family_of(name: str):
    family = FAMILIES[name]
    return replace(family, config=family.config | DEEPER.get(name, {}))


def of(name: str):
    family = family_of(name)
    if name == "SD3":  # its text is as wide as its blocks
        wide = {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 6 * 64}}
        family = replace(family, config=family.config | {"context_embedder_config": wide})
    model = build(family)
    randomize(model)
    return family, model


def operations(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["SD15", "SDXL", "SD3", "Flux", "Wan"])
def test_operations_are_those_of_real_calls(name):
    """torch's own counter around whole and partial calls of the model itself."""
    family, model = of(name)
    root, rows = model.diffusion_model, 2
    x, t = family.noise(rows), torch.full((rows,), 0.6)
    context = torch.randn(rows, 5, family.context)
    pooled = family.config.get("adm_in_channels") or family.config.get("vec_in_dim")
    conds = {"y": torch.randn(rows, pooled)} if family.pooled else {}
    conds |= {"guidance": torch.full((rows,), 3.5)} if name == "Flux" else {}
    found = work.work_of(model, root, x, t, None, context, {}, conds)

    def call(options: dict) -> int:
        return operations(lambda: model._apply_model(x, t, None, context, None, options, **conds))

    assert found.whole == call(COUNTED)
    depth, seen = 1, {}
    while not isinstance(split := split_point_of(root, depth), str):
        caught: dict = {}
        call(split.capture(COUNTED, caught))
        with split.reuse(caught, None, COUNTED) as (_, changed):
            seen[depth] = call(changed)
        depth += 1
    assert found.cut == seen and len(seen) >= 2
    assert list(found.shares.values()) == sorted(found.shares.values()) and found.shares[1] < 0.6
    assert work.work_of(model, root, x, t, None, context, {}, dict(conds)) is found, "counted once"
    if name == "Flux":  # Guard: reference pictures come in a list
        more = [work.work_of(model, root, x, t, None, context, {}, {**conds, "ref_latents": [family.noise(rows, size)]})
                for size in (4, 8)]
        assert found.whole < more[0].whole < more[1].whole


def budget(model, share: float, schedule: str = "forecast", interval: int = 0, depth: int = 2):
    return LoRAEnsembleBranchCache.execute(model, schedule, interval, depth, share).args[0]


@pytest.mark.parametrize(("name", "schedule"), [("SD15", "forecast"), ("Flux", "uniform"), ("SD15", "CMLoRA")])
def test_a_run_takes_what_was_expected(name, schedule):
    """Operations of the whole run, counted by torch's counter, and the run that interval and depth would have given."""
    family, model = of(name)
    model = patcher(model)
    model.model_options["transformer_options"] = dict(COUNTED)

    def run(model) -> int:
        return operations(lambda: outs.append(sample(model, name, steps=20)))

    outs: list = []
    ours = budget(model, 0.6, schedule)
    sample(ours, name, steps=20)  # in which its operations are counted
    plain, spent = run(model), run(ours)
    assert torch.equal(sample(budget(model, 0.6, schedule, 4, 1), name, steps=20), outs[-1]), "they are not used"
    (line,) = record_of(ours).chosen
    words = line.split()
    depth, expected = int(words[words.index("depth") + 1].rstrip(";")), float(words[words.index("together") + 1])
    assert spent / plain == pytest.approx(expected / 100, abs=0.02) and expected <= 60
    interval = int(line.partition("interval is ")[2][0]) if schedule != "CMLoRA" else 9
    given = LoRAEnsembleBranchCache.execute(model, schedule, interval, depth).args[0]
    assert torch.equal(sample(given, name, steps=20), outs[1]) and not torch.equal(*outs)
    whole = [step["reused"] == 0 for step in steps_of(ours)]
    assert f"{sum(whole)} steps whole" in line and record_of(ours).problems == []


def test_less_than_can_be_had():
    model = base("SD15")
    ours = budget(model, 0.05)
    sample(ours, steps=20)
    (line,) = record_of(ours).chosen
    assert "interval is 5, depth 1;" in line and line.endswith("; less than that cannot be had")


def test_few_steps_have_nothing_to_spend(loras):
    model = composite(base("SD15"), three(base("SD15"), loras))
    ours = budget(model, 0.5)
    assert torch.equal(sample(ours, steps=8), sample(model, steps=8))
    (line,) = record_of(ours).problems
    assert "8 steps" in line and "nothing is reused, whatever the budget of 0.5" in line


def test_a_model_that_cannot_be_cut():
    model = base("SD3")  # of one block
    ours = budget(model, 0.5)
    assert torch.equal(sample(ours, "SD3", steps=12), sample(model, "SD3", steps=12))
    assert any("the budget of 0.5 is not used" in line for line in record_of(ours).problems)
    assert record_of(ours).chosen == []


def test_a_model_that_cannot_be_counted(monkeypatch):
    """Interval and depth are then those of a node without a budget."""
    _, model = of("SD15")
    monkeypatch.setattr(model.model_config, "unet_config", {"never": "heard"})
    model = patcher(model)
    ours = budget(model, 0.5, depth=1)
    assert torch.equal(sample(ours, steps=20), sample(budget(model, 0.0, depth=1), steps=20))
    (line,) = record_of(ours).problems
    assert "cannot be counted" in line and "depth is 1" in line


def test_values_of_saved_workflows_mean_what_they_did():
    model = base("SD15")
    for values, spec in ((("forecast", 4, 2), CacheSpec(Uniform(4, 2), depth=2, forecast=True)),
                         (("uniform", 0, 2), CacheSpec(BySteps(), depth=2))):
        for more in ((), (0.0,)):
            made = LoRAEnsembleBranchCache.execute(model, *values, *more).args[0]
            assert made.get_attachment("lora_ensemble").cache == spec
    for wrong in (dict(schedule=Uniform(3), budget=0.5), dict(schedule=BySteps(), budget=1.0),
                  dict(schedule=BySteps(), budget=-0.1)):
        with pytest.raises(ValueError, match="a budget is a share"):
            with_cache(model, CacheSpec(**wrong))


@pytest.mark.parametrize("reason", [torch.OutOfMemoryError, comfy.model_management.InterruptProcessingException])
def test_what_says_nothing_of_the_model_is_not_remembered_of_it(reason, monkeypatch):
    """Guard: a lack of memory or the user's interrupt while operations are counted, taken for a model that cannot be
    counted, for as long as it lives."""
    family, model = of("SD15")
    call = model, model.diffusion_model, family.noise(1), torch.full((1,), 0.6), None, torch.randn(1, 5, family.context)

    def stopped(*_):
        raise reason

    with monkeypatch.context() as patched:
        patched.setattr(work, "_counted", stopped)
        with pytest.raises(reason):
            work.work_of(*call, {}, {})
    assert isinstance(work.work_of(*call, {}, {}), work.Work)
