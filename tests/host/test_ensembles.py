"""The nodes that make an ensemble: a chain of LoRAs, the files on them, and stacks of other packs."""

from __future__ import annotations

import re

import folder_paths
import pytest
import torch
from lora_ensemble.host.files.ensemble import ROLES, LoRASpec
from lora_ensemble.host.files.files import path_of
from lora_ensemble.nodes.ensembles import LoRAEnsembleFromStack, LoRAEnsembleLoRA, from_stack, left_out


@pytest.fixture
def two(loras):
    """The names of two LoRA files that pass the check of their header."""
    return tuple(loras({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, f"{name}.safetensors") for name in "ab")


# --- a chain ---


def test_loras_chain_in_order(two):
    first = LoRAEnsembleLoRA.execute(two[0], 1.0, 0.5, "character").args[0]
    both = LoRAEnsembleLoRA.execute(two[1], 0.7, 0.0, "style", ensemble=first).args[0]
    assert both == (LoRASpec(two[0], 1.0, 0.5, "character"), LoRASpec(two[1], 0.7, 0.0, "style"))
    assert first == both[:1]


@pytest.mark.parametrize("mask, word", [(torch.zeros(0, 8, 8), "no pixels"), (torch.ones(1, 0, 0), "no pixels"),
                                        (torch.tensor([[[1.0, float("nan")]]]), "no numbers")])
def test_a_mask_that_confines_nothing_is_refused_by_the_name_of_its_lora(two, mask, word):
    with pytest.raises(ValueError, match=rf"LoRA \(Ensemble\): the mask for '{two[0]}' .*{word}"):
        LoRAEnsembleLoRA.execute(two[0], 1.0, 1.0, "auto", mask=mask)


def test_a_new_ensemble_offers_every_role_and_the_range_of_the_stock_loader():
    from nodes import LoraLoader

    inputs = {part.id: part for part in LoRAEnsembleLoRA.GET_SCHEMA().inputs}
    assert tuple(inputs["role"].options) == ROLES and inputs["role"].default == "auto"
    for name in ("strength_model", "strength_clip"):
        _, stock = LoraLoader.INPUT_TYPES()["required"][name]
        assert {key: stock[key] for key in ("default", "min", "max", "step")} == {
            key: getattr(inputs[name], key) for key in ("default", "min", "max", "step")
        }


def test_a_good_file_passes_and_a_linked_name_is_not_known_yet(two):
    assert LoRAEnsembleLoRA.validate_inputs(lora_name=two[0]) is True
    assert LoRAEnsembleLoRA.validate_inputs(lora_name=None) is True


def test_bad_files_are_refused_before_the_run_by_name(two, lora_folder):
    whole = (lora_folder / two[0]).read_bytes()
    (lora_folder / two[0]).write_bytes(whole[:-3])
    (lora_folder / two[1]).write_bytes(b"<html>please log in</html>" * 9)
    for name, word in ((two[0], "truncated"), (two[1], "not a safetensors file"), ("gone.safetensors", "not in any")):
        answer = LoRAEnsembleLoRA.validate_inputs(lora_name=name)
        assert isinstance(answer, str) and name in answer and word in answer


def test_the_fingerprint_follows_the_file(two, loras):
    before = LoRAEnsembleLoRA.fingerprint_inputs(lora_name=two[0], strength_model=1.0)
    assert before == LoRAEnsembleLoRA.fingerprint_inputs(lora_name=two[0], strength_model=1.0)
    loras({"lora_unet_x.lora_up.weight": torch.zeros(3, 3)}, two[0])
    assert before != LoRAEnsembleLoRA.fingerprint_inputs(lora_name=two[0], strength_model=1.0)


# --- stacks of other packs ---


def test_a_stack_keeps_order_and_strengths_and_loses_empty_rows(two):
    stack = [(two[1], 0.8, 0.3), ("None", 1.0, 1.0), [two[0], -1, 0], (None, 1.0, 1.0), ("", 1, 1)]
    earlier = (LoRASpec("earlier.safetensors", 1.0, 1.0, "style"),)
    ensemble = LoRAEnsembleFromStack.execute(stack, ensemble=earlier).args[0]
    assert ensemble == (*earlier, LoRASpec(two[1], 0.8, 0.3), LoRASpec(two[0], -1.0, 0.0))


def test_full_paths_become_names(two, lora_folder):
    full = str(lora_folder / two[0])
    assert folder_paths.get_full_path("loras", two[0]) == full
    assert from_stack([(full, 1.0, 1.0)], "a stack") == (LoRASpec(two[0], 1.0, 1.0),)


def test_a_full_path_whose_name_means_another_file_is_refused(two, lora_folder, tmp_path, monkeypatch):
    """Guards: of two folders with a file of one name, the first one's was taken, without a word."""
    later = tmp_path / two[0]
    later.write_bytes((lora_folder / two[1]).read_bytes())
    folders, endings = folder_paths.folder_names_and_paths["loras"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([*folders, str(tmp_path)], endings))
    with pytest.raises(ValueError, match=f"a stack: .*{re.escape(str(later))}' has no name of its own.*Rename"):
        from_stack([(str(later), 1.0, 1.0)], "a stack")
    assert from_stack([(lora_folder / two[0], 1.0, 1.0)], "a stack") == (LoRASpec(two[0], 1.0, 1.0),)
    other = later.rename(tmp_path / "other.safetensors")
    assert from_stack([(str(other), 1.0, 1.0)], "a stack") == (LoRASpec("other.safetensors", 1.0, 1.0),)


def test_an_empty_stack_adds_nothing():
    assert LoRAEnsembleFromStack.execute([]).args[0] == ()


def test_a_stacker_that_is_off_and_rows_that_are_none_add_nothing(two):
    assert LoRAEnsembleFromStack.execute(None).args[0] == ()
    assert from_stack([None, (two[0], 1.0, 1.0), None], "a stack") == (LoRASpec(two[0], 1.0, 1.0),)


@pytest.mark.parametrize("entry", [("a.safetensors", 1.0), ("a.safetensors", "strong", 1.0), 3, {"name": "a"},
                                   ("a.safetensors", float("nan"), 1.0), ("a.safetensors", 1.0, 1e30)])
def test_what_is_no_stack_entry_is_refused(entry):
    with pytest.raises(ValueError, match="LORA_STACK output"):
        from_stack([entry], "a stack")


def test_names_of_a_stack_may_be_as_prompts_write_them(two, raw, lora_folder):
    """Those that are read from a prompt have no extension; Lora-Manager's text has no folder, either."""
    (lora_folder / "sub").mkdir(exist_ok=True)
    content = (lora_folder / two[0]).read_bytes()
    only = raw(content, "sub/only one, v1.2.safetensors")
    for name in ("only one, v1.2", "only one, v1.2.safetensors", "sub/only one, v1.2",
                 "sub\\only one, v1.2.safetensors"):
        (lora,) = LoRAEnsembleFromStack.execute([(name, 1.0, 1.0)]).args[0]
        assert path_of(lora.name) == path_of(only)
    raw(content, "only one, v1.2.sft")
    raw(content, "sub/twice.safetensors")
    raw(content, "sub/twice.sft")
    with pytest.raises(ValueError, match="'twice' is not in any"):
        LoRAEnsembleFromStack.execute([("twice", 1.0, 1.0)])


def merging(lora_name: str, strength: float, conflict_mode: str) -> dict:
    """An entry as LoRA-Optimizer's *LoRA Stack* makes it."""
    return {"name": lora_name, "lora": {"a layer": torch.zeros(2)}, "strength": strength,
            "conflict_mode": conflict_mode, "key_filter": "all", "metadata": {}}


def test_stacks_that_say_more_than_strengths(two):
    """LoRA-Optimizer's, whose two stackers say how to merge as well."""
    stack = [(two[0], 0.8, 0.3, "low_conflict", "all"), merging(two[1], 0.5, "all"), ("None", 1.0, 1.0, "all", "all"),
             (two[1], 1.0, 1.0)]
    assert LoRAEnsembleFromStack.execute(stack).args[0] == (
        LoRASpec(two[0], 0.8, 0.3), LoRASpec(two[1], 0.5, 0.5), LoRASpec(two[1], 1.0, 1.0))
    assert left_out(stack) == [f"{two[0]}: its stack also says low_conflict, all, which has no effect here",
                               f"{two[1]}: its stack also says all, all, which has no effect here"]


def test_what_a_stack_says_besides_is_told(two, caplog):
    LoRAEnsembleFromStack.execute([(two[0], 0.8, 0.3, "low_conflict")])
    assert "also says low_conflict, which has no effect" in caplog.text


def test_a_stack_without_a_file_is_told_without_its_tensors():
    with pytest.raises(ValueError, match="extracted from a model.* is not in any"):
        LoRAEnsembleFromStack.execute([merging("<extracted from a model>", 1.0, "all")])
    with pytest.raises(ValueError, match=r"\['lora'\] is not \(file") as refused:
        from_stack([{"lora": {"a layer": torch.zeros(2)}}], "a stack")
    assert "tensor" not in str(refused.value)


def test_a_missing_file_of_a_stack_is_named():
    with pytest.raises(ValueError, match="gone.safetensors"):
        LoRAEnsembleFromStack.execute([("gone.safetensors", 1.0, 1.0)])
