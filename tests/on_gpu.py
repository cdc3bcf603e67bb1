"""Where tests that need ComfyUI compute: on the CPU, or with TESTS_ON=cuda on a GPU, with ComfyUI's dynamic VRAM as its
server has it there. Imports nothing of ComfyUI or torch by itself."""

from __future__ import annotations

import os

REAL = os.environ.get("TESTS_ON") == "cuda"
"""Whether an accelerator is there, and nothing has to be pretended."""
ARGUMENTS = () if REAL else ("--cpu",)
"""Of ComfyUI's command line."""


def dynamic_vram() -> bool:
    """Switch it on in this process, as `main.py` does before it loads anything; whether it is there then."""
    try:
        import comfy.cli_args
        import comfy_aimdo.control as control

        wanted = comfy.cli_args.enables_dynamic_vram()
    except (ImportError, AttributeError):
        return False  # a release or a machine without it
    if not wanted:
        return False
    control.init()
    import comfy.memory_management
    import comfy.model_management
    import comfy.model_patcher

    from .comfy_testbed.dynamic import fill_layers

    headroom = int(comfy.cli_args.args.vram_headroom * 1024 ** 3)
    if not control.init_devices((d.index, headroom) for d in comfy.model_management.get_all_torch_devices()):
        return False
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
    fill_layers()
    return True
