"""What a MODEL carries once a method was applied to it, and what lives while it samples."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from uuid import UUID, uuid4

import torch
from torch import Tensor, nn

from ..engine.bank import Bank
from ..engine.forwards import RoutedForwards
from ..engine.record import RunRecord, StepRecord
from ..kernels.branch import Branch, Step
from ..kernels.packed import Parts, unpack
from ..methods import Method
from ..methods.session import OTHER, POSITIVE, UNCONDITIONAL, Call, RunFacts, begin
from .cache import BranchCache, CacheSpec
from .clock import Clock
from .control import Controls

KEY = "lora_ensemble"
log = logging.getLogger("lora_ensemble")

Combo = tuple[Branch, ...]
"""One branch per applied method: what one row of a batch is evaluated with."""

Free = Callable[[torch.device], float]
"""Bytes that a device has left."""


@dataclass(frozen=True)
class Layer:
    """One method node's share: its method, the names of its LoRAs, what it could not express at load, where each LoRA
    may act (masks as users give them, [B, height, width] in pixels), and which of the MODEL's banks holds them."""

    method: Method
    names: tuple[str, ...]
    problems: tuple[str, ...] = ()
    masks: tuple[Tensor | None, ...] = ()
    bank: int = 0


@dataclass
class Composition:
    """The attachment of a patched MODEL. Method nodes in a row make several layers: the branches multiply, and the
    predictions of the last one are mixed first.

    Clones of a MODEL share this object, so the record of the last run can be read from any of them; everything that
    belongs to one run is in `Run`, which exists only while it samples.
    """

    layers: tuple[Layer, ...]
    cache: CacheSpec | None = None
    record: RunRecord | None = None
    runs: list[Run] = field(default_factory=list)
    warned: bool = False

    def on_model_patcher_clone(self) -> Composition:
        """Called by the host: attachments without this method would be shared too, but not by contract."""
        return self

    @property
    def run(self) -> Run | None:
        """The run that is sampling now; the innermost where one run starts another.

        None where the model is evaluated although no run of it began, as the second model of a guider with two is:
        said once, since its LoRAs do nothing then.
        """
        if not self.runs and not self.warned:
            self.warned = True
            log.warning("This sampler evaluates a model without starting it as the sampled one (the negative model of "
                        "a dual-model guider, say): its LoRAs have no effect there. Bake them in with Merge instead.")
        return self.runs[-1] if self.runs else None

    def begin(self, sigmas: Tensor, facts: Sequence[RunFacts], sides: Mapping[UUID, str], free: Free) -> Run:
        """Start a run; `facts` per layer, the side of guidance that each of the sampler's conds is on, and what tells
        how much memory is left."""
        run = Run(self.layers, sigmas, facts, sides, self.cache, free)
        self.runs.append(run)
        self.record = run.record
        return run

    def end(self, run: Run, finished: bool) -> None:
        self.runs.remove(run)
        run.close(finished)


def record_of(model) -> RunRecord | None:
    """What the last run of a MODEL with a method on it did; None before the first run and for other models."""
    composition = model.get_attachment(KEY)
    return composition.record if composition is not None else None


@dataclass(frozen=True)
class Plan:
    """What one model call evaluates: every combination of the layers' branches.

    fresh   per combination: False where caches may stand in for its deep layers, as far as the methods go
    parts   of a latent that holds several, such as picture and sound
    """

    step: Step
    x: Tensor
    sigma: Tensor
    branches: tuple[tuple[Branch, ...], ...]
    combos: tuple[Combo, ...]
    fresh: tuple[bool, ...]
    parts: Parts = ()


