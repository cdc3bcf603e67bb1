"""LoRA Spectrum: which frequencies a LoRA works on (CMLoRA, Zou et al. 2025, arXiv 2502.04923)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import comfy.samplers
import comfy.utils
from comfy_api.latest import io

from ..host.files.ensemble import Ensemble
from ..host.look.latent import latent_of
from ..host.look.spectrum import Sampling, plot, profiles, report, with_measured_roles
from ..host.look.theme import THEMES
from .sockets import ensemble_input, ensemble_output, model_input, schema, theme_input
from .unused import tell

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class LoRAEnsembleSpectrum(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleSpectrum",
            display_name="LoRA Spectrum",
            description="Samples one picture with each LoRA alone and measures the high frequencies of the latent at "
            "every step: a plot, a table, and the class of each LoRA for CMLoRA.",
            search_aliases=["frequency", "fft", "analyse lora", "lora profile"],
            inputs=[
                model_input(),
                ensemble_input(),
                io.Conditioning.Input("positive", tooltip="A prompt with the trigger words of all LoRAs."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size you work with."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The noise, the same for every LoRA.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps per picture."),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01,
                               tooltip="Scale of the guidance."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="As in KSampler."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="As in KSampler."),
                theme_input(),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="The high-frequency share over progress, by LoRA."),
                io.String.Output(display_name="report", tooltip="The same as a table, with the class of each LoRA."),
                ensemble_output("The same LoRAs for CMLoRA: those of role auto that were measured to smooth the "
                                "picture have become background."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        ensemble: Ensemble,
        positive: list,
        negative: list,
        latent_image: dict,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        theme: str = "light",
    ) -> io.NodeOutput:
        colours = THEMES[theme]
        how = Sampling(positive, negative, latent_of(model, latent_image), seed, steps, cfg, sampler_name,
                       scheduler, numbers=latent_image.get("batch_index"))
        pictures = 1 + sum(spec.composed for spec in ensemble)
        bar = comfy.utils.ProgressBar(steps * pictures)
        found = profiles(model, ensemble, how, lambda: bar.update(1))
        tell("LoRA Spectrum", ["masks are not used here: each LoRA is measured on the whole picture"] * any(
            spec.mask is not None and spec.strength_model for spec in ensemble))
        return io.NodeOutput(plot(found, colours), report(found), with_measured_roles(ensemble, found))


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleSpectrum]
