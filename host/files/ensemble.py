"""What travels on a LORA_ENSEMBLE socket: names and numbers. Nothing is loaded until a method needs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from ...methods.windows import Window
from .called import in_row

ALWAYS = "always"
"""The role of a LoRA that is no part of the composition but of the model: it acts in all of it, in every step. Such
are LoRAs for few steps (Lightning, Turbo, LCM)."""
ROLES = ("auto", "character", "clothing", "object", "style", "background", ALWAYS)


@dataclass(frozen=True, eq=False)
class Mask:
    """A MASK [B, height, width] in [0, 1]. Compared by identity, so that what holds it can be compared at all."""

    tensor: Tensor


@dataclass(frozen=True)
class LoRASpec:
    """One LoRA of an ensemble.

    name             file name below ComfyUI's `loras` folders
    strength_model   multiplies the delta of the diffusion model; 0 leaves the LoRA out of the composition
    strength_clip    multiplies the delta of the text encoder
    role             what the LoRA depicts, one of ROLES
    mask             where in the picture it may act, for methods that can confine it; None: everywhere
    words            its words in the prompt, as `methods.prompt.LoRAWords.typed` has them; empty: those of its file
    start, end, fade when it acts, as `methods.windows.Window` has them
    row              its number on the node that it comes from; 0: it is counted
    label            what it is called where its file's name does not tell it apart (`told_apart`)
    """

    name: str
    strength_model: float
    strength_clip: float
    role: str = "auto"
    mask: Mask | None = None
    words: str = ""
    start: float = 0.0
    end: float = 1.0
    fade: float = 0.0
    row: int = field(default=0, compare=False)
    label: str = field(default="", compare=False)

    @property
    def called(self) -> str:
        """For messages and records."""
        return self.label or self.name

    @property
    def window(self) -> Window:
        """When it acts. Raises ValueError where that would be never."""
        return Window(self.start, self.end, self.fade)

    @property
    def acts(self) -> bool:
        """Whether it has a strength at all."""
        return self.strength_model != 0 or self.strength_clip != 0

    @property
    def composed(self) -> bool:
        """Whether a method has it to work with: it acts on the model, and is no part of it."""
        return self.strength_model != 0 and self.role != ALWAYS


Ensemble = tuple[LoRASpec, ...]


def told_apart(ensemble: Ensemble) -> Ensemble:
    """The same, with the number of its row behind the name of each LoRA whose file acts in several."""
    files = [spec.name for spec in ensemble if spec.acts]
    return tuple(replace(spec, label=in_row(spec.name, spec.row or k)) if files.count(spec.name) > 1 else spec
                 for k, spec in enumerate(ensemble, 1))


def on_the_model(ensemble: Ensemble) -> Ensemble:
    """The same without what it changes in the text encoder: for a node that has no clip to be connected."""
    return tuple(replace(spec, strength_clip=0.0) for spec in ensemble)


def index_of(specs: Sequence[LoRASpec], spec: LoRASpec) -> int:
    """The place of a LoRA among these. By identity: two rows may hold the same."""
    return next(k for k, one in enumerate(specs) if one is spec)
