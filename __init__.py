"""LoRA Ensemble: several LoRAs in one image, without training, over one mechanism. A ComfyUI node pack.

Importing the package needs neither ComfyUI nor torch; the nodes are imported when ComfyUI asks for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "web"  # docs/<NodeId>.md: the help panel of each node


async def comfy_entrypoint() -> ComfyExtension:
    """Called once by ComfyUI when it loads its custom nodes."""
    from .nodes import LoRAEnsembleExtension

    return LoRAEnsembleExtension()
