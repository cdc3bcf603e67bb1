"""The notation for the order of turns: `2,1,3`."""

from __future__ import annotations

from ..host.files.ensemble import Ensemble


def numbers_of(text: str) -> tuple[int, ...]:
    """'2, 1,3' -> (2, 1, 3); spaces alone separate as well; an empty text gives an empty tuple.

    Raises ValueError for anything but numbers from 1, each at most once.
    """
    words = text.replace(",", " ").split()
    if not all(word.isdecimal() and len(word) < 10 and int(word) > 0 for word in words):
        raise ValueError(f"Switch LoRAs: order is '{text[:80]}'. Write the numbers of the LoRAs, such as 2,1,3, or "
                         "nothing.")
    numbers = tuple(map(int, words))
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"Switch LoRAs: order '{text[:80]}' names a LoRA twice. Name each one once, or leave it "
                         "empty.")
    return numbers


def turns_of(text: str, ensemble: Ensemble, taking_part: Ensemble) -> tuple[int, ...] | None:
    """The order of turns as indexes among the LoRAs that take part; None: as listed.

    Numbers count all LoRAs of the chain, so that muting one does not renumber the others; one that takes no part may
    be named.
    Raises ValueError for a number beyond the chain and for a LoRA that would never get a turn.
    """
    numbers = numbers_of(text)
    if not numbers:
        return None
    active = [number for number, lora in enumerate(ensemble, start=1) if lora in taking_part]
    beyond = [number for number in numbers if number > len(ensemble)]
    if beyond:
        raise ValueError(
            f"Switch LoRAs: order '{text[:80]}' names LoRA {beyond[0]}, but the ensemble has {len(ensemble)}. "
            "Take that number out, or leave the order empty."
        )
    missing = [number for number in active if number not in numbers]
    if missing:
        name = ensemble[missing[0] - 1].name
        raise ValueError(
            f"Switch LoRAs: order '{text[:80]}' leaves out LoRA {missing[0]} ('{name}'). Add its number, set its "
            "strength_model to 0, or leave the order empty."
        )
    return tuple(active.index(number) for number in numbers if number in active)
