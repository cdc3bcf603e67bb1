"""Merge, Switch and Composite (Zhong et al. 2024, arXiv 2402.16843)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..host.compose.apply import Active, apply_method, bake
from ..host.compose.placing import Placing
from ..host.files.ensemble import Ensemble
from ..methods.composite import Composite
from ..methods.merge import Merge
from ..methods.selection import main_subject
from ..methods.switch import Switch
from .order import numbers_of, turns_of
from .sockets import method_schema
from .unused import tell

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP

MODES = ["runtime", "baked"]
TURNS = ["paper", "released code"]
ENDINGS = ["in turn", "subject"]
LENGTHS = ["equal", "by the prompt"]


class LoRAEnsembleMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return method_schema(
            node_id="LoRAEnsembleMerge",
            display_name="Merge LoRAs",
            description="All LoRAs at once, their changes added up: what a chain of LoRA loaders does. "
            "The fastest method; with many LoRAs concepts may blend or vanish.",
            search_aliases=["multi lora", "combine loras", "lora loader", "apply lora stack"],
            options=[
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    default="runtime",
                    tooltip="runtime: the LoRAs' changes are computed beside the untouched weights, also where "
                    "those are quantized. baked: the changes are written into the weights by ComfyUI, as its LoRA "
                    "loader does; no cost per step.",
                )
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, ensemble: Ensemble, mode: str, clip: CLIP | None = None,
                place: str = "masks") -> io.NodeOutput:
        where = Placing(place)
        if mode == "baked":
            if where.where == "words":
                raise ValueError("Merge LoRAs: place is 'words', and mode is 'baked': what is in the weights acts "
                                 "everywhere. Choose mode 'runtime'.")
            model, clip, problems = bake(model, clip, ensemble, node="Merge LoRAs")
            tell("Merge LoRAs", problems)  # there is no record that would have them
            return io.NodeOutput(model, clip)
        return io.NodeOutput(*apply_method(model, clip, ensemble, lambda active: Merge(active.strengths),
                                           node="Merge LoRAs", rest_on_weights=where.where != "words", placing=where))


class LoRAEnsembleSwitch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return method_schema(
            node_id="LoRAEnsembleSwitch",
            display_name="Switch LoRAs",
            description="One LoRA at a time, in turn, a few sampling steps each. LoRAs cannot disturb each other "
            "within a step, and a step costs no more than with one LoRA.",
            search_aliases=["multi lora", "combine loras", "alternate loras", "lora schedule", "lora switch"],
            options=[
                io.Int.Input(
                    "steps_per_lora",
                    default=0,
                    min=0,
                    max=10000,
                    tooltip="Sampling steps before the next LoRA takes over. 0 goes by the number of steps: two turns "
                    "for each LoRA where that can be, of 5 steps at most. The paper uses 5, with 100 steps and more.",
                ),
                io.String.Input(
                    "order",
                    default="",
                    placeholder="as listed, or 2,1,3",
                    tooltip="The order of the turns, as numbers of the LoRAs in the chain: 2,1,3. Empty: as listed. "
                    "The first LoRA settles the layout, so it should be the character; avoid starting with a style.",
                ),
                io.Combo.Input(
                    "turns",
                    options=TURNS,
                    default="paper",
                    tooltip="paper: every turn lasts steps_per_lora steps. released code: every turn ends one step "
                    "later, as in the authors' program, so the first one is one step longer; only to compare with it.",
                ),
            ],
            later=[
                io.Combo.Input(
                    "ending",
                    options=ENDINGS,
                    default="in turn",
                    optional=True,
                    tooltip="Who has the last steps. in turn: whose turn it is. subject: a tenth of the steps, one at "
                    "least, goes to the character (without one to clothing or an object, else to the LoRA whose turn "
                    "is first), which keeps faces and details. No LoRA loses its only turn by it.",
                ),
                io.Combo.Input(
                    "lengths",
                    options=LENGTHS,
                    default="equal",
                    optional=True,
                    tooltip="equal: all turns last steps_per_lora steps. by the prompt: turns of LoRAs whose words "
                    "change little of what the prompt says are shorter; encode the prompt with the CLIP of this node.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, order: str | None = None) -> bool | str:
        """Checks the notation before the run; which numbers there are is only known during it."""
        try:
            numbers_of(order or "")
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        ensemble: Ensemble,
        steps_per_lora: int,
        order: str,
        turns: str,
        clip: CLIP | None = None,
        place: str = "masks",
        ending: str = "in turn",
        lengths: str = "equal",
    ) -> io.NodeOutput:
        late = turns == "released code"
        by_prompt = lengths == "by the prompt"
        ends = ending == "subject"

        def switch(active: Active) -> Switch:
            own = turns_of(order, ensemble, active.specs)
            last = main_subject(active.roles, own) if ends else None
            return Switch(active.strengths, steps_per_lora, own, late, last, by_prompt)

        return io.NodeOutput(*apply_method(model, clip, ensemble, switch, node="Switch LoRAs", placing=Placing(place)))


class LoRAEnsembleComposite(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return method_schema(
            node_id="LoRAEnsembleComposite",
            display_name="Composite LoRAs",
            description="Every LoRA predicts each step alone and the predictions are averaged, so all have their say "
            "in every step. Costs one model evaluation per LoRA, in one batch where memory allows.",
            search_aliases=["multi lora", "combine loras", "average loras", "lora composite"],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, ensemble: Ensemble, clip: CLIP | None = None,
                place: str = "masks") -> io.NodeOutput:
        return io.NodeOutput(*apply_method(model, clip, ensemble, lambda active: Composite(active.strengths),
                                           node="Composite LoRAs", placing=Placing(place)))


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleMerge, LoRAEnsembleSwitch, LoRAEnsembleComposite]
