"""The one way to tell a problem: once, however often it is met."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

log = logging.getLogger("lora_ensemble")
Report = Callable[[str, str, str], None]
"""(adapter name or `all`, layer, reason): what of an adapter is not done there as asked."""


class Once:
    """A callable that passes on what it is told the first time and is silent from then on, for several threads at
    once: the devices of one run tell from threads of their own."""

    def __init__(self, say: Callable[..., None]):
        self._say = say
        self._said: dict[Hashable, object] = {}

    def __call__(self, *words: Hashable, about: Hashable = None) -> None:
        """Call `say(*words)`, unless these words were said before; with `about`, unless anything was said about it."""
        key = words if about is None else about
        mine = object()
        if self._said.setdefault(key, mine) is mine:  # looked up and put in by one operation of the interpreter
            self._say(*words)


def into(problems: list[str]) -> Once:
    """What tells the problems of a run: as a warning in the log, and in the list that its record keeps. It holds on to
    nothing but the list, so that whoever is given it may outlive the run."""
    def say(problem: str) -> None:
        log.warning(problem)
        problems.append(problem)

    return Once(say)
