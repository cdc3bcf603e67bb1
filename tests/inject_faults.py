"""Faults inside a run, for tests/inject.py: tensors that cannot be made, interrupts, and other packs that raise."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import comfy.model_management
import comfy.utils
import pytest
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch.utils._python_dispatch import TorchDispatchMode

from ..tools.results import CODE

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(f"{ROOT / folder}/" for folder in CODE if folder != "testbed")
SKIPPED = (f"{Path(torch.__file__).parent}/", str(ROOT / "tests" / "inject"))


class Trouble(Exception):
    """What a neighbour raises."""


class Ops(TorchDispatchMode):
    """Counts, by file and line of this pack, what makes new tensors there; raises `error` at one of them.

    at   (file:line, the how-manieth time)
    """

    def __init__(self, at: tuple[str, int] | None = None, error: Exception | None = None):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.at, self.error, self.happened = at, error, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self._makes(func) and (site := self._site()) is not None:
            self.counts[site] += 1
            if (site, self.counts[site]) == self.at:
                self.happened = True
                raise self.error
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _makes(func) -> bool:
        """Whether it returns tensors that are no views and were not there before."""
        returns = func._schema.returns
        return bool(returns) and not any(each.alias_info or "Tensor" not in str(each.type) for each in returns)

    @staticmethod
    def _site() -> str | None:
        frame = sys._getframe(2)
        while frame is not None and frame.f_code.co_filename.startswith(SKIPPED):
            frame = frame.f_back
        if frame is None or not frame.f_code.co_filename.startswith(OURS):
            return None
        return f"{Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()}:{frame.f_lineno}"


class Moments:
    """Counts when a job may be interrupted, and interrupts it at one of these moments (from 1)."""

    def __init__(self, at: int = 0):
        self.at, self.count = at, 0

    @property
    def happened(self) -> bool:
        return self.count >= self.at

    @contextmanager
    def open(self) -> Iterator[None]:
        ask = comfy.model_management.throw_exception_if_processing_interrupted

        def asked(*_, **__):
            self.count += 1
            if self.count == self.at:
                comfy.model_management.interrupt_current_processing()
            ask()

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", asked)
            # As ComfyUI's server sets it; not counted, since bars leave out what comes too fast.
            patched.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *_, **__: ask())
            yield


@dataclass
class Neighbour:
    """Another pack at one place of a model: does nothing, and raises at its second call, before or after the rest."""

    place: str
    after: bool
    happened: bool = False
    calls: int = 0

    def _call(self, go_on: Callable[[], object]) -> object:
        self.calls += 1
        now = self.calls == (1 if self.place in ONCE else 2)
        self.happened |= now
        if now and not self.after:
            raise Trouble(self.place)
        found = go_on()
        if now:
            raise Trouble(self.place)
        return found

    def around(self, model) -> object:
        model = model.clone()
        if self.place.startswith("wrapper "):
            kind = getattr(WrappersMP, self.place.removeprefix("wrapper "))
            model.add_wrapper_with_key(kind, "neighbour", lambda executor, *args, **kwargs: self._call(
                lambda: executor(*args, **kwargs)))
        elif self.place.startswith("callback "):
            kind = getattr(CallbacksMP, self.place.removeprefix("callback "))
            model.add_callback_with_key(kind, "neighbour", lambda *_: self._call(lambda: None))
        else:
            PLACES[self.place](model, self)
        return model


def _unet(model, who: Neighbour) -> None:
    model.set_model_unet_function_wrapper(lambda apply, given: who._call(
        lambda: apply(given["input"], given["timestep"], **given["c"])))


def _layer(model, who: Neighbour) -> None:
    """A layer of the model that raises, replaced as other packs replace it."""
    patched = next(name for name, module in model.model.named_modules()
                   if name.startswith("diffusion_model.") and type(module).__name__ == "Linear"
                   and ("attn" in name or "qkv" in name))
    own = type(model.get_model_object(patched)).forward.__get__(model.get_model_object(patched))
    model.add_object_patch(f"{patched}.forward", lambda *args, **kwargs: who._call(lambda: own(*args, **kwargs)))


PLACES: dict[str, Callable[[object, Neighbour], None]] = {
    "unet function wrapper": _unet,
    "pre cfg function": lambda model, who: model.set_model_sampler_pre_cfg_function(
        lambda given: who._call(lambda: given["conds_out"])),
    "post cfg function": lambda model, who: model.set_model_sampler_post_cfg_function(
        lambda given: who._call(lambda: given["denoised"])),
    "attn1 patch": lambda model, who: model.set_model_attn1_patch(lambda q, k, v, given: who._call(lambda: (q, k, v))),
    "attn1 output patch": lambda model, who: model.set_model_attn1_output_patch(
        lambda out, given: who._call(lambda: out)),
    "input block patch": lambda model, who: model.set_model_input_block_patch(lambda h, given: who._call(lambda: h)),
    "output block patch": lambda model, who: model.set_model_output_block_patch(
        lambda h, skip, given: who._call(lambda: (h, skip))),
    "a layer": _layer,
}
WRAPPERS = ("OUTER_SAMPLE", "PREPARE_SAMPLING", "SAMPLER_SAMPLE", "PREDICT_NOISE", "CALC_COND_BATCH", "APPLY_MODEL",
            "DIFFUSION_MODEL")
ONCE = {"wrapper OUTER_SAMPLE", "wrapper PREPARE_SAMPLING", "wrapper SAMPLER_SAMPLE", "callback ON_PRE_RUN",
        "callback ON_CLEANUP"}
"""Places that a run comes by once."""
OF_UNETS = {"attn1 patch", "attn1 output patch", "input block patch", "output block patch"}
EVERY = (*(f"wrapper {name}" for name in WRAPPERS), "callback ON_PRE_RUN", "callback ON_CLEANUP", *PLACES)
