"""Layers that the host runs while it prepares a prompt, before any evaluation: LTX-2's connectors, Anima's adapter of
language, MiniMax H3's refiner."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace

import comfy.model_base
import comfy.sample
import comfy.supported_models
import pytest
import torch
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import ALWAYS, LoRASpec
from lora_ensemble.methods.composite import Composite

from .any_model import Config
from .blocks import noise
from .builders import lora, merge, method, same, shapes, stock
from .models import patcher
from .small import like
from .small_video import SMALL
from .test_parity_families import NAME, parts

KINDS = {
    "LTX-2": ("LTXAV", r".*_embeddings_connector\..*"),
    "LTX 2.5": ("LTXAV", r".*_connector\..*|.*caption_proj.*"),
    "Anima": ("Anima", r"llm_adapter\.(?!embed).*"),
    "MiniMax H3": ("MiniMaxH3", r"token_refiner\..*|condition_proj"),
}
"""Small family -> (the host's class of it, its layers for prompts)."""


@pytest.fixture(params=KINDS, scope="module")
def model(request):
    """The MODEL with the host's own preparation of conds."""
    cls, pattern = KINDS[request.param]
    if not hasattr(comfy.model_base, cls):
        pytest.skip(f"this ComfyUI has no {cls}")
    kind = SMALL[request.param]
    if request.param == "LTX 2.5":  # connectors as wide as what they are for, as in its checkpoints
        kind = like(kind, kind.name, connector_attention_head_dim=24, audio_connector_attention_head_dim=12)
    kind = replace(kind, context=(5, 24))  # as text encoders give it
    with torch.inference_mode(False):
        config = Config()
        config.latent_format = getattr(comfy.supported_models, cls).latent_format()
        config.sampling_settings = {"shift": 1.0, "audio_shift": 1.0, "multiplier": 1.0}
        made = getattr(comfy.model_base, cls)(config)
        made.diffusion_model, made.kind, made.pattern = kind.build(), kind, pattern
        return patcher(made.eval())


def drawn(model, steps: int = 2) -> torch.Tensor:
    kind = model.model.kind
    shapes_ = kind.latent if isinstance(kind.latent[0], tuple) else (kind.latent,)
    start = [noise(1, *shape, seed=1 + k) for k, shape in enumerate(shapes_)]
    if len(start) > 1:
        from comfy.nested_tensor import NestedTensor

        start = NestedTensor(start)
    else:
        start = start[0]
    more = {"t5xxl_ids": torch.arange(5), "t5xxl_weights": torch.ones(5)} if kind.name == "Anima" else {}
    conds = [[[noise(1, *kind.context, seed=seed), {"unprocessed_ltxav_embeds": True, **more}]] for seed in (11, 12)]
    with torch.inference_mode():
        return parts(comfy.sample.sample(model, start, steps, 3.0, "euler", "simple", *conds, start * 0, seed=1,
                                         disable_pbar=True))


def prompts(model, loras, **options) -> list[LoRASpec]:
    layers = {f"diffusion_model.{name}": shape for name, shape in
              shapes(model, lambda name: re.fullmatch(model.model.pattern, name) is not None).items()}
    assert layers
    return [LoRASpec(loras(lora(layers, seed, size=1.0, **NAME)), 0.8, 0, **options) for seed in (1, 2)]


def test_merge_is_the_chain_of_loaders(model, loras):
    """Guard: their keys had no effect."""
    ensemble = prompts(model, loras)
    ours = merge(model, ensemble)
    same(drawn(ours), drawn(stock(model, ensemble)), drawn(model))
    assert record_of(ours).problems == []


def test_always_under_a_method_with_branches(model, loras):
    """What is always on acts on the prompt; the LoRAs of the method do not, which is said."""
    always, own = prompts(model, loras, role=ALWAYS)[0], prompts(model, loras)
    ours = method(model, [always, *own], Composite)
    same(drawn(ours), drawn(stock(model, [always])), drawn(model))
    assert [line for line in record_of(ours).problems if "never called" in line]


def test_what_has_a_window_in_time_is_not_in_the_prompt(model, loras):
    """It is prepared once for all steps."""
    ensemble = prompts(model, loras)
    late = replace(ensemble[1], end=0.5)
    ours = merge(model, [ensemble[0], late])
    same(drawn(ours), drawn(stock(model, ensemble[:1])), drawn(model))
    (line,) = record_of(ours).problems
    assert late.name in line and "once for all steps" in line
    ours = merge(model, [late])
    assert torch.equal(drawn(ours), drawn(model))
    assert ["never called" in line for line in record_of(ours).problems] == [True]


def test_nothing_stays_open_where_preparing_fails(model, loras, monkeypatch, nothing_left):
    ours = merge(model, prompts(model, loras))
    monkeypatch.setattr(type(model.model.diffusion_model), "preprocess_text_embeds",
                        lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drawn(ours)
    assert not nothing_left()


def test_the_host_calls_nothing_else_of_a_diffusion_model_on_its_own():
    """Which of its methods the host's base models call beside its forward: a new one would show here."""
    called = set(re.findall(r"self\.diffusion_model\.(\w+)\(", inspect.getsource(comfy.model_base)))
    assert called <= {"requires_grad_", "eval", "to", "load_state_dict", "state_dict", "preprocess_text_embeds"}
