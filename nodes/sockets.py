"""The sockets and widgets that several nodes share, each with its one tooltip."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import io

from ..host.compose.placing import PLACES
from ..host.look.theme import THEMES
from .menu import advanced, category

# Schema fields that the oldest supported ComfyUI refuses; leaving them out is harmless.
NEWER_FIELDS = {"search_aliases", "has_intermediate_output"}

LoRAEnsemble = io.Custom("LORA_ENSEMBLE")
LoRAStack = io.Custom("LORA_STACK")
MOST_ROWS = 20
"""Of LoRA Ensemble."""
HIDDEN = [io.Hidden.unique_id, io.Hidden.extra_pnginfo]
"""For `chain.check_chain`."""
TOLD_HERE = True
"""What `not_idempotent` is of nodes that compose: the host does not take the output of an equal node with another id,
as another workflow has, or this one had before its nodes went into a subgraph. The run is told on the node of that id.
"""
SAID_AGAIN = True
"""What `has_intermediate_output` is of nodes that say something and end no workflow: the host sends it from its cache
to a page that has not heard it."""


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
    return schema(inputs=inputs, outputs=[model_output(), clip_output()], not_idempotent=TOLD_HERE,
                  hidden=[io.Hidden.unique_id, io.Hidden.prompt], **fields)


def model_input(tooltip: str = "The base diffusion model, straight from its loader or with other patches on it. It is "
                "not changed.") -> io.Input:
    return io.Model.Input("model", tooltip=tooltip)


def sampled_model_input() -> io.Input:
    """Of a node that stands before the sampler, whatever is on the model."""
    return model_input("The model that you sample with, and all that is on it: LoRAs, methods, guidance nodes. It is "
                       "not changed.")


def clip_input() -> io.Input:
    return io.Clip.Input(
        "clip",
        optional=True,
        tooltip="The text encoder. Connect it where LoRAs change it, and where they act where their words are (Routed "
        "LoRAs, place words), whatever they change: encode the prompts with the CLIP output then. Otherwise it may "
        "stay unconnected.",
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


def ensemble_input() -> io.Input:
    return LoRAEnsemble.Input(
        "ensemble", tooltip="The LoRAs: the last of a chain of LoRA (Ensemble) nodes, a converted stack, or the "
        "ENSEMBLE of LoRA Ensemble."
    )


def earlier_ensemble_input(tooltip: str = "LoRAs that come before this node's. Leave it unconnected to start a new "
                           "ensemble.") -> io.Input:
    return LoRAEnsemble.Input("ensemble", optional=True, tooltip=tooltip)


def theme_input() -> io.Input:
    """The last input of a node that draws a picture of figures."""
    return io.Combo.Input("theme", options=list(THEMES), default="light", optional=True,
                          tooltip="Light or dark paper for the picture. The colours of the LoRAs are ones that "
                          "colour-blind eyes tell apart.")


def strength_input(name: str, tooltip: str, optional: bool = False) -> io.Input:
    """A strength with the range of ComfyUI's own LoRA loader."""
    return io.Float.Input(name, default=1.0, min=-100.0, max=100.0, step=0.01, tooltip=tooltip, optional=optional)


def model_output(tooltip: str = "The model with the LoRAs composed while it samples. Works with any sampler node."
                 ) -> io.Output:
    return io.Model.Output(display_name="MODEL", tooltip=tooltip)


def clip_output() -> io.Output:
    return io.Clip.Output(
        display_name="CLIP",
        tooltip="The text encoder with the LoRAs' changes merged in; encode all prompts with it. "
        "Nothing when no clip is connected.",
    )


def ensemble_output(tooltip: str = "The LoRAs so far, in order. Connect it to the next LoRA or to a method node."
                    ) -> io.Output:
    return LoRAEnsemble.Output(display_name="ENSEMBLE", tooltip=tooltip)
