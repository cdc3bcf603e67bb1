"""MODELs with the branch cache on them, what a run's record says of it, and a watch over what is reused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lora_ensemble.host.compose.apply import with_cache
from lora_ensemble.host.compose.cache import CacheSpec
from lora_ensemble.host.compose.composition import record_of
from lora_ensemble.host.families import split_points
from lora_ensemble.kernels.branch import one_hot
from lora_ensemble.methods.schedule import Uniform
from lora_ensemble.methods.session import PlainSession
from lora_ensemble.nodes.cmlora import LoRAEnsembleCMLoRA

from .builders import method


def cached(model, interval: int = 3, depth: int = 1):
    return with_cache(model, CacheSpec(Uniform(interval), depth=depth))


def steps_of(model) -> list[dict]:
    """Per step of the last run: what the cache noted, with the rows of the step."""
    return [{**step.notes["cache"], "rows": step.rows, "calls": step.calls} for step in record_of(model).steps]


def cmlora(model, ensemble, cache_depth: int, dominance: float = 0.0, full: str = "every_step", order: str = "offline",
           **later):
    return LoRAEnsembleCMLoRA.execute(model, ensemble, order, 0.6, 0.4, dominance, "none", 2, 3, full, 5,
                                      cache_depth, **later).args[0]


@dataclass(frozen=True)
class InTurn:
    """Composite whose branches run whole one after the other, the rest reuses: CMLoRA's pattern."""

    strengths: tuple[float, ...]

    def begin(self, facts):
        return InTurnSession(self)

    def branches(self, step):
        return tuple(one_hot(self.strengths, i) for i in range(len(self.strengths)))

    def mix(self, step, predictions):
        return predictions.mean(dim=0)


class InTurnSession(PlainSession):
    def refresh(self, step):
        return tuple(step.index % 3 == i for i in range(len(self.method.strengths)))


def in_turn(model, ensemble, max_age: int = 4, forecast: bool = False):
    return with_cache(method(model, ensemble, InTurn), CacheSpec(max_age=max_age, depth=1, forecast=forecast))


class Watch:
    """Checks at every reuse that a row gets what that row's branch, cond and window caught last."""

    def __init__(self, monkeypatch):
        self.caught: dict[tuple, dict] = {}
        self.reused = 0
        for kind in (split_points.UNetSplit, split_points.BlockSplit):
            monkeypatch.setattr(kind, "capture", self.capture(kind.capture))
            monkeypatch.setattr(kind, "reuse", self.reuse(kind.reuse))
        monkeypatch.setattr(split_points.UNetSplit, "mix", self.mix(split_points.UNetSplit.mix))

    def places(self, options: dict) -> list[tuple]:
        window = options.get("context_window")
        attention = tuple(options.get("patches_replace", {}).get("attn1", {}))
        return [(uuid, tuple(window.index_list) if window else (), attention) for uuid in options["uuids"]]

    def note(self, place: tuple, options: dict, caught: dict, k: int, count: int) -> None:
        """What a place catches: the k-th of so many parts of `caught`, once the model has run."""
        self.caught[place] = (caught, k, count)

    def check(self, place: tuple, options: dict, features: dict) -> None:
        """What a place is given."""
        caught, i, count = self.caught[place]
        for name, value in features.items():
            assert torch.equal(value, caught[name].chunk(count)[i])
            self.reused += 1

    def capture(self, original):
        def capture(split, options, caught):
            places = self.places(options)
            for k, place in enumerate(places):
                self.note(place, options, caught, k, len(places))
            return original(split, options, caught)

        return capture

    def reuse(self, original):
        def reuse(split, features, control, options):
            places = self.places(options)
            for k, place in enumerate(places):
                self.check(place, options, {name: value.chunk(len(places))[k] for name, value in features.items()})
            return original(split, features, control, options)

        return reuse

    def mix(self, original):
        def mix(split, features, rows, options, caught, among):
            found = list(zip(self.places(options), features, strict=True))
            whole = [place for place, kept in found if kept is None]
            for place, kept in found:
                if kept is not None:
                    self.check(place, options, kept)
            for k, place in enumerate(whole):
                self.note(place, options, caught, k, len(whole))
            return original(split, features, rows, options, caught, among)

        return mix
