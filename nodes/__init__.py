"""What a ComfyUI user sees: thin V3 schemas; each execute hands over to host/."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..host.compose.watch import watch
from ..host.look.live import on_the_node
from . import (
    baselines,
    cache,
    calibration,
    cmlora,
    ensembles,
    guidance,
    info,
    klora,
    leave_one_out,
    levels,
    loratorio,
    prompt,
    report,
    routed,
    selection,
    spectrum,
    stack,
)
from .border import guard

NODES: list[type[io.ComfyNode]] = [
    *stack.NODES, *ensembles.NODES, *levels.NODES, *prompt.NODES, *info.NODES, *routed.NODES, *baselines.NODES,
    *cache.NODES, *cmlora.NODES, *guidance.NODES, *klora.NODES, *loratorio.NODES, *selection.NODES,
    *calibration.NODES, *spectrum.NODES, *report.NODES, *leave_one_out.NODES,
]
for node in NODES:
    guard(node)
watch(on_the_node)


class LoRAEnsembleExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
