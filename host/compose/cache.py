"""The branch cache of a run: which rows run whole, which ride on deep features of an earlier step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from threading import Lock
from uuid import UUID

import comfy.model_management
import torch
from torch import Tensor, nn

from ...engine.cache import FeatureCache, Home
from ...engine.tell import Once
from ...kernels.branch import Branch, Step
from ...methods.counted import counted
from ...methods.schedule import AgeBySteps, BySteps, Schedule, schedules, within
from ..families.lasting import lasting
from ..families.split_points import SplitPoint, split_point_of
from ..families.work import Work
from .attention import OVERRIDE
from .neighbours import identity_of_pass
from .places import window_of
from .tiles import TILES, UNKNOWN, tile_of_each

Combo = tuple[Branch, ...]
"""One branch per applied method: what one row of a batch is evaluated with."""
MAIN_MEMORY = torch.device("cpu")
FEWEST = 6
"""Steps of a run that can be forecast, at least."""
log = logging.getLogger("lora_ensemble")


@dataclass(frozen=True)
class CacheSpec:
    """What a MODEL says of caching.

    schedule   when every branch runs whole; None: when its method asks for it (`Session.refresh`)
    max_age    features of step s serve no step from s + max_age on, whatever the schedule; None: as the schedule says.
               It may go by the number of steps
    depth      blocks computed at either end of the model where features are reused
    forecast   features move on along the line through the last two, the less the farther it reaches, instead of being
               held
    budget     share of the model's operations that a run may take: its first call counts them and chooses schedule and
               depth. 0: they are as given. Needs a schedule that goes by the number of steps
    whose      what is said of it begins with this: the user may have no Branch Cache node
    """

    schedule: Schedule | None = None
    max_age: int | AgeBySteps | None = None
    depth: int = 2
    forecast: bool = False
    budget: float = 0.0
    whose: str = "Branch Cache"

    def __post_init__(self) -> None:
        if not 0 <= self.budget < 1 or (self.budget and not isinstance(self.schedule, BySteps)):
            raise ValueError(f"Branch Cache: a budget is a share from 0 to 1 of a schedule by steps, got {self}")
        if self.depth < 1:
            raise ValueError(f"Branch Cache: depth must be at least 1, got {self.depth}")
        if self.schedule is None and self.max_age is None:
            raise ValueError("Branch Cache: without a schedule it needs a max_age")

    def at(self, total: int) -> CacheSpec:
        """What it says of a run of so many steps; a budget stays to be spent where they are enough."""
        if self.budget and self.schedule.at(total).max_age > 1:
            return self
        return replace(self, **{name: value.at(total) for name, value in vars(self).items()
                                if isinstance(value, AgeBySteps | BySteps)}, budget=0.0)

    @property
    def oldest(self) -> int:
        """The age at which features are no longer used."""
        ages = [self.max_age, self.schedule.max_age if self.schedule is not None else None]
        return min(age for age in ages if age is not None)


class BranchCache:
    """One run's cache. Per model call of the sampler: `parts` once, then `evaluate` for each batch of the host's, of
    several devices at the same time.

    Features belong to a branch, a cond, a context window or a part of the picture, a pass (perturbed ones of PAG and
    SLG bring patches of their own), a shape, and the how-manieth evaluation of all that at this noise level (SAG
    evaluates twice).

    What is reused must not depend on the memory that happens to be free, or the same settings would draw another
    picture. So features go to main memory where their device has no room, each gives half of what it has free when the
    run first needs it, and where both are full the whole run goes on without a cache.

    report   called with a sentence for what cannot be cached, each time it is found
    free     bytes that a device has left, as the host's batching counts them
    flow     whether noise levels are times of a flow; the run says so before its first call
    chosen   called with a sentence for what a budget has come to; the run sets it before its first call
    """

    def __init__(self, spec: CacheSpec, report: Callable[[str], None], free: Callable[[torch.device], float]):
        self.spec, self._free, self.flow = spec, free, False
        self.chosen: Callable[[str], None] = log.debug
        self.store = FeatureCache(spec.oldest, spec.forecast)
        self.reused = 0  # rows of this step that were evaluated on cached features
        self.ages: dict[Combo, int] = {}  # of what they were evaluated on
        self._report = Once(report)
        self._step: Step | None = None
        self._timestep: Tensor | None = None
        self._whole: dict[Combo, bool] = {}
        self._mixed = False
        self._kept: dict[UUID | None, Hashable] = {}  # per cond of a branch, where its newest features are
        self._times: dict[Hashable, int] = {}
        self._split_points: dict[nn.Module, SplitPoint | None] = {}
        self._cut: set[nn.Module] = set()  # models of which features have been kept
        self._limits: dict[torch.device, int] = {}
        self._spilled: set[torch.device] = set()
        self._off = False
        self._lock = Lock()

    def parts(self, step: Step, combos: Sequence[Combo], fresh: Sequence[bool], timestep: Tensor,
              identities: Callable[[Combo], Iterable[UUID | None]], mixed: bool = False) -> list[list[Combo]]:
        """The combinations to evaluate together: those that run whole, then those on cached features; `mixed`: all of
        them, since the model can do both in one batch (`mixes`). `identities` names the conds that a combination is
        evaluated with now: it runs whole if one of them has no features, since the host decides by its memory what
        shares a batch with that one."""
        if self._step is None or self._step.index != step.index:
            self.reused, self.ages = 0, {}
        if timestep is not self._timestep:
            self._times.clear()
        self._step, self._timestep, self._mixed = step, timestep, mixed
        self._whole = {}
        if self._off:
            self.store.clear()
            self._step, self._whole = None, dict.fromkeys(combos, True)
            return [list(combos)]
        few = self._few(step)
        if few:
            self._report(f"{self.spec.whose}: a run of {counted(step.total, 'step')} is too short for a forecast, its "
                         "features differ too much; every branch ran whole. Schedule uniform, which holds them (of "
                         "CMLoRA: features held), can be used.")
        for combo, asked in zip(combos, fresh, strict=True):
            due = few or (asked if self.spec.schedule is None else self.spec.schedule.refreshes(step))
            self._whole[combo] = self._whole.get(combo, False) or due or any(
                self.store.get(self._kept.get(uuid), step.index) is None for uuid in identities(combo))
        if mixed:
            return [list(combos)]
        parts = ([combo for combo in combos if self._whole[combo] is whole] for whole in (True, False))
        return [part for part in parts if part]

    def again(self) -> None:
        """The call that has begun is evaluated once more, in other batches."""
        self._times.clear()

    def mixes(self, root: nn.Module, options: dict) -> bool:
        """Whether a batch on this model may hold rows that run whole beside rows that reuse: one call of the model and
        not two. Not where another node may look at rows or blocks while it runs, as its transformer options say; not
        needed where a schedule has all rows run whole in the same steps."""
        patched = any(options.get(name) for name in ("patches", "patches_replace", OVERRIDE))
        return self.spec.schedule is None and not patched and getattr(self._split_point(root), "mixes", False)

    @contextmanager
    def evaluate(self, root: nn.Module, uuids: Sequence[UUID | None], combos: Sequence[Combo], x: Tensor,
                 context: Tensor | None, control: dict | None, options: dict,
                 work: Callable[[], Work | str] | None = None,
                 among: Callable[[Sequence[int]], AbstractContextManager] = nullcontext
                 ) -> Iterator[tuple[dict | None, dict]]:
        """(control, transformer options) to call the model with for one batch, `combos` and `uuids` per cond. `work`
        counts its operations, for a budget; `among` is a context for layers that some of the conds alone come to."""
        with self._lock:
            if self.spec.budget and self._step is not None and not self._few(self._step):
                self._spend(work(), self._step.total)
        split, tiles = self._split_point(root), options.get(TILES, ())
        if None in tiles:
            self._say(UNKNOWN)
        if split is None or self._step is None or None in tiles:
            yield control, options
            return
        rows = x.shape[0] // len(combos)
        places = (window_of(options), identity_of_pass(options), (rows, *x.shape[1:]), None if context is None else
                  tuple(context.shape[1:]))
        with self._lock:
            keys = [self._key((uuid, combo, tile, *places))
                    for uuid, combo, tile in zip(uuids, combos, tile_of_each(tiles, len(uuids)), strict=True)]
            found = [self.store.get(key, self._step.index) for key in keys]
            whole = [self._whole.get(combo, True) or kept is None for combo, kept in zip(combos, found, strict=True)]
            if any(whole) and not self._mixed:
                whole = [True] * len(whole)
            for combo, key, fresh in zip(combos, keys, whole, strict=True):
                self.ages[combo] = 0 if fresh else max(self.ages.get(combo, 0), self.store.age(key, self._step.index))
            self.reused += rows * whole.count(False)
        time = self._step.time(self.flow)
        if not any(whole):
            features = self.store.side_by_side(keys, self._step.index, time, x.device)
            with split.reuse(features, control, options) as changed:
                yield changed
            return
        caught: dict[Hashable, Tensor] = {}
        if not all(whole):
            found = [None if fresh else self.store.at(key, self._step.index, time, x.device)
                     for key, fresh in zip(keys, whole, strict=True)]
            with split.mix(found, rows, options, caught, among) as changed:
                yield control, changed
            if not caught:  # another node has left the call out
                return
            uuids, keys = ([each for each, fresh in zip(some, whole, strict=True) if fresh] for some in (uuids, keys))
            self._keep(uuids, keys, {name: value.chunk(len(keys)) for name, value in caught.items()}, x.device)
            return
        yield control, split.capture(options, caught)
        if not split.complete(caught) or any(value.shape[0] % len(combos) for value in caught.values()):
            if root not in self._cut:  # else another node has left the call out
                self._split_points[root] = None
                self._say(f"{type(root).__name__} does not let its blocks be replaced")
            return
        self._cut.add(root)
        self._keep(uuids, keys, {name: value.chunk(len(combos)) for name, value in caught.items()}, x.device)

    def notes(self) -> dict[str, object]:
        """What to record of a step.

        reused   rows that were evaluated on cached features
        ages     steps between the making of the features and this step, per branch; 0: it ran whole
        bytes    of features held
        """
        return {"reused": self.reused, "ages": [self.ages.get(combo, 0) for combo in self._whole],
                "bytes": self.store.bytes}

    def close(self) -> None:
        """Let go of all features, and of what reports and measures: they lead to the run and to its MODEL, and a circle
        keeps a MODEL that nobody uses until Python happens to look for circles. The host takes that for a leak."""
        self.store.clear()
        self._split_points.clear()
        self._cut.clear()
        self._kept.clear()
        del self._report, self._free, self.chosen

    def _few(self, step: Step) -> bool:
        return self.spec.forecast and step.total < FEWEST

    def _spend(self, work: Work | str, total: int) -> None:
        """Schedule and depth by the budget, before anything is kept."""
        spec, self.spec = self.spec, replace(self.spec, budget=0.0).at(total)
        if isinstance(work, str):
            self._report(f"Branch Cache: {work}. So the budget of {spec.budget:g} is not used: the interval goes by "
                         f"the number of steps, and depth is {spec.depth}.")
        else:
            found = within(spec.budget, total, work.shares, schedules(spec.schedule))
            self.spec = replace(self.spec, schedule=found.schedule, depth=found.depth)
            least = "" if found.share <= spec.budget else "; less than that cannot be had"
            self.chosen(f"Branch Cache: budget {spec.budget:g}, {counted(total, 'step')}: {found.schedule.words}, "
                        f"depth {found.depth}; {counted(found.whole, 'step')} whole, the others "
                        f"{100 * found.rest:.0f} % of their operations each, together {100 * found.share:.0f} % of a "
                        f"run without a cache{least}")
        self.store = FeatureCache(self.spec.oldest, self.spec.forecast)

    def _keep(self, uuids: Sequence[UUID | None], keys: list, caught: dict[Hashable, tuple],
              device: torch.device) -> None:
        homes = self._homes(device)
        for k, (uuid, key) in enumerate(zip(uuids, keys, strict=True)):
            if self._off:
                return
            with lasting():
                home = self.store.put(key, self._step.index, {name: each[k] for name, each in caught.items()}, homes,
                                      self._step.time(self.flow))
            if home is None:
                self._give_up(sum(limit for _, limit in homes))
                return
            self._kept[uuid] = key
            if home != device and home not in self._spilled:
                self._spilled.add(home)
                log.info("%s: %s has no room for all features; the others are kept in main memory.", self.spec.whose,
                         device)

    def _give_up(self, limit: int) -> None:
        """From the next call on: what the other batches of this one do must not depend on which of them came first."""
        with self._lock:
            known, self._off = self._off, True
        if not known:
            self._report(f"{self.spec.whose}: the features of this run do not fit into half of the free memory "
                         f"({limit >> 20} MB), so from step {self._step.index + 1} on every branch runs whole and "
                         "nothing is cached. With more memory the picture would be another one.")

    def _homes(self, device: torch.device) -> list[Home]:
        """Where features of a device may be kept, and how many bytes each place gives to this run."""
        with self._lock:
            if device not in self._limits:
                self._limits[device] = int(self._free(device)) // 2
            if MAIN_MEMORY not in self._limits:
                self._limits[MAIN_MEMORY] = int(comfy.model_management.get_free_memory(MAIN_MEMORY)) // 2
            return [(home, self._limits[home]) for home in dict.fromkeys((device, MAIN_MEMORY))]

    def _key(self, place: tuple) -> tuple:
        """The place with its how-manieth evaluation at this noise level."""
        time = self._times.get(place, 0)
        self._times[place] = time + 1
        return (*place, time)

    def _split_point(self, root: nn.Module) -> SplitPoint | None:
        if root not in self._split_points:
            split = split_point_of(root, self.spec.depth)
            if isinstance(split, str):
                self._say(f"{type(root).__name__}: {split}")
            self._split_points[root] = None if isinstance(split, str) else split
        return self._split_points[root]

    def _say(self, reason: str) -> None:
        self._report(f"{self.spec.whose}: {reason}. What is not cached runs whole, as without the cache.")
