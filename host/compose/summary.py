"""What is said of a run when it is over: LoRAs without a turn, and for how many layers a problem is true."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ...engine.record import RunRecord


def idle(applied: Sequence, acted: Sequence[set[int]], record: RunRecord) -> Iterator[str]:
    """LoRAs that a method never let act in a finished run: of those that take turns, there may be more than there are
    steps. `acted` holds the indexes of the others, per method."""
    steps = len(record.steps) if record.finished else 0
    for each, known in zip(applied, acted, strict=True):
        for i, name in enumerate(each.names) if steps else ():
            if i not in known:
                yield (f"LoRA '{name}' did not act in any of the {steps} steps: {type(each.method).__name__} gave it "
                       "no turn")


def sum_up(layers: Mapping[tuple[str, str], Sequence[str]], problems: list[str]) -> None:
    """Say in each line of a (LoRA, reason) how many layers it is true of besides the first, which it names."""
    for (adapter, reason), (first, *others) in layers.items():
        line = f"{adapter}: {first}: {reason}"
        if others and line in problems:
            count = f"{len(others)} more layer{'s' * (len(others) > 1)}"
            problems[problems.index(line)] = f"{adapter}: {first} and {count}: {reason}"
