"""LoRAtorio (Foteinopoulou et al. 2025, arXiv 2508.11624)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..host.compose.apply import Active, apply_method
from ..host.compose.placing import Placing
from ..host.files.ensemble import Ensemble
from ..methods.loratorio import LoRAtorio
from .sockets import method_schema

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

UNITS = ["steps", "progress", "timesteps", "auto"]
UPSAMPLING = ["nearest", "bilinear"]
SPACES = ["noise", "x0"]
SCOPES = ["image", "patch"]


class LoRAEnsembleLoRAtorio(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return method_schema(
            node_id="LoRAEnsembleLoRAtorio",
            display_name="LoRAtorio",
            description="Every LoRA and the base model predict each step; patch by patch, the LoRAs that depart most "
            "from the base model get most of the say. Can choose the LoRAs that matter out of a larger pool, and "
            "confine LoRAs to regions by masks.",
            search_aliases=["multi lora", "combine loras", "lora mask", "regional lora", "lora pool", "auto lora"],
            options=[
                io.Int.Input(
                    "patch_size",
                    default=2,
                    min=1,
                    max=64,
                    tooltip="Side of the patches in latent pixels (8 picture pixels each with most models). The paper "
                    "uses 2. Larger patches give calmer, coarser weights.",
                ),
                io.Float.Input(
                    "temperature",
                    default=10.0,
                    min=0.0,
                    max=10000.0,
                    step=0.1,
                    tooltip="How fast the weights sharpen: the inverse temperature is this number times what has "
                    "passed of the run. 0 weighs all LoRAs alike in every step; 10 is the paper's.",
                ),
                io.Combo.Input(
                    "temperature_unit",
                    options=UNITS,
                    default="auto",
                    tooltip="What has passed is counted in sampling steps, in progress from 0 to 1, or in the model's "
                    "timesteps from 0 to 1000. With progress the number of steps does not change the sharpness. auto: "
                    "steps, but a run of fewer than 8 ends as sharp as one of 8.",
                ),
                io.Float.Input(
                    "recenter_lambda",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Re-centred guidance: the LoRAs' share of the negative prediction, the rest is the base "
                    "model's. 1 turns re-centring off. Without a negative pass (cfg 1) there is none.",
                ),
                io.Combo.Input(
                    "upsampling",
                    options=UPSAMPLING,
                    default="nearest",
                    tooltip="From weights per patch to weights per pixel. bilinear softens the edges of patches.",
                ),
                io.Combo.Input(
                    "similarity",
                    options=SPACES,
                    default="noise",
                    tooltip="Predictions are compared as noise (or velocity), as in the paper, or as the denoised "
                    "picture x0.",
                ),
                io.Int.Input(
                    "top_k",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Dynamic selection: only the top_k LoRAs that depart most from the base model take part "
                    "in a step. Choose the number of concepts in the prompt. 0: all LoRAs of the ensemble.",
                ),
                io.Combo.Input(
                    "selection",
                    options=SCOPES,
                    default="image",
                    tooltip="With top_k: choose LoRAs for the whole picture, or for each patch by itself.",
                ),
                io.Int.Input(
                    "recheck_every",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="With top_k: evaluate the whole pool only every so many steps, and between them only the "
                    "LoRAs that were chosen. 1 is the paper: everything at every step.",
                ),
            ],
            later=[
                io.Int.Input(
                    "reweigh_every",
                    default=1,
                    min=1,
                    max=1000,
                    optional=True,
                    tooltip="Weigh the LoRAs anew only every so many steps. 1 is the paper: at every step. With 3 the "
                    "LoRA that leads in a patch has time to finish what it began.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        ensemble: Ensemble,
        patch_size: int,
        temperature: float,
        temperature_unit: str,
        recenter_lambda: float,
        upsampling: str,
        similarity: str,
        top_k: int,
        selection: str,
        recheck_every: int,
        clip: CLIP | None = None,
        place: str = "masks",
        reweigh_every: int = 1,
    ) -> io.NodeOutput:
        def loratorio(active: Active) -> LoRAtorio:
            return LoRAtorio(active.strengths, patch_size, temperature, temperature_unit, recenter_lambda,
                             upsampling, similarity, top_k, selection, recheck_every, reweigh_every)

        return io.NodeOutput(*apply_method(model, clip, ensemble, loratorio, node="LoRAtorio", placing=Placing(place)))


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleLoRAtorio]
