"""CMLoRA (Zou et al. 2025, arXiv 2502.04923)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..host.compose.apply import Active, apply_method, with_cache
from ..host.compose.cache import CacheSpec
from ..host.compose.composition import KEY
from ..host.compose.placing import Placing
from ..host.files.ensemble import Ensemble
from ..methods.cmlora import CMLoRA
from ..methods.frequency import LOW_FREQUENCY
from ..methods.schedule import AgeBySteps, oldest
from .sockets import method_schema

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

ORDERS = ["offline", "online", "async", "Switch-A"]
DECAYS = ["none", "halving", "linear"]
FULL = ["every_step", "on_refresh"]
FEATURES = ["held", "forecast"]


class LoRAEnsembleCMLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return method_schema(
            node_id="LoRAEnsembleCMLoRA",
            display_name="CMLoRA (Cached Multi-LoRA)",
            description="LoRAs take turns in the lead; all predict each step, the leader with the largest weight and "
            "from scratch, the others from cached deep features. "
            "LoRAs with fine detail (characters, clothing, styles, objects) lead early, backgrounds late.",
            search_aliases=["multi lora", "combine loras", "lora turns", "cached multi-lora", "lora cache"],
            options=[
                io.Combo.Input(
                    "order",
                    options=ORDERS,
                    default="offline",
                    tooltip="Who leads. offline: backgrounds after the boundary, all others before it. online: the "
                    "others as long as the latent has enough fine detail. async: all in turn, a tenth of the run "
                    "each. Switch-A: only the leader acts, backgrounds join after the boundary.",
                ),
                io.Float.Input(
                    "boundary",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="For offline and Switch-A: the share of the run after which backgrounds get the lead.",
                ),
                io.Float.Input(
                    "threshold",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="For online: the high-frequency share of the latent below which backgrounds lead. LoRA "
                    "Spectrum shows how it falls.",
                ),
                io.Float.Input(
                    "dominance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How many times the leader's weight is another LoRA's. 1: all alike, as Composite. 0: the "
                    "paper's number, which is the number of LoRAs less 0.5.",
                ),
                io.Combo.Input(
                    "decay",
                    options=DECAYS,
                    default="none",
                    tooltip="Dominance over the run, each time c1 or c2 steps have passed. none: it stays, as in the "
                    "authors' program. halving: less 1, then 1/2, 1/4 and so on. linear: less 0.5, 1, 1.5 and so on. "
                    "It does not fall below all alike.",
                ),
                io.Int.Input(
                    "c1",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Steps until the lead passes on, in the first 37.5 % and the last 12.5 % of the run. 0: "
                    "the paper's 2, and 1 where there are too few steps for every LoRA to lead. With async the lead "
                    "goes by tenths, and c1 and c2 are for decay and the cache alone.",
                ),
                io.Int.Input(
                    "c2",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Steps until the lead passes on, in the middle of the run. 0: the paper's 3, and fewer "
                    "where there are too few steps for every LoRA to lead.",
                ),
                io.Combo.Input(
                    "dominant_full",
                    options=FULL,
                    default="every_step",
                    tooltip="With a cache: whether the leader is computed whole in every step, as in the paper, or "
                    "only when the lead passes on, as in the authors' program.",
                ),
                io.Int.Input(
                    "steps_per_lora",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="For Switch-A: sampling steps before the next LoRA takes over. 0 goes by the number of "
                    "steps, as Switch does; backgrounds then begin right after the boundary.",
                ),
                io.Int.Input(
                    "cache_depth",
                    default=3,
                    min=0,
                    max=100,
                    tooltip="Blocks at either end of the model that a LoRA computes while it does not lead; the deep "
                    "ones between them come from a cache. More is more exact and slower. 0: no cache, every LoRA is "
                    "computed whole in every step.",
                ),
            ],
            later=[
                io.Combo.Input(
                    "features",
                    options=FEATURES,
                    default="held",
                    optional=True,
                    tooltip="What a LoRA that does not lead takes from the cache. held: what it computed last, as in "
                    "the paper. forecast: that, moved on along the straight line through its last two, which is more "
                    "exact and needs two times the memory.",
                ),
                io.Int.Input(
                    "cache_age",
                    default=0,
                    min=0,
                    max=10000,
                    optional=True,
                    tooltip="Steps over which cached features serve; then the LoRA is computed whole, leading or not. "
                    "0 goes by the number of steps: 15 % of them, so 3 of 20 and none of 9 and fewer, at most as long "
                    "as all LoRAs take to lead, as in the paper.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        ensemble: Ensemble,
        order: str,
        boundary: float,
        threshold: float,
        dominance: float,
        decay: str,
        c1: int,
        c2: int,
        dominant_full: str,
        steps_per_lora: int,
        cache_depth: int,
        clip: CLIP | None = None,
        place: str = "masks",
        features: str = "held",
        cache_age: int | None = None,  # not there: saved before there was one, when it was the paper's
    ) -> io.NodeOutput:
        order = order.lower()

        def cmlora(active: Active) -> CMLoRA:
            high = tuple(role not in LOW_FREQUENCY for role in active.roles)
            return CMLoRA(active.strengths, high, order, boundary, threshold, dominance or None, decay, c1, c2,
                          cache_depth > 0, dominant_full, steps_per_lora, cache_age)

        composed, merged = apply_method(model, clip, ensemble, cmlora, node="CMLoRA", placing=Placing(place))
        last = composed.get_attachment(KEY).applied[-1]
        if cache_depth > 0 and order != "switch-a" and not last.always:
            count = len(last.names)
            age = AgeBySteps(count, c1, c2) if cache_age == 0 else cache_age or oldest(count, c1, c2)
            composed = with_cache(composed, CacheSpec(max_age=age, depth=cache_depth, forecast=features == "forecast",
                                                     whose="The cache of CMLoRA"))
        return io.NodeOutput(composed, merged)


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleCMLoRA]
