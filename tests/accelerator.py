"""An accelerator that a machine without one can pretend to have.

Its tensors say that they are on `cuda:0`, or on a second one, `cuda:1`, and compute on the CPU. What a real one
punishes is found here as well: operations across devices fail, and whatever makes the host wait for the device, or
moves data between them, is written down with the line that asked for it. It proves nothing about speed, memory or a
real device's kernels.

With TESTS_ON=cuda the same tests use the machine's own CUDA device, whose waits torch tells.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

DEVICE, SECOND, CPU = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")
ROOT = Path(__file__).parents[1]
READS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
         "unique_consecutive", "repeat_interleave"}
"""Operations whose result, or its shape, the host must know before it can go on."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Transfer(NamedTuple):
    """What happened between host and device.

    kind    wait: the host waits for all that is queued; settle: for an event in the queue; send: a copy to the host
            that nobody waits for; upload: a copy to the device; across: one from device to device; double: float64 on
            the device, which not all have
    by      the operation
    line    the innermost line outside torch, below the pack's folder where it is the pack's
    """

    kind: str
    by: str
    line: str

    @property
    def ours(self) -> bool:
        return not self.line.startswith(("/", "tests/", "."))


class OnDevice(Tensor):
    """A tensor on the pretended device; `value` holds its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: Tensor, device: torch.device = DEVICE):
        out = Tensor._make_wrapper_subclass(cls, value.shape, strides=value.stride(), dtype=value.dtype, device=device,
                                            storage_offset=value.storage_offset())
        out.value = value
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _call(func, types, args, kwargs or {})

    def __repr__(self) -> str:
        return f"OnDevice({self.value!r})"

    def tolist(self) -> list:
        _note("wait", "tolist")
        return self.value.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda device type tensor to numpy")

    def data_ptr(self) -> int:
        return self.value.data_ptr()


class Accelerator(TorchDispatchMode):
    """While open, the pretended devices exist, for this thread."""

    current: Accelerator | Watched | None = None

    def __init__(self, transfers: list[Transfer] | None = None):
        super().__init__()
        self.transfers: list[Transfer] = [] if transfers is None else transfers

    @classmethod
    def here(cls) -> None:
        """For a thread of its own until it ends: what the host's threads do of `set_torch_device`."""
        if cls.current is not None and not isinstance(_get_current_dispatch_mode(), cls):
            cls(cls.current.transfers).__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _call(func, types, args, kwargs or {}, self)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled while it is open, and to say so of each operation costs more than it

    @contextmanager
    def reopened(self) -> Iterator[None]:
        """For operations that call others: inside its own handler a mode is off."""
        TorchDispatchMode.__enter__(self)
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)


class Watched:
    """A real device, of which `transfers` tells the waits alone."""

    def __init__(self):
        self.transfers: list[Transfer] = []


@contextmanager
def watched(monkeypatch) -> Iterator[Watched]:
    """The real device; products in full float32, since results are compared with those of the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(Accelerator, "current", opened := Watched())

    def told(message, *args, **kwargs) -> None:
        if "synchronizing CUDA operation" in str(message):
            _note("wait", "sync")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", told)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield opened
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Event:
    """torch.cuda.Event."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args) -> None:
        pass

    def synchronize(self) -> None:
        _note("settle", "event")


@contextmanager
def pretended(monkeypatch) -> Iterator[Accelerator]:
    """The pretended device; the fixture `accelerator` opens it for one test."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch knows no CUDA device, not even a pretended one")
    torch._C._ensureCUDADeviceGuardSet()
    stand_ins = {"_lazy_init": lambda: None, "synchronize": lambda device=None: None, "Event": Event,
                 "current_stream": lambda device=None: None}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is made on the CPU and copied
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    opened = Accelerator()
    monkeypatch.setattr(Accelerator, "current", opened)
    try:
        with opened:
            yield opened
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(lifted)


def _note(kind: str, by: str) -> None:
    if Accelerator.current is None:
        return
    frame = sys._getframe(1)
    while frame.f_code.co_filename in (__file__, warnings.__file__) or "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    Accelerator.current.transfers.append(Transfer(kind, by, f"{name}:{frame.f_lineno}"))


def _on(device) -> torch.device | None:
    """The pretended device of that name; None: the CPU."""
    device = torch.device(device)
    return None if device.type != DEVICE.type else device if device.index is not None else DEVICE


def _call(func, types, args, kwargs, mode: Accelerator | None = None):
    """One operation, with tensors of these types beside torch's own: on the CPU, and back to where it belongs."""
    device = kwargs.get("device")
    named = device is not None or kwargs.get("pin_memory") or torch.device in map(type, args)
    if not named and OnDevice not in types:
        return func(*args, **kwargs)
    if _is_compound(func):
        # In inference mode such operations arrive whole; their parts are what tells about devices.
        if mode is None:
            return func.decompose(*args, **kwargs)
        with mode.reopened():
            return func.decompose(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    place = _judge(name, args, kwargs)
    if device is not None and _on(device):
        kwargs = {**kwargs, "device": CPU}
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    known: dict[int, OnDevice] = {}

    def inside(value: Tensor) -> Tensor:
        if not isinstance(value, OnDevice):
            return value
        known[id(value.value)] = value
        return value.value

    def outside(value: Tensor) -> Tensor:
        if place is None:
            return value
        if id(value) in known:  # an operation in place gives back what it was given
            return known[id(value)]
        if value.dtype == torch.float64:
            _note("double", name)
        return OnDevice(value, place)

    args, kwargs = _mapped(inside, args), {key: _mapped(inside, value) for key, value in kwargs.items()}
    return _mapped(outside, func(*args, **kwargs))


@cache
def _is_compound(func) -> bool:
    return func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _mapped(function, value):
    """The function on every tensor; an operation takes and gives tensors and sequences of them."""
    if isinstance(value, Tensor):
        return function(value)
    return type(value)(_mapped(function, entry) for entry in value) if isinstance(value, list | tuple) else value


def _tensors(args, kwargs) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value, {})


def _judge(name: str, args, kwargs) -> torch.device | None:
    """Where the result is, None: on the CPU. Notes waits and copies; raises RuntimeError for a mixture of devices."""
    tensors = list(_tensors(args, kwargs))
    there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    here = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.ndim]
    device, later = kwargs.get("device"), kwargs.get("non_blocking", False)
    own = there[0].device if there else None
    if name == "_to_copy":
        wanted = own if device is None else _on(device)
        _moved(name, own, wanted, later)
        return wanted
    if name == "copy_":
        target, source, *later = args[0], args[1], *(args[2:] or [later])
        place = target.device if isinstance(target, OnDevice) else None
        _moved(name, source.device if isinstance(source, OnDevice) else None, place, later[0])
        return place
    if not there:
        return None if device is None else _on(device)
    if here and name not in INDEXING or len({tensor.device for tensor in there if tensor.ndim}) > 1:
        shapes = {str(tensor.device): tuple(tensor.shape) for tensor in (*there, *here)}
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but there are {shapes}")
    if here:
        _note("upload", name)
    masks = name in INDEXING and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
    if name in READS or masks:
        _note("wait", name)
    return own if device is None else _on(device)


def _moved(name: str, source: torch.device | None, target: torch.device | None, later: bool) -> None:
    if source != target:
        _note("across" if source and target else "upload" if target else "send" if later else "wait", name)
