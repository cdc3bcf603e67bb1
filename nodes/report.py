"""Ensemble Report: what a run did, and where each LoRA acted in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..host.look.report import report
from ..host.look.theme import THEMES
from .sockets import schema, theme_input

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from torch import Tensor


class LoRAEnsembleReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleReport",
            display_name="Ensemble Report",
            description="Shows who led at each step, where in the picture each LoRA acted, which of its words were "
            "found in the prompt, what guidance and caches saved, and whatever could not be done as asked.",
            search_aliases=["lora map", "attention map", "lora mask preview", "debug lora", "visualize lora"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that was sampled: the one that the sampler node got."),
                io.Latent.Input(
                    "latent",
                    tooltip="What the sampler made of it: says which run is meant where the MODEL is sampled several "
                    "times, makes this node wait for it, and is handed on.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The decoded picture, or the frames of a film: the maps are laid over it. Leave it "
                    "unconnected to see the maps alone.",
                ),
                theme_input(),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="The latent as it came."),
                io.Image.Output(
                    display_name="IMAGE",
                    tooltip="Who led at each step, what was saved, and a map for each LoRA and picture, bright where "
                    "it acts, with the words that were found.",
                ),
                io.String.Output(display_name="text", tooltip="The record of the run as JSON text."),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, latent: dict, image: Tensor | None = None,
                theme: str = "light") -> io.NodeOutput:
        return io.NodeOutput(latent, *report(model, latent["samples"], image, THEMES[theme]))


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleReport]
