"""The conds of a guider: those that stand in for a prompt's while its places are looked for, the same picture with
another text, and those that the host adds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar
from uuid import uuid4

import torch
from torch import Tensor

from ...methods.prompt import PromptTokens
from ..words.marked import PROBE, PROMPT, WITHOUT
from ..words.own import OWN

Value = TypeVar("Value")
CONTRAST = "lora_ensemble_contrast"
"""Prefix of the names under which a guider holds what its prompts bring to be compared with: a name of their own."""
OF_TOKENS = ("attention_mask", "attention_mask_img_shape")
"""What a cond says of its own tokens one by one, which is true of no other text's."""
OF_TEXT = ("cross_attn", PROMPT, WITHOUT, PROBE, OWN, CONTRAST)
"""What it says of its text, and what belongs to that."""


def variant_of(entry: Mapping[str, object], key: Hashable) -> str:
    """The name under which a guider holds what a prompt brings along, if it does: PROBE, or a clause that is left out.
    """
    return f"{entry.get(CONTRAST)} {key}"


def with_variants(conds: dict[str, list[dict]]) -> list[str]:
    """Add what prompts bring along (themselves without one clause, or with stand-in words) to a guider's conds, each
    under a name of its own, so that the host prepares them as it does the others; returns these names."""
    added = []
    for name, entries in list(conds.items()):
        for number, entry in enumerate(entries):
            more = list(entry.get(WITHOUT) or ())
            more += [(PROBE, entry[PROBE])] if entry.get(PROBE) else []
            if more:
                entry[CONTRAST] = f"{CONTRAST} {name} {number}"
            for key, (cross, options) in more:
                added.append(variant_of(entry, key))
                conds[added[-1]] = [_instead(entry, cross, options)]
    return added


def own_conds(conds: Mapping[str, Value]) -> dict[str, Value]:
    """A guider's conds without those that `with_variants` has added: these are on no side of guidance."""
    return {name: entries for name, entries in conds.items() if not name.startswith(CONTRAST)}


def with_own_names(conds: Mapping[str, list[dict]]) -> None:
    """Give each cond of a guider, as the host has prepared them, a name of its own. Where a side of guidance has an
    area, the host gives it to all others, too: by copies of that cond, its name and what it says of its words included,
    with the text of another side. These say of their words what the conds say whose text they have."""
    times = Counter(entry.get("uuid") for entries in conds.values() for entry in entries or ())
    for entries in conds.values():
        for k, entry in enumerate(entries or ()):
            if times[entry.get("uuid")] == 1:
                continue
            text = next((each for each in entries[:k] if _same_text(each, entry)), None)
            if text is not None:
                rest = {key: value for key, value in entry.items() if key not in OF_TEXT}
                entries[k] = rest | {key: text[key] for key in OF_TEXT if key in text} | {"uuid": uuid4()}


def _same_text(one: Mapping[str, dict], other: Mapping[str, dict]) -> bool:
    """Whether a model gets the same for two conds, down to the objects."""
    given, also = one.get("model_conds") or {}, other.get("model_conds") or {}
    return given.keys() == also.keys() and all(given[name] is also[name] for name in given)


def _instead(entry: dict, cross: Tensor, options: dict) -> dict:
    """A cond as nodes behind the text encoder have left another one, with its start picture, references, ControlNets,
    area, times and what was put behind its text, but with another text.

    options   what the text encoder says of that text; None: nothing, where it says something of the entry's
    """
    marks, whole = entry.get(PROMPT), entry.get("cross_attn")
    if isinstance(marks, PromptTokens) and marks.words and isinstance(whole, Tensor):
        cross = torch.cat([cross, whole[:, marks.length:].to(cross)], dim=1)
    kept = {key: value for key, value in entry.items() if key not in (WITHOUT, PROBE, CONTRAST, *OF_TOKENS)}
    said = {**kept, **options, "cross_attn": cross, "model_conds": {}, "uuid": uuid4()}
    return {key: value for key, value in said.items() if value is not None or key not in options}


def of_its_area(others: Sequence[dict], entry: Mapping[str, object]) -> dict:
    """Which of those under one name stands in for a cond: the host gives them the areas of all others, too."""
    return next((each for each in others if each.get("area") == entry.get("area")), others[0])


def in_call(other: dict, entry: dict, conds: Mapping[str, list[dict]]) -> dict:
    """What stands in for a cond, as a call has it that has the cond itself: cut to a context window, or without what a
    node has taken away, where that is.

    other, conds   as the host has prepared them for the run
    entry          the cond in this call
    """
    whole = next((each for some in conds.values() for each in some or () if each.get("uuid") == entry["uuid"]), entry)
    before, now = whole["model_conds"], entry["model_conds"]
    if now is before:
        return other
    made = {name: _cut(value, now[name], before[name]) if name in before else value
            for name, value in other["model_conds"].items() if name in now or name not in before}
    return {**other, "model_conds": made, **{key: entry[key] for key in ("area", "mask", "control") if key in entry}}


def _cut(own, now, before):
    """One of the values that a model takes: a text's own, or what a window holds of the picture's."""
    shapes = [getattr(getattr(each, "cond", None), "shape", None) for each in (own, before)]
    return own if getattr(now, "cond", now) is getattr(before, "cond", before) or shapes[0] != shapes[1] else now
