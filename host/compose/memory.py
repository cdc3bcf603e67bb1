"""Memory of a device: what the host has to spare, and how a lack of it shows."""

from __future__ import annotations

import comfy.model_management
import torch


def to_spare(device: torch.device, least: int) -> int:
    """Bytes that may be taken for a while: half of what is free, once the host has made room for twice `least` where
    it can; 0 where that is less than `least`."""
    comfy.model_management.free_memory(2 * least, device)
    free = int(comfy.model_management.get_free_memory(device)) // 2
    return free if free >= least else 0


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether one of the host's OOM_EXCEPTION is what it says: where torch has no error of its own for it, that name
    means any."""
    return type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower()
