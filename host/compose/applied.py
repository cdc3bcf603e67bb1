"""A method as a MODEL has it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...methods import Method, method_title
from ...methods.windows import Window
from .placing import Routed
from .prompts import Asked


@dataclass(frozen=True)
class Applied:
    """One method node's share of a MODEL.

    names      of its LoRAs, in the order of their gains
    problems   what could not be done as asked when the node ran
    masks      per LoRA where it may act, as users give them, [B, height, width] in pixels; None: everywhere
    bank       which of the MODEL's banks holds its LoRAs, and
    first      how many of that bank come before them
    routed     how the places of its LoRAs are found by their words; None: they are not
    windows    when each of them may act; (): always
    reason     why the method was taken, where that was not the user's choice
    always     whether its LoRAs are part of the model, and no composition
    asked      whose shares in the prompts the method asks for; None: nobody's
    node       the id of the node in the prompt; "" where none was executed
    """

    method: Method
    names: tuple[str, ...]
    problems: tuple[str, ...] = ()
    masks: tuple[Tensor | None, ...] = ()
    bank: int = 0
    routed: Routed | None = None
    windows: tuple[Window, ...] = ()
    reason: str = ""
    always: bool = False
    asked: Asked | None = None
    node: str = ""
    first: int = 0

    @property
    def title(self) -> str:
        """The method as users call it."""
        return method_title(type(self.method).__name__, self.routed is not None)
