"""LoRA Ensemble: its rows, what auto takes, that it does what the methods' own nodes do."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from comfy_api.latest import _io, io
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.files.ensemble import LoRASpec
from lora_ensemble.nodes.border import shown
from lora_ensemble.nodes.ensembles import LoRAEnsembleFromStack, LoRAEnsembleLoRA

from .builders import lora, sample, shapes, stock
from .models import base, small_clip

if not hasattr(io, "DynamicCombo"):
    pytest.skip("this release cannot show rows", allow_module_level=True)

from lora_ensemble.nodes.rows import EMPTY, Row, check_openings, row_inputs, rows_of
from lora_ensemble.nodes.sockets import MOST_ROWS
from lora_ensemble.nodes.stack import AUTO, METHODS, LoRAEnsembleStack, composed, defaults

NODE = LoRAEnsembleStack
FURTHER = ("words", "clip", "role", "mask", "start", "end", "fade")


def sent(**own: object) -> dict[str, object]:
    """The inputs in API format for fields by their own names, each in the row and the `more` that it is in."""
    numbers = [int(name.rpartition("_")[2]) for name in own]
    inputs: dict[str, object] = {}
    for number in range(1, max(numbers, default=1) + 1):
        above = [f"row_{k}" for k in range(2, number + 1)]
        if above:
            inputs[".".join(above)] = own.get(above[-1], "yes")
        mine = {name: value for name, value in own.items()
                if name.endswith(f"_{number}") and not name.startswith("row_")}
        later = {name: value for name, value in mine.items() if name.rpartition("_")[0] in FURTHER}
        more = {f"more_{number}": "yes"} if later else {}
        for name, value in {**more, **mine}.items():
            inputs[".".join([*above, *more, name] if name in later else [*above, name])] = value
    return inputs


def nested(**own: object) -> dict:
    """What `execute` gets for them, by the host's own functions."""
    live = sent(**own)
    inputs, _, data = _io.get_finalized_class_inputs(NODE.INPUT_TYPES(), live)
    known = {**inputs["required"], **inputs["optional"]}
    return _io.build_nested_inputs({key: value for key, value in live.items() if key in known}, data)


@pytest.fixture
def two(loras):
    layers = shapes(base("SD15"))
    return tuple(loras(lora(layers, seed), f"{name}.safetensors") for seed, name in ((1, "a"), (2, "b")))


# --- rows ---


def test_each_row_opens_the_next_one():
    parts = row_inputs(["a.safetensors"])
    for number in range(1, MOST_ROWS + 1):
        names = [f"{field}_{number}" for field in ("on", "lora", "strength", "more")]
        assert [part.id for part in parts] == names + [f"row_{number + 1}"] * (number < MOST_ROWS)
        assert [[option.key for option in part.options] for part in parts[3:]] == [["no", "yes"]] * len(parts[3:])
        assert [part.id for part in parts[3].options[1].inputs] == [f"{field}_{number}" for field in FURTHER]
        assert parts[3].options[0].inputs == [] and parts[-1].options[0].inputs == []
        parts = parts[-1].options[1].inputs


def test_every_field_is_explained_and_optional():
    """The front end shows required fields first, out of their rows."""
    row = row_inputs([])
    for part in (*row, *row[3].options[1].inputs):
        assert part.optional and part.tooltip.endswith("."), part.id


def test_files_are_offered_below_an_empty_row_and_once_per_row():
    part = row_inputs(["a", "b"])[1]
    assert part.options == [EMPTY, "a", "b"] and part.default == EMPTY
    folder = json.dumps(NODE.GET_SCHEMA().get_v1_info(NODE).input)
    assert folder.count('"None"') <= 2 * MOST_ROWS  # as an option and as the default


def test_fields_that_are_left_out_have_their_defaults(two):
    assert rows_of(nested(lora_1=two[0])) == (Row(1, LoRASpec(two[0], 1.0, 1.0)),)


def test_rows_keep_their_order_and_numbers(two):
    rows = rows_of(nested(lora_2=two[1], strength_2=0.8, words_2=" ohwx  woman ", lora_4=two[0],
                          strength_4=-0.5))
    assert rows == (Row(2, LoRASpec(two[1], 0.8, 0.8, words="ohwx woman")), Row(4, LoRASpec(two[0], -0.5, -0.5)))


