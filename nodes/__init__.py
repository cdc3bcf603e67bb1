"""What a ComfyUI user sees: thin V3 schemas; each execute hands over to host/."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import baselines, cache, cmlora, ensembles, guidance, klora, loratorio

NODES: list[type[io.ComfyNode]] = [
    *ensembles.NODES, *baselines.NODES, *loratorio.NODES, *cmlora.NODES, *klora.NODES, *cache.NODES, *guidance.NODES,
]  # fmt: skip


class LoRAEnsembleExtension(ComfyExtension):
    """All nodes of the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
