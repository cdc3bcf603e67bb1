"""K-LoRA (arXiv 2502.18461) and EST-LoRA (arXiv 2508.02165): a subject or a style LoRA, per layer and step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..host.compose.apply import Active, apply_method
from ..host.compose.measure import sizes_of, subjects_of
from ..host.compose.placing import Placing
from ..host.files.ensemble import Ensemble
from ..methods.est import BALANCES, ESTLoRA
from ..methods.klora import KLoRA
from .sockets import method_schema

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

PATTERNS = ["s", "s*"]
GAMMAS = ["paper", "released code"]
DELTAS = ["as applied", "raw factors"]


def alpha_input(tooltip: str) -> io.Input:
    return io.Float.Input("alpha", default=1.5, min=0.0, max=100.0, step=0.05, tooltip=tooltip)


class LoRAEnsembleKLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return method_schema(
            node_id="LoRAEnsembleKLoRA",
            display_name="K-LoRA",
            description="A subject LoRA and a style LoRA share one picture: each layer of the model uses the one whose "
            "largest weights matter more there, the subject early, the style late. A step costs what one LoRA costs.",
            search_aliases=["multi lora", "combine loras", "subject and style", "style lora", "k-lora", "klora"],
            options=[
                alpha_input("How far the balance moves from subject to style while sampling. Larger: more style at "
                            "the end. The paper found 1.5."),
                io.Float.Input(
                    "beta",
                    default=-1.0,
                    min=-1.0,
                    max=100.0,
                    step=0.05,
                    tooltip="Where the balance starts. Larger: style sooner. Negative: the paper's value for the "
                    "pattern, 0.5 for s and 1.3 for s*.",
                ),
                io.Combo.Input(
                    "pattern",
                    options=PATTERNS,
                    default="s",
                    tooltip="s: subject first, then style; good for texture. s*: style for a moment at the very start, "
                    "then as s; for styles of colour and layout, and for Flux.",
                ),
                io.Combo.Input(
                    "gamma",
                    options=GAMMAS,
                    default="paper",
                    tooltip="How LoRAs of unequal size are balanced. paper: by the sums of all their weights. released "
                    "code: by the mean over layers, and ties go to the style; for two LoRAs, only to compare with it.",
                ),
                io.Int.Input(
                    "k",
                    default=0,
                    min=0,
                    max=10**9,
                    tooltip="How many of the largest weights of a layer count. 0: the product of the two LoRAs' ranks, "
                    "as in the paper. Very large values lose the style.",
                ),
                io.Combo.Input(
                    "deltas",
                    options=DELTAS,
                    default="as applied",
                    tooltip="What is compared. as applied: the LoRAs' changes as they act, with strength and "
                    "alpha/rank. raw factors: without both, as the released code does; only to compare with it.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        ensemble: Ensemble,
        alpha: float,
        beta: float,
        pattern: str,
        gamma: str,
        k: int,
        deltas: str,
        clip: CLIP | None = None,
        place: str = "masks",
    ) -> io.NodeOutput:
        star = pattern == "s*"
        released = gamma == "released code"
        raw = deltas == "raw factors"

        def klora(active: Active) -> KLoRA:
            subjects = subjects_of(active, "K-LoRA")
            return KLoRA.of(sizes_of(active, subjects, k, raw), active.strengths, subjects, alpha,
                            None if beta < 0 else beta, star, released, raw)

        return io.NodeOutput(*apply_method(model, clip, ensemble, klora, node="K-LoRA", placing=Placing(place)))


class LoRAEnsembleESTLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return method_schema(
            node_id="LoRAEnsembleESTLoRA",
            display_name="EST-LoRA",
            description="A subject LoRA and a style LoRA share one picture: each layer of the model uses the one of "
            "more energy there, the subject early, the style late, and the style earlier the more the two differ. A "
            "step costs what one LoRA costs.",
            search_aliases=["multi lora", "combine loras", "subject and style", "style lora", "est-lora", "estlora"],
            options=[
                alpha_input("How far the balance moves from subject to style while sampling. Larger: more style at "
                            "the end. The released code uses 1.5."),
                io.Float.Input(
                    "style_discrepancy",
                    default=0.5,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How alike the two LoRAs' own pictures are, 1 for the same: connect the Style Discrepancy "
                    "node, or choose. Smaller: style sooner.",
                ),
                io.Combo.Input(
                    "balance",
                    options=list(BALANCES),
                    default="energy",
                    tooltip="How LoRAs of unequal size are balanced. energy: by their whole energies, so that "
                    "strengths do not change the choice. l1: as the released code, for two LoRAs. none: not at all.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        ensemble: Ensemble,
        alpha: float,
        style_discrepancy: float,
        balance: str,
        clip: CLIP | None = None,
        place: str = "masks",
    ) -> io.NodeOutput:

        def est(active: Active) -> ESTLoRA:
            subjects = subjects_of(active, "EST-LoRA")
            return ESTLoRA.of(sizes_of(active, subjects, top=balance == "l1"), active.strengths, subjects, alpha,
                              style_discrepancy, balance)

        return io.NodeOutput(*apply_method(model, clip, ensemble, est, node="EST-LoRA", placing=Placing(place)))


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleKLoRA, LoRAEnsembleESTLoRA]
