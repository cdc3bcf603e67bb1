"""What a method keeps and learns while it samples: the context of a run, one model call, and the session.

A plain method (methods/__init__.py) sees one prediction at a time and keeps nothing. A method that must see the
conditional and the unconditional side together, measure the latent, or keep something from one step to the next has
instead

    begin(context) -> Session        called when a run starts; the session is forgotten when it ends
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.branch import Branch, Step
from ..kernels.nested import Parts

POSITIVE, UNCONDITIONAL, OTHER = "positive", "unconditional", "other"


@dataclass(frozen=True)
class RunContext:
    """What is known of a run before its first step: one object for composition methods and for guidance.

    sigmas   the schedule in the model's own units, noisiest first, with the final 0
    times    per step, those before this run included: the model's own time, 1 at its highest noise level and 0 at its
             lowest
    span     how far a run over all noise levels would be at this run's first and at its last step: (0, 1), unless a
             picture is only partly noised, or sampled in several runs. It goes by the noise level, since the schedule
             of that whole run is not known: exact where its steps are equal parts of the model's time
    before   steps that earlier runs took of the picture, where it is sampled in several (Wan 2.2's two models)
    whole    steps of all these runs together; 0: those of this one
    shape    of the latent, [pictures, channels, ..., height, width]; of the first part where it has several
    masks    per LoRA: where it may act, in [0, 1], [pictures or 1, 1, (frames,) height, width] on the latent's grid;
             None: everywhere. What they hold may change from call to call
    gains    per step, those of other runs of the picture included, and LoRA: the share of its strength that its window
             in time lets act, 0 where that is shut (windows.py); (): all of it in every step. Whoever evaluates
             branches multiplies by them; a method has to know who is there
    shares   per LoRA: how much the prompt says by its words, 1 - cos(E(prompt), E(prompt without them)), for methods
             that ask; (): not known
    left     what this method's session of the run before left of the same picture (`Session.left`); None: nothing
    film     of a film, how many of its latent's frames it has itself, from the first on, where others behind them guide
             it (LTX-Video); None: all
    ahead    how many of them are references, which stand before it (Wan VACE, Animate)

    `times`, `span`, `masks`, `gains`, `shares`, `left`, `film` and `ahead` are known to composition methods
    alone; to guidance alone:

    sampler      name of the sampler's function, with its options where it has any
    cfg          scale of guidance; None where a guider has no single one
    negatives    conds besides the positive
    """

    sigmas: tuple[float, ...]
    times: tuple[float, ...] = ()
    shape: tuple[int, ...] = ()
    masks: tuple[Tensor | None, ...] = ()
    gains: tuple[tuple[float, ...], ...] = ()
    shares: tuple[float, ...] = ()
    span: tuple[float, float] = (0.0, 1.0)
    sampler: str = ""
    cfg: float | None = None
    negatives: int = 1
    before: int = 0
    whole: int = 0
    left: object = None
    film: int | None = None
    ahead: int = 0

    @property
    def total(self) -> int:
        """Number of steps, those of earlier and later runs included."""
        return self.whole or self.steps

    @property
    def steps(self) -> int:
        """Number of steps of this run."""
        return max(len(self.sigmas) - 1, 1)

    @property
    def handed_on(self) -> bool:
        """Whether the picture is not finished when the run is over. A run from a picture to its noise begins none."""
        return self.sigmas[0] > self.sigmas[-1] > 0

    def open(self, index: int, count: int) -> tuple[int, ...]:
        """Which of `count` LoRAs may act at a step: those whose windows are open."""
        return tuple(i for i, gain in enumerate(self.gains[index]) if gain) if self.gains else tuple(range(count))

    def progress(self, step: Step) -> float:
        """The methods' normalised time u: 0 at the first step of a full run, 1 at its last, in equal parts per step."""
        first, last = self.span
        return first + (last - first) * ((step.index - self.before) / (self.steps - 1) if self.steps > 1 else 0.0)


@dataclass(frozen=True)
class Call:
    """One call of the model by a sampler, or by a node that asks for an extra prediction, all branches evaluated.

    x, sigma      noisy latent [B, C, ...] and its noise levels [B], for which the predictions were made. A further
                  pass of the same evaluation (perturbed attention, skipped layers) brings the same two objects
    branches      those evaluated, in order
    predictions   per cond of the caller: denoised (x0) predictions [branches, B, C, ...]; None where it gave no cond
    sides         per cond: POSITIVE, UNCONDITIONAL (negative and empty prompts), or OTHER
    parts         shapes of the parts of a packed latent (kernels/nested.py), such as picture and sound; () for one
    window        what tells the part of the pictures or frames that the latent has from others; None: it has all
    masks         `RunContext.masks`, as far as the latent has them; None where it has all

    x - x0 is the predicted noise (or velocity) times a positive number.
    """

    x: Tensor
    sigma: Tensor
    branches: tuple[Branch, ...]
    predictions: Sequence[Tensor | None]
    sides: Sequence[str]
    parts: Parts = ()
    window: Hashable = None
    masks: tuple[Tensor | None, ...] | None = None

    def masks_of(self, context: RunContext) -> tuple[Tensor | None, ...]:
        """Per LoRA where it may act in this latent, as they are now."""
        return context.masks if self.masks is None else self.masks


def masks_among(masks: Sequence[Tensor | None], loras: Sequence[int]) -> list[Tensor | None]:
    """Of `RunContext.masks` or `Call.masks_of` those of these LoRAs; none where none of them has one."""
    found = [masks[i] for i in loras] if masks else []
    return found if any(mask is not None for mask in found) else []


class Session(ABC):
    """A method during one run. Subclasses give `branches` and `mix`; the rest has defaults.

    Per model call the host calls `observe`, `branches`, `refresh` and `mix` in this order, with the step among those of
    all runs of the picture. A step may have several calls (Heun, context windows, perturbed passes) with the same
    `step`. Nothing here may make the host wait for the device: a measurement that steers branches is `Sent` ahead and
    read at a later step.

    whole_batch   whether every call must bring all pictures of the run. False where the mix of a picture depends on
                  that picture alone, so that a further call of a step may bring some of them (a guidance that is
                  decided per picture); the first call of a step, which `observe` sees, always brings all
    """

    whole_batch = True

    def observe(self, step: Step, x: Tensor) -> None:  # noqa: B027  (a default, no duty)
        """Look at the noisy latent before the step's branches are named; at its first part where it has several (the
        picture, without the sound)."""

    @abstractmethod
    def branches(self, step: Step) -> tuple[Branch, ...]:
        """The branches to evaluate at this step, at least one."""

    def refresh(self, step: Step) -> tuple[bool, ...]:
        """Per branch of `branches(step)`: True where it has to run whole, False where a cache, which this method or
        another one on the MODEL brings, may stand in for its deep layers. By default it may: a branch is the same at
        every step that it is there."""
        return (False,) * len(self.branches(step))

    @abstractmethod
    def mix(self, step: Step, call: Call) -> list[Tensor | None]:
        """One prediction [B, C, ...] per cond of the call; None where there is no cond."""

    def notes(self) -> dict[str, object]:
        """What to record of the last step: JSON values or tensors, which are read back when the run is over."""
        return {}

    def chosen(self, names: Sequence[str]) -> list[str]:
        """What the method chose for this run where a user left it to the number of steps, in words. `names` are those
        of its LoRAs."""
        return []

    def missed(self, names: Sequence[str]) -> list[str]:
        """What the method would have had happen and did not in the whole run, in words: a class that never led."""
        return []

    def left(self) -> object:
        """Of a run that hands on an unfinished picture: what was measured of the picture, for the context of the next
        run, whatever model that has; None: nothing."""
        return None


class Sent:
    """A small tensor on its way to the host, since step `step`. Sending does not wait for the device; `read` does, but
    a step or two later the value has long arrived.

    far   whether it comes from an accelerator at all
    """

    def __init__(self, step: int, value: Tensor):
        self.step, self.value, self.far = step, value, value.device.type != "cpu"
        self._copy, self._arrived = value, None
        if value.is_cuda:  # from other devices a copy that nobody waits for is not safe
            # Into pinned memory, as torch does for such copies.
            self._copy = value.to("cpu", non_blocking=True)
            self._arrived = torch.cuda.Event()
            # Of the device that copies: it need not be the current one.
            self._arrived.record(torch.cuda.current_stream(value.device))

    def read(self) -> Any:
        """The values as numbers, in lists as the tensor has dimensions; waits until they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()


class PlainSession(Session):
    """A method without state: every cond is mixed by itself."""

    whole_batch = False

    def __init__(self, method):
        self.method = method

    def branches(self, step: Step) -> tuple[Branch, ...]:
        """Those of the method."""
        return self.method.branches(step)

    def mix(self, step: Step, call: Call) -> list[Tensor | None]:
        """The method's mix of each cond by itself."""
        return [None if p is None else self.method.mix(step, p) for p in call.predictions]


def begin(method, context: RunContext) -> Session:
    """The session of a run: the method's own, or a plain one."""
    return method.begin(context) if hasattr(method, "begin") else PlainSession(method)
