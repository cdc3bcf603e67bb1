"""LoRA Ensemble: rows of LoRAs and a method in one node."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import folder_paths
from comfy_api.latest import io, ui

from ..host.compose.apply import with_reason
from ..host.compose.auto import best_method
from ..host.compose.composition import KEY
from ..host.files.ensemble import Ensemble, LoRASpec
from ..host.files.files import FOLDER, changes, check_file, known, listed
from ..host.files.header_alphas import passed_over
from ..host.files.metadata import fingerprint_with_words, is_proposed, unread_beside
from ..host.words.known import lora_words
from ..methods.prompt import LoRAWords
from .baselines import LoRAEnsembleComposite, LoRAEnsembleMerge, LoRAEnsembleSwitch
from .border import check, shown
from .chain import check_chain
from .cmlora import LoRAEnsembleCMLoRA
from .ensembles import from_stack, left_out
from .klora import LoRAEnsembleESTLoRA, LoRAEnsembleKLoRA
from .loratorio import LoRAEnsembleLoRAtorio
from .routed import LoRAEnsembleRouted
from .rows import NODE, Row, check_openings, row_inputs, rows_of, with_mask
from .said import say
from .sockets import (
    HIDDEN,
    SAID_AGAIN,
    TOLD_HERE,
    LoRAStack,
    clip_input,
    clip_output,
    earlier_ensemble_input,
    ensemble_output,
    model_input,
    model_output,
    schema,
)
from .unused import unused, unused_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP
    from torch import Tensor

log = logging.getLogger("lora_ensemble")
AUTO = "auto"
WIDE = ("style", "always")
"""Roles of LoRAs that act everywhere, as they should."""
METHODS: dict[str, type[io.ComfyNode]] = {
    "Routed": LoRAEnsembleRouted, "Merge": LoRAEnsembleMerge, "Switch": LoRAEnsembleSwitch,
    "Composite": LoRAEnsembleComposite, "CMLoRA": LoRAEnsembleCMLoRA, "LoRAtorio": LoRAEnsembleLoRAtorio,
    "K-LoRA": LoRAEnsembleKLoRA, "EST-LoRA": LoRAEnsembleESTLoRA,
}  # fmt: skip
"""The choices -> the nodes whose work it does, with the defaults of their options."""


class LoRAEnsembleStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsembleStack",
            display_name=NODE,
            description="Several LoRAs and the way they are composed in one node: put it between the checkpoint and "
            "everything else. auto takes the method that suits what is connected and says which.",
            search_aliases=["multi", "multi lora", "lora stack", "lora loader", "power lora", "lora stacker",
                            "several loras", "combine loras", "mix loras", "load lora"],
            hidden=[*HIDDEN, io.Hidden.prompt],
            not_idempotent=TOLD_HERE,
            has_intermediate_output=SAID_AGAIN,
            inputs=[
                model_input(),
                io.Combo.Input(
                    "method",
                    options=[AUTO, *METHODS],
                    default=AUTO,
                    tooltip="How the LoRAs are composed. auto: Routed where clip is connected and at least two LoRAs "
                    "have known words or a mask, not masks alone; else Merge; the node says what it took. Each has its "
                    "usual settings: connect ENSEMBLE to the node of a method to change them.",
                ),
                *row_inputs(folder_paths.get_filename_list(FOLDER)),
                clip_input(),
                earlier_ensemble_input(),
                LoRAStack.Input("lora_stack", optional=True, tooltip="A LORA_STACK of any pack; its LoRAs come before "
                                                                     "the rows."),
                io.Mask.Input("masks", optional=True, tooltip="Masks for the rows, one behind the other in a batch: a "
                                                              "row names its own by number."),
            ],
            outputs=[
                model_output(),
                clip_output(),
                ensemble_output(),
                LoRAStack.Output(display_name="LORA_STACK", tooltip="The LoRAs that act, with their strengths, for "
                                 "nodes of other packs. They are in MODEL and CLIP already."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, **typed: Any) -> bool:
        """Checks the rows before the run; what comes over a link is only known, and checked, during it.

        It takes all inputs, so that the host does not check the files of rows that are off against its list. It raises,
        since a text that it returned would be shown once for each of the inputs.
        """
        try:
            for part in cls.define_schema().inputs:
                if typed.get(part.id) is not None:
                    check(NODE, part, typed[part.id])
            rows_of(typed)
        except ValueError as error:
            raise ValueError(shown(str(error))) from None
        return True

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Run again when a file or the words beside it have changed, of a row or of what comes over a link."""
        names = [row.spec.name for row in rows_of(inputs)]
        return repr(([fingerprint_with_words(name) for name in names if known(name)], changes()))

    @classmethod
    def execute(cls, model: ModelPatcher, method: str, clip: CLIP | None = None, ensemble: Ensemble | None = None,
                lora_stack: Sequence | None = None, masks: Tensor | None = None, **fields: Any) -> io.NodeOutput:
        check_chain(cls, ensemble=ensemble, lora_stack=lora_stack)
        check_openings(as_sent(cls.hidden))
        rows, stacked = rows_of(fields), from_stack(lora_stack, NODE)
        for lora in stacked:
            check_file(lora.name)
        ensemble = (*(ensemble or ()), *stacked, *(with_mask(row, masks) for row in rows))
        model, clip, told = composed(model, clip, ensemble, method, rows)
        told = "\n".join([told, *left_out(lora_stack), *["masks is not used: no row names one of them (more, mask)"] * (
            masks is not None and not any(row.mask for row in rows))])
        say(told)
        stack = [(listed(lora.name), lora.strength_model, lora.strength_clip) for lora in ensemble if lora.acts]
        return io.NodeOutput(model, clip, ensemble, stack, ui=ui.PreviewText(told))


