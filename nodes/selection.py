"""Beside K-LoRA and EST-LoRA: a map of their choices, and the number that EST-LoRA goes by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..host.files.ensemble import Ensemble, on_the_model
from ..host.look.layermap import draw, layer_map
from ..host.look.sheet import as_image
from ..host.look.theme import THEMES
from ..host.look.vision import similarity
from .klora import LoRAEnsembleKLoRA
from .sockets import LoRAEnsemble, schema, theme_input

if TYPE_CHECKING:
    from comfy.clip_vision import ClipVisionModel
    from comfy.model_patcher import ModelPatcher
    from torch import Tensor


class LoRAEnsembleLayerMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleLayerMap",
            display_name="LoRA Layer Map",
            description="Draws which LoRA acts at which layer of the model, and when, under K-LoRA or EST-LoRA. No "
            "sampling needed.",
            search_aliases=["k-lora", "est-lora", "lora layers", "lora blocks", "visualize lora"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL output of K-LoRA or EST-LoRA; with an ensemble connected, "
                                                "a base model."),
                LoRAEnsemble.Input(
                    "ensemble",
                    optional=True,
                    tooltip="Connect it to see what K-LoRA with the paper's settings would do with these LoRAs on the "
                    "model. Leave it unconnected for a model that K-LoRA or EST-LoRA has made.",
                ),
                theme_input(),
            ],
            outputs=[
                io.Image.Output(
                    display_name="IMAGE",
                    tooltip="Layers from top to bottom, progress of the run from left to right, in the colour of the "
                    "LoRA that acts; beside it each layer's ratio of subject to style.",
                ),
                io.String.Output(display_name="text", tooltip="The same as JSON text, one line per layer."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, ensemble: Ensemble | None = None, theme: str = "light") -> io.NodeOutput:
        colours = THEMES[theme]
        if ensemble is not None:
            ensemble = on_the_model(ensemble)
            model = LoRAEnsembleKLoRA.execute(model, ensemble, 1.5, -1.0, "s", "paper", 0, "as applied").args[0]
        found = layer_map(model)
        return io.NodeOutput(as_image(draw(found, colours)), found.as_json())


class LoRAEnsembleStyleDiscrepancy(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleStyleDiscrepancy",
            display_name="Style Discrepancy",
            description="How alike two pictures look to a vision model: one made with the subject LoRA alone and one "
            "with the style LoRA alone, from the same prompt and seed. For EST-LoRA.",
            search_aliases=["est-lora", "image similarity", "clip vision similarity", "dino similarity"],
            inputs=[
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="Any vision model from Load CLIP Vision. The paper uses a DINO model: DINOv2 comes "
                    "closest.",
                ),
                io.Image.Input("subject_image", tooltip="A picture made with the subject LoRA alone."),
                io.Image.Input(
                    "style_image", tooltip="A picture made with the style LoRA alone, from the same prompt and seed."
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="style_discrepancy",
                    tooltip="The cosine of the two pictures' class tokens: 1 for the same picture, towards 0 for "
                    "unrelated ones. Connect it to EST-LoRA.",
                )
            ],
        )

    @classmethod
    def execute(cls, clip_vision: ClipVisionModel, subject_image: Tensor, style_image: Tensor) -> io.NodeOutput:
        return io.NodeOutput(similarity(clip_vision, subject_image, style_image))


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleLayerMap, LoRAEnsembleStyleDiscrepancy]
