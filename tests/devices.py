"""Devices that a test machine lacks."""

from __future__ import annotations

import torch
from lora_ensemble.methods.session import Sent
from torch import Tensor
from torch.utils._pytree import tree_map


class Plain(Tensor):
    """A tensor on an accelerator without float64, as Apple's and Intel's consumer ones are. It computes on the CPU,
    refuses float64, and is an ordinary tensor once it was copied to the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype, device="mps")

    def __init__(self, inner: Tensor):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None)
        args, kwargs = tree_map(lambda v: v.inner if isinstance(v, cls) else v, (args, kwargs))
        out = func(*args, **kwargs)
        if device is not None and torch.device(device).type == "cpu":
            return out
        dtypes = {v.dtype for v in (out if isinstance(out, tuple | list) else (out,)) if isinstance(v, Tensor)}
        if torch.float64 in dtypes:
            raise TypeError(f"{func}: this device has no float64")
        return tree_map(lambda v: cls(v) if isinstance(v, Tensor) else v, out)


class Far(Sent):
    """A value on its way from an accelerator, whatever it comes from."""

    def __init__(self, step: int, value: Tensor):
        super().__init__(step, value)
        self.far = True
