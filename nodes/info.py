"""LoRA Info: what each LoRA is and does on a model, before a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.model_management
from comfy_api.latest import io, ui

from ..host.compose.loading import check_some
from ..host.files.ensemble import Ensemble
from ..host.files.files import changes
from ..host.look.info import draw, infos, told
from ..host.look.sheet import as_image
from ..host.look.theme import THEMES
from .said import say
from .sockets import ensemble_input, schema, theme_input

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

NODE = "LoRA Info"


class LoRAEnsembleInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleInfo",
            display_name=NODE,
            description="What each LoRA is and would do on a model, before anything is sampled: trigger words, kind, "
            "rank, layers, what is left out and why, and how strongly it changes each block.",
            search_aliases=["trigger words", "lora metadata", "lora inspector", "analyse lora", "lora block weight",
                            "does this lora work"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The base diffusion model that the LoRAs shall act on."),
                ensemble_input(),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, to see whether the LoRAs change it."),
                theme_input(),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="A curve per LoRA: how much of their size the weights of "
                                                              "each block change; the text below."),
                io.String.Output(display_name="text", tooltip="The same as text, a paragraph per LoRA."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> str:
        """Run again when a file has been replaced; which ones are in the ensemble is not known yet."""
        return str(changes())

    @classmethod
    def execute(cls, model: ModelPatcher, ensemble: Ensemble, clip: CLIP | None = None, theme: str = "light"
                ) -> io.NodeOutput:
        colours, kind = THEMES[theme], type(getattr(model.model, "model_config", model.model)).__name__
        check_some(ensemble, NODE)
        found = infos(model, clip, ensemble, NODE, comfy.model_management.throw_exception_if_processing_interrupted)
        text = told(found, kind)
        say(text)
        return io.NodeOutput(as_image(draw(found, kind, colours)), text, ui=ui.PreviewText(text))


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleInfo]
