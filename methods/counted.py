"""Numbers with their nouns, for lines that people read."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """1 step, 20 steps, 1,000 steps."""
    return f"{number:,} {noun}" + "s" * (number != 1)


def any_step(number: int) -> str:
    """`the only step`, `any of the 20 steps`: for what happened in none of them."""
    return "the only step" if number == 1 else f"any of the {counted(number, 'step')}"


def verb(number: int, many: str) -> str:
    """The verb of so many: `have`, `were`, `are`, `leave` of several."""
    return many if number != 1 else {"have": "has", "were": "was", "are": "is"}.get(many, many + "s")
