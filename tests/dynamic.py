"""ComfyUI's dynamic VRAM within a process of tests: what its server has on a GPU."""

from __future__ import annotations


def switch_on() -> bool:
    """What `main.py` does before it loads anything; whether there is dynamic VRAM then."""
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
