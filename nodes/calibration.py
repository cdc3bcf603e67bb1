"""Calibrate guidance once, save what was found, load it by name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..host.guidance import files
from ..host.guidance.calibrate import Paths, calibrate
from ..host.look.calibration import plot, summary
from ..host.look.latent import latent_of
from ..host.look.theme import THEMES
from .guidance import GuidanceCoeffs, latent_input, schedule_inputs
from .sockets import sampled_model_input, schema, theme_input
from .unused import tell

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..host.guidance.coeffs import GuidanceCoeffs as Coeffs


SAMPLER = "As in the sampler that the calibration is for."


class LoRAEnsembleCalibrateGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleCalibrateGuidance",
            display_name="Calibrate Guidance",
            description="Samples some pictures with full guidance and finds out at which similarity guidance may stop, "
            "and how the negative prediction can be foretold. Done once per model and sampler settings.",
            search_aliases=["adaptive guidance", "linear ag", "guidance threshold", "calibration"],
            inputs=[
                sampled_model_input(),
                io.Conditioning.Input("positive", tooltip="The prompts. Each entry is one: join several with "
                                      "Conditioning (Combine). Five to ten of the kind that you will use are enough."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                latent_input(),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                             tooltip="The first path's seed; the others count on."),
                io.Int.Input("seeds", default=4, min=1, max=10000,
                             tooltip="Paths per prompt. The paper took 200 paths in all; 20 give thresholds, LinearAG "
                             "gains from more."),
                io.Int.Input("batch_size", default=1, min=1, max=4096,
                             tooltip="Paths sampled at the same time, as many as memory allows. The result is the "
                             "same."),
                *schedule_inputs(SAMPLER),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=SAMPLER),
                io.Boolean.Input("second_round", default=False,
                                 tooltip="For LinearAG: sample all paths once more as it does, and fit its predictions "
                                 "to these. Twice the work, closer pictures."),
                io.Boolean.Input("intercept", default=False,
                                 tooltip="For LinearAG: let a constant take part in the prediction. The paper's "
                                 "formula has none."),
                theme_input(),
            ],
            outputs=[
                GuidanceCoeffs.Output(display_name="COEFFS", tooltip="For Adaptive Guidance, and for Save Guidance "
                                      "Coefficients."),
                io.String.Output(display_name="TEXT", tooltip="Thresholds for several savings, and per step the "
                                 "similarity and how much of guidance is foretold."),
                io.Image.Output(display_name="PLOT", tooltip="The similarity of both spaces over the steps."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: ModelPatcher, positive: Any, negative: Any, latent_image: dict, seed: int, seeds: int,
                batch_size: int, steps: int, cfg: float, sampler_name: str, scheduler: str, denoise: float,
                second_round: bool, intercept: bool, theme: str = "light") -> io.NodeOutput:
        colours = THEMES[theme]
        latent = latent_of(model, latent_image)[:1]
        rest = latent_image["samples"].shape[0] - 1 if denoise < 1 else 0
        tell("Calibrate Guidance", [
            *[f"of latent_image the first picture alone is used, not the other {rest}: seeds says how many paths"] * (
                rest > 0),
            *["the mask of latent_image is not used: paths are sampled on the whole picture"] * (
                latent_image.get("noise_mask") is not None)])
        paths = Paths(positive, negative, latent, steps, cfg, sampler_name, scheduler, denoise, seed, seeds, batch_size)
        rounds = len(positive) * math.ceil(seeds / batch_size) * (1 + second_round)
        bar = comfy.utils.ProgressBar(rounds * steps)
        coeffs = calibrate(model, paths, second_round, intercept, lambda: bar.update(1),
                           lambda done, calls: comfy.utils.ProgressBar(calls).update_absolute(done))
        return io.NodeOutput(coeffs, summary(coeffs), plot(coeffs, colours))


class LoRAEnsembleSaveCoeffs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleSaveCoeffs",
            display_name="Save Guidance Coefficients",
            description="Writes a calibration into models/guidance_coeffs, to be loaded by name later.",
            search_aliases=["adaptive guidance", "calibration"],
            is_output_node=True,
            inputs=[
                GuidanceCoeffs.Input("coeffs", tooltip="A calibration, from Calibrate Guidance."),
                io.String.Input("filename", default="sd15_dpmpp_2m_karras_20_cfg7.5",
                                tooltip="Name of the file below models/guidance_coeffs; may hold folders. A number is "
                                "added where the name is taken."),
            ],
            outputs=[io.String.Output(display_name="NAME", tooltip="The name under which it was saved.")],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, filename: str | None = None) -> bool | str:
        """Checks the name and its place before a long calibration; a name that comes over a link is checked during the
        run."""
        try:
            if filename is not None:
                files.check_place(filename)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, coeffs: Coeffs, filename: str) -> io.NodeOutput:
        name = files.save(coeffs, filename)
        return io.NodeOutput(name, ui=ui.PreviewText(f"saved as {name}"))


class LoRAEnsembleLoadCoeffs(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleLoadCoeffs",
            display_name="Load Guidance Coefficients",
            description="Reads a calibration from models/guidance_coeffs.",
            search_aliases=["adaptive guidance", "calibration", "linear ag"],
            inputs=[io.Combo.Input("coeffs_name", options=folder_paths.get_filename_list(files.FOLDER),
                                   tooltip="A file that Save Guidance Coefficients has written.")],
            outputs=[GuidanceCoeffs.Output(display_name="COEFFS", tooltip="For Adaptive Guidance and its sampler and "
                                           "guider.")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, coeffs_name: str | None = None) -> str:
        """Run again when the file has been replaced."""
        return "" if coeffs_name is None else files.fingerprint(coeffs_name)

    @classmethod
    def validate_inputs(cls, coeffs_name: str | None = None) -> bool | str:
        """Checks the file before the run; one named over a link is checked during it."""
        try:
            if coeffs_name is not None:
                files.load(coeffs_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, coeffs_name: str) -> io.NodeOutput:
        return io.NodeOutput(files.load(coeffs_name))


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleCalibrateGuidance, LoRAEnsembleSaveCoeffs, LoRAEnsembleLoadCoeffs]
