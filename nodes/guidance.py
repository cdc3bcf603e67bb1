"""Extrapolated guidance, and Adaptive Guidance and LinearAG (Castillo et al. 2023, arXiv 2312.12487): on a MODEL, as a
GUIDER, as a KSampler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import comfy.samplers
from comfy_api.latest import io

import nodes as host_nodes

from ..host.guidance.apply import apply_guidance, guidance_record_of
from ..host.guidance.options import MODES, GuidanceOptions, guidance_of
from ..methods.guidance.adaptive import SPACES, AdaptiveGuidance
from .sockets import sampled_model_input, schema

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..host.guidance.coeffs import GuidanceCoeffs as Coeffs

GuidanceCoeffs = io.Custom("GUIDANCE_COEFFS")
DECISIONS = ["per picture", "whole batch"]
READ_BACK = ["late", "exact"]
IF_DIFFERENT = ["refuse", "nearest"]
ALIASES = ["cfg", "skip", "adaptive guidance", "extrapolated guidance", "skip cfg", "skip negative", "faster cfg",
           "linear ag", "speed up"]


def guidance_inputs() -> list[io.Input]:
    """The options that the three nodes share."""
    return [
        io.Combo.Input("mode", options=list(MODES), default="extrapolate",
                       tooltip="extrapolate: the negative is evaluated at some steps, and its part of guidance follows "
                       "a straight line in between: saves up to 30 % at nearly the picture of full guidance, needs "
                       "nothing else. threshold: guidance stops where the two predictions are as alike as 'threshold' "
                       "says. "
                       "saving: the threshold is taken from a calibration, so that 'saving' is reached on average. "
                       "LinearAG: in the first half every second negative is predicted, the second half has none; "
                       "saves 37.5 %, needs a calibration."),
        io.Float.Input("threshold", default=0.991, min=-1.0, max=1.1, step=0.000001, round=False,
                       tooltip="Cosine similarity of the predictions with the prompt and with the negative prompt at "
                       "which guidance stops. Depends on the model: 0.991 suits Stable Diffusion 1.5, others start "
                       "above that. Above 1: never. Used in mode 'threshold' alone."),
        io.Float.Input("saving", default=0.3, min=0.0, max=0.5, step=0.01,
                       tooltip="Share of all model evaluations to save, in the modes 'extrapolate' and 'saving'. 0.3 "
                       "suits 16 and more steps; in fewer 'extrapolate' saves less, where fewer steps still would be "
                       "better. 0: full guidance. The paper's mode 'saving' has 0.25."),
        io.Combo.Input("space", options=list(SPACES), default="noise",
                       tooltip="What is compared. noise: the noise or velocity predictions, as in the paper. x0: the "
                       "predicted pictures, as in an older node; thresholds of the two are different numbers."),
        io.Combo.Input("decision", options=DECISIONS, default="per picture",
                       tooltip="per picture: each picture of a batch stops when it is ready, and only those that still "
                       "need the negative pay for it. whole batch: all stop with the last one; choose it where the "
                       "batch is a video's frames."),
        io.Int.Input("min_guided_steps", default=1, min=0, max=10000,
                     tooltip="Steps at the start that are guided whatever the similarity; in mode 'extrapolate' "
                     "those that have the negative in any case, two at least."),
        io.Int.Input("ramp_steps", default=0, min=0, max=10000,
                     tooltip="Steps over which guidance fades out, still at full cost. 0: it stops at once, as in the "
                     "paper. 1 to 3 help where a high cfg leaves a visible jump."),
        io.Combo.Input("read_back", options=READ_BACK, default="late",
                       tooltip="When the similarity reaches the processor. late: one step later, so that a GPU never "
                       "waits; one more negative is evaluated, the picture is the same. exact: at once. Without a GPU "
                       "there is no difference."),
        GuidanceCoeffs.Input("coeffs", optional=True,
                             tooltip="A calibration, from Load Guidance Coefficients or Calibrate Guidance. Needed for "
                             "'saving' and 'LinearAG'."),
        io.Combo.Input("if_different", options=IF_DIFFERENT, default="refuse", optional=True,
                       tooltip="What to do when model, sampler, schedule, steps or cfg differ from the calibration's. "
                       "refuse: stop with a message that says what differs. nearest: use it as well as it fits."),
        io.Float.Input("tolerance", default=0.0, min=0.0, max=10.0, step=0.01, optional=True,
                       tooltip="Mode 'extrapolate': how far the straight line may miss, as a share of the negative's "
                       "part, instead of 'saving'. The negative is evaluated more often where it misses by more. 0: "
                       "as often as 'saving' says; the record then tells by how much it missed."),
    ]  # fmt: skip


def guidance_options(mode: str, threshold: float, saving: float, space: str, decision: str, min_guided_steps: int,
                     ramp_steps: int, read_back: str, coeffs: Coeffs | None, if_different: str,
                     tolerance: float) -> GuidanceOptions:
    """The options of a node as host/ takes them."""
    policy = AdaptiveGuidance(threshold, space, decision == "per picture", min_guided_steps, ramp_steps)
    return GuidanceOptions(mode, policy, saving, read_back == "exact", coeffs, if_different == "nearest", tolerance)


def positive_input() -> io.Input:
    """The CONDITIONING that stays on."""
    return io.Conditioning.Input("positive", tooltip="What the picture should show.")


def negative_input() -> io.Input:
    """The CONDITIONING that guidance does without where it can."""
    return io.Conditioning.Input("negative", tooltip="What it should not show. Evaluated only where it matters.")


def cfg_input(like: str = "") -> io.Input:
    """The scale of guidance."""
    return io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01,
                          tooltip=like or "How strongly the prompt guides while guidance is on. At 1 there is no "
                          "guidance and nothing to save.")


class LoRAEnsembleAdaptiveGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleAdaptiveGuidance",
            display_name="Adaptive Guidance (Skip CFG)",
            description="Evaluates the negative prompt only at some steps, and lets its part of guidance go on in "
            "between: up to 30 % less work at nearly the picture of full guidance. Or stops evaluating it once it no "
            "longer matters (Adaptive Guidance). Works with every sampler and with other guidance nodes. At cfg 1, as "
            "LoRAs for few steps ask for, there is nothing to save.",
            search_aliases=ALIASES,
            inputs=[sampled_model_input(), *guidance_inputs()],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The model with adaptive guidance. Works with any "
                                     "sampler node and guider.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, mode: str, threshold: float, saving: float, space: str, decision: str,
                min_guided_steps: int, ramp_steps: int, read_back: str, coeffs: Coeffs | None = None,
                if_different: str = "refuse", tolerance: float = 0.0) -> io.NodeOutput:
        return io.NodeOutput(apply_guidance(model, guidance_of(guidance_options(
            mode, threshold, saving, space, decision, min_guided_steps, ramp_steps, read_back, coeffs, if_different,
            tolerance))))


class LoRAEnsembleAdaptiveGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleAdaptiveGuider",
            display_name="CFG Guider (Adaptive Guidance)",
            description="CFG Guider with adaptive guidance, for SamplerCustomAdvanced. At cfg 1 there is nothing to "
            "save.",
            search_aliases=[*ALIASES, "cfg guider"],
            inputs=[sampled_model_input(), positive_input(), negative_input(), cfg_input(), *guidance_inputs()],
            outputs=[io.Guider.Output(display_name="GUIDER", tooltip="For the guider input of SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, positive: Any, negative: Any, cfg: float, mode: str, threshold: float,
                saving: float, space: str, decision: str, min_guided_steps: int, ramp_steps: int, read_back: str,
                coeffs: Coeffs | None = None, if_different: str = "refuse", tolerance: float = 0.0) -> io.NodeOutput:
        guider = comfy.samplers.CFGGuider(apply_guidance(model, guidance_of(guidance_options(
            mode, threshold, saving, space, decision, min_guided_steps, ramp_steps, read_back, coeffs, if_different,
            tolerance))))
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)


class LoRAEnsembleKSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleKSampler",
            display_name="KSampler (Adaptive Guidance)",
            description="KSampler that evaluates the negative prompt only where it matters, and reports what it did. "
            "At cfg 1 there is nothing to save.",
            search_aliases=[*ALIASES, "ksampler"],
            inputs=[
                sampled_model_input(),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                             tooltip="The random seed of the noise."),
                *schedule_inputs(),
                positive_input(),
                negative_input(),
                latent_input(),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                               tooltip="How much of the latent is made anew: 1 all of it, less keeps its structure."),
                *guidance_inputs(),
            ],
            outputs=[
                io.Latent.Output(display_name="LATENT", tooltip="The denoised latent."),
                io.String.Output(display_name="RECORD", tooltip="What was evaluated and saved, step by step, as text."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: ModelPatcher, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str,
                positive: Any, negative: Any, latent_image: dict, denoise: float, mode: str, threshold: float,
                saving: float, space: str, decision: str, min_guided_steps: int, ramp_steps: int, read_back: str,
                coeffs: Coeffs | None = None, if_different: str = "refuse", tolerance: float = 0.0) -> io.NodeOutput:
        guided = apply_guidance(model, guidance_of(guidance_options(
            mode, threshold, saving, space, decision, min_guided_steps, ramp_steps, read_back, coeffs, if_different,
            tolerance)))
        (latent,) = host_nodes.common_ksampler(guided, seed, steps, cfg, sampler_name, scheduler, positive, negative,
                                               latent_image, denoise=denoise)
        record = guidance_record_of(guided)
        return io.NodeOutput(latent, record.text() if record is not None else "nothing was sampled")


def schedule_inputs(like: str = "") -> list[io.Input]:
    """KSampler's steps, cfg, sampler and scheduler.

    like   of a node that does not draw the picture itself: what it says of each
    """
    return [
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip=like or "Sampling steps."),
        cfg_input(like),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS,
                       tooltip=like or "The algorithm that removes the noise. Those that evaluate the model several "
                       "times per step are decided once per step."),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS,
                       tooltip=like or "How the noise level falls from step to step."),
    ]  # fmt: skip


def latent_input() -> io.Input:
    """The LATENT to start from."""
    return io.Latent.Input("latent_image", tooltip="The latent to denoise: an empty one, or a picture's.")


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleAdaptiveGuidance, LoRAEnsembleAdaptiveGuider, LoRAEnsembleKSampler]
