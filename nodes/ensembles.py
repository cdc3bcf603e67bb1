"""The nodes that make an ensemble: one LoRA after the other, or from another pack's stack."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io

from ..host.files.ensemble import ROLES, Ensemble, LoRASpec, Mask
from ..host.files.files import FOLDER, changes, check_file, known, path_in
from ..host.files.metadata import fingerprint_with_words
from ..host.files.names import matching
from .chain import check_chain
from .said import say
from .sockets import (
    HIDDEN,
    LoRAStack,
    earlier_ensemble_input,
    ensemble_output,
    schema,
    strength_input,
)

log = logging.getLogger("lora_ensemble")
LARGEST = 100.0
"""No strength of ComfyUI's own loader is larger."""


class LoRAEnsembleLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleLoRA",
            display_name="LoRA (Ensemble)",
            description="Adds one LoRA to an ensemble. Chain several, then compose them with Merge, Switch, Composite "
            "or another method.",
            search_aliases=["multi lora", "several loras", "lora stack", "combine loras"],
            hidden=HIDDEN,
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file in ComfyUI's models/loras.",
                ),
                strength_input(
                    "strength_model",
                    "How strongly the LoRA acts on the diffusion model. May be negative; 0 leaves it out of the "
                    "composition.",
                ),
                strength_input(
                    "strength_clip",
                    "How strongly the LoRA acts on the text encoder, if it changes it at all and a clip is connected "
                    "to the method node. May be negative; 0 leaves the text encoder alone.",
                ),
                io.Combo.Input(
                    "role",
                    options=list(ROLES),
                    default="auto",
                    tooltip="What the LoRA depicts. For K-LoRA and EST-LoRA, characters, clothing and objects are "
                    "subjects, styles and backgrounds styles; auto goes by order. For CMLoRA, backgrounds lead late. "
                    "With words, styles act everywhere. always: part of the model rather than of the composition, in "
                    "every step and at every place; for LoRAs that make few steps do (Lightning, Turbo, LCM).",
                ),
                earlier_ensemble_input(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture this LoRA may act: for every method, but not for Merge in mode "
                    "baked. It beats the LoRA's words.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    optional=True,
                    tooltip="The LoRA's words in the prompt, separated by commas, for methods that let it act where "
                    "these words are: each grows to the clause that holds it. Empty: the trigger words that its file "
                    "names, or else a file of a LoRA manager beside it. 'ohwx = woman with red hair' looks for ohwx "
                    "and lets ordinary words stand in for it where its place in the picture is sought.",
                ),
                *window_inputs(),
            ],
            outputs=[ensemble_output()],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        """Checks the file before the run; a name that comes over a link is only known, and checked, during it."""
        try:
            if lora_name is not None:
                check_file(lora_name)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **others: object) -> str:
        """Run again when the file has been replaced, or its words beside it."""
        return str(changes()) if lora_name is None else fingerprint_with_words(lora_name)

    @classmethod
    def execute(
        cls,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        role: str,
        ensemble: Ensemble | None = None,
        mask: torch.Tensor | None = None,
        words: str | None = "",
        start: float = 0.0,
        end: float = 1.0,
        fade: float = 0.0,
    ) -> io.NodeOutput:
        check_chain(cls, ensemble=ensemble)
        check_file(lora_name)
        region = Mask(checked_mask(mask, lora_name, "LoRA (Ensemble)")) if mask is not None else None
        lora = LoRASpec(lora_name, strength_model, strength_clip, role, region, " ".join((words or "").split()),
                        start, end, fade)
        check_window(lora, "LoRA (Ensemble)")
        return io.NodeOutput((*(ensemble or ()), lora))


def window_inputs() -> list[io.Input]:
    """When a LoRA acts."""
    return [
        io.Float.Input(
            "start", optional=True, default=0.0, min=0.0, max=1.0, step=0.01,
            tooltip="When the LoRA begins to act, from 0 to 1, counted as a ControlNet's start_percent is: "
            "by the noise level, 0 the noisiest. 0: from the first step on.",
        ),
        io.Float.Input(
            "end", optional=True, default=1.0, min=0.0, max=1.0, step=0.01,
            tooltip="When it stops: steps from here on are without it. 1: it acts to the last step. A LoRA outside its "
            "window costs nothing and takes no turn.",
        ),
        io.Float.Input(
            "fade", optional=True, default=0.0, min=0.0, max=1.0, step=0.01,
            tooltip="How long its strength takes to rise from 0 behind start and to fall to 0 before end, on the same "
            "scale. 0: at once.",
        ),
    ]


def check_window(lora: LoRASpec, node: str) -> None:
    """Raises ValueError where a LoRA's window is never open."""
    try:
        lora.window  # noqa: B018  (made to be checked)
    except ValueError as error:
        raise ValueError(f"{node}: '{lora.name}': {error}.") from None


def checked_mask(mask: torch.Tensor, name: str, node: str) -> torch.Tensor:
    """The mask as [B, height, width], if it can confine a LoRA. Raises ValueError for one without pixels or with
    numbers that are none."""
    if mask.numel() == 0:
        raise ValueError(f"{node}: the mask for '{name}' has no pixels, its size is {tuple(mask.shape)}. A "
                         "node that found nothing makes such masks. Connect another one, or none to let the LoRA act "
                         "everywhere.")
    if not mask.isfinite().all():
        raise ValueError(f"{node}: the mask for '{name}' holds values that are no numbers (NaN or infinite). "
                         "Make it anew: its values go from 0 to 1.")
    return several(mask)


