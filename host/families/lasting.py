"""Memory that outlives the block of a model in which it is taken."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import comfy.model_management


def lasting() -> AbstractContextManager:
    """A context for tensors that are kept beyond the block that runs. ComfyUI's compiler records what a block allocates
    and gives the same memory out again with the next call of it; here it looks away. Releases without that compiler
    need nothing."""
    prefetch = getattr(comfy, "model_prefetch", None)
    return getattr(prefetch, "pause_malloc_graph", nullcontext)()