def test_what_is_closed_is_not_read(two):
    given = nested(lora_1=two[0], row_2="no", lora_2=two[1], lora_3=two[1], more_1="no", role_1="style")
    assert rows_of(given) == (Row(1, LoRASpec(two[0], 1.0, 1.0)),)


def test_the_last_row(two):
    given = nested(**{f"lora_{number}": two[0] for number in (1, MOST_ROWS)}, words_20="ohwx")
    assert rows_of(given) == (Row(1, LoRASpec(two[0], 1.0, 1.0)),
                              Row(MOST_ROWS, LoRASpec(two[0], 1.0, 1.0, words="ohwx")))


def test_more_of_a_row(two):
    given = nested(lora_1=two[0], strength_1=0.5, clip_1=0.5, role_1="style", mask_1=3, start_1=0.25, end_1=0.5,
                   fade_1=0.125)
    spec = LoRASpec(two[0], 0.5, 0.25, "style", start=0.25, end=0.5, fade=0.125)
    assert rows_of(given) == (Row(1, spec, 3),)
    assert rows_of(nested(lora_1=two[0], more_1="yes")) == (Row(1, LoRASpec(two[0], 1.0, 1.0)),)


@pytest.mark.parametrize("name", ["gone.safetensors", "old.ckpt"])
def test_a_row_that_is_off_keeps_its_place_and_needs_no_file(two, name):
    given = nested(on_1=False, lora_1=name, strength_1=0.7, words_1="ohwx", lora_2=two[1])
    assert rows_of(given) == (Row(1, LoRASpec(name, 0.0, 0.0, words="ohwx")), Row(2, LoRASpec(two[1], 1.0, 1.0)))
    assert NODE.validate_inputs(**given) is True
    assert NODE.fingerprint_inputs(**given) != NODE.fingerprint_inputs(**nested(lora_1=two[0]))


@pytest.mark.parametrize(("fields", "words"), [
    ({"lora_2": "gone.safetensors"}, "row 2: LoRA 'gone.safetensors' is not in any"),
    ({"strength_2": float("nan")}, "row 2: strength_2 is nan. It must be a number from"),
    ({"strength_2": 101}, "row 2: strength_2 is 101. It must be a number from"),
    ({"strength_2": "much"}, "row 2: strength_2 is 'much'"),
    ({"clip_2": float("inf")}, "row 2: clip_2 is inf"),
    ({"role_2": "villain"}, "row 2: role_2 is 'villain'. Choose one of: auto"),
    ({"mask_2": -1}, "row 2: mask_2 is -1. It must be a whole number"),
    ({"mask_2": 1.5}, "row 2: mask_2 is 1.5. It must be a whole number"),
    ({"end_2": 1.5}, "row 2: end_2 is 1.5. It must be a number from"),
    ({"start_2": 0.5, "end_2": 0.25}, "row 2: 'b.safetensors': start is 0.5 and end is 0.25"),
])  # fmt: skip
def test_a_wrong_row_is_named_before_the_run(two, fields, words):
    with pytest.raises(ValueError) as refused:
        NODE.validate_inputs(**nested(**{"lora_1": two[0], "lora_2": two[1], **fields}))
    assert f"LoRA Ensemble, {shown(words)}" in str(refused.value)


def test_all_wrong_rows_are_named_at_once(two):
    """As in an example that was just opened, whose files are placeholders."""
    with pytest.raises(ValueError) as refused:
        NODE.validate_inputs(**nested(lora_1="gone.safetensors", lora_2=two[0], lora_3="lost.safetensors"))
    assert [line.split(" is not")[0] for line in str(refused.value).splitlines()] == [
        "LoRA Ensemble, row 1: LoRA “gone.safetensors”", "LoRA Ensemble, row 3: LoRA “lost.safetensors”"]


@pytest.mark.parametrize(("name", "value"), [("row_2", "maybe"), ("row_2", None), ("row_2", ["7", 0]),
                                             ("more_1", True)])
def test_what_opens_nothing_and_is_not_closed_is_refused(two, name, value):
    """The host leaves a choice out that it does not know, and all that belongs to it."""
    inputs = sent(**{"lora_1": two[0], "words_1": "ohwx", "lora_2": two[1], name: value})
    with pytest.raises(ValueError, match=f"LoRA Ensemble: {name} is .*. It must be 'yes' or 'no', and no link"):
        check_openings(inputs)

    class Node(NODE):
        hidden = SimpleNamespace(unique_id="4", prompt={"4": {"inputs": inputs}}, extra_pnginfo=None)

    with pytest.raises(ValueError, match=f"LoRA Ensemble: {name} is "):
        Node.execute(base("SD15"), "Merge", **nested(lora_1=two[0]))


