"""One ensemble for the two models of Wan 2.2: high and low noise."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..host.files.ensemble import Ensemble
from ..host.files.files import FOLDER, changes, check_file
from ..host.files.levels import UNNAMED, divided, side_by_side
from .sockets import LoRAEnsemble, ensemble_input, schema
from .unused import tell

NODE = "Two Noise Levels (Ensemble)"


class LoRAEnsembleNoiseLevels(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleNoiseLevels",
            display_name=NODE,
            description="One chain of LoRAs for a pair of models, as Wan 2.2's for high and for low noise: finds the "
            "file for each by name, and says what it paired.",
            search_aliases=["wan 2.2", "high noise", "low noise", "two models", "high low lora"],
            inputs=[
                ensemble_input(),
                io.Combo.Input(
                    "unnamed",
                    options=list(UNNAMED),
                    default="both",
                    tooltip="Where LoRAs act whose names say no noise level, as those for Wan 2.1.",
                ),
                LoRAEnsemble.Input(
                    "low_noise",
                    optional=True,
                    tooltip="The LoRAs for low noise, where you chain them yourself; ensemble is that for high noise "
                    "then, and no file is looked for.",
                ),
            ],
            outputs=[
                LoRAEnsemble.Output(display_name="HIGH NOISE", tooltip="For the method node of the high noise model."),
                LoRAEnsemble.Output(display_name="LOW NOISE", tooltip="For the method node of the low noise model."),
                io.String.Output(display_name="PAIRS", tooltip="What each file was paired with, a line each."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> str:
        """Run again when files have come or gone, for a partner may be among them, or when one has been replaced."""
        return repr((hash(tuple(folder_paths.get_filename_list(FOLDER))), changes()))

    @classmethod
    def execute(cls, ensemble: Ensemble, unnamed: str, low_noise: Ensemble | None = None) -> io.NodeOutput:
        found = divided(ensemble, folder_paths.get_filename_list(FOLDER), unnamed) if low_noise is None else \
            side_by_side(ensemble, low_noise)
        for spec in (*found.high, *found.low):
            if spec.acts:
                check_file(spec.name)
        tell(NODE, found.problems)
        return io.NodeOutput(found.high, found.low, "\n".join(found.lines))


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleNoiseLevels]
