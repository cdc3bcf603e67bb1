"""LoRAtorio that keeps every call of a run with the weights that it found."""

from __future__ import annotations

from dataclasses import dataclass, field

from lora_ensemble.methods.loratorio import LoRAtorio

from .builders import method


@dataclass(frozen=True)
class Watched(LoRAtorio):
    seen: list = field(default_factory=list, compare=False)
    """(step, call, weights [N, B, 1, ...]) of every call"""

    def begin(self, facts):
        session = super().begin(facts)
        weigh = session._weights_for

        def watched(step, call):
            weights = weigh(step, call)
            self.seen.append((step, call, weights))
            return weights

        session._weights_for = watched
        return session


def watched(model, ensemble, **options) -> tuple[object, list]:
    """(the MODEL with LoRAtorio on it, its calls)."""
    seen: list = []
    return method(model, ensemble, lambda strengths: Watched(strengths, seen=seen, **options)), seen
