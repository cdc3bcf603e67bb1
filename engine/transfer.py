"""Numbers on their way to a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(numbers: Sequence[float] | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The numbers as a tensor on a device, in `dtype` or that of the numbers.

    CUDA is not waited for, as `torch.tensor(numbers, device=...)` would wait until it has done all that was queued.
    Others are: there a copy that nobody waits for may read memory that is in use again by then.
    """
    tensor = torch.as_tensor(numbers, dtype=dtype)
    return tensor.to(device, non_blocking=device.type == "cuda")
