"""What a MODEL carries once a method was applied to it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import torch
from comfy_execution.utils import get_executing_context
from torch import Tensor

from ...engine.record import RunRecord
from ...engine.tell import Once
from ...methods.session import RunContext
from .applied import Applied
from .cache import CacheSpec
from .earlier import Left, Mark
from .fused import as_before, call_routed_layers
from .run import Free, Run
from .steps import StepTracker
from .summary import chosen, in_parts, whole
from .without import Without

KEY = "lora_ensemble"
TOLD = 4
"""Runs of a MODEL of which is told what they did."""
log = logging.getLogger("lora_ensemble")


@dataclass(frozen=True)
class Placed:
    """Where the LoRAs of one method acted at the end of a run: their names, maps [pictures, LoRAs, (frames,) height,
    width] on the latent's grid, what was found of their words (`RoutedLoRAs.found`), and which have a mask by hand."""

    names: tuple[str, ...]
    maps: Tensor
    found: tuple[dict, ...] = ()
    masked: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a run: its record, and where its LoRAs acted, per method that confines them."""

    record: RunRecord | None
    places: tuple[Placed, ...]


@dataclass
class Composition:
    """The attachment of a patched MODEL. Method nodes in a row are several applied methods, outermost first: the
    branches multiply, and the predictions of the last one are mixed first.

    Clones of a MODEL share this object, so the record of the last run can be read from any of them, and what is told of
    those before by the latents that they left; everything else that belongs to one run is in `Run`, which exists only
    while it samples. `without` leaves LoRAs out of its pictures.
    """

    applied: tuple[Applied, ...]
    cache: CacheSpec | None = None
    record: RunRecord | None = None
    places: tuple[Placed, ...] = ()
    told: Left[Outcome] = field(default_factory=lambda: Left(TOLD))
    without: Without = Without()
    runs: list[Run] = field(default_factory=list)
    sampled: tuple | None = None  # the node that sampled last, as the host executes it, and the shape of its latent
    warn: Once = field(default_factory=lambda: Once(log.warning))

    def on_model_patcher_clone(self) -> Composition:
        """Called by the host: attachments without this method would be shared too, but not by contract."""
        return self

    @property
    def run(self) -> Run | None:
        """The run that is sampling now; the innermost where one run starts another.

        None where the model is evaluated although no run of it began, as the second model of a guider with two is:
        said once, since its LoRAs do nothing then.
        """
        if not self.runs:
            self.warn("This sampler evaluates a model without starting it as the sampled one (the negative model of a "
                      "dual-model guider, say): its LoRAs have no effect there. Bake them in with Merge instead.")
        return self.runs[-1] if self.runs else None

    def begin(self, tracker: StepTracker, contexts: Sequence[RunContext], sides: Mapping[UUID, str], free: Free,
              device: torch.device) -> Run:
        """Start a run; its context per applied method, the side of guidance that each of the sampler's conds is on,
        what tells how much memory is left, and where it samples."""
        total = contexts[0].total if contexts else tracker.total
        run = Run(self.applied, tracker, contexts, sides, self.cache and self.cache.at(total), free, device)
        run.without = self.without
        run.record.chosen += chosen(run.record, run.sessions, self.cache, total)
        run.tell(whole(self.cache, total))
        node = get_executing_context()
        sampled = node and (node, contexts[0].shape if contexts else ())
        if sampled and sampled == self.sampled:
            run.tell(in_parts(self.applied, contexts))
        self.sampled = sampled
        call_routed_layers()
        self.runs.append(run)
        self.record = run.record
        return run

    def end(self, run: Run, left: Mark | None) -> None:
        """The run is over, however it ended; `left` is the latent where it came to its end."""
        self.runs.remove(run)
        as_before()
        try:
            self.places = tuple(
                Placed(each.names, regions.maps.cpu(), tuple(getattr(regions, "found", ())),
                       tuple(mask is not None for mask in each.masks))
                for each, regions in zip(self.applied, run.regions, strict=True) if regions is not None)
        finally:  # a failed accelerator raises there
            run.close(left)
        if left is not None:
            self.told.keep(left, Outcome(self.record, self.places))


def places_of(model) -> tuple[Placed, ...]:
    """Where the LoRAs of each method that confines them acted in the last run of a MODEL."""
    composition = model.get_attachment(KEY)
    return composition.places if composition is not None else ()


def record_of(model) -> RunRecord | None:
    """What the last run of a MODEL with a method on it did; None before the first run and for other models."""
    composition = model.get_attachment(KEY)
    return composition.record if composition is not None else None


def outcome_of(model, latent: Tensor) -> Outcome:
    """What came of the run of a MODEL that left this latent, since a graph may sample a MODEL several times; of its
    last run where none is known to have."""
    composition = model.get_attachment(KEY)
    found = composition.told.before(latent) if composition is not None else None
    return found or Outcome(record_of(model), places_of(model))
