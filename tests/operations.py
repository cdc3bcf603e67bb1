"""How many kernels a device is asked for."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh",
        "_unsafe_view", "_reshape_alias"}
"""Operations beside views that compute nothing."""


class Operations(TorchDispatchMode):
    """While open, writes down the names of all operations that compute or copy: each is a kernel or more that the host
    asks a device for. Views and memory that is only taken are not among them. Not for inference mode, in which
    compound operations arrive whole."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))
