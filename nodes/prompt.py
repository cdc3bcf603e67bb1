"""The node that encodes a prompt and tells which of its words are which LoRA's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io, ui

from ..host.compose.loading import changes_text
from ..host.files.ensemble import Ensemble, LoRASpec
from ..host.files.files import changes, check_file
from ..host.files.names import resolved
from ..host.words.known import lora_words, report
from ..host.words.marked import PROMPT, marked
from ..methods.prompt import LoRAWords, find_clauses
from ..methods.prompt_text import parse_loras, parse_marks
from .chain import check_chain
from .said import say
from .sockets import HIDDEN, SAID_AGAIN, earlier_ensemble_input, ensemble_output, schema

log = logging.getLogger("lora_ensemble")


class LoRAEnsemblePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LoRAEnsemblePrompt",
            display_name="Ensemble Prompt",
            description="Encodes a prompt and finds the words of each LoRA in it, for methods that let a LoRA act "
            "where its words are. LoRAs may be named in the text: <lora:name:0.8>.",
            search_aliases=["lora prompt", "prompt with loras", "clip text encode", "trigger words"],
            hidden=HIDDEN,
            has_intermediate_output=SAID_AGAIN,
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The text encoder: of a method node, if LoRAs change it, or straight from its loader.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt. [2: ohwx woman] marks words for the second LoRA; <lora:name:0.8:0.5> adds "
                    "a LoRA with its strengths for the model and the text encoder. Neither is encoded.",
                ),
                earlier_ensemble_input("The LoRAs whose words are sought, in order. Unconnected: those of the method "
                                       "node that the CLIP comes from."),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="CONDITIONING",
                    tooltip="The encoded prompt, as CLIP Text Encode makes it, with the places of its words.",
                ),
                ensemble_output("The LoRAs of the input ensemble and those that the text names."),
                io.String.Output(
                    display_name="found",
                    tooltip="For each LoRA which words are its own and how many tokens they take, or why it has none.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None) -> bool | str:
        """Checks marks and names before the run; a text that comes over a link is not known yet."""
        try:
            if text is not None:
                ensemble_of(text)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **inputs: object) -> str:
        """Run again when a file has been replaced; which ones are in the ensemble is not known yet."""
        return str(changes())

    @classmethod
    def execute(cls, clip: Any, text: str, ensemble: Ensemble | None = None) -> io.NodeOutput:
        check_chain(cls, ensemble=ensemble)
        text, named = ensemble_of(text)
        words, unchanged = words_of(clip, ensemble or (), named), not_in(clip, named)
        ensemble = (*(ensemble or ()), *named)
        clip = marked(clip, words, getattr(clip, "lora_ensemble_contrast", False))
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        told = report(find_clauses(conditioning[0][1][PROMPT], words)) if conditioning else ""
        if unchanged:
            log.warning("Ensemble Prompt: %s", unchanged)
            told = f"{told}\n{unchanged}"
        say(told)
        return io.NodeOutput(conditioning, ensemble, told, ui=ui.PreviewText(told))


def ensemble_of(text: str) -> tuple[str, Ensemble]:
    """(the text without `<lora:...>`, the LoRAs that these name). Raises ValueError for malformed and unknown ones."""
    text, loras = parse_loras(text)
    parse_marks(text)
    specs = tuple(LoRASpec(resolved(name), model, clip) for name, model, clip in loras)
    for spec in specs:
        check_file(spec.name)
    return text, specs


def words_of(clip: Any, ensemble: Ensemble, named: Ensemble) -> Sequence[LoRAWords]:
    """The words of an ensemble and of the LoRAs that a text names; without an ensemble those of the method node that
    the CLIP comes from, if it has these."""
    own, of_clip = lora_words((*ensemble, *named)), getattr(clip, "lora_ensemble_words", ())
    return of_clip if not ensemble and {each.name for each in own} <= {each.name for each in of_clip} else own


def not_in(clip: Any, named: Sequence[LoRASpec]) -> str:
    """What to say of LoRAs that a text names and that change the text encoder, where it is encoded with one that
    nothing has changed: their method's CLIP comes behind this node. Empty: nothing."""
    patched = getattr(getattr(clip, "patcher", None), "patches", None) or getattr(clip, "lora_ensemble_own", None)
    names = "" if patched else ", ".join(f"'{spec.name}'" for spec in named
                                         if spec.strength_clip and changes_text(spec.name))
    return f"CONDITIONING is without what {names} changes in the text encoder: encode with a second Ensemble Prompt " \
           "of the same text, at the CLIP of the method node that gets this ENSEMBLE" if names else ""


NODES: list[type[io.ComfyNode]] = [LoRAEnsemblePrompt]
