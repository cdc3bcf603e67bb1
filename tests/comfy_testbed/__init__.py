"""A ComfyUI custom node package for tests and the demo: the testbed's model as an ordinary MODEL, CLIP and VAE."""

from __future__ import annotations

import json
from typing import Any

import torch
from comfy_api.latest import ComfyExtension, io, ui

from .dynamic import fill_layers
from .families import CHECKPOINTS, FAMILIES, guidance_record, kept_bytes, load_checkpoint, load_family
from .vision import load_vision
from .wrap import load_testbed, load_unet

fill_layers()
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # pictures are compared with a CPU's


class LoRAEnsembleTestbedLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRAEnsembleTestbedLoader",
            display_name="Load Testbed",
            category="LoRA Ensemble/testbed",
            description="The small diffusion models of the pack's tests: scenes of 32x32 or, joint, 48x32 pixels.",
            inputs=[io.Combo.Input("body", options=["unet", "joint"], default="unet", optional=True,
                                   tooltip="A U-Net with cross-attention, or ComfyUI's own Flux class, small.")],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, body: str = "unet") -> io.NodeOutput:
        return io.NodeOutput(*load_testbed(body))


class LoRAEnsembleTestbedLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        side = {"default": 32, "min": 16, "max": 256, "step": 4}
        return io.Schema(
            node_id="LoRAEnsembleTestbedLatent",
            display_name="Empty Testbed Latent",
            category="LoRA Ensemble/testbed",
            description="An empty latent of the testbed: 12 channels at half the size in pixels.",
            inputs=[
                io.Int.Input("width", tooltip="In pixels.", **side),
                io.Int.Input("height", tooltip="In pixels.", **side),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures in the batch."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> io.NodeOutput:
        import torch

        return io.NodeOutput({"samples": torch.zeros(batch_size, 12, height // 2, width // 2)})


class LoRAEnsembleTestbedStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRAEnsembleTestbedStack",
            display_name="Testbed LoRA Stack",
            category="LoRA Ensemble/testbed",
            description="A LORA_STACK as the LoRA stackers of other packs make it; unused rows are named None.",
            inputs=[
                io.String.Input("first", default="None", tooltip="A file in models/loras, or None."),
                io.String.Input("second", default="None", tooltip="A file in models/loras, or None."),
            ],
            outputs=[io.Custom("LORA_STACK").Output()],
        )

    @classmethod
    def execute(cls, first: str, second: str) -> io.NodeOutput:
        return io.NodeOutput([(name, 1.0, 1.0) for name in (first, second)])


class LoRAEnsembleTestbedUNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRAEnsembleTestbedUNet",
            display_name="Load Testbed U-Net",
            category="LoRA Ensemble/testbed",
            description="ComfyUI's own U-Net, tiny and with random weights, for the testbed's prompts and latents.",
            inputs=[],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_unet())


class LoRAEnsembleTestbedVision(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRAEnsembleTestbedVision",
            display_name="Load Testbed Vision",
            category="LoRA Ensemble/testbed",
            description="ComfyUI's own CLIP vision model, tiny and with random weights.",
            inputs=[],
            outputs=[io.ClipVision.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(load_vision())


class LoRAEnsembleTestbedFamily(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRAEnsembleTestbedFamily",
            display_name="Load Testbed Family",
            category="LoRA Ensemble/testbed",
            description="ComfyUI's own model of a family, tiny and with random weights, and three random prompts.",
            inputs=[io.Combo.Input("family", options=FAMILIES, tooltip="The architecture.")],
            outputs=[io.Model.Output(), *(io.Conditioning.Output(display_name=f"PROMPT {i}") for i in (1, 2, 3))],
        )

    @classmethod
    def execute(cls, family: str) -> io.NodeOutput:
        return io.NodeOutput(*load_family(family))


class LoRAEnsembleTestbedCheckpoint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRAEnsembleTestbedCheckpoint",
            display_name="Load Testbed Checkpoint",
            category="LoRA Ensemble/testbed",
            description="ComfyUI's own model and text encoder of a family, tiny and with random weights.",
            inputs=[io.Combo.Input("family", options=CHECKPOINTS, tooltip="The architecture."),
                    io.Int.Input("weights", default=0, optional=True, force_input=True,
                                 tooltip="The seed of its weights; a socket takes no row.")],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output(), io.Vae.Output(display_name="SOUND VAE")],
        )

    @classmethod
    def execute(cls, family: str, weights: int = 0) -> io.NodeOutput:
        return io.NodeOutput(*load_checkpoint(family, weights))


class LoRAEnsembleTestbedValue(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRAEnsembleTestbedValue",
            display_name="Testbed Value",
            category="LoRA Ensemble/testbed",
            description="Any value over a link of any type, as other packs' nodes for all types hand them on.",
            inputs=[io.String.Input("text", tooltip="The value as JSON, or the name of an odd tensor.")],
            outputs=[io.AnyType.Output()],
        )

    @classmethod
    def execute(cls, text: str) -> io.NodeOutput:
        import torch

        odd = {"empty": torch.zeros(0, 8, 8), "nan": torch.full((1, 8, 8), float("nan")), "number": torch.tensor(1.0),
               "picture": torch.zeros(1, 8, 8, 3), "no pixel": torch.zeros(1, 0, 0, 3),
               "nan picture": torch.full((1, 8, 8, 3), float("nan")),
               "latent": {"samples": torch.full((1, 12, 16, 16), float("nan"))},
               "no latent": {"samples": torch.zeros(0, 12, 16, 16)}, "flat latent": {"samples": torch.zeros(16)},
               "condition": [[torch.zeros(1, 3, 5), {}]], "no condition": []}
        return io.NodeOutput(odd[text] if text in odd else json.loads(text))


class LoRAEnsembleTestbedRecord(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoRAEnsembleTestbedRecord",
            display_name="Testbed Guidance Record",
            category="LoRA Ensemble/testbed",
            description="What guidance did in the run that made a latent, as JSON.",
            inputs=[
                io.Model.Input("model", tooltip="A model with guidance on it that was sampled."),
                io.Latent.Input("latent", tooltip="What it drew: makes this node wait for the run."),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: Any, latent: dict) -> io.NodeOutput:
        return io.NodeOutput(ui=ui.PreviewText(guidance_record(model)))


class TestbedExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoRAEnsembleTestbedLoader, LoRAEnsembleTestbedLatent, LoRAEnsembleTestbedStack,
                LoRAEnsembleTestbedUNet, LoRAEnsembleTestbedVision, LoRAEnsembleTestbedFamily,
                LoRAEnsembleTestbedCheckpoint, LoRAEnsembleTestbedRecord, LoRAEnsembleTestbedValue]


async def comfy_entrypoint() -> TestbedExtension:
    from aiohttp import web
    from server import PromptServer

    @PromptServer.instance.routes.get("/lora_ensemble_testbed/kept")
    async def kept(request: web.Request) -> web.Response:
        return web.json_response(kept_bytes())

    return TestbedExtension()