class Run:
    """State of one sampling run: fresh at its start, gone at its end."""

    def __init__(self, layers: Sequence[Layer], sigmas: Tensor, facts: Sequence[RunFacts], sides: Mapping[UUID, str],
                 cache: CacheSpec | None, free: Free):
        self.sessions = [begin(layer.method, known) for layer, known in zip(layers, facts, strict=True)]
        self.clock = Clock(sigmas.detach().float().cpu().tolist())
        self.record = RunRecord([type(layer.method).__name__ for layer in layers],
                                [list(layer.names) for layer in layers],
                                problems=[problem for layer in layers for problem in layer.problems])
        self.cache = BranchCache(cache, self._tell, free) if cache is not None and cache.oldest > 1 else None
        self.combos: dict[UUID, Combo] = {}
        self.single: Combo | None = None
        self.controls = Controls()
        self._sides = sides
        self._tags: dict[tuple[UUID, Combo], UUID] = {}
        self._routed: dict[int, tuple[nn.Module, list[RoutedForwards]]] = {}
        self._since = time.perf_counter()
        self._prompts: dict[int, tuple[nn.Module, list[Combo | None]]] = {}
        for layer, known in zip(layers, facts, strict=True):
            for name, mask, placed in zip(layer.names, layer.masks, known.masks, strict=False):
                if mask is not None and placed is None and getattr(layer.method, "uses_masks", False):
                    self._tell(f"the mask of LoRA '{name}' is not used: this latent has no height and width")

    def plan(self, x: Tensor, timestep: Tensor, parts: Parts = ()) -> Plan:
        """The step this call belongs to, and what it evaluates."""
        step = self.clock.step(timestep)
        if not self.record.steps or self.record.steps[-1].index != step.index:
            self._close_step()
            self.record.steps.append(StepRecord(step.index, step.sigma))
        for session in self.sessions:
            session.observe(step, unpack(x, parts)[0])
        branches = tuple(session.branches(step) for session in self.sessions)
        combos = tuple(product(*branches))
        fresh = tuple(any(flags) for flags in product(*(session.refresh(step) for session in self.sessions)))
        entry = self.record.steps[-1]
        entry.branches = entry.branches or [[list(branch.gains) for branch in combo] for combo in combos]
        return Plan(step, x, timestep, branches, combos, fresh, parts)

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
        """Mix predictions, per cond [combos, ...], of all layers from `depth` on, the last layer's first. Without
        layers there is one combination, the model as it is."""
        if not self.sessions:
            return [None if p is None else p[0] for p in predictions]
        branches = plan.branches[depth]
        if depth + 1 < len(self.sessions):
            # One part per outer branch: each holds all inner combinations, for all conds together.
            split = [None if p is None else p.unflatten(0, (len(branches), -1)) for p in predictions]
            parts = [self.mix(plan, [None if p is None else p[i] for p in split], sides, depth + 1)
                     for i in range(len(branches))]
            predictions = [None if one[0] is None else torch.stack(one) for one in zip(*parts, strict=True)]
        return self.sessions[depth].mix(plan.step, Call(plan.x, plan.sigma, branches, predictions, sides,
                                                            plan.parts))

    def tag(self, cond: UUID, combo: Combo) -> UUID:
        """An identity for a cond under one combination of branches: what caches keyed by cond must tell apart."""
        key = (cond, combo)
        if key not in self._tags:
            self._tags[key] = uuid4()
            self.combos[self._tags[key]] = combo
        return self._tags[key]

    def routed(self, root: nn.Module, banks: Callable[[], list[Bank]],
               reader: Callable[[str], Tensor | None]) -> list[RoutedForwards]:
        """The routed forwards on one live diffusion model, installed on first sight (delegates and multi-GPU clones
        have modules of their own)."""
        if id(root) not in self._routed:
            forwards = [RoutedForwards(root, bank, reader, self._problem, k) for k, bank in enumerate(banks())]
            self._routed[id(root)] = (root, forwards)
            for routed in forwards:
                routed.install()
        return self._routed[id(root)][1]

    def arrange(self, root: nn.Module, combos: list[Combo | None]) -> None:
        """Rows of these combinations come next. A model that keeps keys and values of its prompt from call to call
        (HiDream-O1) knows them by the prompt alone: it must forget them where the LoRAs of its rows change."""
        if hasattr(root, "clear_kv_cache") and self._prompts.get(id(root), (root, None))[1] != combos:
            root.clear_kv_cache()
            self._prompts[id(root)] = (root, combos)

    def close(self, finished: bool) -> None:
        """Leave the models as they were, whatever becomes of the record: an accelerator that has failed raises where
        its numbers are read."""
        forwards = [routed for _, each in self._routed.values() for routed in reversed(each)]
        for routed in forwards:
            routed.remove()
        self._routed.clear()
        for root, _ in self._prompts.values():
            root.clear_kv_cache()
        self._close_step()
        if self.cache is not None:
            self.cache.close()
        self.record.settle()
        self.record.finished = finished
        for routed in forwards:
            self._unseen(routed)

    def _unseen(self, routed: RoutedForwards) -> None:
        """Name layers that hold adapters but were never called: the model reads their weights in another way."""
        missed = [name for name in routed.bank.sites if routed.seen and name not in routed.seen]
        if missed and self.record.finished:
            self._problem("all", missed[0], f"{len(missed)} layers were never called in this run; their LoRA keys had "
                                            "no effect")

    def _problem(self, adapter: str, layer: str, reason: str) -> None:
        self._tell(f"{adapter}: {layer}: {reason}")

    def _tell(self, problem: str) -> None:
        if self.record.tell(problem):
            log.warning(problem)

    def _close_step(self) -> None:
        """The sessions' notes go in under their method's name; the second of a kind has its place as well."""
        now = time.perf_counter()
        if self.record.steps:
            self.record.steps[-1].seconds = now - self._since
            if self.cache is not None:
                self.record.note("cache", self.cache.notes())
            for k, (name, session) in enumerate(zip(self.record.methods, self.sessions, strict=True)):
                found = session.notes()
                if found:
                    self.record.note(f"{name} {k + 1}" if name in self.record.methods[:k] else name, found)
        self._since = now
