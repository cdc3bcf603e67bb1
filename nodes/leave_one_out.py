"""What did each LoRA do?: the picture without each of the LoRAs, from one seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.utils
from comfy_api.latest import io

from ..host.look.latent import latent_of
from ..host.look.leave_one_out import NODE, leave_one_out
from ..host.look.leave_one_out_sheet import changed, draw, pictures_of
from ..host.look.spectrum import Sampling
from ..host.look.theme import THEMES
from ..methods import method_title
from ..methods.counted import counted
from .guidance import latent_input, schedule_inputs
from .sockets import schema, theme_input

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE


class LoRAEnsembleLeaveOneOut(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleLeaveOneOut",
            display_name=NODE,
            description="Draws the picture with all LoRAs, without each of them in turn, and with none, from one seed, "
            "and measures how much of the model's prediction is each LoRA's own, and where.",
            search_aliases=["compare loras", "lora ablation", "leave one out", "does this lora do anything",
                            "lora contribution", "xy plot lora"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that you sample with: behind the method node that composes "
                               "the LoRAs. It is not changed."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                latent_input(),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                             tooltip="The random seed of the noise, the same for all pictures."),
                *schedule_inputs("As in KSampler."),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="As in KSampler."),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the pictures. Without it they are rough previews."),
                theme_input(),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="All of it on one sheet: the pictures with their "
                                "titles, each LoRA's share, and where it acts."),
                io.Image.Output(display_name="pictures", tooltip="The pictures as a batch: with all LoRAs, without "
                                "each in turn, with none."),
                io.String.Output(display_name="text", tooltip="What was measured, as JSON text."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: ModelPatcher, positive: list, negative: list, latent_image: dict, seed: int, steps: int,
                cfg: float, sampler_name: str, scheduler: str, denoise: float, vae: VAE | None = None,
                theme: str = "light") -> io.NodeOutput:
        colours = THEMES[theme]
        how = Sampling(positive, negative, latent_of(model, latent_image), seed, steps, cfg, sampler_name,
                       scheduler, denoise, latent_image.get("noise_mask"), latent_image.get("batch_index"))
        bar = comfy.utils.ProgressBar(steps)
        found = leave_one_out(model, how, bar.update_absolute)
        pictures, note = pictures_of(found, model, vae)
        about = f"{', '.join(map(method_title, dict.fromkeys(found.methods)))}: {counted(len(found.names), 'LoRA')}, " \
                f"seed {seed}, {counted(steps, 'step')}, cfg {cfg:g}, {sampler_name}; {found.seconds:.1f} s"
        sheet = draw(found, pictures, about, note, colours)
        return io.NodeOutput(sheet, pictures, found.as_json(changed(pictures)))


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleLeaveOneOut]
