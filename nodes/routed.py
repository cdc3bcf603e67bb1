"""Routed LoRAs: every LoRA where its words are (ours)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..host.compose.apply import apply_method
from ..host.compose.placing import Placing
from ..host.files.ensemble import Ensemble
from ..methods.merge import Merge
from ..methods.routed import MODES, Routing
from .sockets import method_schema

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

NODE = "Routed LoRAs"
TEXTS = ("merged", "own words")
"""What LoRAs change in the text encoder: for all words together, or each for its own alone."""


class LoRAEnsembleRouted(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return method_schema(
            node_id="LoRAEnsembleRouted",
            display_name=NODE,
            description="Every LoRA acts where the picture attends to its words, all in one evaluation: LoRAs keep out "
            "of each other's way, at the price of a merge. Encode the prompts with the CLIP of this node.",
            search_aliases=["multi lora", "combine loras", "regional lora", "lora mask", "two characters",
                            "attention couple", "auto mask"],
            options=[
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="every step",
                    tooltip="When places are found. every step: anew in each step, from the attention of the one "
                    "before. once: at the start. contrast: once, from what a prediction loses without each part of "
                    "the prompt; for models whose attention cannot be read, and costs an evaluation for each part.",
                ),
                io.Float.Input(
                    "gamma",
                    default=2.0,
                    min=0.0,
                    max=16.0,
                    step=0.1,
                    tooltip="How sharply places are divided between the LoRAs and the other words of the prompt. 0: "
                    "every LoRA acts everywhere.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    tooltip="The share of the steps that the base model draws alone, and whose attention says where "
                    "the words are. 0: the LoRAs act from the first step on, and places are found in an evaluation of "
                    "their own before it.",
                ),
                io.String.Input(
                    "blocks",
                    default="",
                    placeholder="auto, or 0.2-0.6",
                    tooltip="Which part of the model's attention is read, from 0 (its first blocks) to 1 (its last): "
                    "0.2-0.6. Empty: as it is known for the kind of model. Look at the maps in the Ensemble Report.",
                ),
            ],
            place=False,
            later=[
                io.Boolean.Input(
                    "trust",
                    default=True,
                    optional=True,
                    tooltip="Let a LoRA out of its place as far as it does little elsewhere anyway: well-made LoRAs "
                    "then act as in a merge, and only those that would change the whole picture are confined. Measured "
                    "where places are first looked for, at no further evaluation. Off: every LoRA keeps to its place.",
                ),
                io.Boolean.Input(
                    "style_yields",
                    default=True,
                    optional=True,
                    tooltip="Where a LoRA of role style lies over one of role background, leave out of the style's "
                    "weights what they share with the background's: both act in one place, and the style would paint "
                    "it over. It costs nothing while sampling. Off: every LoRA acts as its file has it.",
                ),
                io.Combo.Input(
                    "text",
                    options=list(TEXTS),
                    default=TEXTS[0],
                    optional=True,
                    tooltip="What LoRAs that also change the text encoder do to the prompt. merged: all of them change "
                    "all of it. own words: each changes its own words alone, and all other words are encoded without "
                    "it, at the price of one more encoding of the prompt per LoRA and one for the rest.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, blocks: str | None = None) -> bool | str:
        """Checks the notation before the run."""
        try:
            share_of(blocks or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model: ModelPatcher, ensemble: Ensemble, mode: str, gamma: float, start: float, blocks: str,
                clip: CLIP | None = None, trust: bool = True, style_yields: bool = True,
                text: str = TEXTS[0]) -> io.NodeOutput:
        routing = Routing(mode, gamma, start, trust, style_yields)
        return io.NodeOutput(*apply_method(model, clip, ensemble, lambda active: Merge(active.strengths), node=NODE,
                                           placing=Placing("words", routing, share_of(blocks), text == TEXTS[1])))


def share_of(blocks: str) -> tuple[float, float] | None:
    """"0.2-0.6" as numbers, None for nothing. Raises ValueError for anything else."""
    if not blocks.strip() or blocks.strip().lower() == "auto":
        return None
    try:
        first, last = (float(part) for part in blocks.split("-"))
    except ValueError:
        first, last = 1.0, 0.0
    if not 0 <= first <= last <= 1:
        raise ValueError(f"{NODE}: blocks is '{blocks}'. Write two numbers from 0 to 1, as 0.2-0.6, or nothing.")
    return first, last


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleRouted]
