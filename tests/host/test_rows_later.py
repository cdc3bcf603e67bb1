"""Rows of LoRA Ensemble on later releases, which have groups of rows (`io.DynamicGroup`): a stand-in with their rule
for what a row may hold. The rows stay as they are, and so do workflows that were saved on any release."""

from __future__ import annotations

import pytest
from comfy_api.latest import _io, io

if not hasattr(io, "DynamicCombo"):
    pytest.skip("this release cannot show rows", allow_module_level=True)

from lora_ensemble.nodes.rows import row_inputs, rows_of
from lora_ensemble.nodes.stack import LoRAEnsembleStack


class DynamicGroup(_io.ComfyTypeI):
    """As of ComfyUI's later releases: a list of rows, each of the same plain widgets."""

    io_type = "COMFY_DYNAMICGROUP_V3"

    class Input(_io.DynamicInput):
        def __init__(self, id: str, template: list[io.Input], min: int = 0, max: int = 50) -> None:
            for part in template:
                assert isinstance(part, _io.WidgetInput) and not isinstance(part, _io.DynamicInput), part.id
            super().__init__(id)
            self.template, self.min, self.max = template, min, max


@pytest.fixture
def later(monkeypatch):
    monkeypatch.setattr(io, "DynamicGroup", DynamicGroup, raising=False)
    monkeypatch.setattr(_io, "DynamicGroup", DynamicGroup, raising=False)


def own(number: int) -> list[io.Input]:
    """What one row holds, without the next one."""
    return [part for part in row_inputs(["a.safetensors"], number) if part.id != f"row_{number + 1}"]


def test_a_row_is_no_template_of_a_group(later):
    """Its further settings wait behind `more`, which opens them; the rest would do."""
    with pytest.raises(AssertionError, match="more_1"):
        io.DynamicGroup.Input("loras", own(1))
    assert io.DynamicGroup.Input("loras", [part for part in own(1) if part.id != "more_1"]).template


def test_rows_are_the_same_on_releases_with_groups(monkeypatch, later):
    with_groups = LoRAEnsembleStack.INPUT_TYPES()
    monkeypatch.undo()
    assert LoRAEnsembleStack.INPUT_TYPES() == with_groups
    assert "COMFY_DYNAMICGROUP_V3" not in repr(with_groups)


def test_what_was_saved_without_groups_is_read_with_them(later, monkeypatch):
    monkeypatch.setattr("lora_ensemble.nodes.rows.check_file", lambda name: None)
    saved = {"on_1": True, "lora_1": "a.safetensors", "strength_1": 0.5, "more_1": "no", "row_2": "yes",
             "row_2.on_2": True, "row_2.lora_2": "b.safetensors", "row_2.more_2": "yes", "row_2.more_2.role_2": "style"}
    schema, _, data = _io.get_finalized_class_inputs(LoRAEnsembleStack.INPUT_TYPES(), saved)
    assert set(saved) <= {**schema["required"], **schema["optional"]}.keys()
    rows = rows_of(_io.build_nested_inputs(saved, data))
    assert [(row.spec.name, row.spec.strength_model, row.spec.role) for row in rows] == [
        ("a.safetensors", 0.5, "auto"), ("b.safetensors", 1.0, "style")]
