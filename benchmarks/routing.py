"""What it costs to let LoRAs act where their words are, over a merge of the same LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..methods.merge import Merge
from ..methods.prompt import PromptTokens
from ..methods.routed import Routing
from .measure import median
from .models import STRENGTH, sampled


@dataclass(frozen=True)
class _Arm:
    model: object
    positive: list


def clauses(count: int, tokens: int) -> PromptTokens:
    """A prompt of as many clauses as there are LoRAs, and one that is nobody's, each of three words."""
    text, words = "", []
    for k in range(count + 1):
        for word in range(3):
            start = len(text)
            text += f"word{k}x{word}" + (" " if word < 2 else ", ")
            words.append((start, start + len(text[start:].rstrip(" ,")), (1 + 3 * k + word,)))
    return PromptTokens(text, tokens, tuple(words))


def with_clauses(positive: list, count: int) -> list:
    """The same conditionings, of a prompt with a clause for each LoRA."""
    return [[tensor, {**extra, "lora_ensemble_prompt": clauses(count, tensor.shape[1])}] for tensor, extra in positive]


def bench_routed(model, files: Sequence[Path], conds: list, noise: Tensor, steps: int, rounds: int, cfg: float
                 ) -> dict[str, dict[str, float]]:
    """Per mode: seconds of a step over those of Merge with the same LoRAs (the first two steps are left out: they find
    places and make programs), evaluations of a run, and the bytes of the maps.

    "confined" is Routed whose attention is not read: what the maps alone cost.
    """
    from ..host.compose.apply import apply_method
    from ..host.compose.composition import places_of, record_of
    from ..host.compose.placing import Placing
    from ..host.files.ensemble import LoRASpec

    ensemble = tuple(LoRASpec(file.name, STRENGTH, 0.0, words=f"word{k}x0") for k, file in enumerate(files))
    worded = with_clauses(conds[0], len(files))

    def applied(placing: Placing) -> object:
        return apply_method(model, None, ensemble, lambda active: Merge(active.strengths), "Routed LoRAs",
                            placing=placing)[0]

    arms = {"merge": _Arm(applied(Placing("everywhere")), conds[0]),
            "confined": _Arm(applied(Placing("words", Routing("once"))), worded),
            "every step": _Arm(applied(Placing("words", Routing("every step", trust=True))), worded)}
    times: dict[str, list] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            times[name] += sampled(arm.model, arm.positive, conds[1], noise, steps, cfg)[1][2:]
    seconds = {name: median(each) for name, each in times.items()}
    found = {}
    for name in ("confined", "every step"):
        maps = places_of(arms[name].model)[0].maps
        found[name] = {"ratio": seconds[name].wall / seconds["merge"].wall,
                       "cpu_ratio": seconds[name].cpu / seconds["merge"].cpu, "seconds": seconds[name].wall,
                       "rows": sum(step.rows for step in record_of(arms[name].model).steps),
                       "map_bytes": maps.numel() * maps.element_size()}
    return found