def test_what_comes_over_a_link_is_not_known_before_the_run(two):
    given = nested(lora_1=None, strength_1=None, lora_2=two[1], more_2=None)
    assert rows_of(given) == (Row(2, LoRASpec(two[1], 1.0, 1.0)),)
    assert NODE.validate_inputs(**given, method=None, model=None) is True


def test_an_unknown_method_is_refused(two):
    with pytest.raises(ValueError, match="method is “Blend”. Choose one of: auto, Routed"):
        NODE.validate_inputs(**nested(), method="Blend")
    with pytest.raises(ValueError, match="method is 'Blend'"):
        NODE.execute(base("SD15"), "Blend", **nested(lora_1=two[0]))


def test_the_fingerprint_follows_the_files(two, loras):
    given = nested(lora_1=two[0])
    before = NODE.fingerprint_inputs(**given, model=None)
    assert before == NODE.fingerprint_inputs(**given, model=None)
    loras({"lora_unet_x.lora_up.weight": torch.zeros(3, 3)}, two[0])
    assert before != NODE.fingerprint_inputs(**given, model=None)


# --- masks ---


def test_a_row_takes_its_mask_out_of_the_batch(two):
    masks = torch.stack([torch.full((4, 4), value) for value in (0.25, 0.75)])
    given = nested(lora_1=two[0], mask_1=2, lora_2=two[1])
    ensemble = NODE.execute(base("SD15"), "Merge", **given, masks=masks).args[2]
    assert ensemble[0].mask.tensor.shape == (1, 4, 4) and (ensemble[0].mask.tensor == 0.75).all()
    assert ensemble[1].mask is None


def test_masks_that_no_row_names_are_said(two):
    """Guard: they were connected, and each LoRA acted everywhere."""
    for mask, said in ((0, True), (1, False)):
        given = nested(lora_1=two[0], mask_1=mask)
        out = NODE.execute(base("SD15"), "Merge", **given, masks=torch.eye(4)[None])
        assert ("masks is not used: no row names one of them" in out.ui.as_dict()["text"][0]) is said


@pytest.mark.parametrize("shape", [(6, 4), (1, 1, 6, 4)], ids=["without a batch", "with a channel"])
def test_a_mask_of_other_dimensions_is_one_mask(two, shape):
    masks = torch.rand(shape)
    given = nested(lora_1=two[0], mask_1=1)
    (lora,) = NODE.execute(base("SD15"), "Merge", **given, masks=masks).args[2]
    assert torch.equal(lora.mask.tensor, masks.reshape(1, 6, 4))
    (lora,) = LoRAEnsembleLoRA.execute(two[0], 1.0, 1.0, "auto", mask=masks).args[0]
    assert torch.equal(lora.mask.tensor, masks.reshape(1, 6, 4))
    with pytest.raises(ValueError, match="masks has 1"):
        NODE.execute(base("SD15"), "Merge", **nested(lora_1=two[0], mask_1=2), masks=masks)


@pytest.mark.parametrize(("masks", "words"), [
    (None, "asks for mask 3, and nothing is connected to masks"), (torch.ones(2, 4, 4), "and masks has 2"),
    (torch.full((3, 4, 4), float("nan")), "row 1: the mask for 'a.safetensors' holds values that are no numbers"),
])  # fmt: skip
def test_a_mask_that_there_is_not(two, masks, words):
    given = nested(lora_1=two[0], mask_1=3)
    assert NODE.validate_inputs(**given) is True  # masks are not known yet
    with pytest.raises(ValueError, match=f"LoRA Ensemble, row 1: .*{words.removeprefix('row 1: ')}"):
        NODE.execute(base("SD15"), "Merge", **given, masks=masks)


# --- what it does ---


def test_the_choices_are_all_methods():
    assert list(METHODS) == ["Routed", "Merge", "Switch", "Composite", "CMLoRA", "LoRAtorio", "K-LoRA", "EST-LoRA"]
    assert next(part for part in NODE.define_schema().inputs if part.id == "method").options == [AUTO, *METHODS]


