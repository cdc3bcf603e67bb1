"""Which branch the layers that prepare prompts get; `test_prepared_texts.py` shows it in models."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from types import SimpleNamespace

import pytest
from lora_ensemble.host.compose import prepared
from lora_ensemble.host.compose.applied import Applied
from lora_ensemble.host.compose.prepared import act_on_prompts
from lora_ensemble.host.compose.without import Without
from lora_ensemble.kernels.branch import Branch
from lora_ensemble.methods.composite import Composite
from lora_ensemble.methods.merge import Merge
from lora_ensemble.methods.windows import Window
from torch import nn

BOTH, NONE, ALL = Branch((0.5, 0.25)), Branch((0.0, 0.0)), Without()


def rows_of(monkeypatch, applied: Applied, regions=None, without: Without = ALL, model=None, **patched) -> list:
    seen, options = [], []
    routed = SimpleNamespace(bank=SimpleNamespace(count=2), rows=lambda rows: seen.extend(rows) or nullcontext())
    monkeypatch.setattr(prepared, "routed_on", lambda run, patcher, given: options.append(given) or [routed])
    patcher = SimpleNamespace(model=SimpleNamespace(diffusion_model=model or SimpleNamespace(
        preprocess_text_embeds=None)), wrappers={"apply_model": {}}, **patched)
    joined = SimpleNamespace(methods=(0,), branch=lambda row, count: row[0])
    act_on_prompts(SimpleNamespace(applied=[applied], banked=[joined], regions=[regions], without=without,
                                   texts=ExitStack()), patcher)
    assert all(given["wrappers"] is patcher.wrappers for given in options), "by which a compiled model is known"
    return seen


@pytest.mark.parametrize(("applied", "more", "row"), [
    (Applied(Merge((0.5, 0.25)), ("a", "b")), {}, BOTH),
    (Applied(Composite((0.5, 0.25)), ("a", "b")), {}, NONE),
    (Applied(Merge((0.5, 0.25)), ("a", "b")), {"regions": object()}, NONE),  # it has no places
    (Applied(Merge((0.5, 0.25)), ("a", "b"), windows=(Window(), Window(end=0.5))), {}, Branch((0.5, 0.0))),
    (Applied(Merge((0.5, 0.25)), ("a", "b")), {"without": Without((frozenset({(0, 0)}),))}, Branch((0.0, 0.25))),
])
def test_what_acts_at_all_times_and_places_acts_on_prompts(applied, more, row, monkeypatch):
    assert rows_of(monkeypatch, applied, **more) == [row]


def test_who_prepares_prompts(monkeypatch):
    """One device for all, and only models that do."""
    applied = Applied(Merge((0.5, 0.25)), ("a", "b"))
    assert rows_of(monkeypatch, applied, is_multigpu_base_clone=True) == []
    assert rows_of(monkeypatch, applied, model=nn.Linear(2, 2)) == []
    assert rows_of(monkeypatch, applied, model=SimpleNamespace(
        _orig_mod=SimpleNamespace(preprocess_text_embeds=None))) == [BOTH]
