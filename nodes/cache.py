"""The branch cache as a node of its own, for every method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..host.compose.apply import with_cache
from ..host.compose.cache import CacheSpec
from ..methods.schedule import BySteps, NonUniform, Uniform
from .sockets import model_output, sampled_model_input, schema

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

SCHEDULES = ["forecast", "uniform", "CMLoRA"]


class LoRAEnsembleBranchCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleBranchCache",
            display_name="Branch Cache",
            description="Computes the deep layers of every branch only each few steps and foretells them from the last "
            "two in between. Makes Composite, LoRAtorio and other methods with many branches about two times as "
            "fast, at a small loss of exactness.",
            search_aliases=["deepcache", "feature cache", "speed up", "faster sampling", "teacache"],
            inputs=[
                sampled_model_input(),
                io.Combo.Input(
                    "schedule",
                    options=SCHEDULES,
                    default="forecast",
                    tooltip="When everything is computed anew, and what stands in between. forecast: the first two and "
                    "every interval-th step; between them the deep layers' results move on along a straight line. "
                    "uniform: every interval-th step; they are held. CMLoRA: every second step at the start and at the "
                    "end, every third in the middle (37.5 % to 87.5 % of the steps), held; of interval only 0 counts"
                    " then.",
                ),
                io.Int.Input(
                    "interval",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="The steps from one full computation to the next. 0 goes by the number of steps: 15 % of "
                    "them, 5 at most, so 3 of 20, and none of 9 and fewer, whose steps differ too much. 1 turns the "
                    "cache off, 2 is careful, 3 to 5 is fast.",
                ),
                io.Int.Input(
                    "depth",
                    default=2,
                    min=1,
                    max=100,
                    tooltip="How many blocks at either end of the model are computed in every step. More is more "
                    "exact and slower. The deep ones between them come from the cache.",
                ),
                io.Float.Input(
                    "budget",
                    default=0.0,
                    min=0.0,
                    max=0.95,
                    step=0.05,
                    optional=True,
                    tooltip="The share of the model's work that a run may take: 0.5 is half of it. Interval and depth "
                    "are then chosen by counting the operations of whole and partial computations of this very model; "
                    "Ensemble Report says what was chosen. 0: interval and depth as set.",
                ),
            ],
            outputs=[model_output("The model with the cache. Works with any sampler node.")],
        )

    @classmethod
    def execute(
        cls, model: ModelPatcher, schedule: str, interval: int, depth: int, budget: float = 0.0
    ) -> io.NodeOutput:
        uniform, first = schedule != "CMLoRA", 2 if schedule == "forecast" else 1
        given = Uniform(interval, first) if uniform and interval else NonUniform()
        by_steps = budget > 0 or interval == 0
        spec = CacheSpec(BySteps(uniform, first) if by_steps else given, depth=depth, forecast=schedule == "forecast",
                         budget=budget)
        return io.NodeOutput(with_cache(model, spec))


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleBranchCache]