@pytest.mark.parametrize("name", METHODS)
def test_it_does_what_the_node_of_the_method_does(two, name):
    """With every option at its default."""
    model, ensemble = base("SD15"), (LoRASpec(two[0], 0.8, 0.8), LoRASpec(two[1], 0.6, 0.6))
    theirs = METHODS[name].execute(model=model, ensemble=ensemble, **defaults(METHODS[name])).args[0]
    given = nested(lora_1=two[0], strength_1=0.8, lora_2=two[1], strength_2=0.6)
    ours = NODE.execute(model, name, **given).args[0]
    assert torch.equal(sample(ours), sample(theirs)) and not torch.equal(sample(ours), sample(model))
    assert record_of(ours).reasons == []


def test_merge_is_the_stock_chain(two):
    model, ensemble = base("SD15"), (LoRASpec(two[0], 0.8, 0.8), LoRASpec(two[1], 0.6, 0.6))
    given = nested(lora_1=two[0], strength_1=0.8, lora_2=two[1], strength_2=0.6, on_3=False, lora_3=two[0])
    ours, theirs = sample(NODE.execute(model, "Merge", **given).args[0]), sample(stock(model, ensemble))
    assert (ours - theirs).abs().max() < 1e-3 * (theirs - sample(model)).abs().max()


def test_what_comes_before_the_rows(two):
    earlier = (LoRASpec(two[1], 0.3, 0.0, "style"),)
    out = NODE.execute(base("SD15"), "Merge", **nested(lora_1=two[0], on_2=False, lora_2=two[1]),
                       ensemble=earlier, lora_stack=[(two[0], 0.2, 0.1), ("None", 1, 1)])
    _, clip, ensemble, stack = out.args
    assert clip is None
    assert ensemble == (*earlier, LoRASpec(two[0], 0.2, 0.1), LoRASpec(two[0], 1.0, 1.0), LoRASpec(two[1], 0.0, 0.0))
    assert stack == [(two[1], 0.3, 0.0), (two[0], 0.2, 0.1), (two[0], 1.0, 1.0)]
    assert LoRAEnsembleFromStack.execute(stack).args[0] == (LoRASpec(two[1], 0.3, 0.0), *ensemble[1:3])


def test_its_stack_has_names_that_other_nodes_find(two, raw, lora_folder):
    """Guard: `listed`. A workflow from Windows names files with backslashes, which other packs hand to ComfyUI."""
    (lora_folder / "sub").mkdir(exist_ok=True)
    raw((lora_folder / two[0]).read_bytes(), "sub/a.safetensors")
    out = NODE.execute(base("SD15"), "Merge", **nested(lora_1="sub\\a.safetensors"),
                       lora_stack=[(two[0], 0.2, 0.1, "low_conflict")])
    assert all(folder_paths.get_full_path("loras", name) for name, *_ in out.args[3])
    assert "also says low_conflict, which has no effect" in out.ui.as_dict()["text"][0].splitlines()[-1]


def test_a_file_of_a_stack_is_checked():
    with pytest.raises(ValueError, match="gone.safetensors"):
        NODE.execute(base("SD15"), "Merge", **nested(), lora_stack=[("gone.safetensors", 1.0, 1.0)])
    with pytest.raises(ValueError, match="LoRA Ensemble: 3 is not .file, model strength, clip strength."):
        NODE.execute(base("SD15"), "Merge", **nested(), lora_stack=[3])


@pytest.mark.parametrize("fields", [{"row_2": "yes"}, {"on_1": False, "lora_1": "gone.safetensors"},
                                    {"lora_1": "a.safetensors", "strength_1": 0}])
def test_without_a_lora_that_acts_the_model_is_handed_on(two, fields):
    model, clip = base("SD15"), small_clip()
    out = NODE.execute(model, AUTO, **nested(**fields), clip=clip)
    assert out.args[0] is model and out.args[1] is clip and out.args[3] == []
    assert "no LoRA is on" in out.ui.as_dict()["text"][0]


