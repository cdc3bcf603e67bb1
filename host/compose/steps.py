"""Which sampling step a model call belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ...kernels.branch import Step

Callback = Callable[..., object]


class StepTracker:
    """Turns noise levels into steps without making the host wait for the device in every step.

    Reading a noise level on an accelerator empties its queue. So it is read only until the sampler has shown three
    times that it calls the model once between two of its callbacks, each time for the next step; from then on the first
    call after a callback is the next step's, and only a second call within a step (Heun, SDE samplers) is read. Three,
    because a corrector that calls after its callback (SA-Solver PECE) looks like the simple kind for its first two
    steps. Where the schedule turns and rises it is read, too: a restart goes on from the level that it rises to, and
    others from the lowest one. On the CPU reading costs nothing.

    sigmas   the run's schedule, noisiest first, with the final 0
    """

    def __init__(self, sigmas: Sequence[float]):
        self.sigmas = sigmas
        self.total = max(len(sigmas) - 1, 1)
        self._last: Tensor | None = None
        self._step: Step | None = None
        self._told = False
        self._next: int | None = None  # the step after the one that the sampler told of last; at first, that of a call
        self._bound = 0  # what a further call at the level after it belongs to
        self._beyond = False  # whether there was one
        self._calls = 0
        self._simple = 0

    def tell(self) -> None:
        """The sampler finished a step, or one pass of several over it (RES4LYF's implicit steps)."""
        if self._step is None:
            return
        self._told = True
        self._simple = self._simple + 1 if self._calls == 1 and self._step.index == self._next else 0
        self._next = self._step.index + 1
        self._calls = 0

    def step(self, timestep: Tensor) -> Step:
        """The step of a model call at `timestep` (noise levels, one per picture, all equal). Extra passes within one
        call (context windows, perturbed attention) bring the same tensor and are the same step; so do passes for some
        of the pictures, which bring the beginning of it."""
        if self._step is not None and _same(timestep, self._last):
            return self._step
        self._last = timestep
        self._calls += 1
        if timestep.device.type != "cpu" and self._told and self._simple >= 3 and self._next < self.total \
                and not self._turns(self._next):
            index = self._next
            sigma = self.sigmas[index]
        else:
            sigma = float(timestep.flatten()[0])
            index = self.index_of(sigma)
        if self._next is None:
            self._next = index
        if self._calls == 1:
            self._bound = index if self._beyond else self._next
        self._told = False
        self._step = Step(index, self.total, sigma)
        return self._step

    def _turns(self, index: int) -> bool:
        """Whether noise falls up to this entry of the schedule and rises behind it."""
        return 0 < index < self.total and self.sigmas[index - 1] > self.sigmas[index] < self.sigmas[index + 1]

    def index_of(self, sigma: float) -> int:
        """The step whose interval holds sigma: one that begins at sigma, else one that it lies within. Where several
        do (restarts, a level twice), the one that is nearest to the last call's, or to the next one if the sampler has
        told of it since. A further call of a step that looks at the level after it (a stage at its end, Heun++) belongs
        to it: steps would go back else. Not where the schedule turns, and a restart begins."""
        steps, sigmas = range(self.total), self.sigmas
        closest = min(abs(sigmas[i] - sigma) for i in steps)
        at = [i for i in steps if abs(sigmas[i] - sigma) == closest <= 1e-4 * abs(sigmas[i])]
        inside = at or [i for i in range(len(sigmas) - 1)
                        if min(sigmas[i:i + 2]) <= sigma <= max(sigmas[i:i + 2])]
        if inside:
            here = self._next or 0 if self._told or self._step is None else self._step.index
            found = min(inside, key=lambda i: abs(i - here))
            if at and self._calls > 1 and found - self._bound == 1 and not self._turns(self._bound):
                self._beyond, found = True, self._bound
            return found
        return max((i for i in steps if sigmas[i] >= sigma), default=0)


class Listening:
    """A sampler's callback that also tells a tracker, and whoever else wants to know, when a step is finished."""

    def __init__(self, tracker: StepTracker, callback: Callback | None):
        self.tracker, self._callback = tracker, callback
        self.also: list[Callable[[], None]] = []

    def __call__(self, *step) -> object:
        self.tracker.tell()
        for tell in self.also:
            tell()
        return self._callback(*step) if self._callback is not None else None


def tracked(sigmas: Sequence[float], callback: Callback | None) -> tuple[StepTracker, Callback]:
    """The tracker of the run that is about to begin, and the callback to begin it with. Whatever else of this pack
    wraps the same run comes by its callback, and takes the tracker from there: it sees every call and is told of every
    step once. Where another node has put its own callback around ours, or has changed the schedule, each has its own.
    """
    if isinstance(callback, Listening) and tuple(callback.tracker.sigmas) == tuple(sigmas):
        return callback.tracker, callback
    tracker = StepTracker(sigmas)
    return tracker, Listening(tracker, callback)


def _same(timestep: Tensor, last: Tensor) -> bool:
    """Whether it is the last call's tensor or a view that begins where it does; both are alive, so equal addresses mean
    equal memory."""
    if timestep is last:
        return True
    return isinstance(timestep, Tensor) and isinstance(last, Tensor) and timestep.data_ptr() == last.data_ptr()