def several(mask: torch.Tensor) -> torch.Tensor:
    """[B, height, width] of a MASK: some nodes give a single one without B, or one with a channel."""
    return mask[None] if mask.ndim == 2 else mask.flatten(0, -3)


class LoRAEnsembleFromStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleFromStack",
            display_name="LoRA Stack to Ensemble",
            description="Turns a LORA_STACK, as LoRA managers and stackers of other packs make it, into an ensemble.",
            search_aliases=["lora stack", "lora stacker", "lora manager", "convert stack"],
            hidden=HIDDEN,
            inputs=[
                LoRAStack.Input(
                    "lora_stack",
                    tooltip="A LORA_STACK of any pack: a list of (file, model strength, clip strength). "
                    "Entries named None are skipped.",
                ),
                earlier_ensemble_input(),
            ],
            outputs=[ensemble_output()],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> str:
        """Run again when a file has been replaced; which ones are in the stack is not known yet."""
        return str(changes())

    @classmethod
    def execute(cls, lora_stack: Sequence[Any] | None, ensemble: Ensemble | None = None) -> io.NodeOutput:
        check_chain(cls, ensemble=ensemble)
        loras = from_stack(lora_stack, "LoRA Stack to Ensemble")
        for lora in loras:
            check_file(lora.name)
        if told := "\n".join(left_out(lora_stack)):
            log.warning("LoRA Stack to Ensemble: %s", told)
            say(told)
        return io.NodeOutput((*(ensemble or ()), *loras))


def from_stack(stack: Sequence[Any] | None, node: str) -> Ensemble:
    """The LoRAs of a LORA_STACK, without its empty entries; none of a stacker that is switched off and hands on None.

    Raises ValueError where an entry is not (file, model strength, clip strength), with strengths that a loader takes,
    and for a file that no name in ComfyUI's list means; what an entry has besides is for `left_out`.
    """
    loras: list[LoRASpec] = []
    for entry in stack or ():
        if entry is None:
            continue
        try:
            name, strength_model, strength_clip, *_ = _parts(entry)
            if name not in (None, "", "None"):
                strengths = float(strength_model), float(strength_clip)
                if not all(abs(strength) <= LARGEST for strength in strengths):  # which a NaN is not, either
                    raise ValueError
                loras.append(LoRASpec(os.fspath(name), *strengths))
        except (TypeError, ValueError, AttributeError, KeyError):
            raise ValueError(
                f"{node}: {_shown(entry)} is not (file, model strength, clip strength), strengths "
                f"from -{LARGEST:g} to {LARGEST:g}. Connect a LORA_STACK output of a LoRA stacker or manager."
            ) from None
    return tuple(replace(lora, name=in_the_list(lora.name, node)) for lora in loras)


def left_out(stack: Sequence[Any] | None) -> list[str]:
    """A line for each LoRA of a LORA_STACK whose entry says more than its file and strengths, as stacks of packs that
    merge files by themselves do."""
    lines = []
    for entry in filter(None, stack or ()):
        name, _, _, *further = _parts(entry)
        if name not in (None, "", "None") and further:
            lines.append(f"{name}: its stack also says {', '.join(map(str, further))[:80]}, which has no effect here")
    return lines


def _parts(entry: Any) -> list[Any]:
    """[file, model strength, clip strength, whatever else is said of it] of an entry of a LORA_STACK: a row of them, or
    a table as LoRA-Optimizer makes it, with one strength and with the tensors of the file, which is read again."""
    if isinstance(entry, Mapping):
        return [entry["name"], entry["strength"], entry["strength"],
                *(value for key, value in entry.items() if key not in ("name", "strength") and isinstance(value, str))]
    return [*entry]


def _shown(entry: Any) -> str:
    """An entry for a message; of a table its keys: it may hold a whole file."""
    return str(list(entry) if isinstance(entry, Mapping) else entry)[:200]


def in_the_list(name: str, node: str) -> str:
    """A LoRA's name as ComfyUI lists it. Some stackers hand over full paths, others names as prompts write them,
    without extension or folder; one that may be several files, or none, stays as it is.

    Raises ValueError for the full path of a file whose name in the list means another one, in an earlier folder.
    """
    for folder in folder_paths.get_folder_paths(FOLDER):
        root = os.path.join(os.path.abspath(folder), "")
        if os.path.normpath(name).startswith(root):
            listed = os.path.normpath(name)[len(root) :]
            taken = path_in(FOLDER, listed)
            if taken is not None and os.path.exists(name) and not os.path.samefile(taken, name):
                raise ValueError(f"{node}: LoRA '{name}' has no name of its own: by '{listed}' ComfyUI means the file "
                                 f"'{taken}', whose folder comes first. Rename one of the two, and choose it again.")
            return listed
    meant = [] if known(name) else matching(name)
    return meant[0] if len(meant) == 1 else name


NODES: list[type[io.ComfyNode]] = [LoRAEnsembleLoRA, LoRAEnsembleFromStack]
