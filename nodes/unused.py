"""Settings that do nothing together with others, nodes whose place another takes, and what a file asks for that is not
done: said on the node and in the log, so that nobody turns them in vain. Nothing is changed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comfy_api.latest import io

from ..host.compose.composition import KEY, Composition
from ..host.files.ensemble import ALWAYS, Ensemble, LoRASpec
from ..host.files.header_alphas import passed_over
from ..host.files.metadata import proposal, unread_beside
from ..host.guidance.apply import KEY as GUIDANCE
from ..host.guidance.apply import Guidance, replaced
from ..methods.frequency import LOW_FREQUENCY
from ..methods.selection import sides
from .said import say

log = logging.getLogger("lora_ensemble")
Given = Mapping[str, Any]
Rule = tuple[tuple[str, ...], Callable[[Given], bool], str]
"""(inputs, whether they are used, why they are not)"""


def composed(ensemble: Ensemble) -> list[LoRASpec]:
    """The LoRAs that a method works with: those that act on the model and are no part of it."""
    return [spec for spec in ensemble if spec.composed]


def _roles(given: Given) -> set[str]:
    return {spec.role for spec in composed(given["ensemble"] or ())}


def _two_classes(given: Given) -> bool:
    """Of CMLoRA."""
    return len({role in LOW_FREQUENCY for role in _roles(given)}) == 2


def _goes_by_refreshes(given: Given) -> bool:
    """Whether something of CMLoRA beside the lead goes by c1 and c2: how w decays, or how long its cache serves."""
    decays = given["decay"] != "none" and not 0 < given["dominance"] <= 1
    return decays or (given["cache_depth"] > 0 and given["cache_age"] != 1 and (
        given["dominant_full"] == "on_refresh" or not given["cache_age"]))


def _picks(given: Given) -> bool:
    """Whether LoRAtorio lets fewer LoRAs take part than there are."""
    there = len(composed(given["ensemble"] or ()))
    return 0 < given["top_k"] < (there or given["top_k"] + 1)


_ONE_CLASS = "none of the LoRAs, or each, has the role background"
_CACHED = "order is {order}, which has no cache and no weights"
_MODE = "mode is {mode}"
_ONE = "top_k is 1: the LoRA that is picked has all the weight"
_GUIDANCE: list[Rule] = [
    (("threshold",), lambda given: given["mode"] == "threshold", _MODE),
    (("saving",), lambda given: given["mode"] in ("extrapolate", "saving"), _MODE),
    (("saving",), lambda given: given["mode"] != "extrapolate" or not given["tolerance"], "tolerance is {tolerance:g}"),
    (("tolerance",), lambda given: given["mode"] == "extrapolate", _MODE),
    (("coeffs", "if_different"), lambda given: given["mode"] in ("saving", "LinearAG"), _MODE),
    (("space", "ramp_steps", "read_back"), lambda given: given["mode"] in ("threshold", "saving"), _MODE),
    (("decision", "min_guided_steps"), lambda given: given["mode"] != "LinearAG", _MODE),
    (("decision",), lambda given: given["mode"] != "extrapolate" or given["tolerance"] > 0,
     "mode is {mode} without a tolerance: all pictures take the same steps"),
]
_RULES: dict[str, list[Rule]] = {
    "LoRAEnsembleLoRA": [
        (("mask", "words"), lambda given: given["role"] != ALWAYS, "role is always: it acts everywhere"),
        (("fade",), lambda given: given["start"] > 0 or given["end"] < 1,
         "start is 0 and end is 1: the LoRA always acts"),
    ],
    "LoRAEnsembleNoiseLevels": [
        (("unnamed",), lambda given: given["low_noise"] is None,
         "low_noise is connected: both chains stay as they are"),
    ],
    "LoRAEnsembleRouted": [
        (("mode", "blocks", "trust"), lambda given: given["gamma"] > 0, "gamma is 0: every LoRA acts everywhere"),
        (("blocks",), lambda given: given["mode"] != "contrast", "mode is {mode}, which reads no attention"),
        (("mode", "gamma", "blocks", "trust"), lambda given: not _roles(given) or any(
            spec.mask is None and spec.role != "style" for spec in composed(given["ensemble"])),
         "no LoRA is placed by its words, since each has a mask or is a style"),
        (("style_yields",), lambda given: not _roles(given) or {"style", "background"} <= _roles(given),
         "there is no style together with a background"),
    ],
    "LoRAEnsembleCMLoRA": [
        (("boundary",), lambda given: given["order"] in ("offline", "Switch-A") or (
            given["order"] == "online" and not given["c1"] * given["c2"]), "order is {order}"),  # open ones go by it
        (("boundary", "threshold"), lambda given: not _roles(given) or _two_classes(given), _ONE_CLASS),
        (("order",), lambda given: given["order"] != "online" or not _roles(given) or _two_classes(given),
         f"{_ONE_CLASS}, so that it is as offline"),
        (("decay",), lambda given: not 0 < given["dominance"] <= 1, "dominance is {dominance:g}, which does not fall"),
        (("c1", "c2"), lambda given: given["order"] != "async" or _goes_by_refreshes(given),
         "order is {order}, whose lead passes on by tenths of the run"),
        (("threshold",), lambda given: given["order"] == "online", "order is {order}"),
        (("steps_per_lora",), lambda given: given["order"] == "Switch-A", "order is {order}"),
        (("dominance", "decay", "c1", "c2", "cache_depth", "dominant_full", "features", "cache_age"),
         lambda given: given["order"] != "Switch-A", _CACHED),
        (("cache_depth", "dominant_full", "features"),
         lambda given: given["order"] == "Switch-A" or given["cache_age"] != 1, "cache_age is 1: nothing is reused"),
        (("dominant_full", "features", "cache_age"),
         lambda given: given["order"] == "Switch-A" or given["cache_depth"] > 0,
         "cache_depth is 0: every LoRA is computed whole"),
    ],
    "LoRAEnsembleLoRAtorio": [
        (("selection", "recheck_every"), _picks, "top_k is {top_k}: all LoRAs take part"),
        (("temperature_unit",), lambda given: given["temperature"] > 0, "temperature is 0: all LoRAs weigh alike"),
        (("patch_size", "upsampling", "similarity"), lambda given: given["temperature"] > 0 or _picks(given),
         "temperature is 0: all LoRAs weigh alike"),
        (("temperature", "temperature_unit"), lambda given: given["top_k"] != 1, _ONE),
        (("upsampling", "reweigh_every"), lambda given: given["top_k"] != 1 or given["selection"] == "patch", _ONE),
    ],
    "LoRAEnsembleBranchCache": [
        (("interval", "depth"), lambda given: given["budget"] == 0, "budget is {budget:g}, which chooses it"),
        (("interval",), lambda given: given["budget"] > 0 or given["schedule"] != "CMLoRA",
         "schedule is {schedule}, which has intervals of its own; 0 alone shortens them"),
        (("depth",), lambda given: given["budget"] > 0 or given["schedule"] == "CMLoRA" or given["interval"] != 1,
         "interval is 1: nothing is cached"),
    ],
    "LoRAEnsembleAdaptiveGuidance": _GUIDANCE,
    "LoRAEnsembleAdaptiveGuider": _GUIDANCE,
    "LoRAEnsembleKSampler": _GUIDANCE,
}
_ALONE = {"LoRAEnsembleSwitch", "LoRAEnsembleComposite", "LoRAEnsembleCMLoRA", "LoRAEnsembleKLoRA",
          "LoRAEnsembleESTLoRA"}
"""Methods that have nothing to do with one LoRA alone."""
_COMPOSE = {*_ALONE, "LoRAEnsembleRouted", "LoRAEnsembleLoRAtorio", "LoRAEnsembleSpectrum"}
"""Those that work with LoRAs that are not always on."""
_PREDICT = {"LoRAEnsembleComposite", "LoRAEnsembleLoRAtorio"}
"""Those that mix predictions, so that words say nothing there of what LoRAs do to a prompt."""
_SIDES = {"LoRAEnsembleKLoRA", "LoRAEnsembleESTLoRA"}
_TELL = {"LoRAEnsembleInfo", "LoRAEnsembleStack"}
"""Those that say of every LoRA what it does; the second has LoRAs of its own besides."""


def unused(schema: io.Schema, given: Given) -> list[str]:
    """A line for each setting that does nothing beside the others, for LoRAs that leave a method nothing to do, for a
    file of which the role is left open and that has one of its own, for one whose alpha only diffusers knows, and for
    one whose words beside it cannot be read.

    given   the inputs of a run; what is missing has its default. Settings that stand as they come are not named.
    """
    defaults = {part.id: getattr(part, "default", None) for part in schema.inputs}
    given = {**defaults, **given}
    out = _in_vain(_RULES.get(schema.node_id, ()), given, defaults)
    if schema.node_id in ("LoRAEnsembleAdaptiveGuider", "LoRAEnsembleKSampler") and given["cfg"] == 1:
        out.append("at cfg 1 no negative is evaluated, so there is nothing to save")
    if schema.node_id == "LoRAEnsembleLoRA" and given["strength_model"] == given["strength_clip"] == 0:
        out.append("both strengths are 0: this LoRA does nothing")
    elif schema.node_id == "LoRAEnsembleLoRA":
        name = given["lora_name"]
        out += filter(None, (proposal(name, given["role"]), passed_over(name),
                            "" if given["words"] else unread_beside(name)))
    out += _replaced(schema, given)
    if "model" in given and given.get("ensemble"):
        out += [*_of_loras(schema, given["ensemble"]), *_of_place(schema, given["ensemble"], given.get("place"))]
    return out


def unused_of(lora: LoRASpec, words: bool, clip: bool) -> list[str]:
    """The same of one LoRA in a row of LoRA Ensemble.

    words   whether the method goes by words
    clip    whether a CLIP is connected
    """
    given = {"role": lora.role, "mask": lora.mask, "words": lora.words, "start": lora.start, "end": lora.end,
             "fade": lora.fade}
    out = _in_vain(_RULES["LoRAEnsembleLoRA"], given, {"mask": None, "words": "", "fade": 0.0})
    if lora.words and lora.role != ALWAYS and not words:
        out.append("words are not used: this method does not go by them")
    if lora.strength_clip != lora.strength_model and not clip:
        out.append("clip is not used: no CLIP is connected")
    return out


def _in_vain(rules: Sequence[Rule], given: Given, defaults: Given) -> list[str]:
    return [f"{name} is not used: {why.format(**given)}" for names, used, why in rules
            for name in names if not _same(given[name], defaults[name]) and not used(given)]


def _replaced(schema: io.Schema, given: Given) -> list[str]:
    """What an earlier node has put on the MODEL, and this one takes the place of."""
    attached = getattr(given.get("model"), "get_attachment", lambda key: None)
    before: Composition | None = attached(KEY)
    caches = schema.node_id == "LoRAEnsembleBranchCache" or (
        schema.node_id == "LoRAEnsembleCMLoRA" and given["cache_depth"] > 0 and given["order"] != "Switch-A")
    out = ["the cache that an earlier node has put on this MODEL is not used: that of this node takes its place"] \
        if caches and before is not None and before.cache is not None else []
    guided: Guidance | None = attached(GUIDANCE) if _RULES.get(schema.node_id) is _GUIDANCE else None
    return out + ([replaced(guided.policy)] if guided is not None else [])


def _of_loras(schema: io.Schema, ensemble: Ensemble) -> list[str]:
    loras = composed(ensemble)
    if schema.node_id in _TELL:
        return []
    if not any(spec.strength_model for spec in ensemble):
        return ["all model strengths are 0: no LoRA acts on the model"]
    if schema.node_id in _COMPOSE and not loras:
        return [f"all LoRAs that act have the role always: they are part of the model, and {schema.display_name} has "
                "no other to work with"]
    if schema.node_id in _ALONE and len(loras) == 1:
        return [f"{loras[0].name} is the only LoRA to compose: {schema.display_name} does what Merge LoRAs does"]
    if schema.node_id == "LoRAEnsembleLoRAtorio" and len(loras) == 1:
        return [f"{loras[0].name} is the only LoRA to compose and has all the weight: of the settings "
                "recenter_lambda and place alone change anything"]
    found = set(sides([spec.role for spec in loras]))
    if schema.node_id in _SIDES and len(found) == 1:
        there, missing = ("subjects", "style") if found == {True} else ("styles", "subject")
        return [f"all LoRAs are {there}, so there is nothing to choose: set the role of one to a {missing}"]
    return []


def _of_place(schema: io.Schema, ensemble: Ensemble, place: str | None) -> list[str]:
    loras = composed(ensemble)
    if place == "everywhere" and loras and all(spec.mask is None for spec in loras):
        return ["place is not used: no LoRA has a mask, so they act everywhere in any case"]
    if place == "words" and not loras and any(spec.strength_model for spec in ensemble):
        return ["place is not used: LoRAs of the role always act everywhere"]
    if place == "words" and schema.node_id in _PREDICT and all(
            spec.mask is not None or spec.role == "style" for spec in loras):
        return ["place is not used: each LoRA has a mask or is a style, so none is placed by its words"]
    return []


def _same(value: object, default: object) -> bool:
    return value is default or (isinstance(value, str | int | float) and value == default)


def nothing_out(hidden: io.HiddenHolder | None, schema: io.Schema, given: Given) -> list[str]:
    """A line where another node takes the CLIP of this one, to whose clip nothing is connected: the host's own error
    comes at that node, and speaks of the checkpoint.

    hidden   what the host tells of the node that runs: its id, and the prompt
    """
    own, prompt = str(getattr(hidden, "unique_id", "")), getattr(hidden, "prompt", None) or {}
    slot = next((k for k, out in enumerate(schema.outputs or ()) if str(out.io_type) == "CLIP"), None)
    if slot is None or own not in prompt or given.get("clip") is not None or "clip" in prompt[own]["inputs"]:
        return []
    taken = any([own, slot] in each.get("inputs", {}).values() for each in prompt.values())
    return ["nothing is connected to clip, so nothing comes out at CLIP, which another node takes: connect the "
            "checkpoint's CLIP to clip"] if taken else []


def tell(node: str, lines: Sequence[str]) -> None:
    """Show lines on the node that runs, and write them into the log by the node's name."""
    for line in lines:
        log.warning("%s: %s", node, line)
    if lines:
        say("\n".join(lines))
