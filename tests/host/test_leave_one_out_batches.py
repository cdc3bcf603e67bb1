"""What did each LoRA do?: how many pictures are in a batch, nodes that call with others, cancelling, refusals."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import numpy as np
import pytest
import torch
from lora_ensemble.host.compose.composition import KEY
from lora_ensemble.host.compose.without import AnotherBatch, Without, silent
from lora_ensemble.host.files.ensemble import ALWAYS, LoRASpec
from lora_ensemble.host.look import leave_one_out as looking
from lora_ensemble.host.look.leave_one_out import leave_one_out
from lora_ensemble.kernels.branch import Branch

from .any_model import any_model, latent_of, prompt_of
from .blocks import noise
from .builders import lora, merge, sample, three
from .models import base
from .small import like
from .small_video import HUNYUAN
from .test_leave_one_out import STEPS, gap, how, picture
from .test_parity_families import NAME, layers_of


def test_less_memory_means_smaller_batches(loras, monkeypatch):
    model, given = base("SD15"), how()
    ours, whole = merge(model, three(model, loras)), None
    for error in (None, torch.OutOfMemoryError("test")):
        calls, real = [], looking._sampled

        def sampled(*args, error=error, calls=calls, real=real):
            calls.append(len(args[3]))
            if error is not None and len(args[3]) > 2:
                raise error
            return real(*args)

        monkeypatch.setattr(looking, "_sampled", sampled)
        found = leave_one_out(ours, given)
        monkeypatch.setattr(looking, "_sampled", real)
        whole = whole or found
        assert calls == ([5] if error is None else [5, 3, 2, 2, 1])
    assert found.batches == [2, 2, 1] and found.why == "memory is short" and found.steps == whole.steps
    assert all(gap(a, b) < 1e-4 for a, b in zip(found.latents, whole.latents, strict=True))
    assert np.allclose(found.shares, whole.shares, rtol=1e-3) and torch.allclose(found.maps, whole.maps, atol=1e-3)
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_: 1)
    assert leave_one_out(ours, given).batches == [1] * 5


def test_a_node_that_calls_with_some_of_the_pictures(loras):
    """Each has then a run of its own; before, rows would have been those of other pictures."""
    model, given = base("SD15"), how()
    ensemble = three(model, loras)
    ours = merge(model, ensemble)

    def in_parts(args):
        whole = comfy.samplers.calc_cond_batch
        rows = [whole(args["model"], args["conds"], args["input"][k:k + 1], args["sigma"][k:k + 1],
                      args["model_options"]) for k in range(len(args["input"]))]
        return [torch.cat(each) for each in zip(*rows, strict=True)]

    ours.model_options = {**ours.model_options, "sampler_calc_cond_batch_function": in_parts}
    found = leave_one_out(ours, given)
    assert found.batches == [1] * 5 and "calls the model" in found.why
    assert gap(found.latents[1], picture(merge(model, ensemble[1:]), given)) < 1e-4
    with pytest.raises(AnotherBatch):
        Without((frozenset(), frozenset({(0, 1)}))).rows(0, [Branch((1.0, 1.0))], 3)


def test_a_model_that_takes_one_picture_at_a_time(loras):
    """Guard: `one_row_only`. With more the host's own forward fails, or adds one picture's guidance to another's."""
    model = any_model(like(HUNYUAN, "reference", lambda rows: {"ref_latent": noise(rows, 16, 1, 8, 8)}))
    ours = merge(model, [LoRASpec(loras(lora(layers_of(model), seed, **NAME)), 0.8, 0) for seed in (1, 2)])
    found = leave_one_out(ours, how(positive=prompt_of(model, 11), negative=prompt_of(model, 12), cfg=1.0, steps=2,
                                    latent=torch.zeros_like(latent_of(model, 1))))
    assert found.batches == [1] * 4 and "HunyuanVideo takes one picture at a time" in found.why


def test_silent_branches():
    branch = Branch((1.0, 2.0, 3.0), (("a", (4.0, 5.0, 6.0)),))
    assert silent(branch, frozenset({1})) == Branch((1.0, 0.0, 3.0), (("a", (4.0, 0.0, 6.0)),))
    assert silent(branch, frozenset()) is branch
    rows = Without((frozenset(), frozenset({(1, 0)}))).rows(1, [branch, Branch((1.0, 1.0, 1.0))], 2)
    assert rows == [branch, silent(branch, frozenset({0})), Branch((1.0, 1.0, 1.0)), Branch((0.0, 1.0, 1.0))]
    assert Without().rows(0, [branch], 3) == [branch] * 3


def test_progress_and_cancelling(loras, caplog):
    caplog.set_level("INFO")
    model, told = base("SD15"), []
    ours = merge(model, three(model, loras))
    leave_one_out(ours, how(sampler="lcm"), lambda done, total: told.append((done, total)))
    assert told == [(k, 5 * STEPS) for k in range(1, 5 * STEPS + 1)]
    assert f"5 pictures of {STEPS} steps, 1 at a time" in caplog.text, "what it takes, before it begins"

    def cancel(done, total) -> None:
        comfy.model_management.interrupt_current_processing(done >= 10)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        leave_one_out(ours, how(), cancel)
    comfy.model_management.interrupt_current_processing(False)
    assert ours.get_attachment(KEY).runs == [] and "forward" not in vars(
        next(m for m in model.model.diffusion_model.modules() if isinstance(m, torch.nn.Linear)))


def test_the_model_is_not_changed(loras):
    model = base("SD15")
    ours = merge(model, three(model, loras))
    sample(ours, steps=2)
    record = ours.get_attachment(KEY).record
    options = repr(ours.model_options)
    leave_one_out(ours, how())
    assert ours.get_attachment(KEY).record is record and ours.get_attachment(KEY).without == Without()
    assert repr(ours.model_options) == options


def test_models_without_loras_are_refused(loras):
    model = base("SD15")
    always = merge(model, tuple(replace(spec, role=ALWAYS) for spec in three(model, loras)))
    for other in (model, always):
        with pytest.raises(ValueError, match="has no LoRAs that can be left out. Connect the MODEL output"):
            leave_one_out(other, how())


def test_nothing_to_sample_is_refused(loras):
    """Guard: four equal pictures came out, and shares of 0."""
    model = merge(base("SD15"), three(base("SD15"), loras))
    with pytest.raises(ValueError, match="at denoise 0 nothing is sampled.* Set denoise"):
        leave_one_out(model, how(denoise=0.0))