def as_sent(hidden: io.HiddenHolder | None) -> Mapping[str, Any]:
    """The inputs of the node that runs as they are in the prompt."""
    prompt = getattr(hidden, "prompt", None) or {}
    return prompt.get(str(hidden.unique_id), {}).get("inputs", {}) if prompt else {}


def composed(model: ModelPatcher, clip: CLIP | None, ensemble: Ensemble, method: str, rows: Sequence[Row] = ()
             ) -> tuple[ModelPatcher, CLIP | None, str]:
    """(MODEL and CLIP with an ensemble on them as a choice of METHODS does it with its defaults, what was done).

    Where no LoRA acts they stay as they are. Raises ValueError, which names the row of a file that is at fault.
    """
    if not any(lora.acts for lora in ensemble):
        return model, clip, "no LoRA is on: the model is handed on as it is"
    name, reason = method, ""
    if name == AUTO:
        name, reason = best_method(ensemble, clip is not None)
        log.info("%s: auto took %s: %s", NODE, name, reason)
    node = METHODS[name]
    given = {"model": model, "ensemble": ensemble, "clip": clip, **defaults(node)}
    try:
        model, clip = node.execute(**given).args
    except ValueError as error:
        numbers = [str(row.number) for row in rows if row.spec.acts and f"'{row.spec.name}'" in str(error)]
        if not numbers:
            raise
        raise ValueError(f"{NODE}, row {' and '.join(numbers)}: {error}") from error
    if reason and model.get_attachment(KEY) is not None:
        model = with_reason(model, f"{NODE} took {name}: {reason}")
    head = [f"auto: {name}, {reason}"] if reason else [name, *unused(node.define_schema(), given)]
    return model, clip, "\n".join([*head, *_lines(ensemble, name == "Routed", clip is not None)])


def defaults(node: type[io.ComfyNode]) -> dict[str, Any]:
    """The default of every widget of a node."""
    return {part.id: part.default for part in node.define_schema().inputs if getattr(part, "default", None) is not None}


def _lines(ensemble: Ensemble, by_words: bool, with_clip: bool) -> list[str]:
    """A line per LoRA: its number, which prompts count by, its strength, what it is placed by, what is set in vain."""
    return [f"{number}  {lora.name}: " + ", ".join([_about(lora, words, by_words),
                                                    *(unused_of(lora, by_words, with_clip) if lora.acts else ())])
            for number, (lora, words) in enumerate(zip(ensemble, lora_words(ensemble), strict=True), 1)]


def _about(lora: LoRASpec, words: LoRAWords, by_words: bool) -> str:
    if not lora.acts:
        return "off"
    parts = [f"{lora.strength_model:g}"]
    parts += [] if lora.window.whole else [f"from {lora.start:g} to {lora.end:g}"]
    parts += [lora.role] if lora.role != "auto" else []
    parts += ["looks like one for few steps: with the role always it is part of the model"] * bool(
        is_proposed(lora.name, lora.role))
    parts += filter(None, [passed_over(lora.name), "" if words.phrases else unread_beside(lora.name)])
    parts += ["mask"] if lora.mask is not None else []
    if words.phrases:
        parts.append("words " + ", ".join(phrase for phrase, _ in words.phrases))
    elif words.trigger:
        parts.append(f"trigger words of {words.where}: " + ", ".join(words.trigger[:4]))
    elif by_words and lora.mask is None and lora.role not in WIDE:
        parts.append("no known words, so it acts everywhere: type them (more), or mark them in the prompt")
    return ", ".join(parts)


NODES: list[type[io.ComfyNode]] = []
if hasattr(io, "DynamicCombo"):
    NODES.append(LoRAEnsembleStack)
else:
    log.info("This ComfyUI cannot show rows that come and go (0.8 and later can), so the node '%s' is left out. Chain "
             "'LoRA (Ensemble)' nodes and connect them to a method node.", NODE)
