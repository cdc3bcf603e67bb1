"""The sockets and widgets that several nodes share, each with its one tooltip."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from comfy_api.latest import io

from ..host.compose.routes import PLACES, Placing
from ..host.look.theme import THEMES, Theme
from .menu import advanced, category

# Schema fields that the oldest supported ComfyUI refuses; leaving them out is harmless.
NEWER_FIELDS = {"search_aliases"}

LoRAEnsemble = io.Custom("LORA_ENSEMBLE")
LoRAStack = io.Custom("LORA_STACK")
MOST_ROWS = 20
"""Of LoRA Ensemble."""
HIDDEN = [io.Hidden.unique_id, io.Hidden.extra_pnginfo]
"""For `chain.check_chain` and `said.say`."""


def schema(**fields: Any) -> io.Schema:
    """io.Schema at the node's place in the menu, without those NEWER_FIELDS that the running ComfyUI does not know."""
    unknown = NEWER_FIELDS - set(inspect.signature(io.Schema).parameters)
    later = advanced(fields["node_id"])
    for part in fields.get("inputs", ()):
        if part.id in later:
            part.advanced = True  # ComfyUI 0.3.64 does not look at it and shows the input
    return io.Schema(category=category(fields["node_id"]),
                     **{name: value for name, value in fields.items() if name not in unknown})


def method_schema(*, options: list[io.Input] | None = None, place: bool = True, later: list[io.Input] | None = None,
                  **fields: Any) -> io.Schema:
    """The schema of a method node: model, ensemble, the method's own options, [clip], [place] -> MODEL, CLIP.

    later   options that came with a later version, all optional: workflows that were saved before open as they did
    """
    inputs = [model_input(), ensemble_input(), *(options or []), clip_input()]
    inputs += [*([place_input()] if place else []), *(later or [])]
    return schema(inputs=inputs, outputs=[model_output(), clip_output()], **fields)


def model_input() -> io.Input:
    return io.Model.Input(
        "model",
        tooltip="The base diffusion model, straight from its loader or with other patches on it. It is not changed.",
    )


def clip_input() -> io.Input:
    return io.Clip.Input(
        "clip",
        optional=True,
        tooltip="The text encoder, for LoRAs that also change it: their changes are merged into the CLIP output. "
        "Leave it unconnected for model-only LoRAs.",
    )


def place_input() -> io.Input:
    """The last input of a method node: workflows that were saved before there was one open as they did."""
    return io.Combo.Input(
        "place",
        options=list(PLACES),
        default="masks",
        optional=True,
        tooltip="Where the LoRAs act. masks: in their masks, everywhere without one. words: where the picture attends "
        "to their words, in their masks where they have one; encode the prompts with the CLIP of this node. "
        "everywhere: masks are not used.",
    )


def placing(place: str, node: str) -> Placing:
    """What `apply_method` is told of the input `place`. Raises ValueError for one that there is not."""
    return Placing(chosen(place, PLACES, f"{node}: place"))


def ensemble_input() -> io.Input:
    return LoRAEnsemble.Input(
        "ensemble", tooltip="The LoRAs to compose: the last of a chain of LoRA (Ensemble) nodes, or a converted stack."
    )


def earlier_ensemble_input() -> io.Input:
    return LoRAEnsemble.Input(
        "ensemble",
        optional=True,
        tooltip="LoRAs that come before this one. Leave it unconnected to start a new ensemble.",
    )


def chosen(value: str, options: Sequence[str], what: str) -> str:
    """`value`, if it is one of the options. The host does not check combos that are linked, in older releases none.

    Raises ValueError.
    """
    if value not in options:
        raise ValueError(f"{what} is '{value}'. Choose one of: {', '.join(options)}.")
    return value


def check_numbers(node: type[io.ComfyNode], **values: object) -> None:
    """Refuse what is outside the range of the node's own widget. The host does not check numbers that are linked, and
    takes a NaN for any number.

    Raises ValueError.
    """
    schema = node.define_schema()
    for part in schema.inputs:
        if part.id in values:
            whole, value = isinstance(part, io.Int.Input), values[part.id]
            if not isinstance(value, Integral if whole else Real) or not part.min <= value <= part.max:
                raise ValueError(f"{schema.display_name}: {part.id} is {value!r}. It must be a "
                                 f"{'whole ' if whole else ''}number from {part.min} to {part.max}.")


def theme_input() -> io.Input:
    """The last input of a node that draws a picture of figures."""
    return io.Combo.Input("theme", options=list(THEMES), default="light", optional=True,
                          tooltip="Light or dark paper for the picture. The colours of the LoRAs are ones that "
                          "colour-blind eyes tell apart.")


def theme_of(theme: str, node: str) -> Theme:
    """What the input `theme` means. Raises ValueError for one that there is not."""
    return THEMES[chosen(theme, tuple(THEMES), f"{node}: theme")]


def strength_input(name: str, tooltip: str, optional: bool = False) -> io.Input:
    """A strength with the range of ComfyUI's own LoRA loader."""
    return io.Float.Input(name, default=1.0, min=-100.0, max=100.0, step=0.01, tooltip=tooltip, optional=optional)


def model_output() -> io.Output:
    return io.Model.Output(
        display_name="MODEL", tooltip="The model with the LoRAs composed while it samples. Works with any sampler node."
    )


def clip_output() -> io.Output:
    return io.Clip.Output(
        display_name="CLIP",
        tooltip="The text encoder with the LoRAs' changes merged in; encode all prompts with it. "
        "Nothing when no clip is connected.",
    )


def ensemble_output() -> io.Output:
    return LoRAEnsemble.Output(
        display_name="ENSEMBLE", tooltip="The LoRAs so far, in order. Connect it to the next LoRA or to a method node."
    )
