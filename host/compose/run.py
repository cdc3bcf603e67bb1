"""What lives while a run of the methods on a MODEL samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import prod
from uuid import UUID, uuid4

import torch
from torch import Tensor, nn

from ...engine.bank import Bank
from ...engine.forwards import RoutedForwards
from ...engine.layout import NotRows
from ...engine.positions import Places
from ...engine.record import StepRecord
from ...engine.tell import into
from ...kernels.branch import Branch, Step
from ...kernels.nested import Parts, unpack
from ...methods.session import OTHER, POSITIVE, UNCONDITIONAL, Call, RunContext, begin
from ...methods.windows import InTime
from ..families.containers import forward_of
from ..families.lasting import lasting
from ..families.row_order import one_row_only, row_order
from ..families.token_order import token_order
from .applied import Applied
from .cache import BranchCache, CacheSpec, Combo
from .combos import Joined, any_of, combinations, magnitudes_above, together
from .control import Controls
from .earlier import Mark
from .kept import KeptBetweenCalls
from .merging import Merging
from .neighbours import APART
from .places import Area, ContextWindow, for_call, values_by_name
from .routes import RoutedLoRAs, regions_of
from .steps import StepTracker
from .summary import BY_ITSELF, begun, idle, missed, note_acting, sum_up, uncalled, unplaced
from .tiles import LOST, Known, inside
from .without import Without

log = logging.getLogger("lora_ensemble")

Free = Callable[[torch.device], float]
"""Bytes that a device has left."""


@dataclass(frozen=True)
class Plan:
    """What one model call evaluates: every combination of the applied methods' branches.

    fresh   per combination: False where caches may stand in for its deep layers, as far as the methods go
    parts   of a latent that holds several, such as picture and sound
    """

    step: Step
    own: Step  # among the steps of this run; `step` is among those of all runs of the picture
    x: Tensor
    sigma: Tensor
    branches: tuple[tuple[Branch, ...], ...]
    combos: tuple[Combo, ...]
    fresh: tuple[bool, ...]
    parts: Parts = ()


class Run:
    """State of one sampling run: fresh at its start, gone at its end.

    Per applied method there are `contexts`, `sessions` and `regions`: where its LoRAs may act, None: everywhere. Those
    of them that words find are `routes`. `banked` has the methods by the bank that serves them.

    Of the call that goes on are `step`, `branches` per method, `window`, and `single`, its combination of branches if
    it has one alone. `readers` and `read`: see `reading`. `probing`: it is none of the sampler's own. `without`: LoRAs
    that are left out of it.

    Of conds are `combos` and `origins`, what an identity that `tag` has given stands for, and `areas`. `conds` asks for
    all that the guider has.

    Beside other nodes there are `controls`, `kept`, `merging`, and `cuts`, where they have cut the picture. `texts` is
    open while the host prepares conds.
    """

    def __init__(self, applied: Sequence[Applied], tracker: StepTracker, contexts: Sequence[RunContext],
                 sides: Mapping[UUID, str], cache: CacheSpec | None, free: Free, device: torch.device):
        self.applied, self.tracker = applied, tracker
        self.record = begun(applied, contexts)
        self._tell = into(self.record.problems)
        self._layers: dict[tuple[str, str], list[str]] = {}
        self._acted: list[set[int]] = [set() for _ in applied]
        self._in_time = [InTime(context.gains, context.before, context.steps) for context in contexts]
        self.cache = BranchCache(cache, self._tell, free) if cache is not None and cache.oldest > 1 else None
        self.combos: dict[UUID, Combo] = {}
        self.single: Combo | None = None
        self.controls, self.texts = Controls(), ExitStack()
        self._sides = sides
        self._tags: dict[tuple[UUID, Combo], UUID] = {}
        self._routed: dict[nn.Module, list[RoutedForwards]] = {}
        self._off: list[RoutedForwards] = []
        self._bare = False
        self._apart: dict[nn.Module, bool] = {}
        self._since = time.perf_counter()
        self.areas: dict[UUID | None, Area] = {}
        self.cuts: Known = {}
        self.origins: dict[UUID | None, UUID | None] = {}
        self.banked = together(applied)
        self.regions = [regions_of(each, context, device, self._tell)
                        for each, context in zip(applied, contexts, strict=True)]
        self.routes = [regions for regions in self.regions if isinstance(regions, RoutedLoRAs)]
        self.kept = KeptBetweenCalls(self._tell, "LoRAs act in places of the picture" if
                                     any(regions is not None for regions in self.regions) else
                                     "the Branch Cache keeps tokens of its own" if self.cache is not None else "")
        self.readers: list[RoutedLoRAs] = []
        self.conds: Callable[[], dict[str, list[dict]]] = dict
        self.probing, self.without, self.merging = False, Without(), Merging()
        self.read: Combo | None = None
        self._seen_compiled: dict[nn.Module, bool] = {}
        self.step: Step | None = None
        self.branches: tuple[tuple[Branch, ...], ...] = ()
        self.window: ContextWindow = None
        self.contexts = [replace(context, masks=regions.masks) if isinstance(regions, RoutedLoRAs) else context
                         for context, regions in zip(contexts, self.regions, strict=True)]
        self.sessions = [begin(each.method, context) for each, context in zip(applied, self.contexts, strict=True)]
        self.tell(unplaced(applied, contexts))

    def plan(self, x: Tensor, timestep: Tensor, parts: Parts = ()) -> Plan:
        """The step this call belongs to, and what it evaluates."""
        here = self.tracker.step(timestep)
        if not self.record.steps or self.record.steps[-1].index != here.index:
            self._close_step()
            self.record.steps.append(StepRecord(here.index, here.sigma))
        self.step = step = replace(here, index=here.index + self.record.before, total=self.record.whole or here.total)
        for regions in self.routes:
            regions.begin(step)
        for session in self.sessions:
            session.observe(step, unpack(x, parts)[0])
        branches = self.branches = tuple(in_time(step, session.branches(step)) for in_time, session
                                         in zip(self._in_time, self.sessions, strict=True))
        combos = combinations(branches, self.record.methods)
        fresh = any_of([session.refresh(step) for session in self.sessions])
        note_acting(self._acted, branches)
        entry = self.record.steps[-1]
        entry.branches = entry.branches or [[list(branch.gains) for branch in combo] for combo in combos]
        return Plan(step, here, x, timestep, branches, combos, fresh, parts)

    def sides(self, conds: Sequence[list | None]) -> tuple[str, ...]:
        """The side that each cond of a call is on. Conds that no guider knows (a node made them itself) go by their
        place, as in the host's own guidance: positive first, then unconditional. One alone, where the guider has its
        positive, is a side that the guider lacks: the empty prompt of the deprecated Perp-Neg node."""
        places = (POSITIVE, UNCONDITIONAL)
        if len(conds) == 1 and POSITIVE in self._sides.values():
            places = (UNCONDITIONAL,)
        return tuple(next((self._sides[entry["uuid"]] for entry in cond or () if entry.get("uuid") in self._sides),
                          places[i] if i < len(places) else OTHER) for i, cond in enumerate(conds))

    def mix(self, plan: Plan, predictions: Sequence[Tensor | None], sides: Sequence[str],
            depth: int = 0) -> list[Tensor | None]:
        """Mix predictions, per cond [combos, ...], of all applied methods from `depth` on, the last one's first.
        Without methods there is one combination, the model as it is."""
        if not self.sessions:
            return [None if p is None else p[0] for p in predictions]
        branches = plan.branches[depth]
        if depth + 1 < len(self.sessions):
            # One part per outer branch: each holds all inner combinations, for all conds together.
            split = [None if p is None else p.unflatten(0, (len(branches), -1)) for p in predictions]
            parts = [self.mix(plan, [None if p is None else p[i] for p in split], sides, depth + 1)
                     for i in range(len(branches))]
            predictions = [None if one[0] is None else torch.stack(one) for one in zip(*parts, strict=True)]
        context, x = self.contexts[depth], unpack(plan.x, plan.parts)[0]
        masks = None if self.window is None and x.shape[2:] == context.shape[2:] else tuple(
            mask if mask is None else for_call(mask, self.window, x) for mask in context.masks)
        return self.sessions[depth].mix(plan.step, Call(plan.x, plan.sigma, branches, predictions, sides, plan.parts,
                                                        self.window, masks))

    def tag(self, cond: UUID, combo: Combo) -> UUID:
        """An identity for a cond under one combination of branches: what caches keyed by cond must tell apart."""
        key = (cond, combo)
        if key not in self._tags:
            self._tags[key] = uuid4()
            self.combos[self._tags[key]] = combo
            self.origins[self._tags[key]] = cond
        return self._tags[key]

    def routed(self, root: nn.Module, banks: Callable[[], list[Bank]], reader: Callable[[str], Tensor | None],
               compiled: Callable[[], bool], layers: Callable[[], Mapping[str, nn.Module]]) -> list[RoutedForwards]:
        """The routed forwards on one live diffusion model, one per bank of `banked`, installed on first sight
        (delegates and multi-GPU clones have modules of their own)."""
        if root not in self._routed:
            order, seen = row_order(root) or (lambda layer, entries, rows: None), compiled()
            flat = (tokens := token_order(root)) is not None and tokens.axis == 0
            found = banks()
            for adapter, layer in magnitudes_above(self.banked, found):
                self._problem(adapter, layer, "a DoRA goes by the weight without the LoRAs of the method before it; "
                                              "in one ensemble with them it counts them in, as a chain of loaders does")
            forwards = [RoutedForwards(root, bank, reader, self._problem, position=k, order=order, compiled=seen,
                                       lasting=lasting, layers=layers, flat=flat, forward_of=forward_of)
                        for k, bank in enumerate(found)]
            self._routed[root] = forwards
            for routed in forwards:
                routed.install()
        return self._routed[root]

    def apart(self, root: nn.Module, conds: Sequence[list[dict] | None], options: Mapping) -> bool:
        """Whether every branch needs a batch of its own on a diffusion model: where it is not known which entries of
        its layers are which row's, and where the host evaluates such conds for one row at a time."""
        if root not in self._apart:
            known = row_order(root) is not None
            self._apart[root] = not known
            if not known:
                self._tell(f"{type(root).__name__}: in which order this kind of model keeps the rows of a batch is not "
                           f"known; {APART}")
        apart = self.kept.neighbours.patched(conds, options) or self._apart[root]
        return apart or self.one_row_only(root, conds)

    @staticmethod
    def one_row_only(root: nn.Module, conds: Sequence[list[dict] | None]) -> bool:
        """Whether the host evaluates such conds for one row at a time."""
        return one_row_only(root, values_by_name(conds))

    def keep_apart(self, root: nn.Module, reason: NotRows) -> None:
        """From now on branches have batches of their own."""
        self._apart[root] = True
        self._tell(f"{type(root).__name__}: {reason}; {APART}")

    def places(self, joined: Joined, root: nn.Module, x: Tensor, conds: Mapping[str, object],
               uuids: Sequence[UUID | None], tiles: Sequence[Area] = ()) -> Places | None:
        """Where the LoRAs of the methods of a bank may act in a batch of these conds, of each tile of the picture all;
        None: everywhere."""
        k = joined.methods[-1]  # what is beneath it is always on, everywhere
        regions = self.regions[k]
        if regions is None or regions.nowhere or getattr(self.applied[k].method, "masks", "") == "predictions":
            return None
        if None in tiles:
            self._tell(LOST)
        return regions.places(root, x, conds, inside([self.areas.get(uuid) for uuid in uuids], tiles),
                              [self.origins.get(uuid, uuid) for uuid in uuids], self.merging)

    def rows(self, joined: Joined, count: int, conds: Sequence[tuple[Combo, UUID | None]], pictures: int
             ) -> list[Branch]:
        """The branch of every row of a batch, of a bank of `count` adapters: for each cond all pictures."""
        own = [self.without.rows(k, [self.confined(k, combo[k], uuid) for combo, uuid in conds], pictures)
               for k in joined.methods]
        return [joined.branch(branches, count) for branches in zip(*own, strict=True)]

    def confined(self, k: int, branch: Branch, uuid: UUID | None) -> Branch:
        """The k-th method's branch for a cond's rows, as far as its LoRAs act there at all."""
        regions = self.regions[k]
        return regions.confined(self.origins.get(uuid, uuid), branch) if isinstance(regions, RoutedLoRAs) else branch

    @contextmanager
    def reading(self, regions: Sequence[RoutedLoRAs], combo: Combo | None = None) -> Iterator[None]:
        """While open, the attention of these methods is read in the rows of one combination, None: in all."""
        before, self.readers, self.read = (self.readers, self.read), list(regions), combo
        try:
            yield
        finally:
            self.readers, self.read = before

    def to_read(self, uuids: Sequence[UUID | None], combos: Sequence[Combo | None]) -> list[UUID | None]:
        """Which conds of a batch are read, by the caller's own names; None for the others."""
        return [self.origins.get(uuid, uuid) if self.read is None or combo == self.read else None
                for uuid, combo in zip(uuids, combos, strict=True)]

    def compiled(self, root: nn.Module, look: Callable[[], bool]) -> bool:
        """Whether torch.compile sees a model: looked at once."""
        if root not in self._seen_compiled:
            self._seen_compiled[root] = look()
        return self._seen_compiled[root]

    def keeping(self, root: nn.Module, options: dict, combos: Sequence[Combo | None], uuids: Sequence[UUID | None]
                ) -> dict:
        """Transformer options for a batch of these conds, as far as the model keeps something from call to call."""
        acting = [combo and tuple(self.confined(k, branch, uuid) for k, branch in enumerate(combo))
                  for combo, uuid in zip(combos, uuids, strict=True)]
        words = tuple(regions.texts for regions in self.regions if regions is not None)
        rows = tuple((each, words, self.without) for each in acting)
        options = self.kept.arrange(root, options, rows, prod(map(len, self.branches)), uuids, self.probing)
        return self.merging.watched(root, options) if words else options

    def off(self) -> None:
        """Take the routed forwards off the models; a later evaluation puts them on again."""
        self.texts.close()
        forwards = [routed for each in self._routed.values() for routed in reversed(each)]
        if log.isEnabledFor(logging.DEBUG):
            for line in (line for routed in forwards for line in routed.explain()):
                log.debug(line)
        self._bare = self._bare or any(routed.bare for routed in forwards)
        for routed in forwards:
            routed.remove()
        self._routed.clear()
        self._off += forwards

    def close(self, left: Mark | None) -> None:
        """Leave the models as they were, whatever becomes of the record: a failed accelerator raises there. `left` is
        the latent of a run that came to its end."""
        self.off()
        forwards, self._off = self._off, []  # which hold the model
        self.kept.close()
        self._close_step()
        if self.cache is not None:
            self.cache.close()
        lost = self.record.settle()
        if lost is not None or left is not None and not left.whole:
            since = f" from step {lost.index + 1} on" if lost is not None else ""
            self._tell(f"the model predicted values that are no numbers (NaN or infinite){since}, and the picture is "
                       "lost. Sample once without LoRAs: if that is right, lower their strengths")
        self.record.finished = left is not None
        for routed in forwards:
            self._unseen(routed)
        self.tell([*idle(self.applied, self._acted, self._in_time, self.record), *missed(self.record, self.sessions),
                   *[BY_ITSELF] * self._bare])
        sum_up(self._layers, self.record.problems)

    def _unseen(self, routed: RoutedForwards) -> None:
        """Name layers that were never called while adapters acted: the model uses them in another way, or earlier."""
        missed = routed.unseen(self.banked[routed.position].adapters)
        if missed and self.record.finished:
            self._tell(uncalled(missed))

    def tell(self, lines: Iterable[str]) -> None:
        """Lines for the record, each once."""
        for line in lines:
            self._tell(line)

    def _problem(self, adapter: str, layer: str, reason: str) -> None:
        """One line for a reason, with the first layer that it is true of; `sum_up` counts the others."""
        found = self._layers.setdefault((adapter, reason), [])
        found.append(layer)
        if len(found) == 1:
            self._tell(f"{adapter}: {layer}: {reason}")

    def _close_step(self) -> None:
        """The last step is over: its time, and what the cache and the sessions note of it, go into the record."""
        now = time.perf_counter()
        if self.record.steps:
            self.record.steps[-1].seconds = now - self._since
            if self.cache is not None:
                self.record.note("cache", self.cache.notes())
            for k, session in enumerate(self.sessions):
                regions = self.regions[k]
                found = session.notes() | (regions.notes() if isinstance(regions, RoutedLoRAs) else {})
                if found:
                    self.record.note(self.record.note_key(k), found)
        self._since = now
