"""What comes into a node over a link or out of an API workflow: refused in words, by the name of its input."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace

import lora_ensemble
import pytest
import torch
from comfy_api.latest import io
from lora_ensemble.nodes.baselines import LoRAEnsembleMerge, LoRAEnsembleSwitch
from lora_ensemble.nodes.border import DYNAMIC, FILES, SOCKETS, guard, shown
from lora_ensemble.nodes.cmlora import LoRAEnsembleCMLoRA
from lora_ensemble.nodes.ensembles import LoRAEnsembleLoRA

from .models import base, small_clip

NODES = asyncio.run(asyncio.run(lora_ensemble.comfy_entrypoint()).get_node_list())
each_node = pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
NONSENSE = (5, "text", 1.5, True, {"a": 1}, [], [["a"]], object(), torch.zeros(0))
GOOD = {"MODEL": lambda: base("SD15"), "CLIP": small_clip, "LATENT": lambda: {"samples": torch.zeros(1, 4, 8, 8)},
        "CONDITIONING": lambda: [[torch.zeros(1, 77, 8), {}]], "IMAGE": lambda: torch.zeros(1, 8, 8, 3),
        "MASK": lambda: torch.zeros(1, 8, 8), "LORA_ENSEMBLE": tuple, "LORA_STACK": list,
        "CLIP_VISION": lambda: SimpleNamespace(encode_image=None), "GUIDANCE_COEFFS": lambda: None}
"""Something that passes for one; coefficients are never before another socket."""


def plain(node) -> dict[str, object]:
    """Something that every widget of a node takes."""
    given = {}
    for part in node.define_schema().inputs:
        if not part.optional and str(part.io_type) not in SOCKETS:
            default = getattr(part, "default", None)
            given[part.id] = default if default is not None else next(iter(getattr(part, "options", None) or ["x"]))
    return given


def required(node) -> list[str]:
    return [part.id for part in node.define_schema().inputs if not part.optional and str(part.io_type) in SOCKETS]


@each_node
def test_what_is_of_another_type_is_refused_by_the_name_of_its_input(node):
    name, widgets = node.GET_SCHEMA().display_name, plain(node)
    sockets = [part for part in node.define_schema().inputs if str(part.io_type) in SOCKETS]
    good = {part.id: GOOD[str(part.io_type)]() for part in sockets if not part.optional}
    for part in sockets:
        for value in NONSENSE:
            if SOCKETS[str(part.io_type)][0](value):
                continue
            with pytest.raises(ValueError) as refused:
                node.execute(**widgets | good | {part.id: value})
            assert type(refused.value) is ValueError
            assert str(refused.value).startswith(f"{name}: {part.id} is ") and "Connect" in str(refused.value)
        if not part.optional and part.io_type != "LORA_STACK":
            with pytest.raises(ValueError, match=f"{part.id} is nothing"):
                node.execute(**widgets | good | {part.id: None})


@each_node
def test_a_link_to_an_input_that_the_node_does_not_have(node):
    """As a workflow of a later version may bring: ComfyUI hands it on."""
    if any(part.kind is part.VAR_KEYWORD for part in inspect.signature(node.execute).parameters.values()):
        return  # the node takes all inputs
    with pytest.raises(ValueError, match="this version of the node has no input 'strange'. .*update LoRA Ensemble"):
        node.execute(**plain(node), strange=5)


@each_node
def test_every_socket_is_one_that_is_checked(node):
    for part in node.define_schema().inputs:
        known = isinstance(part, io.Int.Input | io.Float.Input | io.String.Input | io.Boolean.Input | io.Combo.Input)
        assert known or str(part.io_type) in (DYNAMIC, *SOCKETS), part.id


@each_node
def test_widgets_over_links_are_checked(node):
    """ComfyUI looks at no value that comes over a link."""
    for part in node.define_schema().inputs:
        if str(part.io_type) in SOCKETS:
            continue
        for value in (object(), ["x"], *([] if isinstance(part, io.String.Input) or part.id in FILES else ["no such"])):
            with pytest.raises(ValueError, match=f"{part.id} is "):
                node.execute(**plain(node) | {other: None for other in required(node)} | {part.id: value})


@each_node
def test_an_error_before_the_run_is_shown_once(node):
    """ComfyUI shows a text that is returned once for each argument of the function, and leaves the checks of the
    values of all of them to the node. Others are checked by itself, and by `execute`."""
    asked = inspect.getfullargspec(node.validate_inputs) if "validate_inputs" in vars(node) else None
    if asked is None or asked.varkw is not None:
        return  # none at all, or the node takes all inputs and raises, which is shown once
    parts = {part.id: part for part in node.define_schema().inputs}
    cls, name = asked.args
    assert isinstance(parts[name], io.Combo.Input | io.String.Input)


def test_what_a_node_asks_for_before_the_run_is_checked():
    assert LoRAEnsembleLoRA.validate_inputs(lora_name=None) is True
    assert "lora_name is 5" in LoRAEnsembleLoRA.validate_inputs(lora_name=5)


def test_a_number_that_is_none_is_refused():
    """ComfyUI holds numbers against their range, and a NaN is in any."""
    with pytest.raises(ValueError, match="boundary is nan. It must be a number from 0.0 to 1.0"):
        LoRAEnsembleCMLoRA.execute(**plain(LoRAEnsembleCMLoRA) | {"model": None, "ensemble": None,
                                                                  "boundary": float("nan")})


def test_texts_of_validation_have_no_sign_that_the_front_end_escapes():
    told = shown("LoRA 'a/b.safetensors' isn't in \"x\" & <lora:y> = 'z'")
    assert told == ("LoRA \u201ca\u2215b.safetensors\u201d isn\u2019t in \u201cx\u201d \uff06 \u2039lora:y\u203a "
                    "\uff1d \u201cz\u201d")
    answers = (LoRAEnsembleLoRA.validate_inputs(lora_name="sub/gone.safetensors"),
               LoRAEnsembleSwitch.validate_inputs(order="1/'2"), LoRAEnsembleSwitch.validate_inputs(order=["<b>"]))
    for answer in answers:
        assert isinstance(answer, str) and not set(answer) & set("'\"/&<>`=")


def test_a_long_value_is_not_shown_whole():
    with pytest.raises(ValueError, match="method|mode is") as refused:
        LoRAEnsembleMerge.execute(None, (), "x" * 10**6)
    assert len(str(refused.value)) < 400


def test_a_node_that_takes_all_inputs_checks_them_itself():
    class Whole(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(node_id="Whole", display_name="Whole", category="x", inputs=[io.Model.Input("model")])

        @classmethod
        def validate_inputs(cls, **inputs) -> bool:
            return len(inputs) == 2

        @classmethod
        def execute(cls, model, **others) -> io.NodeOutput:
            return io.NodeOutput(len(others))

    guard(Whole)
    assert Whole.validate_inputs(a=1, b=2) is True and Whole.validate_inputs() is False
    assert Whole.execute(base("SD15"), a=1).args == (1,)
    with pytest.raises(ValueError, match="Whole: model is 5"):
        Whole.execute(5)


@each_node
def test_half_a_character_is_refused_in_words(node):
    """JSON can hold half of an emoji, and tokenizers and files end at it with words that nobody understands."""
    texts = [part for part in node.define_schema().inputs if isinstance(part, io.String.Input)]
    good = {part.id: GOOD[str(part.io_type)]() for part in node.define_schema().inputs
            if str(part.io_type) in SOCKETS and not part.optional}
    for part in texts:
        with pytest.raises(ValueError) as refused:
            node.execute(**plain(node) | good | {part.id: "a dog \ud83d"})
        assert str(refused.value).startswith(f"{node.GET_SCHEMA().display_name}: {part.id} holds half of a character")
        assert "U+D83D" in str(refused.value) and str(refused.value).encode()
