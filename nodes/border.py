"""The border between ComfyUI and the nodes: what comes in is held against the schema before a node sees it.

ComfyUI checks a workflow's numbers and combos where they are typed in, but nothing that comes over a link, takes a NaN
for any number, and lets an API workflow put a text or a number where a MODEL belongs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..host.files.ensemble import LoRASpec
from ..host.guidance.coeffs import GuidanceCoeffs
from .sockets import MOST_ROWS
from .unused import nothing_out, tell, unused

DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
"""The type of a combo whose choices open further inputs."""


def guard(node: type[io.ComfyNode]) -> None:
    """Check all inputs of a node against its schema before `execute`; what is set in vain is told afterwards. Where the
    node has a `validate_inputs`, what that asks for is checked before the run, and its answer is one that the front end
    can show.

    Both say in words which input is wrong, what it is and what it must be, `execute` by a ValueError.

    ComfyUI calls `validate_inputs` with those inputs alone that it names, leaves all checks of their values to it, and
    shows a text that it returns once for each of them: it is to name the one that its text is about.
    """
    execute, parts = node.execute.__func__, {part.id: part for part in node.define_schema().inputs}
    signature = inspect.signature(execute)
    rest = next((name for name, each in signature.parameters.items() if each.kind is each.VAR_KEYWORD), None)

    @functools.wraps(execute)
    def checked(cls, *args: Any, **kwargs: Any) -> io.NodeOutput:
        schema = cls.define_schema()
        if rest is None and (strange := sorted(kwargs.keys() - signature.parameters.keys())):
            # ComfyUI hands on what is linked, whether or not the schema names it.
            raise ValueError(f"{schema.display_name}: this version of the node has no input {_brief(strange[0])}. The "
                             "workflow was made for another one: update LoRA Ensemble, or remove that link.")
        bound = signature.bind(cls, *args, **kwargs)
        given = {**bound.arguments, **bound.arguments.get(rest, {})}
        for part in sorted(schema.inputs, key=_socket):
            if part.id in given:
                check(schema.display_name, part, given[part.id])
        out = execute(*bound.args, **bound.kwargs)
        tell(schema.display_name, [*unused(schema, given), *nothing_out(cls.hidden, schema, given)])
        return out

    node.execute = classmethod(checked)
    if "validate_inputs" not in vars(node):
        return
    validate = node.validate_inputs.__func__
    if inspect.getfullargspec(validate).varkw is not None:
        return  # it takes all inputs and checks them itself

    @functools.wraps(validate)
    def answered(cls, **typed: Any) -> bool | str:
        try:
            for key, value in typed.items():
                if value is not None:  # a link, or an optional input that is not there
                    check(cls.define_schema().display_name, parts[key], value)
        except ValueError as error:
            return shown(str(error))
        answer = validate(cls, **typed)
        return shown(answer) if isinstance(answer, str) else answer

    answered.__signature__ = inspect.signature(validate)  # ComfyUI asks for the names, of this function itself
    node.validate_inputs = classmethod(answered)


def check(node: str, part: io.Input, value: object) -> None:
    """Refuse what an input cannot be.

    node   display name of the node, for the message
    Raises ValueError.
    """
    if value is None and part.optional and (_socket(part) or isinstance(part, io.String.Input)):
        return
    if isinstance(part, io.Int.Input | io.Float.Input):
        whole = isinstance(part, io.Int.Input)
        if not isinstance(value, Integral if whole else Real) or not part.min <= value <= part.max:
            raise ValueError(f"{node}: {part.id} is {_brief(value)}. It must be a {'whole ' if whole else ''}number "
                             f"from {part.min} to {part.max}.")
    elif isinstance(part, io.String.Input):
        if not isinstance(value, str):
            raise ValueError(f"{node}: {part.id} is {_brief(value)}. It must be a text.")
        if half := next((char for char in value if "\ud800" <= char <= "\udfff"), None):
            raise ValueError(f"{node}: {part.id} holds half of a character (U+{ord(half):X}), which nothing can read "
                             "or save: a program has cut an emoji in two. Take that character out, or type it again.")
    elif isinstance(part, io.Boolean.Input):
        if not isinstance(value, Integral):
            raise ValueError(f"{node}: {part.id} is {_brief(value)}. It must be true or false.")
    elif isinstance(part, io.Combo.Input):
        # A list of files is as old as the page; the node itself says what is wrong with a file.
        if not isinstance(value, str) or part.id not in FILES and value not in part.options:
            raise ValueError(f"{node}: {part.id} is {_brief(value)}. Choose one of: {_options(part)}.")
    elif str(part.io_type) == DYNAMIC:
        if not isinstance(value, Mapping):  # which the host makes of a choice that it knows
            keys = ", ".join(option.key for option in part.options)
            raise ValueError(f"{node}: {part.id} is {_brief(value)}. Choose one of: {keys}.")
    elif (socket := SOCKETS.get(str(part.io_type))) is not None:
        fits, words = socket
        if not fits(value):
            raise ValueError(f"{node}: {part.id} is {'nothing' if value is None else _brief(value)}. Connect {words}.")


FILES = ("lora_name", "coeffs_name", *(f"lora_{number}" for number in range(1, MOST_ROWS + 1)))


def _options(part: io.Combo.Input) -> str:
    return "the files in the list" if part.id in FILES else ", ".join(map(str, part.options))


def _tensor(dimensions: tuple[int, ...]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, torch.Tensor) and value.ndim in dimensions


def _conditioning(value: object) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], dict) for entry in value)


SOCKETS: dict[str, tuple[Callable[[object], bool], str]] = {
    "MODEL": (lambda value: isinstance(value, ModelPatcher), "a MODEL: a loader, or a node that patches one"),
    "CLIP": (lambda value: hasattr(value, "tokenize") and hasattr(value, "clone"),
             "a CLIP: there is no text encoder where a checkpoint has none; load one with a CLIP loader"),
    "CLIP_VISION": (lambda value: hasattr(value, "encode_image"), "a CLIP_VISION, from Load CLIP Vision"),
    "CONDITIONING": (_conditioning, "a CONDITIONING, such as CLIP Text Encode makes"),
    "VAE": (lambda value: callable(getattr(value, "decode", None)) and callable(getattr(value, "encode", None)),
            "a VAE: that of a checkpoint, or Load VAE"),
    "LATENT": (lambda value: isinstance(value, dict) and hasattr(value.get("samples"), "shape"),
               "a LATENT: an empty one, an encoded picture, or what a sampler made"),
    "IMAGE": (lambda value: _tensor((4,))(value) and value.numel() > 0, "an IMAGE with at least one pixel"),
    "MASK": (_tensor((2, 3, 4)), "a MASK"),
    "LORA_ENSEMBLE": (lambda value: isinstance(value, list | tuple) and all(isinstance(e, LoRASpec) for e in value),
                      "an ENSEMBLE: the last of a chain of LoRA (Ensemble) nodes, or a converted stack"),
    "LORA_STACK": (lambda value: value is None or isinstance(value, list | tuple),
                   "a LORA_STACK output of a LoRA stacker or manager"),
    "GUIDANCE_COEFFS": (lambda value: isinstance(value, GuidanceCoeffs),
                        "Load Guidance Coefficients or Calibrate Guidance"),
}
"""Type of a socket -> whether a value is one, and what to connect."""


def _socket(part: io.Input) -> bool:
    return str(part.io_type) in SOCKETS


def _brief(value: object) -> str:
    """A value as a message shows it: short ones as they are, others by their type."""
    if value is None or isinstance(value, str | int | float):
        return repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."
    return f"of the type {type(value).__name__}"


_LOOKALIKES = str.maketrans({"/": "\u2215", "&": "\uff06", "<": "\u2039", ">": "\u203a", "=": "\uff1d", "`": "\u2019"})


def shown(text: str) -> str:
    """A message as the front end can show it: it escapes quotes, slashes and the signs of HTML three times, so that a
    reader would see `&amp;#x27;`. Quotes become typographic ones, the others signs that look like them."""
    out, opened = [], {}
    for before, sign in zip(" " + text, text, strict=False):
        if sign in "'\"":
            apostrophe = sign == "'" and not opened.get(sign) and before.isalnum()
            out.append("\u2019" if apostrophe else "\u201d" if opened.get(sign) else "\u201c")
            opened[sign] = not apostrophe and not opened.get(sign)
        else:
            out.append(sign)
    return "".join(out).translate(_LOOKALIKES)