def test_a_file_that_cannot_be_used_is_named_with_its_row(two, loras):
    other = loras({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(4, 3072),
                   "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(9216, 4)}, "flux.safetensors")
    with pytest.raises(ValueError, match="LoRA Ensemble, row 3: Merge LoRAs: LoRA 'flux.safetensors'"):
        NODE.execute(base("SD15"), AUTO, **nested(lora_1=two[0], lora_3=other))


def test_it_says_what_it_took(two, caplog):
    """On the node and in the record of a run."""
    given = nested(lora_1=two[0], strength_1=0.5, words_1="ohwx woman", on_2=False, lora_2=two[1],
                   lora_3=two[1], words_3="sks = a dog", role_3="object")
    with caplog.at_level(logging.INFO, logger="lora_ensemble"):
        out = NODE.execute(base("SD15"), AUTO, **given, clip=small_clip())
    (told,) = out.ui.as_dict()["text"]
    assert told.splitlines() == ["auto: Routed, 2 of 2 LoRAs have words, so each can act where it belongs",
                                 "1  a.safetensors: 0.5, words ohwx woman", "2  b.safetensors: off",
                                 "3  b.safetensors: 1, object, words sks"]
    assert "auto took Routed" in caplog.text
    sample(out.args[0])
    record = json.loads(json.dumps(record_of(out.args[0]).as_dict()))
    assert record["reasons"] == ["LoRA Ensemble took Routed: 2 of 2 LoRAs have words, so each can act where it belongs"]


def test_it_says_what_the_node_of_the_method_would(two):
    """Whose own text this one takes the place of."""
    given = nested(lora_1=two[0], role_1="style", lora_2=two[1], role_2="style")
    (text,) = NODE.execute(base("SD15"), "K-LoRA", **given).ui.as_dict()["text"]
    assert text.splitlines()[:2] == [
        "K-LoRA", "all LoRAs are styles, so there is nothing to choose: set the role of one to a subject"]


def test_routed_names_the_loras_whose_words_nobody_knows(two):
    """They act everywhere; those that should, by their role, are no matter."""
    given = nested(lora_1=two[0], words_1="ohwx", lora_2=two[1], lora_3=two[1], role_3="style")

    def told(method: str) -> list[str]:
        (text,) = NODE.execute(base("SD15"), method, **given, clip=small_clip()).ui.as_dict()["text"]
        return text.splitlines()[1:]

    assert told("Routed") == [
        "1  a.safetensors: 1, words ohwx",
        "2  b.safetensors: 1, no known words, so it acts everywhere: type them (more), or mark them in the prompt",
        "3  b.safetensors: 1, style"]
    assert told("Merge")[1] == "2  b.safetensors: 1"


def test_what_is_set_in_vain_is_told_with_its_row(two):
    """Settings of a row that do nothing beside the others, the method, and what is connected."""
    given = nested(lora_1=two[0], fade_1=0.25, clip_1=0.5, lora_2=two[1], words_2="ohwx", role_2="always", mask_2=1,
                   lora_3=two[0], words_3="sks", start_3=0.25, fade_3=0.25)

    def told(method: str, **sockets) -> list[str]:
        out = NODE.execute(base("SD15"), method, **given, masks=torch.ones(1, 8, 8), **sockets)
        return [line.partition(": ")[2] for line in out.ui.as_dict()["text"][0].splitlines() if line[0].isdigit()]

    fade = "fade is not used: start is 0 and end is 1: the LoRA always acts"
    clip = "clip is not used: no CLIP is connected"
    always, words = "role is always: it acts everywhere", "words are not used: this method does not go by them"
    assert told("Merge") == [f"1, {fade}, {clip}",
                             f"1, always, mask, words ohwx, mask is not used: {always}, words is not used: {always}",
                             f"1, from 0.25 to 1, words sks, {words}"]
    first, _, third = told("Routed", clip=small_clip())
    assert first.endswith(f", {fade}") and third == "1, from 0.25 to 1, words sks"


# --- auto ---


def test_always_alone_is_part_of_the_model(two):
    given = nested(lora_1=two[0], role_1="always")
    model, _, _, _ = NODE.execute(base("SD15"), AUTO, **given).args
    assert not torch.equal(sample(model), sample(base("SD15")))
    assert record_of(model).reasons == ["LoRA Ensemble took Merge: no LoRA takes turns"]


def test_composed_needs_no_rows(two):
    model, clip, told = composed(base("SD15"), None, (LoRASpec(two[0], 1.0, 1.0),), "Switch")
    name, only, lora = told.splitlines()
    assert clip is None and (name, lora) == ("Switch", "1  a.safetensors: 1") and "is the only LoRA to compose" in only
